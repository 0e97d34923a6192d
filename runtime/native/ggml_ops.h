/* Callbacks for ggml_custom_4d: our kernels as nodes of a ggml graph. With a pool they run on its threads, and ggml has
 * one; without, on ggml's own threads.
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

/* x [n, width] -> counts [n, width], thresholds [n] */
typedef struct {
    sbedge_pool* pool;
    const float* x;
    float k, dead_zone;
    int64_t n, width;
    int32_t* counts;
    float* thresholds;
} sbedge_op_encode;

/* x [n, width] in blocks of 32 -> codes [n, width], scales and sums [n, width / 32] */
typedef struct {
    sbedge_pool* pool;
    const float* x;
    int64_t n, width;
    int8_t* codes;
    float* scales;
    int32_t* sums;
} sbedge_op_block_encode;

enum { SBEDGE_W8, SBEDGE_W4, SBEDGE_DENSE };

/* Linears of one encoded input (spikes for SBEDGE_W8 and W4, blocks for SBEDGE_DENSE), side by side in y [n, y_stride].
 * `gated`: two linears, gate and up, of the same width F; y [n, 2F] is scratch then and `out` [n, F] receives
 * silu(gate) * up. */
typedef struct {
    sbedge_pool* pool;
    const int32_t* counts;
    const float* thresholds;
    const int8_t* codes;
    const float* scales;
    const int32_t* sums;
    int64_t n, count;
    const void* weights[SBEDGE_MAX_LINEARS]; /* sbedge_w8, sbedge_w4 or sbedge_dense */
    int64_t kinds[SBEDGE_MAX_LINEARS];
    int64_t columns[SBEDGE_MAX_LINEARS];     /* where each begins in a row of y */
    float* y;
    int64_t y_stride, gated;
    float* out;
    int64_t bytes;    /* of all the weights */
    int64_t* traffic; /* [2]: weight bytes read, and those there are, are added here; NULL for dense weights */
} sbedge_op_linears;

typedef struct {
    sbedge_pool* pool;
    sbedge_gla_input in;
    int64_t n, sequences; /* more than one: n is 1, and a sequence's token is its row of the inputs */
    float* const* states; /* [sequences] */
    float *out, *scratch;
} sbedge_op_gla;

typedef struct {
    sbedge_pool* pool;
    sbedge_window_input in;
    const int64_t* positions; /* [sequences], read at every run: one graph serves all positions */
    int64_t n, sequences;
    sbedge_ring* rings; /* [sequences] */
    float *out, *scratch;
} sbedge_op_window;

SBEDGE_API void sbedge_ggml_encode(void* dst, int ith, int nth, void* op);
SBEDGE_API void sbedge_ggml_block_encode(void* dst, int ith, int nth, void* op);
SBEDGE_API void sbedge_ggml_linears(void* dst, int ith, int nth, void* op);
SBEDGE_API void sbedge_ggml_gla(void* dst, int ith, int nth, void* op);
SBEDGE_API void sbedge_ggml_window(void* dst, int ith, int nth, void* op);

#ifdef __cplusplus
}
#endif
#endif
