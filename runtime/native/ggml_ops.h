/* Callbacks for ggml_custom_4d: our kernels as nodes of a ggml graph, on ggml's own threads.
 *
 * A callback reads nothing of ggml's structs: all it needs stands in the structure that is its userdata, filled in by
 * whoever built the graph, once ggml has placed the tensors. The mirror of these structures is ggml_ops.py.
 */
#ifndef SBEDGE_GGML_OPS_H
#define SBEDGE_GGML_OPS_H

#include "sbedge.h"

#ifdef __cplusplus
extern "C" {
#endif

#define SBEDGE_MAX_LINEARS 4

/* x [n, width], normalized first if norm_weight is given -> counts [n, width], thresholds [n] */
typedef struct {
    const float *x, *norm_weight;
    float eps, k, dead_zone;
    int64_t n, width;
    int32_t* counts;
    float* thresholds;
} sbedge_op_encode;

/* Linears of one spiked input, side by side in y [n, y_stride]. `gated`: two linears, gate and up, of the same width F;
 * y [n, 2F] is scratch then and `out` [n, F] receives silu(gate) * up. */
typedef struct {
    const int32_t* counts;
    const float* thresholds;
    int64_t n, count;
    const void* weights[SBEDGE_MAX_LINEARS]; /* sbedge_w8 or sbedge_w4 */
    int64_t bits[SBEDGE_MAX_LINEARS];        /* 8 or 4 */
    int64_t columns[SBEDGE_MAX_LINEARS];     /* where each begins in a row of y */
    float* y;
    int64_t y_stride, gated;
    float* out;
    int64_t* fetched; /* weight bytes read are added here */
} sbedge_op_linears;

typedef struct {
    sbedge_gla_input in;
    int64_t n;
    float *state, *out, *scratch;
} sbedge_op_gla;

typedef struct {
    sbedge_window_input in;
    const int64_t* position; /* read at every run: one graph serves all positions */
    int64_t n;
    sbedge_ring ring;
    float *out, *scratch;
} sbedge_op_window;

SBEDGE_API void sbedge_ggml_encode(void* dst, int ith, int nth, void* op);
SBEDGE_API void sbedge_ggml_linears(void* dst, int ith, int nth, void* op);
SBEDGE_API void sbedge_ggml_gla(void* dst, int ith, int nth, void* op);
SBEDGE_API void sbedge_ggml_window(void* dst, int ith, int nth, void* op);

#ifdef __cplusplus
}
#endif
#endif
