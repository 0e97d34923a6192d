// A Backend for spike_impl.h and dense.h out of any instruction set with a 4-way byte dot product. Four live rows are
// interleaved to [output][4 rows], so that one instruction adds four rows into the int32 sums of a vector of outputs.
// Isa gives
//   V, BYTES               a vector and its size; Narrow: the same with BYTES <= 32
//   LIMIT, OFFSET, TOKENS  as in Backend
//   load, store, broadcast (four counts), zero, low and high (nibbles of bytes), code (stored byte -> what dot takes)
//   raised, lowered        high nibbles times a power of two that costs less to get, and sums of these as they should be
//   interleave(r)          4 rows -> 4 vectors; within each 128-bit lane l, vector k holds bytes 16 l + 4 k + 0..3
//   lanes(v)               4 such vectors (or their int32 sums) -> outputs in their natural order
//   dot(sums, codes, counts), and whole_dot for counts beyond LIMIT
//   widen (float16), Quad, and Row of Narrow: as dense.h has them
#pragma once

#include "dense.h"

namespace sbedge {
namespace {

template <class Isa>
struct Dot {
    using V = typename Isa::V;
    static constexpr int LIMIT = Isa::LIMIT, OFFSET = Isa::OFFSET, TOKENS = Isa::TOKENS;
    static constexpr int BYTES = Isa::BYTES, QUARTER = BYTES / 4;
    using Quad = typename Isa::Quad;
    template <int BITS>
    using Row = typename Isa::Narrow::template Row<typename Isa::Narrow, BITS>;

    static float widen(uint16_t half) { return Isa::widen(half); }
    static void widen(const uint16_t* halves, float* floats) { Isa::widen(halves, floats); }
    static constexpr int ROWS = 8;  // that decode adds at once [16: fewer passes over the sums, but no faster]

    // To the second-level cache: the few miss buffers of the first one do not wait for memory then [Zen 4: 1.6 times
    // faster than prefetching to the first level; Zen 5: 0.97].
    static void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

    // --- decode ---

    // Adds ROWS live rows at a time, while the next are prefetched.
    template <class Layer>
    static void rows(const Layer& layer, const Live& live, const Live& upcoming, Range outputs, int32_t* sums) {
        const int64_t bytes = Layer::bytes(outputs.end - outputs.begin);
        const int64_t padded = (bytes + BYTES - 1) / BYTES * BYTES;
        const uint8_t* row[GROUP + 2 * ROWS];
        int8_t counts[GROUP];
        const int count = list(layer, live, upcoming, outputs.begin, row, counts);
        layer.expect_scales(live.first, outputs, [](const void* line) { prefetch(line); });
        if (count > 4) add<2, true>(layer, row, counts, bytes, sums);
        else if (count) add<1, true>(layer, row, counts, bytes, sums);
        else std::memset(sums, 0, padded * (outputs.end - outputs.begin) / bytes * sizeof(int32_t));
        for (int j = ROWS; j < count; j += ROWS) {
            if (j + 4 < count) add<2, false>(layer, row + j, counts + j, bytes, sums);
            else add<1, false>(layer, row + j, counts + j, bytes, sums);
        }
        for (int64_t b = 0; b < padded; b += BYTES) untangle(layer, b, sums);
    }

    // The live rows and their counts, up to a multiple of four with rows that do not spike, then the first ones of
    // the next group. Returns how many before those.
    template <class Layer>
    static int list(const Layer& layer, const Live& live, const Live& upcoming, int64_t output, const uint8_t** row,
                    int8_t* counts) {
        if (!live.live) return 0;
        const Rows rows = layer.rows(output);
        int count = 0;
        for (; count < live.live; ++count) {
            row[count] = rows[live.first + live.row[count]];
            counts[count] = static_cast<int8_t>(live.count[count]);
        }
        for (; count % 4; ++count) row[count] = row[0], counts[count] = 0;
        for (int j = 0; j < 2 * ROWS; ++j)
            row[count + j] = j < upcoming.live ? rows[upcoming.first + upcoming.row[j]] : row[0];
        return count;
    }

    // Prefetches rows in the order in which they lie in memory, a piece at a time.
    struct Ahead {
        static constexpr int64_t LINE = 64, PIECE = ROWS * LINE;
        const uint8_t* const* row;
        int64_t bytes, b = 0;

        void some() {
            for (int64_t i = 0; i < PIECE; i += LINE) prefetch(*row + b + i);
            b += PIECE;
            if (b >= bytes) b = 0, ++row;
        }
    };

    // row: 4 * QUADS to add to the sums, the FIRST ones to nothing, and 2 * ROWS further the same number to prefetch
    template <int QUADS, bool FIRST, class Layer>
    static void add(const Layer& layer, const uint8_t* const* row, const int8_t* counts, int64_t bytes,
                    int32_t* sums) {
        V s[QUADS], r[QUADS][4];
        for (int q = 0; q < QUADS; ++q) s[q] = Isa::broadcast(counts + 4 * q);
        Ahead ahead{row + 2 * ROWS, bytes};
        int64_t b = 0;
        for (; b + BYTES <= bytes; b += BYTES) {
            if (BYTES == 64 || b % 64 == 0) ahead.some();
            for (int j = 0; j < 4 * QUADS; ++j) r[j / 4][j % 4] = Isa::load(row[j] + b);
            step<QUADS, FIRST>(layer, r, s, b, sums);
        }
        if (b == bytes) return;
        uint8_t tail[BYTES] = {};
        for (int j = 0; j < 4 * QUADS; ++j) {
            std::memcpy(tail, row[j] + b, bytes - b);
            r[j / 4][j % 4] = Isa::load(tail);
        }
        step<QUADS, FIRST>(layer, r, s, b, sums);
    }

    // BYTES outputs, whose sums are left as `interleave` orders them.
    template <int QUADS, bool FIRST>
    static void step(const Int8Layer& layer, V (*r)[4], const V* counts, int64_t b, int32_t* sums) {
        V s[4];
        for (int k = 0; k < 4; ++k) s[k] = FIRST ? Isa::zero() : Isa::load(sums + b + k * QUARTER);
        for (int q = 0; q < QUADS; ++q) {
            for (int k = 0; k < 4; ++k) r[q][k] = Isa::code(r[q][k], layer.flip);
            Isa::interleave(r[q]);
            for (int k = 0; k < 4; ++k) s[k] = Isa::dot(s[k], r[q][k], counts[q]);
        }
        for (int k = 0; k < 4; ++k) Isa::store(sums + b + k * QUARTER, s[k]);
    }

    static void untangle(const Int8Layer&, int64_t b, int32_t* sums) {
        V s[4];
        for (int k = 0; k < 4; ++k) s[k] = Isa::load(sums + b + k * QUARTER);
        Isa::lanes(s);
        for (int k = 0; k < 4; ++k) Isa::store(sums + b + k * QUARTER, s[k]);
    }

    // The output whose nibble is the low half of byte b of a row; the high half's is 32 further.
    static int64_t low_output(int64_t b) { return b / 32 * 64 + b % 32; }

    // The sums of high halves stay raised until they are untangled.
    template <int QUADS, bool FIRST>
    static void step(const Int4Layer&, V (*r)[4], const V* counts, int64_t b, int32_t* sums) {
        for (int q = 0; q < QUADS; ++q) Isa::interleave(r[q]);
        for (int k = 0; k < 4; ++k) {
            int32_t* low = sums + low_output(b + k * QUARTER);
            V l = FIRST ? Isa::zero() : Isa::load(low), h = FIRST ? Isa::zero() : Isa::load(low + 32);
            for (int q = 0; q < QUADS; ++q) {
                l = Isa::dot(l, Isa::low(r[q][k]), counts[q]);
                h = Isa::dot(h, Isa::raised(r[q][k]), counts[q]);
            }
            Isa::store(low, l);
            Isa::store(low + 32, h);
        }
    }

    static void untangle(const Int4Layer&, int64_t b, int32_t* sums) {
        for (int half = 0; half < 64; half += 32) {
            V s[4];
            for (int k = 0; k < 4; ++k) {
                s[k] = Isa::load(sums + half + low_output(b + k * QUARTER));
                if (half) s[k] = Isa::lowered(s[k]);
            }
            Isa::lanes(s);
            for (int k = 0; k < 4; ++k) Isa::store(sums + half + low_output(b + k * QUARTER), s[k]);
        }
    }

    // --- prefill ---

    template <class Layer>
    static void pack(const Layer& layer, int64_t first, const int32_t* row, int live, Range outputs, uint8_t* tile) {
        const int64_t bytes = Layer::bytes(outputs.end - outputs.begin), whole = Layer::bytes(TILE);
        alignas(64) uint8_t tail[4][TILE] = {};
        const Rows all = layer.rows(outputs.begin);
        for (int j = 0; j < live; j += 4, tile += 4 * TILE) {
            const uint8_t* rows[4];
            for (int r = 0; r < 4; ++r) {
                rows[r] = all[first + row[j + r < live ? j + r : j]];
                prefetch(rows[r] + 2 * whole);
                if (bytes == whole) continue;
                std::memcpy(tail[r], rows[r], bytes);
                rows[r] = tail[r];
            }
            pack_quad(layer, rows, tile);
        }
    }

    static void pack_quad(const Int8Layer& layer, const uint8_t* const* rows, uint8_t* tile) {
        for (int b = 0; b < TILE; b += BYTES) {
            V r[4];
            for (int k = 0; k < 4; ++k) r[k] = Isa::code(Isa::load(rows[k] + b), layer.flip);
            Isa::interleave(r);
            Isa::lanes(r);
            for (int k = 0; k < 4; ++k) Isa::store(tile + 4 * b + k * BYTES, r[k]);
        }
    }

    static void pack_quad(const Int4Layer&, const uint8_t* const* rows, uint8_t* tile) {
        using N = typename Isa::Narrow;
        for (int b = 0; b < TILE / 2; b += N::BYTES) {
            typename N::V r[4], low[4], high[4];
            for (int k = 0; k < 4; ++k) r[k] = N::load(rows[k] + b);
            N::interleave(r);
            N::lanes(r);
            for (int k = 0; k < 4; ++k) {
                low[k] = N::low(r[k]), high[k] = N::high(r[k]);
                N::store(tile + 4 * b + k * N::BYTES, low[k]);
                N::store(tile + 4 * (b + 32) + k * N::BYTES, high[k]);
            }
        }
    }

    // counts of TOKENS tokens, `stride` apart; |count| <= LIMIT
    static void product(const uint8_t* tile, int quads, const int8_t* counts, int64_t stride, int32_t* sums) {
        product_by(tile, quads, counts, stride, sums, [](V s, V codes, V four) { return Isa::dot(s, codes, four); });
    }

    // The same for counts of any int8 value.
    static void whole_product(const uint8_t* tile, int quads, const int8_t* counts, int64_t stride, int32_t* sums) {
        product_by(tile, quads, counts, stride, sums,
                   [](V s, V codes, V four) { return Isa::whole_dot(s, codes, four); });
    }

    template <class Add>
    static void product_by(const uint8_t* tile, int quads, const int8_t* counts, int64_t stride, int32_t* sums,
                           Add add) {
        for (int b = 0; b < TILE; b += BYTES) {
            V s[TOKENS][4];
            for (int m = 0; m < TOKENS; ++m)
                for (int k = 0; k < 4; ++k) s[m][k] = Isa::zero();
            for (int q = 0; q < quads; ++q) {
                V codes[4];
                for (int k = 0; k < 4; ++k) codes[k] = Isa::load(tile + 4 * (q * TILE + b) + k * BYTES);
                for (int m = 0; m < TOKENS; ++m) {
                    const V four = Isa::broadcast(counts + m * stride + 4 * q);
                    for (int k = 0; k < 4; ++k) s[m][k] = add(s[m][k], codes[k], four);
                }
            }
            for (int m = 0; m < TOKENS; ++m)
                for (int k = 0; k < 4; ++k) Isa::store(sums + m * TILE + b + k * QUARTER, s[m][k]);
        }
    }
};

}  // namespace
}  // namespace sbedge
