// The event-driven matmul on AArch64 with the dot-product extension. Its dot product is signed: int8 codes stay as they are.
#include "internal.h"

#ifdef __ARM_FEATURE_DOTPROD

#include <arm_neon.h>

#include "spike_dot.h"

namespace sbedge {
namespace {

template <class Isa, int BITS>
struct RowSum {
    float32x4_t sums = vdupq_n_f32(0);

    void add(const uint8_t* codes, const int8_t* x, int32_t, float scale) {
        const int8x16_t first = vld1q_s8(x), second = vld1q_s8(x + 16);
        int8x16_t a, b;
        if (BITS == 8) {
            a = vld1q_s8(reinterpret_cast<const int8_t*>(codes)), b = vld1q_s8(reinterpret_cast<const int8_t*>(codes) + 16);
        } else {
            const uint8x16_t two = vld1q_u8(codes);
            a = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(two, vdupq_n_u8(15))), vdupq_n_s8(8));
            b = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(two, 4)), vdupq_n_s8(8));
        }
        const int32x4_t products = vdotq_s32(vdotq_s32(vdupq_n_s32(0), a, first), b, second);
        sums = vfmaq_n_f32(sums, vcvtq_f32_s32(products), scale);
    }
    float total() const { return vaddvq_f32(sums); }
};

struct Neon {
    using V = int8x16_t;
    using Narrow = Neon;
    using Quad = Neon;
    template <class Isa, int BITS>
    using Row = RowSum<Isa, BITS>;
    static constexpr int LIMIT = 127, OFFSET = 0, TOKENS = 4, BYTES = 16;

    static V load(const void* p) { return vld1q_s8(static_cast<const int8_t*>(p)); }
    static void store(void* p, V v) { vst1q_s8(static_cast<int8_t*>(p), v); }
    static V zero() { return vdupq_n_s8(0); }
    static V broadcast(const void* four) {
        int32_t value;
        std::memcpy(&value, four, 4);
        return vreinterpretq_s8_s32(vdupq_n_s32(value));
    }
    static float widen(uint16_t half) {
        return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(half))), 0);
    }
    static void widen(const uint16_t* halves, float* floats) {
        for (int i = 0; i < TILE; i += 4)
            vst1q_f32(floats + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves + i))));
    }
    static V code(V v) { return v; }
    static V code(V v, uint8_t flip) { return veorq_s8(v, vdupq_n_s8(static_cast<int8_t>(flip))); }
    static V low(V v) { return vandq_s8(v, vdupq_n_s8(15)); }
    static V high(V v) { return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(v), 4)); }
    static V raised(V v) { return high(v); }    // bytes are signed here
    static V lowered(V sums) { return sums; }

    static int16x8_t pairs(V v) { return vreinterpretq_s16_s8(v); }
    static void interleave(V* r) {
        const int16x8_t a = pairs(vzip1q_s8(r[0], r[1])), b = pairs(vzip2q_s8(r[0], r[1]));
        const int16x8_t c = pairs(vzip1q_s8(r[2], r[3])), d = pairs(vzip2q_s8(r[2], r[3]));
        r[0] = vreinterpretq_s8_s16(vzip1q_s16(a, c)), r[1] = vreinterpretq_s8_s16(vzip2q_s16(a, c));
        r[2] = vreinterpretq_s8_s16(vzip1q_s16(b, d)), r[3] = vreinterpretq_s8_s16(vzip2q_s16(b, d));
    }
    static void lanes(V*) {}
    static void transpose(V* r) {
        int32x4_t v[4];
        for (int i = 0; i < 4; ++i) v[i] = vreinterpretq_s32_s8(r[i]);
        const int32x4_t a = vzip1q_s32(v[0], v[1]), b = vzip1q_s32(v[2], v[3]);
        const int32x4_t c = vzip2q_s32(v[0], v[1]), d = vzip2q_s32(v[2], v[3]);
        r[0] = halves(vget_low_s32(a), vget_low_s32(b)), r[1] = halves(vget_high_s32(a), vget_high_s32(b));
        r[2] = halves(vget_low_s32(c), vget_low_s32(d)), r[3] = halves(vget_high_s32(c), vget_high_s32(d));
    }
    static V halves(int32x2_t low, int32x2_t high) { return vreinterpretq_s8_s32(vcombine_s32(low, high)); }
    static V dot(V sums, V codes, V counts) {
        return vreinterpretq_s8_s32(vdotq_s32(vreinterpretq_s32_s8(sums), codes, counts));
    }
    static V whole_dot(V sums, V codes, V counts) { return dot(sums, codes, counts); }
};

}  // namespace

const LinearKernels* const spike_neon = &linear_table<Dot<Neon>>;

}  // namespace sbedge

#else

namespace sbedge {
const LinearKernels* const spike_neon = nullptr;
}

#endif
