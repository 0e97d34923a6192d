// Sliding-window attention of one token: a pass over the whole ring, at the speed of memory.
#pragma once

#include "mixer_rows.h"

namespace sbedge {
namespace {

constexpr int64_t STEP_KEYS = 64;   // slots scored at a time; a multiple of every vector width
constexpr int64_t SPANS = 16;       // spans of slots that threads share out, at most
constexpr int64_t SPAN_UNIT = 32;

// Results of spans stand first, for all threads to see; each thread's own room follows.
struct WindowStepScratch {
    int64_t o, maximum, total, shared;
    int64_t q, room, scores, key_scales, value_scales, floats;
    WindowStepScratch(int64_t heads, int64_t d) {
        Layout common, own;
        o = common.take(SPANS * heads * d);
        maximum = common.take(SPANS * heads);
        total = common.take(SPANS * heads);
        shared = common.floats;
        q = own.take(heads * d);                // [H, d]
        room = own.take(d);
        scores = own.take(heads * STEP_KEYS);   // [H, STEP_KEYS]
        key_scales = own.take(STEP_KEYS);
        value_scales = own.take(STEP_KEYS);
        floats = own.floats;
    }
};

// scores [R, 4] = q [R, d] . keys [count <= 4, d]; columns past `count` are undefined. `next` is laid out like keys.
template <class V, int R, class T, class Next>
inline void dot_rows(const float* q, const T* keys, int64_t stride, int64_t count, float* scores, int64_t d,
                     Next next) {
    const T* key[4];
    for (int i = 0; i < 4; ++i) key[i] = keys + least(i, count - 1) * stride;
    typename V::reg sum[R][4];
    SBEDGE_UNROLL for (int r = 0; r < R; ++r)
        SBEDGE_UNROLL for (int i = 0; i < 4; ++i) sum[r][i] = V::set(0.0f);
    for_vectors<V>(d, [&](int64_t c, int64_t width) {
        typename V::reg x[R];
        SBEDGE_UNROLL for (int r = 0; r < R; ++r) x[r] = V::load(q + r * d + c, width);
        SBEDGE_UNROLL for (int i = 0; i < 4; ++i) {
            const auto y = V::load(key[i] + c, width);
            ask<V>(next + i * stride, c);
            SBEDGE_UNROLL for (int r = 0; r < R; ++r) sum[r][i] = V::fma(x[r], y, sum[r][i]);
        }
    });
    SBEDGE_UNROLL for (int r = 0; r < R; ++r)
        V::store_sums(scores + r * STEP_KEYS, sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
}

template <class V, class T>
struct WindowStep {
    WindowRows<V, T> rows;
    int64_t length;     // slots in use, this token's included
    const WindowStepScratch& at;
    float *shared, *own;

    int64_t span() const {
        return (length + SPANS * SPAN_UNIT - 1) / (SPANS * SPAN_UNIT) * SPAN_UNIT;
    }

    void prepare() {
        for (int64_t h = 0; h < rows.in->heads; ++h) rows.query(0, h, own + at.q + h * rows.d);
    }

    // Softmax over the slots of a span alone.
    void attend_span(int64_t index, int64_t own_slot) {
        const int64_t H = rows.in->heads, begin = index * span(), end = least(begin + span(), length);
        if (own_slot >= begin && own_slot < end) rows.remember(0, own_slot, own + at.room);
        float *o = shared + at.o + index * H * rows.d, *maximum = shared + at.maximum + index * H;
        float* total = shared + at.total + index * H;
        for (int64_t i = 0; i < H * rows.d; ++i) o[i] = 0;
        for (int64_t h = 0; h < H; ++h) maximum[h] = -FLT_MAX, total[h] = 0;
        for (int64_t slot = begin; slot < end; slot += STEP_KEYS) {
            const int64_t count = least(STEP_KEYS, end - slot);
            score(slot, count);
            for (int64_t g = 0; g < rows.ring->groups; ++g) weigh(g, slot, count, o, maximum, total);
            gather(slot, count, o);
        }
    }

    // Scores of `count` slots for all heads. Whole slots are read one after the other, as they lie in memory. Their
    // values arrive meanwhile, and the next keys while values are gathered.
    void score(int64_t slot, int64_t count) {
        const int64_t d = rows.d, heads = rows.heads, stride = rows.ring->groups * d;
        for (int64_t j = 0; j < count; j += 4)
            for (int64_t g = 0; g < rows.ring->groups; ++g) {
                const T *keys = rows.keys(slot + j, g), *values = rows.values(slot + j, g);
                const float* q = own + at.q + g * heads * d;
                float* scores = own + at.scores + g * heads * STEP_KEYS + j;
                const int64_t some = least(4, count - j);
                with_rows<V::dots>(least(V::dots, heads), [&](auto R) {
                    dot_rows<V, decltype(R)::value>(q, keys, stride, some, scores, d, values);
                });
                for (int64_t h = V::dots; h < heads; h += V::dots)
                    with_rows<V::dots>(least(V::dots, heads - h), [&](auto R) {
                        dot_rows<V, decltype(R)::value>(q + h * d, keys, stride, some, scores + h * STEP_KEYS, d,
                                                        Nothing());
                    });
            }
    }

    // A group's scores become weights relative to the running maximum; what was gathered under the old one shrinks.
    void weigh(int64_t g, int64_t slot, int64_t count, float* o, float* maximum, float* total) {
        constexpr bool scaled = std::is_same<T, int8_t>::value;
        float *key_scales = own + at.key_scales, *value_scales = own + at.value_scales;
        if (scaled)
            for (int64_t j = 0, i = slot * rows.ring->groups + g; j < count; ++j, i += rows.ring->groups)
                key_scales[j] = rows.ring->key_scales[i], value_scales[j] = rows.ring->value_scales[i];
        const int64_t padded = (count + V::width - 1) / V::width * V::width;
        for (int64_t h = g * rows.heads; h < (g + 1) * rows.heads; ++h) {
            float* row = own + at.scores + h * STEP_KEYS;
            if (scaled)
                for (int64_t j = 0; j < padded; j += V::width)
                    V::store(row + j, V::mul(V::load(row + j), V::load(key_scales + j)));
            for (int64_t j = count; j < padded; ++j) row[j] = -INFINITY;
            auto highest = V::set(maximum[h]);
            for (int64_t j = 0; j < padded; j += V::width) highest = V::max(highest, V::load(row + j));
            const float peak = V::highest(highest);
            auto sum = V::set(0.0f);
            for (int64_t j = 0; j < padded; j += V::width) {
                const auto weight = exponential<V>(V::sub(V::load(row + j), V::set(peak)));
                sum = V::add(sum, weight);
                V::store(row + j, scaled ? V::mul(weight, V::load(value_scales + j)) : weight);
            }
            if (peak > maximum[h]) {
                const float shrink = V::first(exponential<V>(V::set(maximum[h] - peak)));
                scale_row<V>(o + h * rows.d, shrink, rows.d);
                total[h] *= shrink;
                maximum[h] = peak;
            }
            total[h] += V::sum(sum);
        }
    }

    // o += weights . values
    void gather(int64_t slot, int64_t count, float* o) {
        const int64_t d = rows.d, heads = rows.heads, stride = rows.ring->groups * d;
        for (int64_t g = 0; g < rows.ring->groups; ++g)
            multiply<V>(heads, d, count, ByRows{own + at.scores + g * heads * STEP_KEYS, STEP_KEYS},
                        rows.values(slot, g), stride, o + g * heads * d, d, {true, nullptr},
                        (const T*)rows.keys(slot + count, g));
    }

    // The softmax over all spans, in their order whoever made them. Span 0 becomes the sum.
    void merge(float* out) {
        const int64_t H = rows.in->heads, d = rows.d, spans = (length + span() - 1) / span();
        for (int64_t h = 0; h < H; ++h) {
            float peak = -FLT_MAX, total = 0;
            for (int64_t s = 0; s < spans; ++s) peak = std::fmax(peak, shared[at.maximum + s * H + h]);
            float weights[SPANS];
            for (int64_t s = 0; s < spans; ++s) {
                weights[s] = V::first(exponential<V>(V::set(shared[at.maximum + s * H + h] - peak)));
                total += weights[s] * shared[at.total + s * H + h];
            }
            for (int64_t s = 0; s < spans; ++s) weights[s] /= total;
            for_vectors<V>(d, [&](int64_t i, int64_t count) {
                auto sum = V::set(0.0f);
                for (int64_t s = 0; s < spans; ++s)
                    sum = V::fma(V::set(weights[s]), V::load(shared + at.o + (s * H + h) * d + i, count), sum);
                V::store(out + h * d + i, sum, count);
            });
        }
    }
};

template <class V, class T>
void window_step(sbedge_window_input* in, int64_t position, sbedge_ring* ring, float* out, float* scratch, int ith,
                 int nth) {
    const WindowStepScratch at(in->heads, ring->d);
    const int64_t length = position < ring->window ? position + 1 : ring->window;
    WindowStep<V, T> step{{in, ring}, length, at, scratch, scratch + at.shared + ith * at.floats};
    const Range mine = share((length + step.span() - 1) / step.span(), 1, ith, nth);
    if (mine.begin < mine.end) step.prepare();
    for (int64_t s = mine.begin; s < mine.end; ++s) step.attend_span(s, position % ring->window);
    if (last_to_arrive(&in->arrived, nth)) step.merge(out);
}

}  // namespace
}  // namespace sbedge
