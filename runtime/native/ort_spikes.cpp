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

// --- SpikeLinear ---------------------------------------------------------------------------------------------------

void Int8Weights::build(Checked& node, const Tensors& given) {
    node.expect(given.scales, "scales", {ANY, ANY});
    const int64_t groups = given.scales.shape.dims[0], out = given.scales.shape.dims[1], m = given.values.size();
    if (given.codes.shape.rank == 4) {
        layer.stripe = stripe_of(node, given.codes.shape.dims[3], out);
        node.expect(given.codes, "codes", {out / layer.stripe, groups, SBEDGE_GROUP, layer.stripe});
    } else {
        node.expect(given.codes, "codes", {groups, SBEDGE_GROUP, out});
    }
    node.expect(given.values, "residual_values", {m});
    node.expect(given.inputs, "residual_inputs", {m});
    node.expect(given.outputs, "residual_outputs", {m});
    layer.in = groups * SBEDGE_GROUP;
    layer.out = out;
    layer.unsigned_codes = 1;
    if (m) build_residual(node, given);
}

void Int8Weights::build_residual(Checked& node, const Tensors& given) {
    const int64_t m = given.values.size(), rows = layer.in, out = layer.out;
    const int64_t *input = given.inputs.as<int64_t>(), *output = given.outputs.as<int64_t>();
    const float *value = given.values.as<float>(), *scales = given.scales.as<float>();
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
    layer.residual_start = start_.get();
    layer.residual_output = output_.get();
    layer.residual_value = value_.get();
}

namespace {

enum SpikeLinearInput { COUNT, THRESHOLD, CODES, SCALES, RESIDUAL_INPUTS, RESIDUAL_OUTPUTS, RESIDUAL_VALUES };

// y = threshold * count @ weight; `matmul` is a kernel without its first argument.
template <class Matmul>
void multiply(Run& run, int64_t in, int64_t out, int64_t weight_bytes, Matmul matmul) {
    const Tensor count = run.input(COUNT), threshold = run.input(THRESHOLD);
    const int64_t n = count.shape.dims[1];
    run.expect(count, "count", {1, ANY, in});
    run.expect(threshold, "threshold", {1, n, 1});
    auto* y = static_cast<float*>(run.output(0, {1, n, out}));
    if (run.failed() || !n) return;
    const Scratch::Loan scratch(run.registration.scratch, n * in * sizeof(int32_t), run);
    auto* counts = scratch.as<int32_t>();
    run.parallel(n / TOKENS_A_THREAD, [&](int ith, int nth) {
        const Range mine = share(n, 1, ith, nth);
        to_int32(count.as<float>() + mine.begin * in, (mine.end - mine.begin) * in, counts + mine.begin * in);
    });
    run.parallel((out + OUTPUT_BLOCK - 1) / OUTPUT_BLOCK, [&](int ith, int nth) {
        run.registration.fetched += matmul(counts, threshold.as<float>(), n, y, out, ith, nth);
    });
    run.registration.dense += weight_bytes;
}

}  // namespace

void SpikeLinear::create(Construction& node) {
    const Int8Weights::Tensors given{node.constant(CODES), node.constant(SCALES), node.constant(RESIDUAL_INPUTS),
                                     node.constant(RESIDUAL_OUTPUTS), node.constant(RESIDUAL_VALUES)};
    constant_ = given.codes.value && given.scales.value && given.inputs.value && given.outputs.value &&
                given.values.value;
    if (constant_) weights_.build(node, given);
}

void SpikeLinear::run(Run& run) const {
    Int8Weights own;
    if (!constant_)
        own.build(run, {run.input(CODES), run.input(SCALES), run.input(RESIDUAL_INPUTS), run.input(RESIDUAL_OUTPUTS),
                        run.input(RESIDUAL_VALUES)});
    sbedge_w8 layer = (constant_ ? weights_ : own).layer;
    layer.codes = static_cast<const int8_t*>(run.data(CODES));
    layer.scales = static_cast<const float*>(run.data(SCALES));
    multiply(run, layer.in, layer.out, layer.in * layer.out, [&](auto... arguments) {
        return sbedge_spike_matmul_w8(&layer, arguments...);
    });
}

// --- SpikeLinear4 --------------------------------------------------------------------------------------------------

namespace {

enum SpikeLinear4Input { NIBBLES = 2, SCALES_4, ZEROS };

sbedge_w4 layer_of(Checked& node, const Tensor& nibbles, const Tensor& scales, const Tensor& zeros) {
    node.expect(nibbles, "nibbles", {ANY, ANY, ANY});
    node.expect(scales, "scales", {ANY, ANY});
    const int64_t groups = scales.shape.dims[0], out = scales.shape.dims[1], in = nibbles.shape.dims[1];
    const int64_t group = groups ? in / groups : 0;
    sbedge_w4 layer{};
    layer.in = in, layer.out = out, layer.group = group;
    layer.stripe = stripe_of(node, 2 * nibbles.shape.dims[2], out);
    node.expect(nibbles, "nibbles", {out / layer.stripe, groups * group, layer.stripe / 2});
    node.expect(zeros, "zeros", {groups, out});
    if (!node.failed() && ((group != 32 && group != 128) || out % OUTPUT_BLOCK))
        node.fail("groups of %lld inputs and %lld outputs, expected 32 or 128 inputs and a multiple of %lld outputs",
                  (long long)group, (long long)out, (long long)OUTPUT_BLOCK);
    return layer;
}

}  // namespace

void SpikeLinear4::create(Construction& node) {
    const Tensor nibbles = node.constant(NIBBLES), scales = node.constant(SCALES_4), zeros = node.constant(ZEROS);
    constant_ = nibbles.value && scales.value && zeros.value;
    if (constant_) layer_ = layer_of(node, nibbles, scales, zeros);
}

void SpikeLinear4::run(Run& run) const {
    sbedge_w4 layer = constant_ ? layer_ : layer_of(run, run.input(NIBBLES), run.input(SCALES_4), run.input(ZEROS));
    layer.nibbles = static_cast<const uint8_t*>(run.data(NIBBLES));
    layer.scales = static_cast<const uint16_t*>(run.data(SCALES_4));
    layer.zeros = static_cast<const uint8_t*>(run.data(ZEROS));
    multiply(run, layer.in, layer.out, layer.in * layer.out / 2, [&](auto... arguments) {
        return sbedge_spike_matmul_w4(&layer, arguments...);
    });
}

}  // namespace ort
}  // namespace sbedge
