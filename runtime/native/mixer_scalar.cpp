// Gated linear attention and sliding-window attention, one number at a time: the reference in C++.
#include "mixer_gla.h"
#include "mixer_window.h"

namespace sbedge {
namespace {

struct Scalar {
    using reg = float;
    static constexpr int width = 1;
    static constexpr int rows = 4, panel = 2, step = 1, dots = 2;     // vectors of a tile that fit the registers

    static reg set(float x) { return x; }
    static reg load(const float* p) { return *p; }
    static reg load(const float* p, int64_t) { return *p; }
    static void store(float* p, reg x) { *p = x; }
    static void store(float* p, reg x, int64_t) { *p = x; }
    static reg load_int8(const int8_t* p, int64_t) { return float(*p); }
    static void store_int8(int8_t* p, reg x, int64_t) { *p = int8_t(x); }
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

constexpr MixerKernels kernels = {gla_scratch<Scalar>, gla<Scalar>, window_scratch<Scalar>, window<Scalar>};

}  // namespace

const MixerKernels* const mixer_scalar = &kernels;

}  // namespace sbedge
