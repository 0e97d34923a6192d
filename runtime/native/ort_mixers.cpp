#include "ort_mixers.h"

#include <cmath>
#include <cstring>

namespace sbedge {
namespace ort {
namespace {

constexpr int64_t MAX_HEADS = 1 << 16, MAX_HEAD_SIZE = 1 << 16, MAX_POSITION = int64_t(1) << 62;
constexpr int64_t TOKENS_A_THREAD = 8;  // whose angles are worth waking a thread

// The memory of output `index`, which holds what `past` does: the same memory, or a copy.
template <class T>
T* present(Run& run, size_t index, const Tensor& past) {
    auto* memory = static_cast<T*>(run.output(index, past.shape));
    if (!run.failed() && memory != past.data) std::memcpy(memory, past.data, past.size() * sizeof(T));
    return memory;
}

// position_ids [1, n] -> the first one; the others follow it one by one.
int64_t first_position(Run& run, const Tensor& ids, int64_t n) {
    run.expect(ids, "position_ids", {1, n});
    if (run.failed() || !n) return 0;
    const int64_t* position = ids.as<int64_t>();
    if (*position < 0 || *position > MAX_POSITION) run.fail("position %lld is out of range", (long long)*position);
    for (int64_t t = 1; t < n && !run.failed(); ++t)
        if (position[t] != position[0] + t) run.fail("positions are not consecutive");
    return *position;
}

}  // namespace

void Heads::create(Construction& node) {
    heads = node.whole("num_heads", 1, MAX_HEADS);
    groups = node.whole("kv_num_heads", 1, heads);
    scale = node.real("scale");
    if (heads % groups) node.fail("num_heads %lld is no multiple of kv_num_heads %lld", (long long)heads, (long long)groups);
}

int64_t Heads::size(Checked& node, const Tensor& q) const {
    node.expect(q, "q", {1, ANY, ANY});
    const int64_t d = q.shape.dims[2] / heads;
    node.expect(q, "q", {1, ANY, heads * d});
    if (!node.failed() && (d < 1 || d > MAX_HEAD_SIZE)) node.fail("head size is %lld", (long long)d);
    if (!node.failed() && std::fabs(scale * std::sqrt(float(d)) - 1) > 1e-4f)
        node.fail("scale is %g, expected %g for heads of %lld", scale, 1 / std::sqrt(double(d)), (long long)d);
    return d;
}

// --- GLA -----------------------------------------------------------------------------------------------------------

void GatedLinearAttention::create(Construction& node) {
    heads_.create(node);
    epsilon_ = node.real("epsilon");
}

void GatedLinearAttention::run(Run& run) const {
    const Tensor q = run.input(0), k = run.input(1), v = run.input(2), gate = run.input(3), norm = run.input(4);
    const Tensor past = run.input(5);
    const int64_t H = heads_.heads, G = heads_.groups, d = heads_.size(run, q), n = q.shape.dims[1];
    run.expect(k, "k", {1, n, G * d});
    run.expect(v, "v", {1, n, G * d});
    run.expect(gate, "gate", {1, n, G * d});
    run.expect(norm, "norm_weight", {d});
    run.expect(past, "past", {1, G, d, d});
    auto* y = static_cast<float*>(run.output(0, q.shape));
    auto* state = present<float>(run, 1, past);
    if (run.failed() || !n) return;
    const int64_t threads = run.registration.threads;
    const Scratch::Loan scratch(run.registration.scratch, sbedge_gla_scratch(H, G, d, n) * threads * sizeof(float), run);
    sbedge_gla_input given{H, G, d, q.as<float>(), k.as<float>(), v.as<float>(), gate.as<float>(),
                                 H * d, G * d, G * d, G * d, norm.as<float>(), epsilon_, 0};
    run.parallel(threads, [&](int ith, int nth) { sbedge_gla(&given, n, state, y, scratch.as<float>(), ith, nth); });
}

// --- sliding window ------------------------------------------------------------------------------------------------

void RotaryAngles::run(Run& run) const {
    const Tensor positions = run.input(0), frequencies = run.input(1);
    const int64_t n = positions.shape.dims[1], half = frequencies.shape.dims[0];
    run.expect(positions, "position_ids", {1, ANY});
    run.expect(frequencies, "inverse_frequencies", {ANY});
    auto* cos = static_cast<float*>(run.output(0, {1, n, half}));
    auto* sin = static_cast<float*>(run.output(1, {1, n, half}));
    if (run.failed()) return;
    run.parallel(n / TOKENS_A_THREAD, [&](int ith, int nth) {
        const Range mine = share(n, 1, ith, nth);
        for (int64_t t = mine.begin; t < mine.end; ++t) {
            const double position = static_cast<double>(positions.as<int64_t>()[t]);
            for (int64_t i = 0; i < half; ++i) {    // the C library reduces an angle of any size exactly
                const double angle = position * frequencies.as<double>()[i];
                cos[t * half + i] = static_cast<float>(std::cos(angle));
                sin[t * half + i] = static_cast<float>(std::sin(angle));
            }
        }
    });
}

namespace {

// Everything after q, k, v and the ring: `next` is the input that follows it, `spike_k` 0 where queries do not spike.
void attend(Run& run, const Heads& heads, const Tensor& q, sbedge_ring& ring, size_t next, float spike_k) {
    const Tensor k = run.input(1), v = run.input(2), cos = run.input(next), sin = run.input(next + 1);
    const int64_t H = heads.heads, G = ring.groups, d = ring.d, n = q.shape.dims[1];
    run.expect(k, "k", {1, n, G * d});
    run.expect(v, "v", {1, n, G * d});
    run.expect(cos, "cos", {1, n, d / 2});
    run.expect(sin, "sin", {1, n, d / 2});
    const int64_t position = first_position(run, run.input(next + 2), n);
    auto* y = static_cast<float*>(run.output(0, q.shape));
    if (run.failed() || !n) return;
    const int64_t threads = run.registration.threads;
    const int64_t floats = sbedge_window_scratch(H, G, d, ring.window, n) * threads;
    const Scratch::Loan scratch(run.registration.scratch, floats * sizeof(float), run);
    sbedge_window_input given{H, q.as<float>(), k.as<float>(), v.as<float>(), cos.as<float>(), sin.as<float>(),
                              H * d, G * d, G * d, spike_k, 0};
    run.parallel(threads, [&](int ith, int nth) {
        sbedge_window(&given, position, n, &ring, y, scratch.as<float>(), ith, nth);
    });
}

// The sizes of a ring, from its keys [1, W, G, d].
sbedge_ring ring_of(Run& run, const Heads& heads, const Tensor& q, const Tensor& keys, const Tensor& values) {
    const int64_t d = heads.size(run, q), W = keys.shape.dims[1];
    run.expect(keys, "past_key", {1, ANY, heads.groups, d});
    run.expect(values, "past_value", {1, W, heads.groups, d});
    if (!run.failed() && (W < 1 || d % 2)) run.fail("a window of %lld keys of %lld", (long long)W, (long long)d);
    return {W, heads.groups, d, nullptr, nullptr, nullptr, nullptr, SBEDGE_F32};
}

}  // namespace

void SlidingWindowAttention::create(Construction& node) { heads_.create(node); }

void SlidingWindowAttention::run(Run& run) const {
    const Tensor q = run.input(0), keys = run.input(3), values = run.input(4);
    sbedge_ring ring = ring_of(run, heads_, q, keys, values);
    ring.keys = present<float>(run, 1, keys);
    ring.values = present<float>(run, 2, values);
    attend(run, heads_, q, ring, 5, 0);
}

void SpikingWindowAttention::create(Construction& node) {
    heads_.create(node);
    spike_k_ = node.real("spike_k");
    if (!(spike_k_ > 0)) node.fail("spike_k is %g, expected more than 0", spike_k_);
}

void SpikingWindowAttention::run(Run& run) const {
    const Tensor q = run.input(0), keys = run.input(3), key_scales = run.input(4), values = run.input(5);
    const Tensor value_scales = run.input(6);
    sbedge_ring ring = ring_of(run, heads_, q, keys, values);
    run.expect(key_scales, "past_key_scale", {1, ring.window, ring.groups});
    run.expect(value_scales, "past_value_scale", {1, ring.window, ring.groups});
    ring.type = SBEDGE_INT8;
    ring.keys = present<int8_t>(run, 1, keys);
    ring.key_scales = present<float>(run, 2, key_scales);
    ring.values = present<int8_t>(run, 3, values);
    ring.value_scales = present<float>(run, 4, value_scales);
    attend(run, heads_, q, ring, 7, spike_k_);
}

}  // namespace ort
}  // namespace sbedge
