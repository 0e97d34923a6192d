// 256-bit vectors for spike_dot.h.
#pragma once

#include <immintrin.h>

#include "spike_dot.h"

namespace sbedge {
namespace {

// Four dwords.
struct Sse {
    using V = __m128i;
    static V load(const void* p) { return _mm_loadu_si128(static_cast<const V*>(p)); }
    static void store(void* p, V v) { _mm_storeu_si128(static_cast<V*>(p), v); }
    static V code(V v) { return _mm_xor_si128(v, _mm_set1_epi8(-128)); }
    static V low(V v) { return _mm_and_si128(v, _mm_set1_epi8(15)); }
    static V high(V v) { return _mm_and_si128(_mm_srli_epi16(v, 4), _mm_set1_epi8(15)); }
    static void transpose(V* r) {
        const V a = _mm_unpacklo_epi32(r[0], r[1]), b = _mm_unpacklo_epi32(r[2], r[3]);
        const V c = _mm_unpackhi_epi32(r[0], r[1]), d = _mm_unpackhi_epi32(r[2], r[3]);
        r[0] = _mm_unpacklo_epi64(a, b), r[1] = _mm_unpackhi_epi64(a, b);
        r[2] = _mm_unpacklo_epi64(c, d), r[3] = _mm_unpackhi_epi64(c, d);
    }
};

// A row of blocks times activations, with the byte dot product of Isa: |w| times x with the sign of w; nibbles take
// what their middle of 8 brings in off again.
template <class Isa, int BITS>
struct RowSum {
    __m256 sums = _mm256_setzero_ps();

    void add(const uint8_t* codes, const int8_t* x, int32_t sum, float scale) {
        const __m256i activations = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
        __m256i products;
        if (BITS == 8) {
            const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
            products = Isa::dot(_mm256_setzero_si256(), _mm256_abs_epi8(w), _mm256_sign_epi8(activations, w));
        } else {
            const __m128i two = Sse::load(codes);
            const __m256i nibbles = _mm256_set_m128i(Sse::high(two), Sse::low(two));
            products = Isa::dot(_mm256_zextsi128_si256(_mm_cvtsi32_si128(-8 * sum)), nibbles, activations);
        }
        sums = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), _mm256_set1_ps(scale), sums);
    }

    float total() const {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
};

struct Avx2 {
    using V = __m256i;
    using Quad = Sse;
    template <class Isa, int BITS>
    using Row = RowSum<Isa, BITS>;
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
    static float widen(uint16_t half) { return _cvtsh_ss(half); }
    static void widen(const uint16_t* halves, float* floats) {
        for (int i = 0; i < TILE; i += 8)
            _mm256_storeu_ps(floats + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i))));
    }
    static V code(V v, uint8_t flip) {   // int8 code + 128
        return _mm256_xor_si256(v, _mm256_set1_epi8(static_cast<char>(flip ^ 0x80)));
    }
    static V low(V v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
    static V high(V v) { return _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15)); }
    static V raised(V v) { return high(v); }    // 16 times as much would saturate maddubs
    static V lowered(V sums) { return sums; }

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
    static V whole_dot(V sums, V codes, V counts) {     // by even and odd bytes in int16
        const V even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(counts, 8), 8));
        const V odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(counts, 8));
        return _mm256_add_epi32(sums, _mm256_add_epi32(even, odd));
    }
};

}  // namespace
}  // namespace sbedge
