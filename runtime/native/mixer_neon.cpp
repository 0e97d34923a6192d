// Gated linear attention and sliding-window attention with AArch64 NEON.
#include "internal.h"

#if defined(__aarch64__) && defined(__ARM_NEON)

#include <arm_neon.h>

#include "mixer_gla.h"
#include "mixer_window.h"

namespace sbedge {
namespace {

struct Neon {
    using reg = float32x4_t;
    static constexpr int width = 4;
    static constexpr int rows = 12, panel = 2, step = 2, dots = 4;     // vectors of a tile that fit 32 registers

    static reg set(float x) { return vdupq_n_f32(x); }
    static reg load(const float* p) { return vld1q_f32(p); }
    static reg load(const float* p, int64_t n) {
        if (n >= width) return load(p);
        float room[4] = {};
        for (int64_t i = 0; i < n; ++i) room[i] = p[i];
        return load(room);
    }
    static void store(float* p, reg x) { vst1q_f32(p, x); }
    static void store(float* p, reg x, int64_t n) {
        if (n >= width) return store(p, x);
        float room[4];
        store(room, x);
        for (int64_t i = 0; i < n; ++i) p[i] = room[i];
    }
    static reg load(const half* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p))); }
    static reg load(const half* p, int64_t n) {
        if (n >= width) return load(p);
        half room[4] = {};
        for (int64_t i = 0; i < n; ++i) room[i] = p[i];
        return load(room);
    }
    static void store(half* p, reg x, int64_t n) {
        half room[4];
        vst1_u16((uint16_t*)room, vreinterpret_u16_f16(vcvt_f16_f32(x)));
        for (int64_t i = 0; i < least(n, width); ++i) p[i] = room[i];
    }
    static reg load(const int8_t* p) { return load(p, width); }
    static reg load(const int8_t* p, int64_t n) {
        int8_t room[8] = {};
        for (int64_t i = 0; i < least(n, width); ++i) room[i] = p[i];
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vld1_s8(room)))));
    }
    static void store(int8_t* p, reg x, int64_t n) {
        int32_t room[4];
        vst1q_s32(room, vcvtq_s32_f32(x));
        for (int64_t i = 0; i < least(n, width); ++i) p[i] = int8_t(room[i]);
    }
    static reg add(reg a, reg b) { return vaddq_f32(a, b); }
    static reg sub(reg a, reg b) { return vsubq_f32(a, b); }
    static reg mul(reg a, reg b) { return vmulq_f32(a, b); }
    static reg div(reg a, reg b) { return vdivq_f32(a, b); }
    static reg min(reg a, reg b) { return vminq_f32(a, b); }
    static reg max(reg a, reg b) { return vmaxq_f32(a, b); }
    static reg fma(reg a, reg b, reg c) { return vfmaq_f32(c, a, b); }
    static reg round(reg x) { return vrndnq_f32(x); }
    // x * 2^n in two steps, so that 2^n may be denormal.
    static reg scale(reg x, reg n) {
        const int32x4_t whole = vcvtq_s32_f32(n), half = vshrq_n_s32(whole, 1);
        return mul(mul(x, power(half)), power(vsubq_s32(whole, half)));
    }
    static reg power(int32x4_t n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23)); }
    static float first(reg x) { return vgetq_lane_f32(x, 0); }
    static float sum(reg x) { return vaddvq_f32(x); }
    static float highest(reg x) { return vmaxvq_f32(x); }
    static float lowest(reg x) { return vminvq_f32(x); }
    static void store_sums(float* p, reg a, reg b, reg c, reg d) {
        vst1q_f32(p, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
    }
};

constexpr MixerKernels kernels = {gla_scratch<Neon>, gla<Neon>, window_scratch<Neon>, window<Neon>, silu_gate<Neon>};

}  // namespace

const MixerKernels* const mixer_neon = &kernels;

}  // namespace sbedge

#else

namespace sbedge {
const MixerKernels* const mixer_neon = nullptr;
}

#endif
