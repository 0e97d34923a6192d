// Gated linear attention and sliding-window attention with AVX-512.
#include "internal.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

#if defined(__GNUC__) && !defined(__clang__)    // GCC 12 warns of its own header's deliberately undefined operands
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include "mixer_gla.h"
#include "mixer_window.h"

namespace sbedge {
namespace {

struct Avx512 {
    using reg = __m512;
    static constexpr int width = 16;
    static constexpr int rows = 12, panel = 2, step = 2, dots = 4;     // vectors of a tile that fit 32 registers

    static __mmask16 mask(int64_t n) { return __mmask16((1u << n) - 1); }
    static reg set(float x) { return _mm512_set1_ps(x); }
    static reg load(const float* p) { return _mm512_loadu_ps(p); }
    static reg load(const float* p, int64_t n) { return n >= width ? load(p) : _mm512_maskz_loadu_ps(mask(n), p); }
    static void store(float* p, reg x) { _mm512_storeu_ps(p, x); }
    static void store(float* p, reg x, int64_t n) {
        n >= width ? store(p, x) : _mm512_mask_storeu_ps(p, mask(n), x);
    }
    static reg load(const half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
    static reg load(const half* p, int64_t n) {
        return n >= width ? load(p) : _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p));
    }
    static void store(half* p, reg x, int64_t n) {
        _mm256_mask_storeu_epi16(p, mask(least(n, width)), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
    static reg load(const int8_t* p) { return load(p, width); }
    static reg load(const int8_t* p, int64_t n) {
        const __m128i codes = n >= width ? _mm_loadu_si128((const __m128i*)p) : _mm_maskz_loadu_epi8(mask(n), p);
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
    }
    static void store(int8_t* p, reg x, int64_t n) {
        _mm512_mask_cvtepi32_storeu_epi8(p, mask(least(n, width)), _mm512_cvtps_epi32(x));
    }
    static reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
    static reg sub(reg a, reg b) { return _mm512_sub_ps(a, b); }
    static reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
    static reg div(reg a, reg b) { return _mm512_div_ps(a, b); }
    static reg min(reg a, reg b) { return _mm512_min_ps(a, b); }
    static reg max(reg a, reg b) { return _mm512_max_ps(a, b); }
    static reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
    static reg round(reg x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static reg scale(reg x, reg n) { return _mm512_scalef_ps(x, n); }
    static float first(reg x) { return _mm512_cvtss_f32(x); }
    static float sum(reg x) { return _mm512_reduce_add_ps(x); }
    static float highest(reg x) { return _mm512_reduce_max_ps(x); }
    static float lowest(reg x) { return _mm512_reduce_min_ps(x); }
    static void store_sums(float* p, reg a, reg b, reg c, reg d) {
        const reg ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const reg cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        const reg x = add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
        const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
        _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
    }
};

constexpr MixerKernels kernels = {gla_scratch<Avx512>, gla<Avx512>, window_scratch<Avx512>, window<Avx512>, silu_gate<Avx512>};

}  // namespace

const MixerKernels* const mixer_avx512vnni = &kernels;

}  // namespace sbedge

#else

namespace sbedge {
const MixerKernels* const mixer_avx512vnni = nullptr;
}

#endif
