#include "ggml_ops.h"

#include <cmath>

#include "internal.h"

extern "C" {

void sbedge_ggml_encode(void*, int ith, int nth, void* userdata) {
    const auto* op = static_cast<const sbedge_op_encode*>(userdata);
    if (op->norm_weight)
        sbedge_norm_spike_encode(op->x, op->norm_weight, op->eps, op->n, op->width, op->k, op->dead_zone, nullptr,
                                 op->counts, op->thresholds, ith, nth);
    else
        sbedge_spike_encode(op->x, op->n, op->width, op->k, op->dead_zone, op->counts, op->thresholds, ith, nth);
}

void sbedge_ggml_linears(void*, int ith, int nth, void* userdata) {
    const auto* op = static_cast<const sbedge_op_linears*>(userdata);
    int64_t fetched = 0;
    for (int64_t i = 0; i < op->count; ++i) {
        float* y = op->y + op->columns[i];
        if (op->bits[i] == 8)
            fetched += sbedge_spike_matmul_w8(static_cast<const sbedge_w8*>(op->weights[i]), op->counts, op->thresholds, op->n, y,
                                   op->y_stride, ith, nth);
        else
            fetched += sbedge_spike_matmul_w4(static_cast<const sbedge_w4*>(op->weights[i]), op->counts, op->thresholds, op->n, y,
                                   op->y_stride, ith, nth);
    }
    __atomic_fetch_add(op->fetched, fetched, __ATOMIC_RELAXED);
    if (!op->gated) return;
    // Gate and up are as wide as each other, so this thread has made both halves of its own columns.
    const int64_t width = op->columns[1];
    const sbedge::Range own = sbedge::share(width, sbedge::OUTPUT_BLOCK, ith, nth);
    for (int64_t t = 0; t < op->n; ++t) {
        const float *gate = op->y + t * op->y_stride, *up = gate + width;
        for (int64_t o = own.begin; o < own.end; ++o)
            op->out[t * width + o] = gate[o] / (1.0f + std::exp(-gate[o])) * up[o];
    }
}

void sbedge_ggml_gla(void*, int ith, int nth, void* userdata) {
    auto* op = static_cast<sbedge_op_gla*>(userdata);
    sbedge_gla(&op->in, op->n, op->state, op->out, op->scratch, ith, nth);
}

void sbedge_ggml_window(void*, int ith, int nth, void* userdata) {
    auto* op = static_cast<sbedge_op_window*>(userdata);
    sbedge_window(&op->in, *op->position, op->n, &op->ring, op->out, op->scratch, ith, nth);
}

}  // extern "C"
