// The event-driven matmul on AVX-512 with vpdpbusd: four rows straight into int32.
#include "internal.h"

#ifdef __AVX512VNNI__

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own headers, through _mm512_undefined_epi32
#endif

#include "spike_avx2.h"

namespace sbedge {
namespace {

struct Vnni256 : Avx2 {
    static V dot(V sums, V codes, V counts) { return _mm256_dpbusd_epi32(sums, codes, counts); }
};

struct Avx512 {
    using V = __m512i;
    using Narrow = Vnni256;
    using Quad = Sse;
    static constexpr int LIMIT = 127, OFFSET = 128, TOKENS = 4, BYTES = 64;

    static V load(const void* p) { return _mm512_loadu_si512(p); }
    static void store(void* p, V v) { _mm512_storeu_si512(p, v); }
    static V zero() { return _mm512_setzero_si512(); }
    static V broadcast(const void* four) {
        int32_t value;
        std::memcpy(&value, four, 4);
        return _mm512_set1_epi32(value);
    }
    static float widen(uint16_t half) { return _cvtsh_ss(half); }
    static void widen(const uint16_t* halves, float* floats) {
        for (int i = 0; i < TILE; i += 16) _mm512_storeu_ps(floats + i, _mm512_cvtph_ps(Narrow::load(halves + i)));
    }
    static V code(V v, uint8_t flip) {   // int8 code + 128
        return _mm512_xor_si512(v, _mm512_set1_epi8(static_cast<char>(flip ^ 0x80)));
    }
    static V low(V v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
    static V high(V v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
    static V raised(V v) { return _mm512_and_si512(v, _mm512_set1_epi8(-16)); }
    static V lowered(V sums) { return _mm512_srai_epi32(sums, 4); }

    static void interleave(V* r) {
        const V a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpackhi_epi8(r[0], r[1]);
        const V c = _mm512_unpacklo_epi8(r[2], r[3]), d = _mm512_unpackhi_epi8(r[2], r[3]);
        r[0] = _mm512_unpacklo_epi16(a, c), r[1] = _mm512_unpackhi_epi16(a, c);
        r[2] = _mm512_unpacklo_epi16(b, d), r[3] = _mm512_unpackhi_epi16(b, d);
    }
    static void lanes(V* v) {  // the 4 x 4 transpose of 128-bit lanes
        const V a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
        const V c = _mm512_shuffle_i32x4(v[0], v[1], 0xee), d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
        v[0] = _mm512_shuffle_i32x4(a, b, 0x88), v[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
        v[2] = _mm512_shuffle_i32x4(c, d, 0x88), v[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
    static V dot(V sums, V codes, V counts) { return _mm512_dpbusd_epi32(sums, codes, counts); }
    static V whole_dot(V sums, V codes, V counts) { return dot(sums, codes, counts); }
};

}  // namespace

const LinearKernels* const spike_avx512vnni = &linear_table<Dot<Avx512>>;

}  // namespace sbedge

#else

namespace sbedge {
const LinearKernels* const spike_avx512vnni = nullptr;
}

#endif
