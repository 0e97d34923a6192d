// Dense linears in ggml's Q8_0 and Q4_0, for every instruction set. A Backend gives, beside what spike_impl.h asks for:
//   Row<BITS>        add(codes, x, sum, scale): a block of 32 weights times 32 activations; total()
//   Quad             vectors of four dwords: load, store, code, low, high (as in spike_dot.h), transpose(4 of them)
//   whole_product    product for activations of any int8 value
#pragma once

#include "spike_impl.h"

namespace sbedge {
namespace {

constexpr int BLOCK = 32;           // weights that share a scale
constexpr int QUADS = BLOCK / 4;
constexpr int AHEAD = 4096;         // bytes of rows that are fetched ahead of their use

template <int BITS>
struct Format;
template <>
struct Format<8> {
    static constexpr int BYTES = 34;    // of a block
};
template <>
struct Format<4> {
    static constexpr int BYTES = 18;
};

inline uint16_t half_at(const uint8_t* p) {
    uint16_t half;
    std::memcpy(&half, p, sizeof(half));
    return half;
}

void block_encode(const float* x, int64_t n, int64_t width, int8_t* codes, float* scales, int32_t* sums, int ith,
                  int nth) {
    const Range mine = share(n * width / BLOCK, 1, ith, nth);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
        const float* in = x + b * BLOCK;
        // Without their sign floats order as their bits do, and what is no number comes last: it becomes the scale.
        uint32_t size[BLOCK], largest_bits = 0;
        std::memcpy(size, in, sizeof(size));
        for (int i = 0; i < BLOCK; ++i) {
            size[i] &= 0x7fffffff;
            largest_bits = size[i] > largest_bits ? size[i] : largest_bits;
        }
        float largest;
        std::memcpy(&largest, &largest_bits, sizeof(largest));
        const float scale = largest / 127.0f, inverse = scale > 0 ? 1.0f / scale : 0.0f;
        int32_t code[BLOCK], sum = 0;
        for (int i = 0; i < BLOCK; ++i) {
            float rounded = __builtin_rintf(in[i] * inverse);
            rounded = rounded == rounded ? rounded : 0.0f;
            rounded = rounded > 127.0f ? 127.0f : rounded;
            code[i] = static_cast<int32_t>(rounded < -127.0f ? -127.0f : rounded);
        }
        for (int i = 0; i < BLOCK; ++i) {
            codes[b * BLOCK + i] = static_cast<int8_t>(code[i]);
            sum += code[i];
        }
        scales[b] = scale;
        sums[b] = sum;
    }
}

// --- few tokens: each row is read once, from its beginning to its end, and multiplied with every token's codes --------

constexpr int64_t FEW_TOKENS = 16;

// What block_encode made of n tokens.
struct Encoded {
    const int8_t* codes;
    const float* scales;
    const int32_t* sums;
    int64_t width;

    Encoded from(int64_t token) const {
        const int64_t blocks = token * width / BLOCK;
        return {codes + token * width, scales + blocks, sums + blocks, width};
    }
};

// One row times N tokens -> y [N], `stride` apart. The order of additions does not depend on N.
template <class Backend, int BITS, int N>
void dense_row(const uint8_t* row, const Encoded& x, float bias, float* y, int64_t stride) {
    constexpr int BYTES = Format<BITS>::BYTES, LOT = 8, CHAINS = 4;
    typename Backend::template Row<BITS> chain[N][CHAINS];      // of additions that do not wait for each other
    const int64_t blocks = x.width / BLOCK;
    const auto add = [&](int64_t b, int c) {
        const float scale = Backend::widen(half_at(row));
        for (int t = 0; t < N; ++t)
            chain[t][c].add(row + 2, x.codes + t * x.width + b * BLOCK, x.sums[t * blocks + b],
                            scale * x.scales[t * blocks + b]);
        row += BYTES;
    };
    int64_t b = 0;
    for (; b + LOT <= blocks; b += LOT) {
        for (int i = 0; i < LOT * BYTES; i += 64) __builtin_prefetch(row + AHEAD + i);
        for (int j = 0; j < LOT; ++j) add(b + j, j % CHAINS);
    }
    for (; b < blocks; ++b) add(b, 0);
    for (int t = 0; t < N; ++t) {
        float total = 0;
        for (const auto& one : chain[t]) total += one.total();
        y[t * stride] = total + bias;
    }
}

template <class Backend, int BITS>
void dense_rows(const sbedge_dense& w, const Encoded& x, int64_t n, float* y, int64_t y_stride, Range range) {
    const int64_t bytes = w.in / BLOCK * Format<BITS>::BYTES;
    for (int64_t o = range.begin; o < range.end; ++o) {
        const uint8_t* row = w.blocks + o * bytes;
        const float bias = w.bias ? w.bias[o] : 0.0f;
        int64_t t = 0;
        for (; t + 4 <= n; t += 4)
            dense_row<Backend, BITS, 4>(row, x.from(t), bias, y + t * y_stride + o, y_stride);
        for (; t < n; ++t) dense_row<Backend, BITS, 1>(row, x.from(t), bias, y + t * y_stride + o, y_stride);
    }
}

// --- many tokens: tiles of 64 outputs ----------------------------------------------------------------------------------

// Block b of 64 rows -> tile [8 quads][64 outputs][4 inputs] in the form that the dot product takes.
template <class Backend, int BITS>
void pack_block(const uint8_t* const* rows, int64_t b, uint8_t* tile) {
    using Q = typename Backend::Quad;
    for (int o = 0; o < TILE; o += 4) {
        typename Q::V first[4], second[4];
        for (int r = 0; r < 4; ++r) {
            const uint8_t* codes = rows[o + r] + b * Format<BITS>::BYTES + 2;
            const auto bytes = Q::load(codes);
            first[r] = BITS == 8 ? Q::code(bytes) : Q::low(bytes);
            second[r] = BITS == 8 ? Q::code(Q::load(codes + 16)) : Q::high(bytes);
        }
        Q::transpose(first);
        Q::transpose(second);
        for (int q = 0; q < 4; ++q) {
            Q::store(tile + (q * TILE + o) * 4, first[q]);
            Q::store(tile + ((q + 4) * TILE + o) * 4, second[q]);
        }
    }
}

template <class Backend, int BITS>
struct DenseTile {
    static constexpr int OFFSET = BITS == 8 ? Backend::OFFSET : 8;      // what packed codes have too much
    const sbedge_dense& w;
    int64_t blocks;
    const uint8_t* rows[TILE];
    alignas(64) float y[TOKEN_BLOCK][TILE];

    DenseTile(const sbedge_dense& w, Range outputs) : w(w), blocks(w.in / BLOCK) {
        for (int64_t o = 0; o < TILE; ++o) {    // a narrower last tile repeats its last row
            const int64_t row = outputs.begin + o < outputs.end ? outputs.begin + o : outputs.end - 1;
            rows[o] = w.blocks + row * blocks * Format<BITS>::BYTES;
        }
    }

    // y of `tokens` <= TOKEN_BLOCK tokens
    void multiply(const Encoded& given, int64_t tokens) {
        alignas(64) uint8_t tile[BLOCK * TILE];
        alignas(64) int8_t x[TOKEN_BLOCK][BLOCK] = {};
        alignas(64) float weight_scales[TILE];
        alignas(64) int32_t products[Backend::TOKENS][TILE];
        std::memset(y, 0, sizeof(y));
        for (int64_t b = 0; b < blocks; ++b) {
            pack_block<Backend, BITS>(rows, b, tile);
            uint16_t halves[TILE];
            for (int64_t o = 0; o < TILE; ++o) halves[o] = half_at(rows[o] + b * Format<BITS>::BYTES);
            Backend::widen(halves, weight_scales);
            for (int64_t t = 0; t < tokens; ++t) std::memcpy(x[t], given.codes + t * w.in + b * BLOCK, BLOCK);
            for (int64_t t = 0; t < tokens; t += Backend::TOKENS) {
                Backend::whole_product(tile, QUADS, x[t], BLOCK, products[0]);
                for (int m = 0; m < Backend::TOKENS && t + m < tokens; ++m)
                    add(y[t + m], products[m], weight_scales, given.scales[(t + m) * blocks + b],
                        OFFSET * given.sums[(t + m) * blocks + b]);
            }
        }
    }

    static void add(float* __restrict y, const int32_t* __restrict products, const float* __restrict weight_scales,
                    float scale, int32_t extra) {
        for (int64_t o = 0; o < TILE; ++o)
            y[o] += static_cast<float>(products[o] - extra) * (weight_scales[o] * scale);
    }
};

// --- the public function ---------------------------------------------------------------------------------------------

template <class Backend, int BITS>
void dense(const sbedge_dense* w, const int8_t* codes, const float* scales, const int32_t* sums, int64_t n, float* y,
           int64_t y_stride, int ith, int nth) {
    const Range range = share(w->out, OUTPUT_BLOCK, ith, nth);
    const Encoded x{codes, scales, sums, w->in};
    if (n <= FEW_TOKENS) return dense_rows<Backend, BITS>(*w, x, n, y, y_stride, range);
    for (int64_t begin = range.begin; begin < range.end; begin += TILE) {
        const Range outputs{begin, begin + TILE < range.end ? begin + TILE : range.end};
        DenseTile<Backend, BITS> tile(*w, outputs);
        for (int64_t start = 0; start < n; start += TOKEN_BLOCK) {
            const int64_t tokens = n - start < TOKEN_BLOCK ? n - start : TOKEN_BLOCK;
            tile.multiply(x.from(start), tokens);
            for (int64_t t = 0; t < tokens; ++t)
                for (int64_t o = outputs.begin; o < outputs.end; ++o)
                    y[(start + t) * y_stride + o] = tile.y[t][o - outputs.begin] + (w->bias ? w->bias[o] : 0.0f);
        }
    }
}

template <class Backend>
void dense_matmul(const sbedge_dense* w, const int8_t* codes, const float* scales, const int32_t* sums, int64_t n,
                  float* y, int64_t y_stride, int ith, int nth) {
    (w->bits == 8 ? dense<Backend, 8> : dense<Backend, 4>)(w, codes, scales, sums, n, y, y_stride, ith, nth);
}

template <class Backend>
constexpr LinearKernels linear_table{spike_encode, matmul_w8<Backend>, matmul_w4<Backend>, block_encode,
                                     dense_matmul<Backend>};

}  // namespace
}  // namespace sbedge
