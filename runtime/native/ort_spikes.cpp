#include "ort_spikes.h"

#include <cmath>
#include <cstring>

namespace sbedge {
namespace ort {
namespace {

constexpr int64_t TOKENS_A_THREAD = 16;         // whose counts are converted: fewer are not worth waking a thread
constexpr float LARGEST_COUNT = 2147483520.0f;  // that is a float and fits int32

// Counts as the graph has them, whole numbers in float32, for the kernels.
void to_int32(const float* counts, int64_t n, int32_t* whole) {
    for (int64_t i = 0; i < n; ++i) {
        float count = counts[i] != counts[i] ? 0.0f : counts[i];
        count = count > LARGEST_COUNT ? LARGEST_COUNT : count;
        whole[i] = static_cast<int32_t>(count < -LARGEST_COUNT ? -LARGEST_COUNT : count);
    }
}

// The stripe of a weight of `out` outputs: a part of them that the kernels take.
int64_t stripe_of(Checked& node, int64_t stripe, int64_t out) {
    if (stripe > 0 && (stripe == out || (stripe % OUTPUT_BLOCK == 0 && out % stripe == 0))) return stripe;
    node.fail("stripes of %lld outputs, expected a multiple of %lld that divides %lld", (long long)stripe,
              (long long)OUTPUT_BLOCK, (long long)out);
    return out > 0 ? out : 1;
}

}  // namespace

// --- SpikeEncode ---------------------------------------------------------------------------------------------------

void SpikeEncode::create(Construction& node) {
    k_ = node.real("k");
    dead_zone_ = node.real("dead_zone", 0.0f);
    if (!(k_ > 0)) node.fail("k is %g, expected more than 0", k_);
}

void SpikeEncode::run(Run& run) const {
    const Tensor x = run.input(0);
    if (!run.failed() && !x.shape.rank) run.fail("x has no dimensions");
    if (run.failed()) return;
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

// --- weights -------------------------------------------------------------------------------------------------------

void Int8Weight::build(Checked& node, const Tensor (&given)[PARTS]) {
    const auto& [codes, scales, inputs, outputs, values] = given;
    node.expect(scales, "scales", {ANY, ANY});
    const int64_t groups = scales.shape.dims[0], out = scales.shape.dims[1], m = values.size();
    if (codes.shape.rank == 4) {
        layer_.stripe = stripe_of(node, codes.shape.dims[3], out);
        node.expect(codes, "codes", {out / layer_.stripe, groups, SBEDGE_GROUP, layer_.stripe});
    } else {
        node.expect(codes, "codes", {groups, SBEDGE_GROUP, out});
    }
    node.expect(inputs, "residual_inputs", {m});
    node.expect(outputs, "residual_outputs", {m});
    node.expect(values, "residual_values", {m});
    layer_.in = groups * SBEDGE_GROUP;
    layer_.out = out;
    layer_.unsigned_codes = 1;
    if (m) build_residual(node, given);
}

void Int8Weight::build_residual(Checked& node, const Tensor (&given)[PARTS]) {
    const int64_t m = given[4].size(), rows = layer_.in, out = layer_.out;
    const float *scales = given[1].as<float>(), *value = given[4].as<float>();
    const int64_t *input = given[2].as<int64_t>(), *output = given[3].as<int64_t>();
    if (node.failed()) return;
    if (m > INT32_MAX) return node.fail("%lld residual values, more than fit int32", (long long)m);
    start_.reset(new (std::nothrow) int32_t[rows + 2]());
    output_.reset(new (std::nothrow) int32_t[m]);
    value_.reset(new (std::nothrow) int32_t[m]);
    if (!start_ || !output_ || !value_) return node.fail("no memory for %lld residual values", (long long)m);
    for (int64_t e = 0; e < m; ++e) {
        if (input[e] < 0 || input[e] >= rows || output[e] < 0 || output[e] >= out)
            return node.fail("residual %lld lies at [%lld, %lld] of [%lld, %lld]", (long long)e, (long long)input[e],
                             (long long)output[e], (long long)rows, (long long)out);
        ++start_[input[e] + 2];
    }
    for (int64_t i = 0; i < rows; ++i) start_[i + 2] += start_[i + 1];
    for (int64_t e = 0; e < m; ++e) {   // start_[i + 1] is where the next entry of channel i goes
        const float lacking = value[e] / scales[input[e] / SBEDGE_GROUP * out + output[e]];
        const float whole = std::nearbyint(lacking);
        if (!(std::fabs(whole) <= 1 << 30) || std::fabs(lacking - whole) > 1e-3f * (1 + std::fabs(whole)))
            return node.fail("residual %lld is %g times its scale, expected a whole number", (long long)e, lacking);
        const int32_t place = start_[input[e] + 1]++;
        output_[place] = static_cast<int32_t>(output[e]);
        value_[place] = static_cast<int32_t>(whole);
    }
    for (int64_t i = 0; i < rows; ++i)
        for (int32_t e = start_[i] + 1; e < start_[i + 1]; ++e)     // our exporter's are in order already
            for (int32_t j = e; j > start_[i] && output_[j - 1] > output_[j]; --j) {
                std::swap(output_[j - 1], output_[j]);
                std::swap(value_[j - 1], value_[j]);
            }
    layer_.residual_start = start_.get();
    layer_.residual_output = output_.get();
    layer_.residual_value = value_.get();
}

sbedge_w8 Int8Weight::bound(Run& run, size_t first) const {
    Layer layer = layer_;
    layer.codes = static_cast<const int8_t*>(run.data(first));
    layer.scales = static_cast<const float*>(run.data(first + 1));
    return layer;
}

void Int4Weight::build(Checked& node, const Tensor (&given)[PARTS]) {
    const auto& [nibbles, scales, zeros] = given;
    node.expect(nibbles, "nibbles", {ANY, ANY, ANY});
    node.expect(scales, "scales", {ANY, ANY});
    const int64_t groups = scales.shape.dims[0], out = scales.shape.dims[1], in = nibbles.shape.dims[1];
    const int64_t group = groups ? in / groups : 0;
    layer_.in = in, layer_.out = out, layer_.group = group;
    layer_.stripe = stripe_of(node, 2 * nibbles.shape.dims[2], out);
    node.expect(nibbles, "nibbles", {out / layer_.stripe, groups * group, layer_.stripe / 2});
    node.expect(zeros, "zeros", {groups, out});
    if (!node.failed() && ((group != 32 && group != 64 && group != 128) || out % OUTPUT_BLOCK))
        node.fail("groups of %lld inputs and %lld outputs, expected 32, 64 or 128 inputs and a multiple of %lld outputs",
                  (long long)group, (long long)out, (long long)OUTPUT_BLOCK);
}

sbedge_w4 Int4Weight::bound(Run& run, size_t first) const {
    Layer layer = layer_;
    layer.nibbles = static_cast<const uint8_t*>(run.data(first));
    layer.scales = static_cast<const uint16_t*>(run.data(first + 1));
    layer.zeros = static_cast<const uint8_t*>(run.data(first + 2));
    return layer;
}

// --- linears -------------------------------------------------------------------------------------------------------

template <class Weight, int M>
void SpikeLinears<Weight, M>::create(Construction& node) {
    for (int m = 0; m < M; ++m) {
        Tensor given[Weight::PARTS];
        for (int i = 0; i < Weight::PARTS; ++i) {
            given[i] = node.constant(first(m) + i);
            constant_ = constant_ && given[i].value;
        }
        if (constant_) weights_[m].build(node, given);
    }
}

template <class Weight, int M>
void SpikeLinears<Weight, M>::run(Run& run) const {
    if (constant_) return multiply(run, weights_);
    Weight own[M];
    for (int m = 0; m < M; ++m) {
        Tensor given[Weight::PARTS];
        for (int i = 0; i < Weight::PARTS; ++i) given[i] = run.input(first(m) + i);
        own[m].build(run, given);
    }
    multiply(run, own);
}

template <class Weight, int M>
void SpikeLinears<Weight, M>::multiply(Run& run, const Weight (&weights)[M]) const {
    const Tensor count = run.input(0), threshold = run.input(1);
    typename Weight::Layer layers[M];
    float* y[M];
    const int64_t n = count.shape.dims[1], in = count.shape.dims[2];
    run.expect(threshold, "threshold", {1, n, 1});
    int64_t most = 0;
    for (int m = 0; m < M; ++m) {
        layers[m] = weights[m].bound(run, first(m));
        run.expect(count, "count", {1, ANY, layers[m].in});
        y[m] = static_cast<float*>(run.output(m, {1, n, layers[m].out}));
        if (layers[m].out > most) most = layers[m].out;
    }
    if (run.failed() || !n) return;
    const Scratch::Loan scratch(run.registration.scratch, n * in * sizeof(int32_t), run);
    auto* counts = scratch.as<int32_t>();
    run.parallel(n / TOKENS_A_THREAD, [&](int ith, int nth) {
        const Range mine = share(n, 1, ith, nth);
        to_int32(count.as<float>() + mine.begin * in, (mine.end - mine.begin) * in, counts + mine.begin * in);
    });
    run.parallel((most + OUTPUT_BLOCK - 1) / OUTPUT_BLOCK, [&](int ith, int nth) {
        int64_t fetched = 0;
        for (int m = 0; m < M; ++m)
            fetched += Weight::matmul(&layers[m], counts, threshold.as<float>(), n, y[m], layers[m].out, ith, nth);
        run.registration.fetched += fetched;
    });
    for (int m = 0; m < M; ++m) run.registration.dense += Weight::bytes(layers[m]) * passes(n);
}

template class SpikeLinears<Int8Weight, 1>;
template class SpikeLinears<Int8Weight, 2>;
template class SpikeLinears<Int8Weight, 3>;
template class SpikeLinears<Int4Weight, 1>;
template class SpikeLinears<Int4Weight, 2>;
template class SpikeLinears<Int4Weight, 3>;

}  // namespace ort
}  // namespace sbedge
