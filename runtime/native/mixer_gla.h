// Gated linear attention: one fused pass over the state for a single token, chunks of matrix products for many.
#pragma once

#include <cstring>

#include "mixer_math.h"

namespace sbedge {
namespace {

constexpr int64_t GLA_CHUNK = 16;        // tokens at most
constexpr int64_t GLA_CAUSAL_BLOCK = 8;  // tokens whose keys inside the chunk are taken together
constexpr float GLA_MIN_DECAY = -16.0f;  // log-decay over a chunk: exp(+-16) keeps every ratio exact to float rounding
constexpr int64_t GLA_STEP_ROWS = 16;    // state rows that stay in L1 while every query head reads them
constexpr int64_t LINE = 16;             // floats of a cache line: what threads divide a state's columns by, at least

template <class V>
struct GlaScratch {
    int64_t left, left_stride, o, o_stride, log_decay, k, transposed, decay, panels, floats;
    GlaScratch(int64_t heads, int64_t groups, int64_t d, int64_t n) {
        const int64_t chunk = least(n, GLA_CHUNK), rows = heads / groups * chunk;
        Layout layout;
        left_stride = d + chunk;
        o_stride = panel_count<V>(d) * PANEL<V>;
        left = layout.take(rows * left_stride);     // [chunk, H/G, d + chunk] decayed queries, then scores
        o = layout.take(rows * o_stride);           // [chunk, H/G, d]
        log_decay = layout.take(chunk * d);         // [chunk, d] of each token, then summed up from the chunk's start
        k = layout.take(chunk * d);                 // [chunk, d] relu(k), decayed
        transposed = layout.take(d * GLA_CHUNK);    // [d, chunk]
        decay = layout.take(d);                     // [d] over a whole chunk
        panels = layout.take(panel_count<V>(d) * panel_floats(d));
        floats = layout.floats;
    }
    // A panel of the state [d, PANEL], and under it the chunk's values [chunk, PANEL]: one right factor.
    static int64_t panel_floats(int64_t d) { return (d + GLA_CHUNK) * PANEL<V>; }
};

// log-decay of one token: logsigmoid(gate) / 16, [d]
template <class V>
inline void log_decay(const float* gate, float* g, int64_t d) {
    for_vectors<V>(d, [&](int64_t i, int64_t count) {
        V::store(g + i, V::mul(log_sigmoid<V>(V::load(gate + i, count)), V::set(1.0f / 16)), count);
    });
}

template <class V>
inline void exponentials(const float* x, float* y, int64_t d) {
    for_vectors<V>(d, [&](int64_t i, int64_t count) { V::store(y + i, exponential<V>(V::load(x + i, count)), count); });
}

// out = o / sqrt(mean(o^2) + eps) * weight, [d]
template <class V>
inline void normalize(const float* o, const float* weight, float eps, float* out, int64_t d) {
    auto squares = V::set(0.0f);
    for_vectors<V>(d, [&](int64_t i, int64_t count) {
        const auto x = V::load(o + i, count);
        squares = V::fma(x, x, squares);
    });
    const auto factor = V::set(1.0f / std::sqrt(V::sum(squares) / float(d) + eps));
    for_vectors<V>(d, [&](int64_t i, int64_t count) {
        V::store(out + i, V::mul(V::mul(V::load(o + i, count), factor), V::load(weight + i, count)), count);
    });
}

// One group of one sequence: pointers to its first token, strides as in sbedge_gla_input; columns [begin, end) of its
// values and of its state are this thread's.
struct GlaGroup {
    const float *q, *k, *v, *gate;
    float *S, *out;     // [d, d] ; [n, H * d] at this group's heads
    int64_t heads, d;   // query heads of the group
    int64_t begin, end;
    bool whole() const { return begin == 0 && end == d; }
};

// One token on `rows` rows and N vectors of columns: S = decay S + k v (if UPDATE), o [R] += q [R] S.
template <class V, int R, int N, bool UPDATE>
inline void step_tile(const float* q, const float* k, const float* decay, const float* v, float* S, float* o, int64_t d,
                      int64_t rows, int64_t count) {
    typename V::reg sum[R][N], value[N];
    for (int j = 0; j < N; ++j) {
        value[j] = N == 1 ? V::load(v, count) : V::load(v + j * V::width);
        for (int r = 0; r < R; ++r)
            sum[r][j] = N == 1 ? V::load(o + r * d, count) : V::load(o + r * d + j * V::width);
    }
    for (int64_t i = 0; i < rows; ++i) {
        for (int j = 0; j < N; ++j) {
            float* cell = S + i * d + j * V::width;
            auto s = N == 1 ? V::load(cell, count) : V::load(cell);
            if (UPDATE) {
                __builtin_prefetch(cell + GLA_STEP_ROWS * d);
                s = V::fma(V::set(decay[i]), s, V::mul(V::set(k[i]), value[j]));
                N == 1 ? V::store(cell, s, count) : V::store(cell, s);
            }
            for (int r = 0; r < R; ++r) sum[r][j] = V::fma(V::set(q[r * d + i]), s, sum[r][j]);
        }
    }
    for (int j = 0; j < N; ++j)
        for (int r = 0; r < R; ++r)
            N == 1 ? V::store(o + r * d, sum[r][j], count) : V::store(o + r * d + j * V::width, sum[r][j]);
}

// All the group's columns, for R query heads.
template <class V, int R, bool UPDATE>
inline void step_rows(const GlaGroup& group, const float* q, const float* k, const float* decay, float* S, float* o,
                      int64_t rows) {
    constexpr int N = V::step;
    int64_t j = group.begin;
    for (; j + N * V::width <= group.end; j += N * V::width)
        step_tile<V, R, N, UPDATE>(q, k, decay, group.v + j, S + j, o + j, group.d, rows, N * V::width);
    for (; j < group.end; j += V::width)
        step_tile<V, R, 1, UPDATE>(q, k, decay, group.v + j, S + j, o + j, group.d, rows,
                                   least(V::width, group.end - j));
}

// relu(x) * factor, [n]
template <class V>
inline void rectify(const float* x, float factor, float* y, int64_t n) {
    for_vectors<V>(n, [&](int64_t i, int64_t count) {
        V::store(y + i, V::mul(V::max(V::set(0.0f), V::load(x + i, count)), V::set(factor)), count);
    });
}

// n = 1: every row of S is read, updated, used by all query heads and written once. Leaves o in `out`, not normalized.
template <class V>
void gla_step(const GlaGroup& group, const GlaScratch<V>& at, float* scratch) {
    const int64_t d = group.d, heads = group.heads;
    float *q = scratch + at.left, *k = scratch + at.k, *decay = scratch + at.decay, *o = group.out;
    rectify<V>(group.q, 1.0f / std::sqrt(float(d)), q, heads * d);
    rectify<V>(group.k, 1.0f, k, d);
    log_decay<V>(group.gate, decay, d);
    exponentials<V>(decay, decay, d);
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = group.begin; i < group.end; ++i) o[h * d + i] = 0;
    for (int64_t i = 0; i < d; i += GLA_STEP_ROWS) {
        const int64_t rows = least(GLA_STEP_ROWS, d - i);
        float* S = group.S + i * d;
        with_rows<8>(least(8, heads), [&](auto R) {
            step_rows<V, decltype(R)::value, true>(group, q + i, k + i, decay + i, S, o, rows);
        });
        for (int64_t h = 8; h < heads; h += 8)
            with_rows<8>(least(8, heads - h), [&](auto R) {
                step_rows<V, decltype(R)::value, false>(group, q + h * d + i, k + i, decay + i, S, o + h * d, rows);
            });
    }
}

// Row t of `sums` [n, d]: the log-decay from before the chunk to token t. Returns the lowest of them all.
template <class V>
inline float chunk_decays(const sbedge_gla_input* in, const GlaGroup& group, int64_t n, float* sums) {
    const int64_t d = group.d;
    auto lowest = V::set(0.0f);
    for (int64_t t = 0; t < n; ++t) {
        float* row = sums + t * d;
        log_decay<V>(group.gate + t * in->gate_stride, row, d);
        for_vectors<V>(d, [&](int64_t i, int64_t count) {
            auto sum = V::load(row + i, count);
            if (t) sum = V::add(sum, V::load(row - d + i, count));
            lowest = V::min(lowest, sum);
            V::store(row + i, sum, count);
        });
    }
    return V::lowest(lowest);
}

// A chunk of n tokens. With c_t the log-decay from before it to token t, q'_t = q_t exp(c_t) and c = c_last:
// o_t = q'_t S + sum_{s <= t} (q_t exp(c_t - c_s) . k_s) v_s  and then  S = exp(c) S + sum_s exp(c - c_s) k_s v_s^T.
// Both sums of o_t are one product: of [q', scores] with the state over the values, panel by panel.
template <class V>
struct GlaChunk {
    const sbedge_gla_input* in;
    const GlaGroup& group;
    const GlaScratch<V>& at;
    float* scratch;
    int64_t n;

    void run() {
        const int64_t d = group.d;
        const float lowest = chunk_decays<V>(in, group, n, scratch + at.log_decay);
        exponentials<V>(scratch + at.log_decay + (n - 1) * d, scratch + at.decay, d);
        decay_queries();
        if (lowest >= GLA_MIN_DECAY)
            score_by_product();
        else
            score_by_pairs();
        for (int64_t j = group.begin; j < group.end; j += PANEL<V>)
            advance(j, scratch + at.panels + j / PANEL<V> * at.panel_floats(d));
        finish();
    }

    // q' = relu(q) / sqrt(d) exp(c)
    void decay_queries() {
        const int64_t d = group.d;
        const auto zero = V::set(0.0f), scale = V::set(1.0f / std::sqrt(float(d)));
        for (int64_t t = 0; t < n; ++t) {
            const float *sum = scratch + at.log_decay + t * d, *query = group.q + t * in->q_stride;
            float* left = scratch + at.left + t * group.heads * at.left_stride;
            for_vectors<V>(d, [&](int64_t i, int64_t count) {
                const auto decay = V::mul(exponential<V>(V::load(sum + i, count)), scale);
                for (int64_t h = 0; h < group.heads; ++h)
                    V::store(left + h * at.left_stride + i,
                             V::mul(V::max(zero, V::load(query + h * d + i, count)), decay), count);
            });
        }
    }

    // Decays are weak: exp(c_t - c_s) is the product of exp(c_t) and exp(-c_s). Leaves keys as the state wants them.
    void score_by_product() {
        const int64_t d = group.d, heads = group.heads, lda = at.left_stride;
        const auto zero = V::set(0.0f);
        const float* decay = scratch + at.decay;
        float *k = scratch + at.k, *transposed = scratch + at.transposed, *left = scratch + at.left;
        for (int64_t t = 0; t < n; ++t) {
            const float *sum = scratch + at.log_decay + t * d, *key = group.k + t * in->k_stride;
            for_vectors<V>(d, [&](int64_t i, int64_t count) {
                const auto growth = exponential<V>(V::sub(zero, V::load(sum + i, count)));
                V::store(k + t * d + i, V::mul(V::max(zero, V::load(key + i, count)), growth), count);
            });
        }
        for (int64_t i = 0; i < d; ++i)
            for (int64_t t = 0; t < n; ++t) transposed[i * GLA_CHUNK + t] = k[t * d + i];
        multiply<V>(n * heads, n, d, ByRows{left, lda}, transposed, GLA_CHUNK, left + d, lda, {false, nullptr});
        for (int64_t t = 0; t < n; ++t)
            for (int64_t h = 0; h < heads; ++h)
                for (int64_t s = t + 1; s < n; ++s) left[(t * heads + h) * lda + d + s] = 0;
        for (int64_t t = 0; t < n; ++t)
            for_vectors<V>(d, [&](int64_t i, int64_t count) {
                V::store(k + t * d + i, V::mul(V::load(k + t * d + i, count), V::load(decay + i, count)), count);
            });
    }

    // Any decays, also those whose exp(-c_s) no float holds: every pair's own decay, summed up from the later token on.
    void score_by_pairs() {
        const int64_t d = group.d, heads = group.heads;
        const auto zero = V::set(0.0f);
        float *q = scratch + at.o, *g = scratch + at.log_decay, *k = scratch + at.k;
        float *sum = scratch + at.transposed, *room = sum + d;
        for (int64_t t = 0; t < n; ++t) {
            rectify<V>(group.q + t * in->q_stride, 1.0f / std::sqrt(float(d)), q + t * heads * d, heads * d);
            log_decay<V>(group.gate + t * in->gate_stride, g + t * d, d);
        }
        for (int64_t t = 0; t < n; ++t) {
            float* scores = scratch + at.left + t * heads * at.left_stride + d;
            for (int64_t i = 0; i < d; ++i) sum[i] = 0;
            for (int64_t s = t; s >= 0; --s) {
                const float* key = group.k + s * in->k_stride;
                float* decayed = t == n - 1 ? k + s * d : room;     // the last token's are what the state wants
                for_vectors<V>(d, [&](int64_t i, int64_t count) {
                    const auto log = V::load(sum + i, count);
                    V::store(decayed + i, V::mul(V::max(zero, V::load(key + i, count)), exponential<V>(log)), count);
                    V::store(sum + i, V::add(log, V::load(g + s * d + i, count)), count);
                });
                for (int64_t h = 0; h < heads; ++h)
                    scores[h * at.left_stride + s] = dot<V>(q + (t * heads + h) * d, decayed, d);
            }
            for (int64_t h = 0; h < heads; ++h)
                for (int64_t s = t + 1; s < n; ++s) scores[h * at.left_stride + s] = 0;
        }
    }

    // The panel of columns from j on: outputs, then the state.
    void advance(int64_t j, float* panel) {
        const int64_t d = group.d, heads = group.heads, columns = least(PANEL<V>, group.end - j);
        const float* left = scratch + at.left;
        float *o = scratch + at.o + j, *values = panel + d * PANEL<V>;
        pack<V>(n, columns, group.v + j, in->v_stride, values);
        for (int64_t t = 0; t < n; t += GLA_CAUSAL_BLOCK) {
            const int64_t end = least(n, t + GLA_CAUSAL_BLOCK), row = t * heads;
            for (int64_t i = t; i < end; ++i) look_ahead(i, j);
            multiply_panel<V>((end - t) * heads, columns, d + end, ByRows{left + row * at.left_stride, at.left_stride},
                              panel, o + row * at.o_stride, at.o_stride, {false, nullptr});
        }
        multiply_panel<V>(d, columns, n, ByColumns{scratch + at.k, d}, values, panel, PANEL<V>,
                          {true, scratch + at.decay});
    }

    // What memory holds of this panel's share of the next chunk, and where its results go, arrives while products keep
    // the core busy.
    __attribute__((always_inline)) void look_ahead(int64_t t, int64_t j) {
        const int64_t width = group.heads * group.d, share = width * PANEL<V> / (group.end - group.begin);
        const int64_t begin = (j - group.begin) / PANEL<V> * share, count = least(share, width - begin);
        prefetch(group.q + (n + t) * in->q_stride + begin, count * sizeof(float));
        prefetch(group.out + t * in->heads * group.d + begin, count * sizeof(float));
    }

    void finish() {
        const float* o = scratch + at.o;
        for (int64_t t = 0; t < n; ++t)
            for (int64_t h = 0; h < group.heads; ++h, o += at.o_stride) {
                float* out = group.out + (t * in->heads + h) * group.d;
                if (group.whole())
                    normalize<V>(o, in->norm_weight, in->eps, out, group.d);
                else
                    std::memcpy(out + group.begin, o + group.begin, (group.end - group.begin) * sizeof(float));
            }
    }
};

// All n tokens of this thread's columns; the state stays in panels meanwhile.
template <class V>
void gla_chunks(const sbedge_gla_input* in, GlaGroup group, int64_t n, const GlaScratch<V>& at, float* scratch) {
    const int64_t d = group.d;
    float* panels = scratch + at.panels;
    for (int64_t j = group.begin; j < group.end; j += PANEL<V>)
        pack<V>(d, group.end - j, group.S + j, d, panels + j / PANEL<V> * at.panel_floats(d));
    for (int64_t t = 0; t < n; t += GLA_CHUNK) {
        GlaChunk<V>{in, group, at, scratch, least(GLA_CHUNK, n - t)}.run();
        group.q += GLA_CHUNK * in->q_stride, group.k += GLA_CHUNK * in->k_stride;
        group.v += GLA_CHUNK * in->v_stride, group.gate += GLA_CHUNK * in->gate_stride;
        group.out += GLA_CHUNK * in->heads * d;
    }
    for (int64_t j = group.begin; j < group.end; j += PANEL<V>)
        unpack<V>(d, group.end - j, panels + j / PANEL<V> * at.panel_floats(d), group.S + j, d);
}

template <class V>
void normalize_group(const sbedge_gla_input* in, int64_t n, int64_t g, float* out) {
    const int64_t width = in->heads / in->groups * in->d;
    for (int64_t t = 0; t < n; ++t) {
        float* row = out + t * in->heads * in->d + g * width;
        for (int64_t i = 0; i < width; i += in->d) normalize<V>(row + i, in->norm_weight, in->eps, row + i, in->d);
    }
}

template <class V>
int64_t gla_scratch(int64_t heads, int64_t groups, int64_t d, int64_t n) {
    return GlaScratch<V>(heads, groups, d, n).floats;
}

// Threads share out the columns of all groups' states, one after the other: few groups are divided between threads.
// Those heads are normalized by whoever finishes last.
template <class V>
void gla(sbedge_gla_input* in, int64_t n, float* state, float* out, float* scratch, int ith, int nth) {
    constexpr int64_t unit = most(PANEL<V>, LINE);
    const int64_t d = in->d, heads = in->heads / in->groups, units = (d + unit - 1) / unit;
    const GlaScratch<V> at(in->heads, in->groups, d, n);
    scratch += ith * at.floats;
    const Range mine = share(in->groups * units, 1, ith, nth);
    for (int64_t g = mine.begin / units; g * units < mine.end; ++g) {
        const int64_t begin = most(mine.begin - g * units, 0), end = least(mine.end - g * units, units);
        const GlaGroup group{in->q + g * heads * d, in->k + g * d, in->v + g * d, in->gate + g * d, state + g * d * d,
                             out + g * heads * d, heads, d, begin * unit, least(end * unit, d)};
        if (n > 1) {
            gla_chunks<V>(in, group, n, at, scratch);
        } else {
            gla_step<V>(group, at, scratch);
            if (group.whole()) normalize_group<V>(in, 1, g, out);
        }
    }
    if (!last_to_arrive(&in->arrived, nth)) return;
    for (int64_t part = 1, done = -1; part < nth; ++part) {
        const int64_t border = share(in->groups * units, 1, int(part), nth).begin, g = border / units;
        if (border % units == 0 || g == done) continue;
        normalize_group<V>(in, n, g, out);
        done = g;
    }
}

}  // namespace
}  // namespace sbedge
