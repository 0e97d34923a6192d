// The event-driven matmul in plain C++: what runs anywhere, and what the other instruction sets are compared with.
#include "dense.h"

namespace sbedge {
namespace {

template <int BITS>
struct ScalarRow {
    float sum = 0;

    void add(const uint8_t* codes, const int8_t* x, int32_t, float scale) {
        int32_t products = 0;
        for (int i = 0; i < 32; ++i)
            products += x[i] * (BITS == 8    ? static_cast<int8_t>(codes[i])
                                : i < 16 ? (codes[i] & 15) - 8
                                         : (codes[i - 16] >> 4) - 8);
        sum += static_cast<float>(products) * scale;
    }
    float total() const { return sum; }
};

struct ScalarQuad {
    struct V {
        uint8_t byte[16];
    };
    static V load(const uint8_t* p) {
        V v;
        std::memcpy(v.byte, p, 16);
        return v;
    }
    static void store(uint8_t* p, const V& v) { std::memcpy(p, v.byte, 16); }
    static V code(const V& v) { return v; }
    static V low(V v) {
        for (uint8_t& b : v.byte) b &= 15;
        return v;
    }
    static V high(V v) {
        for (uint8_t& b : v.byte) b >>= 4;
        return v;
    }
    static void transpose(V* r) {
        V out[4];
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) std::memcpy(out[i].byte + 4 * j, r[j].byte + 4 * i, 4);
        for (int i = 0; i < 4; ++i) r[i] = out[i];
    }
};

struct Scalar {
    using Quad = ScalarQuad;
    template <int BITS>
    using Row = ScalarRow<BITS>;
    static constexpr int LIMIT = 127, OFFSET = 0, TOKENS = 1;

    static float widen(uint16_t half) { return half_to_float(half); }
    static void widen(const uint16_t* halves, float* floats) {
        for (int i = 0; i < TILE; ++i) floats[i] = half_to_float(halves[i]);
    }

    template <class Layer>
    static void rows(const Layer& layer, const Live& live, const Live&, Range outputs, int32_t* sums) {
        std::memset(sums, 0, (outputs.end - outputs.begin) * sizeof(int32_t));
        const Rows rows = layer.rows(outputs.begin);
        for (int j = 0; j < live.live; ++j)
            layer.add_row(rows[live.first + live.row[j]], live.count[j], outputs.end - outputs.begin, OFFSET, sums);
    }

    template <class Layer>
    static void pack(const Layer& layer, int64_t first, const int32_t* row, int live, Range outputs, uint8_t* tile) {
        const Rows rows = layer.rows(outputs.begin);
        for (int j = 0; j < live; ++j) {
            int32_t codes[TILE] = {};
            layer.add_row(rows[first + row[j]], 1, outputs.end - outputs.begin, OFFSET, codes);
            for (int o = 0; o < TILE; ++o) tile[(j / 4 * TILE + o) * 4 + j % 4] = static_cast<uint8_t>(codes[o]);
        }
        for (int j = live; j % 4; ++j)
            for (int o = 0; o < TILE; ++o) tile[(j / 4 * TILE + o) * 4 + j % 4] = 0;
    }

    static void whole_product(const uint8_t* tile, int quads, const int8_t* counts, int64_t stride, int32_t* sums) {
        product(tile, quads, counts, stride, sums);
    }

    static void product(const uint8_t* tile, int quads, const int8_t* counts, int64_t, int32_t* sums) {
        std::memset(sums, 0, TILE * sizeof(int32_t));
        for (int q = 0; q < quads; ++q)
            for (int o = 0; o < TILE; ++o)
                for (int j = 0; j < 4; ++j)
                    sums[o] += static_cast<int8_t>(tile[(q * TILE + o) * 4 + j]) * counts[q * 4 + j];
    }
};

}  // namespace

const LinearKernels* const spike_scalar = &linear_table<Scalar>;

}  // namespace sbedge
