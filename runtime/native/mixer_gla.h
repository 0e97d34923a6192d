// Gated linear attention: one fused pass over the state for a single token, chunks of matrix products for many.
#pragma once

#include "mixer_math.h"

namespace sbedge {
namespace {

constexpr int64_t GLA_CHUNK = 32;       // tokens at most; fewer where decays are strong
constexpr int64_t GLA_CAUSAL_BLOCK = 16; // tokens whose keys inside the chunk are taken together
constexpr float GLA_MIN_DECAY = -16.0f; // log-decay over a chunk: exp(+-16) keeps every ratio exact to float rounding
constexpr int64_t GLA_STEP_ROWS = 16;   // state rows that stay in L1 while every query head reads them

struct GlaScratch {
    int64_t q, o, k, gate, decay, scores, room, floats;
    GlaScratch(int64_t heads, int64_t groups, int64_t d, int64_t n) {
        const int64_t chunk = least(n, GLA_CHUNK), rows = heads / groups * chunk;
        Layout layout;
        q = layout.take(rows * d);             // [chunk, H/G, d] relu(q) / sqrt(d), decayed
        o = layout.take(rows * d);             // [chunk, H/G, d]
        k = layout.take(d * chunk);            // [d, chunk] relu(k), grown by what its decay will be
        gate = layout.take(chunk * d);         // [chunk, d] log-decay since the chunk's start
        decay = layout.take(d);                // [d]
        scores = layout.take(rows * chunk);    // [chunk, H/G, chunk]
        room = layout.take(most(d, chunk) * PANEL);   // a packed panel
        floats = layout.floats;
    }
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

template <class V, int R, bool UPDATE>
inline void step_rows(const float* q, const float* k, const float* decay, const float* v, float* S, float* o,
                      int64_t d, int64_t rows) {
    constexpr int N = V::step;
    int64_t j = 0;
    for (; j + N * V::width <= d; j += N * V::width)
        step_tile<V, R, N, UPDATE>(q, k, decay, v + j, S + j, o + j, d, rows, N * V::width);
    for (; j < d; j += V::width)
        step_tile<V, R, 1, UPDATE>(q, k, decay, v + j, S + j, o + j, d, rows, least(V::width, d - j));
}

// One group of one sequence: pointers to its first token, strides as in sbedge_gla_input.
struct GlaGroup {
    const float *q, *k, *v, *gate;
    float *S, *out;     // [d, d] ; [n, H * d] at this group's heads
    int64_t heads, d;   // query heads of the group
};

// relu(x) * factor, [n]
template <class V>
inline void rectify(const float* x, float factor, float* y, int64_t n) {
    for_vectors<V>(n, [&](int64_t i, int64_t count) {
        V::store(y + i, V::mul(V::max(V::set(0.0f), V::load(x + i, count)), V::set(factor)), count);
    });
}

// n = 1: every row of S is read, updated, used by all query heads and written once.
template <class V>
void gla_step(const sbedge_gla_input* in, const GlaGroup& group, const GlaScratch& at, float* scratch) {
    const int64_t d = group.d, heads = group.heads;
    float *q = scratch + at.q, *o = scratch + at.o, *k = scratch + at.k, *decay = scratch + at.decay;
    rectify<V>(group.q, 1.0f / std::sqrt(float(d)), q, heads * d);
    rectify<V>(group.k, 1.0f, k, d);
    log_decay<V>(group.gate, decay, d);
    exponentials<V>(decay, decay, d);
    for (int64_t i = 0; i < heads * d; ++i) o[i] = 0;
    for (int64_t i = 0; i < d; i += GLA_STEP_ROWS) {
        const int64_t rows = least(GLA_STEP_ROWS, d - i);
        float* S = group.S + i * d;
        with_rows<8>(least(8, heads), [&](auto R) {
            step_rows<V, decltype(R)::value, true>(q + i, k + i, decay + i, group.v, S, o, d, rows);
        });
        for (int64_t h = 8; h < heads; h += 8)
            with_rows<8>(least(8, heads - h), [&](auto R) {
                step_rows<V, decltype(R)::value, false>(q + h * d + i, k + i, decay + i, group.v, S, o + h * d, d,
                                                        rows);
            });
    }
    for (int64_t h = 0; h < heads; ++h)
        normalize<V>(o + h * d, in->norm_weight, in->eps, group.out + h * d, d);
}

// The longest chunk from here on (up to `limit` tokens) in which no channel decays below GLA_MIN_DECAY: 0 if already
// the first token does. Row t of `sums` [limit, d] becomes the log-decay from before the chunk to token t.
template <class V>
int64_t chunk_decays(const sbedge_gla_input* in, const GlaGroup& group, int64_t limit, float* sums) {
    const int64_t d = group.d;
    for (int64_t t = 0; t < limit; ++t) {
        float* row = sums + t * d;
        log_decay<V>(group.gate + t * in->gate_stride, row, d);
        auto lowest = V::set(0.0f);
        for_vectors<V>(d, [&](int64_t i, int64_t count) {
            auto sum = V::load(row + i, count);
            if (t) sum = V::add(sum, V::load(row - d + i, count));
            lowest = V::min(lowest, sum);
            V::store(row + i, sum, count);
        });
        if (V::lowest(lowest) < GLA_MIN_DECAY) return t;
    }
    return limit;
}

// A token's queries and key, as gla_chunk has them: q' [H/G, d], and k' as column t of k [d, n].
template <class V>
inline void decay_token(const sbedge_gla_input* in, const GlaGroup& group, int64_t t, int64_t n, const float* sum,
                        float* q, float* k, float* room) {
    const int64_t d = group.d;
    const float *query = group.q + t * in->q_stride, *key = group.k + t * in->k_stride;
    const auto zero = V::set(0.0f), scale = V::set(1.0f / std::sqrt(float(d)));
    for_vectors<V>(d, [&](int64_t i, int64_t count) {
        const auto log = V::load(sum + i, count);
        const auto decay = V::mul(exponential<V>(log), scale);
        for (int64_t h = 0; h < group.heads * d; h += d)
            V::store(q + h + i, V::mul(V::max(zero, V::load(query + h + i, count)), decay), count);
        const auto growth = exponential<V>(V::sub(zero, log));
        V::store(room + i, V::mul(V::max(zero, V::load(key + i, count)), growth), count);
    });
    for (int64_t i = 0; i < d; ++i) k[i * n + t] = room[i];
}

// A chunk of n tokens. With c_t the log-decay from before it to token t, q'_t = q_t exp(c_t) and k'_s = k_s exp(-c_s):
// o_t = q'_t S + sum_{s <= t} (q'_t . k'_s) v_s  and then  S = exp(c_last) S + sum_s exp(c_last) k'_s v_s^T.
template <class V>
void gla_chunk(const sbedge_gla_input* in, const GlaGroup& group, int64_t n, const GlaScratch& at, float* scratch) {
    const int64_t d = group.d, heads = group.heads, rows = heads * n;
    const float* sums = scratch + at.gate;
    float *q = scratch + at.q, *o = scratch + at.o, *k = scratch + at.k, *scores = scratch + at.scores;
    float *decay = scratch + at.decay, *room = scratch + at.room;
    for (int64_t t = 0; t < n; ++t) decay_token<V>(in, group, t, n, sums + t * d, q + t * heads * d, k, room);

    multiply<V>(rows, d, d, q, d, group.S, d, o, d, {false, nullptr}, room);
    for (int64_t t = 0; t < n; t += GLA_CAUSAL_BLOCK) {
        const int64_t end = least(n, t + GLA_CAUSAL_BLOCK), m = (end - t) * heads;
        float* block = scores + t * heads * n;
        for (int64_t i = t; i < end; ++i) {     // arrives while the products keep the core busy
            prefetch(group.q + (n + i) * in->q_stride, heads * d * sizeof(float));
            prefetch(group.out + i * in->heads * d, heads * d * sizeof(float));
        }
        multiply<V>(m, end, d, q + t * heads * d, d, k, n, block, n, {false, nullptr}, room);
        for (int64_t i = 0; i < m; ++i)
            for (int64_t s = t + i / heads + 1; s < end; ++s) block[i * n + s] = 0;
        multiply<V>(m, d, end, block, n, group.v, in->v_stride, o + t * heads * d, d, {true, nullptr}, room);
    }
    exponentials<V>(sums + (n - 1) * d, decay, d);
    for (int64_t i = 0; i < d; ++i) scale_row<V>(k + i * n, decay[i], n);
    multiply<V>(d, d, n, k, n, group.v, in->v_stride, group.S, d, {true, decay}, room);

    for (int64_t t = 0; t < n; ++t)
        for (int64_t h = 0; h < heads; ++h, o += d)
            normalize<V>(o, in->norm_weight, in->eps, group.out + (t * in->heads + h) * d, d);
}

template <class V>
int64_t gla_scratch(int64_t heads, int64_t groups, int64_t d, int64_t n) {
    return GlaScratch(heads, groups, d, n).floats;
}

template <class V>
void gla(const sbedge_gla_input* in, int64_t n, float* state, float* out, float* scratch, int ith, int nth) {
    const int64_t d = in->d, heads = in->heads / in->groups;
    const GlaScratch at(in->heads, in->groups, d, n);
    scratch += ith * at.floats;
    const Range mine = share(in->groups, 1, ith, nth);
    for (int64_t g = mine.begin; g < mine.end; ++g) {
        GlaGroup group{in->q + g * heads * d, in->k + g * d, in->v + g * d, in->gate + g * d,
                       state + g * d * d, out + g * heads * d, heads, d};
        for (int64_t t = 0; t < n;) {
            int64_t length = n == 1 ? 0 : chunk_decays<V>(in, group, least(GLA_CHUNK, n - t), scratch + at.gate);
            if (length > 1) {
                gla_chunk<V>(in, group, length, at, scratch);
            } else {    // the recurrence itself, right for any decay
                gla_step<V>(in, group, at, scratch);
                length = 1;
            }
            t += length;
            group.q += length * in->q_stride, group.k += length * in->k_stride;
            group.v += length * in->v_stride, group.gate += length * in->gate_stride;
            group.out += length * in->heads * d;
        }
    }
}

}  // namespace
}  // namespace sbedge
