/* libsbedge: the kernels that make spikes, recurrent state and sliding windows fast. Plain C ABI.
 *
 * Conventions
 *   - Row-major arrays, innermost last in comments: x [n, width].
 *   - Every kernel takes (ith, nth): the caller runs nth parts of the work, each with its ith, on threads of its own.
 *     No two parts write the same byte at once, and none waits for another: they may run in any order, on fewer
 *     threads than nth. (0, 1) does all the work.
 *   - No kernel allocates memory, keeps state or starts threads. Accumulation is int32 or float32.
 *   - Integer sums make results independent of nth and of the instruction set, up to the final float scaling.
 */
#ifndef SBEDGE_H
#define SBEDGE_H

#include <stdint.h>

#if defined(_WIN32)
#define SBEDGE_API __declspec(dllexport)
#else
#define SBEDGE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define SBEDGE_ABI 3
#define SBEDGE_GROUP 128 /* input channels that share a weight scale */

SBEDGE_API int sbedge_abi(void);

/* Instruction sets: "scalar", "avx2", "avxvnni", "avx512vnni", "neon". The best one is chosen at load; SBEDGE_ISA forces one. */
SBEDGE_API const char* sbedge_isa(void);
/* 0, or -1 if this machine or this build does not have it. Not thread-safe: for tests and start-up. */
SBEDGE_API int sbedge_set_isa(const char* name);

/* --- threads ----------------------------------------------------------------------------------------------- */

/* A pool of threads for a host that has none to spare: kernels stay free of them. Idle threads spin for some 20
 * microseconds and then sleep. One job at a time, from one thread at a time. */
typedef struct sbedge_pool sbedge_pool;
SBEDGE_API sbedge_pool* sbedge_pool_new(int threads); /* the caller's own thread included; NULL without memory */
SBEDGE_API void sbedge_pool_free(sbedge_pool* pool);
SBEDGE_API int sbedge_pool_threads(const sbedge_pool* pool);
/* work(argument, part, parts) for each part, on whichever thread is free; returns when all are done. */
SBEDGE_API void sbedge_pool_run(sbedge_pool* pool, void (*work)(void*, int, int), void* argument, int parts);

/* --- spikes ------------------------------------------------------------------------------------------------ */

/* Spike counts of n rows (report section 3.3): threshold = clamp(mean|x| / k, 1e-5, 1e4), count = round_half_even
 * (x / threshold). Channels with |x| < dead_zone * mean|x| are silent (0: none). Rows are shared out over threads.
 * x [n, width] -> counts [n, width], thresholds [n]. The mean is summed in float64 and rounded once. */
SBEDGE_API void sbedge_spike_encode(const float* x, int64_t n, int64_t width, float k, float dead_zone,
                                    int32_t* counts, float* thresholds, int ith, int nth);

/* Linear layers are stored input-channel-major: a silent channel is a row that is never fetched. Outputs may be cut
 * into stripes of `stripe` outputs (a multiple of 64; 0: one stripe of all), the last one narrower; each stripe is
 * an [in, width] array of its own and they follow one another. A thread's share is then one piece of memory. */

/* weight[i, o] = (codes[i, o] + residual) * scales[i / 128, o]; the last group of inputs may be shorter. */
typedef struct {
    int64_t in, out, stripe;
    const int8_t* codes;            /* [in, out] in stripes */
    const float* scales;            /* [ceil(in / 128), out] */
    const float* bias;              /* [out] or NULL */
    const int32_t* residual_start;  /* [in + 1] first entry of each channel, or NULL if there is no residual */
    const int32_t* residual_output; /* [m] output of each entry, ascending within a channel */
    const int32_t* residual_value;  /* [m] what the int8 code lacks */
    int64_t unsigned_codes;         /* not 0: `codes` holds uint8, code + 128, as ONNX models do */
} sbedge_w8;

/* The same in 4 bits. Nibbles are unsigned, 0..15. A row of `out` outputs takes out / 2 bytes: in each block of
 * 64 outputs, byte b holds output b in its low and output b + 32 in its high nibble; `out` is a multiple of 64.
 * weight[i, o] = (nibble - zeros[i / group, o]) * scales[i / group, o]; group is 32, 64 or 128 and divides `in`. */
typedef struct {
    int64_t in, out, stripe, group;
    const uint8_t* nibbles; /* [in, out / 2] in stripes */
    const uint16_t* scales; /* [in / group, out] float16 */
    const uint8_t* zeros;   /* [in / group, out], or NULL: 8 everywhere */
    const float* bias;      /* [out] or NULL */
} sbedge_w4;

/* y[t, o] = thresholds[t] * sum_i counts[t, i] * weight[i, o] + bias[o]; counts of any size stay exact.
 * counts [n, in], y [n, y_stride >= out]. Outputs are shared out over threads in multiples of 64. n = 1 is decoding:
 * only rows of live channels are fetched, each once; for n > 1 every row live in any token is fetched once a block of
 * tokens. Returns the number of weight bytes this thread fetched. */
SBEDGE_API int64_t sbedge_spike_matmul_w8(const sbedge_w8* w, const int32_t* counts, const float* thresholds,
                                          int64_t n, float* y, int64_t y_stride, int ith, int nth);
SBEDGE_API int64_t sbedge_spike_matmul_w4(const sbedge_w4* w, const int32_t* counts, const float* thresholds,
                                          int64_t n, float* y, int64_t y_stride, int ith, int nth);

/* --- dense linears ------------------------------------------------------------------------------------------ */

/* Rows of activations as int8 codes in blocks of 32 with a scale each, as ggml's Q8_0 has it: code = round(x / scale),
 * scale = max|x| / 127. x [n, width], width a multiple of 32 -> codes [n, width], scales and sums (of the block's codes)
 * [n, width / 32]. Rows are shared out over threads. */
SBEDGE_API void sbedge_block_encode(const float* x, int64_t n, int64_t width, int8_t* codes, float* scales,
                                    int32_t* sums, int ith, int nth);

/* One linear layer in ggml's Q8_0 (bits = 8) or Q4_0 (bits = 4): `blocks` [out, in / 32], a float16 scale and 32 codes
 * each (34 or 18 bytes). y [n, y_stride >= out] = codes * weight + bias, from what block_encode made of n rows.
 * Outputs are shared out over threads in multiples of 64. */
typedef struct {
    int64_t in, out, bits;
    const uint8_t* blocks;
    const float* bias; /* [out] or NULL */
} sbedge_dense;
SBEDGE_API void sbedge_dense_matmul(const sbedge_dense* w, const int8_t* codes, const float* scales,
                                    const int32_t* sums, int64_t n, float* y, int64_t y_stride, int ith, int nth);

/* --- GLA --------------------------------------------------------------------------------------------------- */

/* Gated linear attention over n tokens, G states (not H): S = exp(g) * S + k v^T ; o = (q * d^-0.5) S.
 * q [n, H, d], k v gate [n, G, d] with the given strides between tokens (floats); relu on q and k and
 * g = logsigmoid(gate) / 16 are applied here. state [G, d, d] is updated in place. out [n, H * d], each head
 * rms-normalized and times norm_weight [d] (eps). Columns of the states are shared out over threads.
 * `scratch` has nth times sbedge_gla_scratch(...) floats. */
typedef struct {
    int64_t heads, groups, d;
    const float *q, *k, *v, *gate;
    int64_t q_stride, k_stride, v_stride, gate_stride;
    const float* norm_weight;
    float eps;
    int32_t arrived; /* 0 before the first call: the parts of a call count themselves; 0 again after it */
} sbedge_gla_input;
SBEDGE_API int64_t sbedge_gla_scratch(int64_t heads, int64_t groups, int64_t d, int64_t n);
SBEDGE_API void sbedge_gla(sbedge_gla_input* in, int64_t n, float* state, float* out, float* scratch, int ith, int nth);

/* --- sliding window ---------------------------------------------------------------------------------------- */

/* How a ring holds its rows: float16 is rounded to the nearest (and held within its largest number); int8 are codes
 * with a scale for each row, scale = clamp(amax / 127, 1e-5, 1e4). */
enum { SBEDGE_F32 = 0, SBEDGE_F16 = 1, SBEDGE_INT8 = 2 };

/* A ring of the last `window` rotated keys and values, slot = position % window (State's canonical layout). */
typedef struct {
    int64_t window, groups, d;
    void *keys, *values;              /* [window, groups, d] of `type` */
    float *key_scales, *value_scales; /* [window, groups], NULL unless int8 */
    int32_t type;
} sbedge_ring;

/* Softmax attention of n tokens at positions position..position+n-1, exactly `window` keys each, self included.
 * q [n, H, d], k v [n, G, d] with strides between tokens (floats), not rotated yet; cos sin [n, d / 2].
 * query_k > 0: rotated queries are spiked per head vector with that k (W8ASpike). New keys and values go into the ring
 * and are attended to as it holds them. out [n, H * d]. One token: slots are shared out over threads; more: tokens and
 * groups. `scratch` has nth times sbedge_window_scratch(...) floats. */
typedef struct {
    int64_t heads;
    const float *q, *k, *v, *cos, *sin;
    int64_t q_stride, k_stride, v_stride;
    float query_k;
    int32_t arrived; /* as in sbedge_gla_input */
} sbedge_window_input;
SBEDGE_API int64_t sbedge_window_scratch(int64_t heads, int64_t groups, int64_t d, int64_t window, int64_t n);
SBEDGE_API void sbedge_window(sbedge_window_input* in, int64_t position, int64_t n, sbedge_ring* ring, float* out,
                              float* scratch, int ith, int nth);

/* --- FFN --------------------------------------------------------------------------------------------------- */

/* out = silu(gate) * up, all [n]; silu(x) = x / (1 + exp(-x)). */
SBEDGE_API void sbedge_silu_gate(const float* gate, const float* up, float* out, int64_t n);

/* --- ONNX Runtime ------------------------------------------------------------------------------------------ */

/* The library is a custom op library, too: it exports RegisterCustomOps, which session options are given as a file name.
 * Of those options it reads the entries "ai.sbedge.threads", the threads of the session's own pool to share work out
 * over (all that this process may use if absent), and "ai.sbedge.id", a number of the caller's choice.
 * Weight bytes that the spiking linears of sessions with such an id have fetched, and would have fetched had no channel
 * been silent. 0, or -1 if no session options with this id were given to the library. */
SBEDGE_API int sbedge_ort_traffic(int64_t id, int64_t* fetched, int64_t* dense);

#ifdef __cplusplus
}
#endif
#endif
