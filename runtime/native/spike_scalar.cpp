// The event-driven matmul in plain C++: what runs anywhere, and what the other instruction sets are compared with.
#include "spike_impl.h"

namespace sbedge {
namespace {

struct Scalar {
    static constexpr int LIMIT = 127, OFFSET = 0, TOKENS = 1;

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

    static void product(const uint8_t* tile, int quads, const int8_t* counts, int32_t* sums) {
        std::memset(sums, 0, TILE * sizeof(int32_t));
        for (int q = 0; q < quads; ++q)
            for (int o = 0; o < TILE; ++o)
                for (int j = 0; j < 4; ++j)
                    sums[o] += static_cast<int8_t>(tile[(q * TILE + o) * 4 + j]) * counts[q * 4 + j];
    }
};

}  // namespace

const SpikeKernels* const spike_scalar = &spike_table<Scalar>;

}  // namespace sbedge
