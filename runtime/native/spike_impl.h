// Spike coding and event-driven matmul, shared by every instruction set. A Backend gives the inner loops:
//   LIMIT     the largest |count| its fast path takes; larger ones are added one row at a time, in int32
//   OFFSET    what it adds to an int8 code (128 where the dot product wants unsigned bytes), taken off again at scaling
//   widen     64 float16 -> float32
//   TOKENS    tokens its tile product takes at once
//   rows(layer, live, upcoming, outputs, sums)                decode: sums[o] = sum of count * code over live rows
//   pack(layer, first, rows, live, outputs, tile)             prefill: a tile [live / 4][64 outputs][4 rows] of codes
//   product(tile, quads, counts, stride, sums)                prefill: sums [TOKENS][64] of a tile
// Everything lives in an unnamed namespace: each file that includes this compiles its own copy, for its own
// instruction set, and the linker must not merge them.
#pragma once

#include "spike_layers.h"

namespace sbedge {
namespace {

constexpr int64_t DECODE_TILE = 4096;  // outputs; their int32 sums stay in the L1 cache

// --- spike coding --------------------------------------------------------------------------------------------------

// Sum of |x| in float64, in one fixed order whatever the instruction set.
double sum_of_sizes(const float* x, int64_t width) {
    constexpr int LANES = 16;
    double lanes[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES)
        for (int j = 0; j < LANES; ++j) lanes[j] += __builtin_fabs(double(x[i + j]));
    for (int j = 0; i + j < width; ++j) lanes[j] += __builtin_fabs(double(x[i + j]));
    double total = 0;
    for (double lane : lanes) total += lane;
    return total;
}

// Counts of one row; NaN counts as silence (a NaN threshold carries it on), and what int32 cannot hold is saturated.
// Returns the threshold.
float encode_row(const float* x, int64_t width, float k, float dead_zone, int32_t* counts) {
    constexpr float LARGEST = 2147483520.0f;
    const float mean = static_cast<float>(sum_of_sizes(x, width) / width);
    float threshold = mean / k;
    threshold = threshold < 1e-5f ? 1e-5f : threshold;
    threshold = threshold > 1e4f ? 1e4f : threshold;
    const float silence = dead_zone * mean;
    for (int64_t i = 0; i < width; ++i) {
        float count = __builtin_rintf(x[i] / threshold);  // half to even in the default rounding mode
        count = __builtin_fabsf(x[i]) < silence || count != count ? 0.0f : count;
        count = count > LARGEST ? LARGEST : count;
        counts[i] = static_cast<int32_t>(count < -LARGEST ? -LARGEST : count);
    }
    return threshold;
}

void spike_encode(const float* x, int64_t n, int64_t width, float k, float dead_zone, int32_t* counts,
                  float* thresholds, int ith, int nth) {
    const Range rows = share(n, 1, ith, nth);
    for (int64_t t = rows.begin; t < rows.end; ++t)
        thresholds[t] = encode_row(x + t * width, width, k, dead_zone, counts + t * width);
}

// y = y * threshold + bias
void finish(Range outputs, float threshold, const float* bias, float* y) {
    for (int64_t o = outputs.begin; o < outputs.end; ++o) y[o] *= threshold;
    if (bias)
        for (int64_t o = outputs.begin; o < outputs.end; ++o) y[o] += bias[o];
}

// --- decode: one token ---------------------------------------------------------------------------------------------

// The live channels of one group, counted from its first one.
struct Live {
    int64_t first;
    int32_t row[GROUP], count[GROUP];              // |count| <= limit
    int32_t large_row[GROUP], large_count[GROUP];  // the others
    int live, large;
    int32_t sum;  // of all counts, modulo 2^32

    void collect(const int32_t* all_counts, int64_t first_row, int64_t in, int64_t group, int limit) {
        first = first_row;
        live = large = sum = 0;
        if (first >= in) return;
        const int64_t rows = in - first < group ? in - first : group;
        const int32_t* counts = all_counts + first;
        uint32_t total = 0;
        for (int32_t i = 0; i < rows; ++i) {
            const int32_t s = counts[i];
            total += static_cast<uint32_t>(s);
            const bool fits = s >= -limit && s <= limit;
            row[live] = large_row[large] = i;
            count[live] = large_count[large] = s;
            live += fits && s;
            large += !fits;
        }
        sum = static_cast<int32_t>(total);
    }
};

// Rows that the fast path leaves out, and residuals.
template <class Backend, class Layer>
void add_exactly(const Layer& layer, const Live& live, Range outputs, int32_t* sums) {
    const Rows rows = layer.rows(outputs.begin);
    for (int j = 0; j < live.large; ++j)
        layer.add_row(rows[live.first + live.large_row[j]], live.large_count[j], outputs.end - outputs.begin,
                      Backend::OFFSET, sums);
    if (!layer.has_residual()) return;
    for (int j = 0; j < live.live; ++j)
        layer.add_residual(layer.residual(live.first + live.row[j], outputs), live.count[j], outputs.begin, sums);
    for (int j = 0; j < live.large; ++j)
        layer.add_residual(layer.residual(live.first + live.large_row[j], outputs), live.large_count[j], outputs.begin,
                           sums);
}

template <class Backend, class Layer>
int64_t decode(const Layer& layer, const int32_t* counts, float threshold, const float* bias, float* y, Range range) {
    alignas(64) int32_t sums[DECODE_TILE];
    Live buffers[2];  // this group and the next, whose first rows are prefetched while this one ends
    int64_t fetched = 0;
    for (Range outputs{range.begin, range.begin}; outputs.end < range.end;) {
        outputs = layer.piece(outputs.end, range.end, DECODE_TILE);
        const int64_t begin = outputs.begin, width = outputs.end - begin;
        std::memset(y + begin, 0, width * sizeof(float));
        buffers[0].collect(counts, 0, layer.in, layer.group, Backend::LIMIT);
        for (int64_t g = 0; g * layer.group < layer.in; ++g) {
            const Live& live = buffers[g % 2];
            Live& upcoming = buffers[(g + 1) % 2];
            upcoming.collect(counts, live.first + layer.group, layer.in, layer.group, Backend::LIMIT);
            if (!live.live && !live.large) continue;
            fetched += (live.live + live.large) * Layer::bytes(width);
            Backend::rows(layer, live, upcoming, outputs, sums);
            add_exactly<Backend>(layer, live, outputs, sums);
            layer.template scale<Backend>(g, live.sum, outputs, sums, y + begin);
        }
        finish(outputs, threshold, bias, y);
    }
    return fetched;
}

// --- prefill: many tokens ------------------------------------------------------------------------------------------

// The counts of one group for a block of tokens, over the rows that any of them needs.
struct Block {
    alignas(64) int8_t count[TOKEN_BLOCK][GROUP];  // in the order of `row`; 0 where |count| > limit
    int32_t row[GROUP];
    int live;
    int32_t sum[TOKEN_BLOCK];   // of all counts of the token, modulo 2^32
    bool any[TOKEN_BLOCK], large[TOKEN_BLOCK];

    // counts: those of the group's rows in the block's first token, `stride` from token to token.
    void collect(const int32_t* counts, int64_t stride, int64_t tokens, int64_t rows, int limit) {
        int32_t used[GROUP] = {};
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t i = 0; i < rows; ++i) used[i] |= counts[t * stride + i];
        live = 0;
        for (int32_t i = 0; i < rows; ++i)
            if (used[i]) row[live++] = i;
        std::memset(count, 0, sizeof(count));
        for (int64_t t = 0; t < tokens; ++t) gather(counts + t * stride, t, rows, limit);
    }

    void gather(const int32_t* counts, int64_t t, int64_t rows, int limit) {
        int8_t fitting[GROUP];
        uint32_t total = 0;
        int32_t nonzero = 0, beyond = 0;
        for (int64_t i = 0; i < rows; ++i) {
            const int32_t s = counts[i], large = s < -limit || s > limit ? -1 : 0;
            fitting[i] = static_cast<int8_t>(s & ~large);
            total += static_cast<uint32_t>(s);
            nonzero |= s;
            beyond |= large;
        }
        if (live == rows) std::memcpy(count[t], fitting, rows);
        else
            for (int j = 0; j < live; ++j) count[t][j] = fitting[row[j]];
        sum[t] = static_cast<int32_t>(total);
        any[t] = nonzero != 0;
        large[t] = beyond != 0;
    }
};

// A prefill tile: 64 outputs of one group, with what its rows have beyond int8.
template <class Backend, class Layer>
struct TileProduct {
    const Layer& layer;
    const int32_t* counts;  // of the block's first token [tokens, in]
    alignas(64) uint8_t tile[GROUP * TILE];
    alignas(64) float room[TILE];
    const float* scales = nullptr;
    Range residual[GROUP];
    int32_t residual_row[GROUP];
    int residual_rows = 0;
    Block block;

    TileProduct(const Layer& layer, const int32_t* counts) : layer(layer), counts(counts) {}

    void load(int64_t first, Range outputs) {
        scales = layer.template tile_scales<Backend>(first / layer.group, outputs, room);
        Backend::pack(layer, first, block.row, block.live, outputs, tile);
        residual_rows = 0;
        if (!layer.has_residual()) return;
        for (int j = 0; j < block.live; ++j) {
            const Range entries = layer.residual(first + block.row[j], outputs);
            residual[residual_rows] = entries;
            residual_row[residual_rows] = block.row[j];
            residual_rows += entries.begin < entries.end;
        }
    }

    // y of the block's tokens [t, t + TOKENS) += their counts times the tile
    void multiply(int64_t t, int64_t tokens, int64_t g, Range outputs, float* y, int64_t y_stride) const {
        alignas(64) int32_t sums[Backend::TOKENS][TILE];
        // Rows of y often lie a power of two apart and evict each other: fetch those of the next tokens just in time.
        for (int64_t next = t + Backend::TOKENS; next < t + 2 * Backend::TOKENS && next < tokens; ++next)
            for (int64_t o = outputs.begin; o < outputs.end; o += 16) __builtin_prefetch(y + next * y_stride + o, 1);
        Backend::product(tile, (block.live + 3) / 4, block.count[t], GROUP, sums[0]);
        for (int m = 0; m < Backend::TOKENS && t + m < tokens; ++m) {
            if (!block.any[t + m]) continue;
            add_exactly(t + m, g * layer.group, outputs, sums[m]);
            layer.template scale<Backend>(g, block.sum[t + m], outputs, sums[m], scales,
                                          y + (t + m) * y_stride + outputs.begin);
        }
    }

    void add_exactly(int64_t t, int64_t first, Range outputs, int32_t* sums) const {
        const int32_t* group = counts + t * layer.in + first;
        if (block.large[t]) {
            const Rows rows = layer.rows(outputs.begin);
            for (int j = 0; j < block.live; ++j) {
                const int32_t s = group[block.row[j]];
                if (s < -Backend::LIMIT || s > Backend::LIMIT)
                    layer.add_row(rows[first + block.row[j]], s, outputs.end - outputs.begin, Backend::OFFSET, sums);
            }
        }
        for (int j = 0; j < residual_rows; ++j)
            layer.add_residual(residual[j], group[residual_row[j]], outputs.begin, sums);
    }
};

template <class Backend, class Layer>
int64_t prefill(const Layer& layer, const int32_t* counts, int64_t tokens, float* y, int64_t y_stride, Range range) {
    TileProduct<Backend, Layer> product(layer, counts);
    int64_t fetched = 0;
    for (int64_t g = 0, first = 0; first < layer.in; ++g, first += layer.group) {
        product.block.collect(counts + first, layer.in, tokens, group_rows(layer, first), Backend::LIMIT);
        fetched += product.block.live * Layer::bytes(range.end - range.begin);
        for (int64_t begin = range.begin; product.block.live && begin < range.end; begin += TILE) {
            const Range outputs{begin, begin + TILE < range.end ? begin + TILE : range.end};
            product.load(first, outputs);
            for (int64_t t = 0; t < tokens; t += Backend::TOKENS) product.multiply(t, tokens, g, outputs, y, y_stride);
        }
    }
    return fetched;
}

// --- the public functions ------------------------------------------------------------------------------------------

template <class Backend, class Layer>
int64_t matmul(const Layer& layer, const float* bias, const int32_t* counts, const float* thresholds, int64_t n,
               float* y, int64_t y_stride, int ith, int nth) {
    const Range range = share(layer.out, OUTPUT_BLOCK, ith, nth);
    if (range.begin == range.end) return 0;
    if (n == 1) return decode<Backend>(layer, counts, thresholds[0], bias, y, range);
    int64_t fetched = 0;
    for (int64_t start = 0; start < n; start += TOKEN_BLOCK) {
        const int64_t tokens = n - start < TOKEN_BLOCK ? n - start : TOKEN_BLOCK;
        float* rows = y + start * y_stride;
        for (int64_t t = 0; t < tokens; ++t)
            std::memset(rows + t * y_stride + range.begin, 0, (range.end - range.begin) * sizeof(float));
        fetched += prefill<Backend>(layer, counts + start * layer.in, tokens, rows, y_stride, range);
        for (int64_t t = 0; t < tokens; ++t) finish(range, thresholds[start + t], bias, rows + t * y_stride);
    }
    return fetched;
}

template <class Backend>
int64_t matmul_w8(const sbedge_w8* w, const int32_t* counts, const float* thresholds, int64_t n, float* y,
                  int64_t y_stride, int ith, int nth) {
    return matmul<Backend>(Int8Layer(*w), w->bias, counts, thresholds, n, y, y_stride, ith, nth);
}

template <class Backend>
int64_t matmul_w4(const sbedge_w4* w, const int32_t* counts, const float* thresholds, int64_t n, float* y,
                  int64_t y_stride, int ith, int nth) {
    return matmul<Backend>(Int4Layer(*w), w->bias, counts, thresholds, n, y, y_stride, ith, nth);
}


}  // namespace
}  // namespace sbedge
