// The event-driven matmul on AArch64 with the dot-product extension. Its dot product is signed: int8 codes stay as they are.
#include "internal.h"

#ifdef __ARM_FEATURE_DOTPROD

#include <arm_neon.h>

#include "spike_dot.h"

namespace sbedge {
namespace {

struct Neon {
    using V = int8x16_t;
    using Narrow = Neon;
    static constexpr int LIMIT = 127, OFFSET = 0, TOKENS = 4, BYTES = 16;

    static V load(const void* p) { return vld1q_s8(static_cast<const int8_t*>(p)); }
    static void store(void* p, V v) { vst1q_s8(static_cast<int8_t*>(p), v); }
    static V zero() { return vdupq_n_s8(0); }
    static V broadcast(const void* four) {
        int32_t value;
        std::memcpy(&value, four, 4);
        return vreinterpretq_s8_s32(vdupq_n_s32(value));
    }
    static void widen(const uint16_t* halves, float* floats) {
        for (int i = 0; i < TILE; i += 4)
            vst1q_f32(floats + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves + i))));
    }
    static V code(V v, uint8_t flip) { return veorq_s8(v, vdupq_n_s8(static_cast<int8_t>(flip))); }
    static V low(V v) { return vandq_s8(v, vdupq_n_s8(15)); }
    static V high(V v) { return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(v), 4)); }

    static int16x8_t pairs(V v) { return vreinterpretq_s16_s8(v); }
    static void interleave(V* r) {
        const int16x8_t a = pairs(vzip1q_s8(r[0], r[1])), b = pairs(vzip2q_s8(r[0], r[1]));
        const int16x8_t c = pairs(vzip1q_s8(r[2], r[3])), d = pairs(vzip2q_s8(r[2], r[3]));
        r[0] = vreinterpretq_s8_s16(vzip1q_s16(a, c)), r[1] = vreinterpretq_s8_s16(vzip2q_s16(a, c));
        r[2] = vreinterpretq_s8_s16(vzip1q_s16(b, d)), r[3] = vreinterpretq_s8_s16(vzip2q_s16(b, d));
    }
    static void lanes(V*) {}
    static V dot(V sums, V codes, V counts) {
        return vreinterpretq_s8_s32(vdotq_s32(vreinterpretq_s32_s8(sums), codes, counts));
    }
};

}  // namespace

const SpikeKernels* const spike_neon = &spike_table<Dot<Neon>>;

}  // namespace sbedge

#else

namespace sbedge {
const SpikeKernels* const spike_neon = nullptr;
}

#endif
