#include "ggml_ops.h"


#include "internal.h"

namespace {

using Part = void (*)(void* op, int ith, int nth);

// On the pool in `parts`, or as the host's thread ith of nth.
void run(sbedge_pool* pool, Part part, void* op, int parts, int ith, int nth) {
    if (pool) sbedge_pool_run(pool, part, op, parts);
    else part(op, ith, nth);
}

int threads(const sbedge_pool* pool) { return pool ? sbedge_pool_threads(pool) : 1; }

void encode(void* userdata, int ith, int nth) {
    const auto* op = static_cast<const sbedge_op_encode*>(userdata);
    sbedge_spike_encode(op->x, op->n, op->width, op->k, op->dead_zone, op->counts, op->thresholds, ith, nth);
}

void block_encode(void* userdata, int ith, int nth) {
    const auto* op = static_cast<const sbedge_op_block_encode*>(userdata);
    sbedge_block_encode(op->x, op->n, op->width, op->codes, op->scales, op->sums, ith, nth);
}

int64_t linear(const sbedge_op_linears* op, int64_t i, int ith, int nth) {
    float* y = op->y + op->columns[i];
    switch (op->kinds[i]) {
        case SBEDGE_W8:
            return sbedge_spike_matmul_w8(static_cast<const sbedge_w8*>(op->weights[i]), op->counts, op->thresholds,
                                          op->n, y, op->y_stride, ith, nth);
        case SBEDGE_W4:
            return sbedge_spike_matmul_w4(static_cast<const sbedge_w4*>(op->weights[i]), op->counts, op->thresholds,
                                          op->n, y, op->y_stride, ith, nth);
        default:
            sbedge_dense_matmul(static_cast<const sbedge_dense*>(op->weights[i]), op->codes, op->scales, op->sums,
                                op->n, y, op->y_stride, ith, nth);
            return 0;
    }
}

void linears(void* userdata, int ith, int nth) {
    const auto* op = static_cast<const sbedge_op_linears*>(userdata);
    int64_t fetched = 0;
    for (int64_t i = 0; i < op->count; ++i) fetched += linear(op, i, ith, nth);
    if (op->traffic) {
        __atomic_fetch_add(&op->traffic[0], fetched, __ATOMIC_RELAXED);
        if (ith == 0) __atomic_fetch_add(&op->traffic[1], op->bytes * sbedge::passes(op->n), __ATOMIC_RELAXED);
    }
    if (!op->gated) return;
    // Gate and up are as wide as each other, so this thread has made both halves of its own columns.
    const int64_t width = op->columns[1];
    const sbedge::Range own = sbedge::share(width, sbedge::OUTPUT_BLOCK, ith, nth);
    for (int64_t t = 0; t < op->n; ++t) {
        const float *gate = op->y + t * op->y_stride, *up = gate + width;
        sbedge_silu_gate(gate + own.begin, up + own.begin, op->out + t * width + own.begin, own.end - own.begin);
    }
}

// More parts than threads, so that a thread which is held up leaves work to the others; but none so narrow that its rows
// are fetched in small pieces, and in prefill no more than needed, for each part collects the spikes of its own.
int linear_parts(const sbedge_op_linears* op) {
    constexpr int64_t OUTPUTS = 1024, MOST = 4;
    const int64_t lots = op->n > 1 ? 1 : op->y_stride / (OUTPUTS * threads(op->pool));
    return threads(op->pool) * static_cast<int>(lots < 1 ? 1 : lots > MOST ? MOST : lots);
}

// Several sequences: each is one part's work, whole.
void gla(void* userdata, int ith, int nth) {
    auto* op = static_cast<sbedge_op_gla*>(userdata);
    if (op->sequences == 1) return sbedge_gla(&op->in, op->n, op->states[0], op->out, op->scratch, ith, nth);
    const sbedge_gla_input& all = op->in;
    float* scratch = op->scratch + ith * sbedge_gla_scratch(all.heads, all.groups, all.d, 1);
    for (int64_t s = ith; s < op->sequences; s += nth) {
        sbedge_gla_input in = all;
        in.q += s * all.q_stride, in.k += s * all.k_stride, in.v += s * all.v_stride, in.gate += s * all.gate_stride;
        sbedge_gla(&in, 1, op->states[s], op->out + s * all.heads * all.d, scratch, 0, 1);
    }
}

void window(void* userdata, int ith, int nth) {
    auto* op = static_cast<sbedge_op_window*>(userdata);
    if (op->sequences == 1)
        return sbedge_window(&op->in, op->positions[0], op->n, op->rings, op->out, op->scratch, ith, nth);
    const sbedge_window_input& all = op->in;
    const int64_t d = op->rings->d, groups = op->rings->groups;
    float* scratch = op->scratch + ith * sbedge_window_scratch(all.heads, groups, d, op->rings->window, 1);
    for (int64_t s = ith; s < op->sequences; s += nth) {
        sbedge_window_input in = all;
        in.q += s * all.q_stride, in.k += s * all.k_stride, in.v += s * all.v_stride;
        in.cos += s * d / 2, in.sin += s * d / 2;
        sbedge_window(&in, op->positions[s], 1, op->rings + s, op->out + s * all.heads * d, scratch, 0, 1);
    }
}

}  // namespace

extern "C" {

void sbedge_ggml_encode(void*, int ith, int nth, void* userdata) {
    const auto* op = static_cast<const sbedge_op_encode*>(userdata);
    run(op->pool, encode, userdata, op->n > 1 ? threads(op->pool) : 1, ith, nth);
}

void sbedge_ggml_block_encode(void*, int ith, int nth, void* userdata) {
    const auto* op = static_cast<const sbedge_op_block_encode*>(userdata);
    run(op->pool, block_encode, userdata, op->n > 1 ? threads(op->pool) : 1, ith, nth);
}

void sbedge_ggml_linears(void*, int ith, int nth, void* userdata) {
    const auto* op = static_cast<const sbedge_op_linears*>(userdata);
    run(op->pool, linears, userdata, linear_parts(op), ith, nth);
}

void sbedge_ggml_gla(void*, int ith, int nth, void* userdata) {
    const auto* op = static_cast<const sbedge_op_gla*>(userdata);
    run(op->pool, gla, userdata, threads(op->pool), ith, nth);
}

void sbedge_ggml_window(void*, int ith, int nth, void* userdata) {
    const auto* op = static_cast<const sbedge_op_window*>(userdata);
    run(op->pool, window, userdata, threads(op->pool), ith, nth);
}

}  // extern "C"
