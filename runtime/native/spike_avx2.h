// 256-bit vectors for spike_dot.h.
#pragma once

#include <immintrin.h>

#include "spike_dot.h"

namespace sbedge {
namespace {

struct Avx2 {
    using V = __m256i;
    using Narrow = Avx2;
    // maddubs adds two products of an unsigned and a signed byte into int16: 255 * (64 + 64) is the most it holds.
    static constexpr int LIMIT = 64, OFFSET = 128, TOKENS = 2, BYTES = 32;

    static V load(const void* p) { return _mm256_loadu_si256(static_cast<const V*>(p)); }
    static void store(void* p, V v) { _mm256_storeu_si256(static_cast<V*>(p), v); }
    static V zero() { return _mm256_setzero_si256(); }
    static V broadcast(const void* four) {
        int32_t value;
        std::memcpy(&value, four, 4);
        return _mm256_set1_epi32(value);
    }
    static void widen(const uint16_t* halves, float* floats) {
        for (int i = 0; i < TILE; i += 8)
            _mm256_storeu_ps(floats + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i))));
    }
    static V code(V v, uint8_t flip) {   // int8 code + 128
        return _mm256_xor_si256(v, _mm256_set1_epi8(static_cast<char>(flip ^ 0x80)));
    }
    static V low(V v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
    static V high(V v) { return _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15)); }

    static void interleave(V* r) {
        const V a = _mm256_unpacklo_epi8(r[0], r[1]), b = _mm256_unpackhi_epi8(r[0], r[1]);
        const V c = _mm256_unpacklo_epi8(r[2], r[3]), d = _mm256_unpackhi_epi8(r[2], r[3]);
        r[0] = _mm256_unpacklo_epi16(a, c), r[1] = _mm256_unpackhi_epi16(a, c);
        r[2] = _mm256_unpacklo_epi16(b, d), r[3] = _mm256_unpackhi_epi16(b, d);
    }
    static void lanes(V* v) {
        const V a = _mm256_permute2x128_si256(v[0], v[1], 0x20), b = _mm256_permute2x128_si256(v[2], v[3], 0x20);
        const V c = _mm256_permute2x128_si256(v[0], v[1], 0x31), d = _mm256_permute2x128_si256(v[2], v[3], 0x31);
        v[0] = a, v[1] = b, v[2] = c, v[3] = d;
    }
    static V dot(V sums, V codes, V counts) {
        const V pairs = _mm256_maddubs_epi16(codes, counts);
        return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
};

}  // namespace
}  // namespace sbedge
