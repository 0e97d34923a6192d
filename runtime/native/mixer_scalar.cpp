// Gated linear attention and sliding-window attention, one number at a time: the reference in C++.
#include "mixer_gla.h"
#include "mixer_window.h"

namespace sbedge {
namespace {

float to_float(half x) {
    const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                       : exponent == 0 ? std::ldexp(float(fraction), -24)
                                       : std::ldexp(float(fraction + 1024), exponent - 25);
    return x.bits >> 15 ? -size : size;
}

// To the nearest, halves to even, as the processors do it.
half to_half(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float size = std::fabs(x);
    if (std::isnan(x)) return {uint16_t(sign | 0x7E00)};
    if (size >= 65520) return {uint16_t(sign | 0x7C00)};
    if (size < 0x1p-14f) return {uint16_t(sign | int(std::nearbyint(std::ldexp(size, 24))))};
    const int exponent = std::ilogb(size);      // a fraction that is rounded up to 2048 carries into the exponent
    return {uint16_t(sign | ((exponent + 14) * 1024 + int(std::nearbyint(std::ldexp(size, 10 - exponent)))))};
}

struct Scalar {
    using reg = float;
    static constexpr int width = 1;
    static constexpr int rows = 4, panel = 2, step = 1, dots = 2;     // vectors of a tile that fit the registers

    static reg set(float x) { return x; }
    static reg load(const float* p) { return *p; }
    static reg load(const float* p, int64_t) { return *p; }
    static void store(float* p, reg x) { *p = x; }
    static void store(float* p, reg x, int64_t) { *p = x; }
    static reg load(const half* p, int64_t = 1) { return to_float(*p); }
    static void store(half* p, reg x, int64_t) { *p = to_half(x); }
    static reg load(const int8_t* p, int64_t = 1) { return float(*p); }
    static void store(int8_t* p, reg x, int64_t) { *p = int8_t(x); }
    static reg add(reg a, reg b) { return a + b; }
    static reg sub(reg a, reg b) { return a - b; }
    static reg mul(reg a, reg b) { return a * b; }
    static reg div(reg a, reg b) { return a / b; }
    static reg min(reg a, reg b) { return a < b ? a : b; }
    static reg max(reg a, reg b) { return a > b ? a : b; }
    static reg fma(reg a, reg b, reg c) { return a * b + c; }
    static reg round(reg x) { return std::nearbyint(x); }
    static reg scale(reg x, reg n) { return std::ldexp(x, int(n)); }
    static float first(reg x) { return x; }
    static float sum(reg x) { return x; }
    static float highest(reg x) { return x; }
    static float lowest(reg x) { return x; }
    static void store_sums(float* p, reg a, reg b, reg c, reg d) { p[0] = a, p[1] = b, p[2] = c, p[3] = d; }
};

constexpr MixerKernels kernels = {gla_scratch<Scalar>, gla<Scalar>, window_scratch<Scalar>, window<Scalar>, silu_gate<Scalar>};

}  // namespace

const MixerKernels* const mixer_scalar = &kernels;

}  // namespace sbedge
