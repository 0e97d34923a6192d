#include "ort_spikes.h"

#include <cstring>

namespace sbedge {
namespace ort {

void SpikeEncode::create(Construction& node) {
    k_ = node.real("k");
    dead_zone_ = node.real("dead_zone", 0.0f);
    if (!(k_ > 0)) node.fail("k is %g, expected more than 0", k_);
}

void SpikeEncode::run(Run& run) const {
    const Tensor x = run.input(0);
    if (!x.shape.rank) return run.fail("x has no dimensions");
    Shape columns = x.shape;
    const int64_t width = columns.dims[columns.rank - 1];
    columns.dims[columns.rank - 1] = 1;
    auto* count = static_cast<float*>(run.output(0, x.shape));
    auto* threshold = static_cast<float*>(run.output(1, columns));
    if (run.failed() || !x.size()) return;
    const int64_t n = x.size() / width;
    run.parallel(n, [&](int ith, int nth) {
        const Range rows = share(n, 1, ith, nth);
        for (int64_t t = rows.begin; t < rows.end; ++t) {
            // The kernel's counts are int32; they become the graph's floats where they lie.
            float* row = count + t * width;
            sbedge_spike_encode(x.as<float>() + t * width, 1, width, k_, dead_zone_, reinterpret_cast<int32_t*>(row),
                                threshold + t, 0, 1);
            for (int64_t i = 0; i < width; ++i) {
                int32_t whole;
                std::memcpy(&whole, row + i, sizeof(whole));
                row[i] = static_cast<float>(whole);
            }
        }
    });
}

}  // namespace ort
}  // namespace sbedge
