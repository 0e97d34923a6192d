// The two event layouts: where a row lies, how an exact row, a residual and scales are added. See sbedge.h.
#pragma once

#include <cstring>

#include "internal.h"

namespace sbedge {
namespace {

constexpr int GROUP = SBEDGE_GROUP;
constexpr int64_t TILE = OUTPUT_BLOCK; // outputs of a prefill tile

// Sums are taken modulo 2^32: exact while the true sum of a group fits int32, which any sum of |count| below 2^23 does.
inline void add(int32_t& sum, int32_t count, int32_t code) {
    const uint32_t product = static_cast<uint32_t>(count) * static_cast<uint32_t>(code);
    sum = static_cast<int32_t>(static_cast<uint32_t>(sum) + product);
}

// y += scale * (sum - what the offset or zero point of the codes brought in)
template <class Extra>
inline void scale_sums(int64_t width, const int32_t* __restrict sums, const float* __restrict scales,
                       float* __restrict y, Extra extra) {
    const auto scale = [=](int64_t o) {
        y[o] += static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(sums[o]) - extra(o))) * scales[o];
    };
    if (width == TILE)  // a prefill tile: a count known to the compiler
        for (int64_t o = 0; o < TILE; ++o) scale(o);
    else
        for (int64_t o = 0; o < width; ++o) scale(o);
}

// Where one output of each row lies: row i is `stride` bytes after row i - 1.
struct Rows {
    const uint8_t* first;
    int64_t stride;
    const uint8_t* operator[](int64_t i) const { return first + i * stride; }
};

// What both layouts share: stripes of outputs (see sbedge.h).
struct Striped {
    int64_t in, out, stripe;
    Striped(int64_t in, int64_t out, int64_t stripe) : in(in), out(out), stripe(stripe > 0 ? stripe : out) {}

    // The outputs from `begin` on that lie in one stripe, `most` at the most.
    Range piece(int64_t begin, int64_t end, int64_t most) const {
        const int64_t edge = begin / stripe * stripe + stripe;
        end = end < edge ? end : edge;
        return {begin, end < begin + most ? end : begin + most};
    }
    // Row 0 at `output`, and how far it is to the next row: both in outputs.
    Range place(int64_t output) const {
        const int64_t start = output / stripe * stripe, width = stripe < out - start ? stripe : out - start;
        return {start * in + (output - start), width};
    }
};

struct Int8Layer : Striped {
    const sbedge_w8& w;
    static constexpr int64_t group = GROUP;
    const uint8_t flip;     // what a stored byte is xor-ed with to be an int8 code
    explicit Int8Layer(const sbedge_w8& w)
        : Striped(w.in, w.out, w.stripe), w(w), flip(w.unsigned_codes ? 0x80 : 0) {}

    static constexpr int64_t bytes(int64_t outputs) { return outputs; }
    // Tells `prefetch` the cache lines of the scales of input i's group, which come from a row of their own.
    template <class Prefetch>
    void expect_scales(int64_t i, Range outputs, Prefetch prefetch) const {
        for (int64_t o = outputs.begin; o < outputs.end; o += 16) prefetch(w.scales + i / group * out + o);
    }
    Rows rows(int64_t output) const {
        const auto [first, stride] = place(output);
        return {reinterpret_cast<const uint8_t*>(w.codes) + first, stride};
    }
    // One row of any count, exactly.
    void add_row(const uint8_t* row, int32_t count, int64_t width, int offset, int32_t* sums) const {
        for (int64_t o = 0; o < width; ++o) add(sums[o], count, static_cast<int8_t>(row[o] ^ flip) + offset);
    }
    bool has_residual() const { return w.residual_start; }
    // The entries of row i among these outputs.
    Range residual(int64_t i, Range outputs) const {
        int64_t begin = w.residual_start[i], end = w.residual_start[i + 1], stop = end;
        while (begin < stop) {
            const int64_t middle = begin + (stop - begin) / 2;
            if (w.residual_output[middle] < outputs.begin) begin = middle + 1;
            else stop = middle;
        }
        int64_t last = begin;
        while (last < end && w.residual_output[last] < outputs.end && w.residual_output[last] >= outputs.begin) ++last;
        return {begin, last};
    }
    void add_residual(Range entries, int32_t count, int64_t first_output, int32_t* sums) const {
        for (int64_t e = entries.begin; e < entries.end; ++e)
            add(sums[w.residual_output[e] - first_output], count, w.residual_value[e]);
    }
    // Scales of one group for these outputs; `room` [TILE] is for a tile of scales that must be converted.
    template <class Backend>
    const float* tile_scales(int64_t g, Range outputs, float*) const {
        return w.scales + g * out + outputs.begin;
    }
    template <class Backend>
    void scale(int64_t, int32_t counts, Range outputs, const int32_t* sums, const float* scales, float* y) const {
        const uint32_t extra = static_cast<uint32_t>(counts) * static_cast<uint32_t>(Backend::OFFSET);
        scale_sums(outputs.end - outputs.begin, sums, scales, y, [=](int64_t) { return extra; });
    }
    template <class Backend>
    void scale(int64_t g, int32_t counts, Range outputs, const int32_t* sums, float* y) const {
        scale<Backend>(g, counts, outputs, sums, tile_scales<Backend>(g, outputs, nullptr), y);
    }
};

struct Int4Layer : Striped {
    const sbedge_w4& w;
    int64_t group;
    explicit Int4Layer(const sbedge_w4& w) : Striped(w.in, w.out, w.stripe), w(w), group(w.group) {}

    static constexpr int64_t bytes(int64_t outputs) { return outputs / 2; }
    template <class Prefetch>
    void expect_scales(int64_t i, Range outputs, Prefetch prefetch) const {
        const int64_t start = i / group * out;
        for (int64_t o = outputs.begin; o < outputs.end; o += 32) prefetch(w.scales + start + o);
        for (int64_t o = outputs.begin; w.zeros && o < outputs.end; o += 64) prefetch(w.zeros + start + o);
    }
    Rows rows(int64_t output) const {
        const auto [first, stride] = place(output);
        return {w.nibbles + first / 2, stride / 2};
    }
    static void add_row(const uint8_t* row, int32_t count, int64_t width, int, int32_t* sums) {
        for (int64_t o = 0; o < width; o += 64, sums += 64, row += 32) {
            for (int b = 0; b < 32; ++b) {
                add(sums[b], count, row[b] & 15);
                add(sums[b + 32], count, row[b] >> 4);
            }
        }
    }
    bool has_residual() const { return false; }
    Range residual(int64_t, Range) const { return {0, 0}; }
    void add_residual(Range, int32_t, int64_t, int32_t*) const {}
    template <class Backend>
    const float* tile_scales(int64_t g, Range outputs, float* room) const {
        Backend::widen(w.scales + g * out + outputs.begin, room);
        return room;
    }
    template <class Backend>
    void scale(int64_t g, int32_t counts, Range outputs, const int32_t* sums, const float* scales, float* y) const {
        const uint32_t total = static_cast<uint32_t>(counts);
        if (const uint8_t* zeros = w.zeros ? w.zeros + g * out + outputs.begin : nullptr)
            scale_sums(TILE, sums, scales, y, [=](int64_t o) { return total * zeros[o]; });
        else
            scale_sums(TILE, sums, scales, y, [=](int64_t) { return total * 8; });
    }
    template <class Backend>
    void scale(int64_t g, int32_t counts, Range outputs, const int32_t* sums, float* y) const {
        alignas(64) float room[TILE];
        for (int64_t begin = outputs.begin; begin < outputs.end; begin += TILE, sums += TILE, y += TILE) {
            const Range tile{begin, begin + TILE};
            scale<Backend>(g, counts, tile, sums, tile_scales<Backend>(g, tile, room), y);
        }
    }
};

// Rows of the group that begins at `first`: the last one may be shorter than the others.
template <class Layer>
int64_t group_rows(const Layer& layer, int64_t first) {
    return layer.in - first < layer.group ? layer.in - first : layer.group;
}

}  // namespace
}  // namespace sbedge
