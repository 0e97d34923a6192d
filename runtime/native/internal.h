// What the instruction sets implement and dispatch.cpp chooses from.
#pragma once

#include <cstring>

#include "sbedge.h"

namespace sbedge {

// Outputs are handed to threads in multiples of this, so that no two threads share a cache line of floats.
constexpr int64_t OUTPUT_BLOCK = 64;
constexpr int64_t TOKEN_BLOCK = 64;     // tokens that share one pass over the weights in prefill

// Times that a product of n tokens passes over its weights.
static inline int64_t passes(int64_t n) { return (n + TOKEN_BLOCK - 1) / TOKEN_BLOCK; }

struct LinearKernels {
    decltype(&sbedge_spike_encode) spike_encode;
    decltype(&sbedge_spike_matmul_w8) spike_matmul_w8;
    decltype(&sbedge_spike_matmul_w4) spike_matmul_w4;
    decltype(&sbedge_block_encode) block_encode;
    decltype(&sbedge_dense_matmul) dense_matmul;
};

struct MixerKernels {
    decltype(&sbedge_gla_scratch) gla_scratch;
    decltype(&sbedge_gla) gla;
    decltype(&sbedge_window_scratch) window_scratch;
    decltype(&sbedge_window) window;
    decltype(&sbedge_silu_gate) silu_gate;
};

// A null pointer where this build has no such code: each *_ISA.cpp defines its table, or null if not compiled for it.
extern const LinearKernels* const spike_scalar;
extern const LinearKernels* const spike_avx2;
extern const LinearKernels* const spike_avxvnni;
extern const LinearKernels* const spike_avx512vnni;
extern const LinearKernels* const spike_neon;
extern const MixerKernels* const mixer_scalar;
extern const MixerKernels* const mixer_avx2;
extern const MixerKernels* const mixer_avx512vnni;
extern const MixerKernels* const mixer_neon;

struct Range {
    int64_t begin, end;
};

// Static: each file compiles its own for its own instruction set, and the linker must not merge them.
// The part of [0, count) that thread ith of nth takes, in multiples of `block` (the last one may be ragged).
static inline Range share(int64_t count, int64_t block, int ith, int nth) {
    const int64_t blocks = (count + block - 1) / block;
    const int64_t begin = blocks * ith / nth * block, end = blocks * (ith + 1) / nth * block;
    return {begin < count ? begin : count, end < count ? end : count};
}

// A float16 by its bits, exactly; the scalar twin of the conversions that processors have.
static inline float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    uint32_t bits;
    if (exponent == 31) bits = 0x7f800000 | fraction << 13;                 // infinity, NaN
    else if (exponent) bits = (exponent + 112) << 23 | fraction << 13;
    else {                                                                  // zero and denormals
        const float value = float(fraction) * 0x1p-24f;
        std::memcpy(&bits, &value, 4);
    }
    bits |= sign;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

}  // namespace sbedge
