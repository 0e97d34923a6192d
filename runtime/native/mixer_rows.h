// Rows of sliding-window attention: rotated, spiked, and as a ring stores them (float32, float16, int8 with a scale).
#pragma once

#include <cfloat>
#include <cstring>

#include "mixer_math.h"

namespace sbedge {
namespace {

// Rotate-half pairing: channel c turns with c + d / 2. No fused multiply-add: int8 codes are exact to the last bit.
template <class V>
inline void rotate(const float* x, const float* cos, const float* sin, float* y, int64_t d) {
    const int64_t half = d / 2;
    for_vectors<V>(half, [&](int64_t i, int64_t count) {
        const auto a = V::load(x + i, count), b = V::load(x + half + i, count);
        const auto c = V::load(cos + i, count), s = V::load(sin + i, count);
        V::store(y + i, V::sub(V::mul(a, c), V::mul(b, s)), count);
        V::store(y + half + i, V::add(V::mul(b, c), V::mul(a, s)), count);
    });
}

inline float clamp_scale(float x) { return x < 1e-5f ? 1e-5f : x > 1e4f ? 1e4f : x; }

// x = round(x / threshold) * threshold, threshold = mean|x| / k
template <class V>
inline void spike(float* x, float k, int64_t d) {
    double sum[4] = {0, 0, 0, 0};
    for (int64_t i = 0; i < d; ++i) sum[i % 4] += std::fabs(x[i]);
    const float mean = float((sum[0] + sum[1] + sum[2] + sum[3]) / double(d));
    const auto threshold = V::set(clamp_scale(mean / k));
    for_vectors<V>(d, [&](int64_t i, int64_t count) {
        const auto counts = V::round(V::div(V::load(x + i, count), threshold));
        V::store(x + i, V::mul(counts, threshold), count);
    });
}

// Stores a row and makes x what will be read back: the value attended to is the stored one. Returns its scale.
template <class V>
inline float keep(float* x, float* row, int64_t d) {
    std::memcpy(row, x, d * sizeof(float));
    return 1;
}

template <class V>
inline float keep(float* x, half* row, int64_t d) {
    for_vectors<V>(d, [&](int64_t i, int64_t count) {
        V::store(row + i, V::max(V::set(-HALF_MAX), V::min(V::set(HALF_MAX), V::load(x + i, count))), count);
        V::store(x + i, V::load(row + i, count), count);
    });
    return 1;
}

template <class V>
inline float keep(float* x, int8_t* row, int64_t d) {
    auto highest = V::set(0.0f);
    for_vectors<V>(d, [&](int64_t i, int64_t count) {
        const auto a = V::load(x + i, count);
        highest = V::max(highest, V::max(a, V::sub(V::set(0.0f), a)));
    });
    const float scale = clamp_scale(V::highest(highest) / 127.0f);
    for_vectors<V>(d, [&](int64_t i, int64_t count) {
        auto code = V::round(V::div(V::load(x + i, count), V::set(scale)));
        code = V::max(V::set(-128.0f), V::min(V::set(127.0f), code));
        V::store(row + i, code, count);
        V::store(x + i, V::mul(code, V::set(scale)), count);
    });
    return scale;
}

// A call's inputs, a group or a head at a time, and the ring in its own type T.
template <class V, class T>
struct WindowRows {
    const sbedge_window_input* in;
    sbedge_ring* ring;
    int64_t d = ring->d, heads = in->heads / ring->groups;      // query heads of a group

    // Query h of token t, rotated, spiked where wanted, / sqrt(d).
    void query(int64_t t, int64_t h, float* q) const {
        turn(in->q + t * in->q_stride + h * d, t, q);
        if (in->query_k > 0) spike<V>(q, in->query_k, d);
        scale_row<V>(q, 1.0f / std::sqrt(float(d)), d);
    }

    void key(int64_t t, int64_t g, float* k) const { turn(in->k + t * in->k_stride + g * d, t, k); }

    const float* value(int64_t t, int64_t g) const { return in->v + t * in->v_stride + g * d; }

    void turn(const float* x, int64_t t, float* y) const {
        rotate<V>(x, in->cos + t * (d / 2), in->sin + t * (d / 2), y, d);
    }

    T* keys(int64_t slot, int64_t g) const { return (T*)ring->keys + (slot * ring->groups + g) * d; }
    T* values(int64_t slot, int64_t g) const { return (T*)ring->values + (slot * ring->groups + g) * d; }

    // Token t goes into its slot, all groups; `room` [d].
    void remember(int64_t t, int64_t slot, float* room) const {
        for (int64_t g = 0; g < ring->groups; ++g) {
            key(t, g, room);
            const float key_scale = keep<V>(room, keys(slot, g), d);
            std::memcpy(room, value(t, g), d * sizeof(float));
            const float value_scale = keep<V>(room, values(slot, g), d);
            if (!std::is_same<T, int8_t>::value) continue;
            ring->key_scales[slot * ring->groups + g] = key_scale;
            ring->value_scales[slot * ring->groups + g] = value_scale;
        }
    }
};

}  // namespace
}  // namespace sbedge
