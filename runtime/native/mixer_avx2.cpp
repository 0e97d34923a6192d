// Gated linear attention and sliding-window attention with AVX2 and FMA.
#include "internal.h"

#if defined(__AVX2__) && defined(__FMA__)

#include <immintrin.h>

#include "mixer_gla.h"
#include "mixer_window.h"

namespace sbedge {
namespace {

struct Avx2 {
    using reg = __m256;
    static constexpr int width = 8;
    static constexpr int rows = 6, panel = 2, step = 1, dots = 3;     // vectors of a tile that fit 16 registers

    static __m256i mask(int64_t n) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    static reg set(float x) { return _mm256_set1_ps(x); }
    static reg load(const float* p) { return _mm256_loadu_ps(p); }
    static reg load(const float* p, int64_t n) { return n >= width ? load(p) : _mm256_maskload_ps(p, mask(n)); }
    static void store(float* p, reg x) { _mm256_storeu_ps(p, x); }
    static void store(float* p, reg x, int64_t n) {
        n >= width ? store(p, x) : _mm256_maskstore_ps(p, mask(n), x);
    }
    static reg load(const half* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
    static reg load(const half* p, int64_t n) {
        if (n >= width) return load(p);
        alignas(16) half room[8] = {};
        for (int64_t i = 0; i < n; ++i) room[i] = p[i];
        return load(room);
    }
    static void store(half* p, reg x, int64_t n) {
        alignas(16) half room[8];
        _mm_store_si128((__m128i*)room, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
        for (int64_t i = 0; i < least(n, width); ++i) p[i] = room[i];
    }
    static reg load(const int8_t* p) { return load(p, width); }
    static reg load(const int8_t* p, int64_t n) {
        __m128i codes;
        if (n >= width) {
            codes = _mm_loadl_epi64((const __m128i*)p);
        } else {
            alignas(16) int8_t room[16] = {};
            for (int64_t i = 0; i < n; ++i) room[i] = p[i];
            codes = _mm_load_si128((const __m128i*)room);
        }
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
    }
    static void store(int8_t* p, reg x, int64_t n) {
        alignas(32) int32_t room[8];
        _mm256_store_si256((__m256i*)room, _mm256_cvtps_epi32(x));
        for (int64_t i = 0; i < least(n, width); ++i) p[i] = int8_t(room[i]);
    }
    static reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
    static reg sub(reg a, reg b) { return _mm256_sub_ps(a, b); }
    static reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
    static reg div(reg a, reg b) { return _mm256_div_ps(a, b); }
    static reg min(reg a, reg b) { return _mm256_min_ps(a, b); }
    static reg max(reg a, reg b) { return _mm256_max_ps(a, b); }
    static reg fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
    static reg round(reg x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    // x * 2^n in two steps, so that 2^n may be denormal.
    static reg scale(reg x, reg n) {
        const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
        return mul(mul(x, power(half)), power(_mm256_sub_epi32(whole, half)));
    }
    static reg power(__m256i n) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
    }
    static float first(reg x) { return _mm256_cvtss_f32(x); }
    static float sum(reg x) {
        __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        y = _mm_add_ps(y, _mm_movehl_ps(y, y));
        return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
    }
    static float highest(reg x) {
        __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        y = _mm_max_ps(y, _mm_movehl_ps(y, y));
        return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
    }
    static float lowest(reg x) { return -highest(sub(set(0.0f), x)); }
    static void store_sums(float* p, reg a, reg b, reg c, reg d) {
        const reg x = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
        _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
    }
};

constexpr MixerKernels kernels = {gla_scratch<Avx2>, gla<Avx2>, window_scratch<Avx2>, window<Avx2>, silu_gate<Avx2>};

}  // namespace

const MixerKernels* const mixer_avx2 = &kernels;

}  // namespace sbedge

#else

namespace sbedge {
const MixerKernels* const mixer_avx2 = nullptr;
}

#endif
