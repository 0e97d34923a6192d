// Sliding-window attention on a ring: softmax over blocks of keys with a running maximum, one pass over the ring.
#pragma once

#include <cfloat>
#include <cstring>

#include "mixer_math.h"

namespace sbedge {
namespace {

constexpr int64_t KEY_BLOCK = 64;    // keys scored at a time; a multiple of every vector width
constexpr int64_t WINDOW_ROWS = 192; // queries (tokens * heads of a group) that share a pass over the ring, about
constexpr int64_t DOT_ROWS = 16;     // below this many queries, keys are not worth transposing

// Tokens taken together: those of one tile see each other's keys from scratch, all older ones from the ring.
inline int64_t tile_tokens(int64_t group_heads, int64_t n) {
    return least(n, most(1, least(KEY_BLOCK, WINDOW_ROWS / group_heads)));
}

struct WindowScratch {
    int64_t tile, q, o, maximum, total, scores, transposed, room, keys, values;
    int64_t own_keys, own_values, own_codes, own_scales, floats;
    WindowScratch(int64_t heads, int64_t groups, int64_t d, int64_t n) {
        tile = tile_tokens(heads / groups, n);
        const int64_t rows = heads / groups * tile;
        Layout layout;
        q = layout.take(rows * d);                    // [tile, H/G, d] rotated, / sqrt(d)
        o = layout.take(rows * d);                    // [tile, H/G, d] weighted sums of values
        maximum = layout.take(rows);                  // running maximum of the scores
        total = layout.take(rows);                    // running sum of the weights
        scores = layout.take(rows * KEY_BLOCK);       // [rows, KEY_BLOCK]
        transposed = layout.take(d * KEY_BLOCK);      // [d, KEY_BLOCK] a block of keys
        room = layout.take(most(d, KEY_BLOCK) * PANEL);    // a packed panel
        keys = layout.take(KEY_BLOCK * d);            // a block of keys decoded from int8
        values = layout.take(KEY_BLOCK * d);          // and its values
        own_keys = layout.take(tile * d);             // [tile, d] as they will be read from the ring
        own_values = layout.take(tile * d);
        own_codes = layout.take((2 * tile * d + 3) / 4);    // [2, tile, d] int8
        own_scales = layout.take(2 * tile);           // [2, tile]
        floats = layout.floats;
    }
};

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

// codes * scale stands for x from here on: the value attended to is the stored one.
template <class V>
inline float quantize(float* x, int8_t* codes, int64_t d) {
    auto highest = V::set(0.0f);
    for_vectors<V>(d, [&](int64_t i, int64_t count) {
        const auto a = V::load(x + i, count);
        highest = V::max(highest, V::max(a, V::sub(V::set(0.0f), a)));
    });
    const float scale = clamp_scale(V::highest(highest) / 127.0f);
    for_vectors<V>(d, [&](int64_t i, int64_t count) {
        auto code = V::round(V::div(V::load(x + i, count), V::set(scale)));
        code = V::max(V::set(-128.0f), V::min(V::set(127.0f), code));
        V::store_int8(codes + i, code, count);
        V::store(x + i, V::mul(code, V::set(scale)), count);
    });
    return scale;
}

// scores [R, 4] = q [R, d] . keys [count <= 4, d]; columns past `count` are undefined.
template <class V, int R>
inline void dot_rows(const float* q, const float* keys, int64_t stride, int64_t count, float* scores, int64_t d) {
    const float* key[4];
    for (int i = 0; i < 4; ++i) key[i] = keys + least(i, count - 1) * stride;
    typename V::reg sum[R][4];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < 4; ++i) sum[r][i] = V::set(0.0f);
    for_vectors<V>(d, [&](int64_t c, int64_t width) {
        typename V::reg x[R];
        for (int r = 0; r < R; ++r) x[r] = V::load(q + r * d + c, width);
        for (int i = 0; i < 4; ++i) {
            const auto y = V::load(key[i] + c, width);
            for (int r = 0; r < R; ++r) sum[r][i] = V::fma(x[r], y, sum[r][i]);
        }
    });
    for (int r = 0; r < R; ++r)
        V::store_sums(scores + r * KEY_BLOCK, sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
}

// scores [rows, 4], rows KEY_BLOCK apart, of up to 4 keys
template <class V>
inline void score_by_dots(int64_t rows, const float* q, const float* keys, int64_t stride, int64_t count, float* scores,
                          int64_t d) {
    for (int64_t r = 0; r < rows; r += V::dots)
        with_rows<V::dots>(least(V::dots, rows - r), [&](auto R) {
            dot_rows<V, decltype(R)::value>(q + r * d, keys, stride, count, scores + r * KEY_BLOCK, d);
        });
}

// The queries of one tile of one group, and what they have gathered so far.
template <class V>
struct Tile {
    int64_t tokens, heads, d, window;
    int64_t position;   // of the first token
    float *q, *o, *maximum, *total, *scores, *transposed, *room;

    // Keys at positions first..first+count-1 (count <= KEY_BLOCK), rows `stride` floats apart.
    void attend(const float* keys, int64_t key_stride, const float* values, int64_t value_stride, int64_t count,
                int64_t first) {
        const int64_t rows = tokens * heads;
        if (rows < DOT_ROWS) {
            for (int64_t j = 0; j < count; j += 4) {
                // What the next block will need arrives in L2 meanwhile: its rows lie where no hardware looks ahead.
                for (int64_t i = j + KEY_BLOCK; i < j + KEY_BLOCK + 4; ++i) {
                    prefetch(keys + i * key_stride, d * sizeof(float));
                    prefetch(values + i * value_stride, d * sizeof(float));
                }
                score_by_dots<V>(rows, q, keys + j * key_stride, key_stride, least(4, count - j), scores + j, d);
            }
        } else {
            for (int64_t j = 0; j < count; j += 4) transpose(keys, key_stride, j, count);
            multiply<V>(rows, count, d, q, d, transposed, KEY_BLOCK, scores, KEY_BLOCK, {false, nullptr}, room);
        }
        const bool all_visible = first > position + tokens - 1 - window && first + count - 1 <= position;
        if (!all_visible) hide(count, first);
        for (int64_t r = 0; r < rows; ++r) weigh(r, count);
        multiply<V>(rows, d, count, scores, KEY_BLOCK, values, value_stride, o, d, {true, nullptr}, room);
    }

    // Keys j..j+3 into columns j..j+3; beyond `count` the last one is repeated.
    void transpose(const float* keys, int64_t stride, int64_t j, int64_t count) {
        const float *a = keys + j * stride, *b = keys + least(j + 1, count - 1) * stride;
        const float *c = keys + least(j + 2, count - 1) * stride, *e = keys + least(j + 3, count - 1) * stride;
        float* out = transposed + j;
        for (int64_t i = 0; i < d; ++i, out += KEY_BLOCK) out[0] = a[i], out[1] = b[i], out[2] = c[i], out[3] = e[i];
    }

    // A token sees positions (its own - window, its own].
    void hide(int64_t count, int64_t first) {
        for (int64_t r = 0; r < tokens * heads; ++r) {
            const int64_t own = position + r / heads - first;   // in columns of this block
            float* row = scores + r * KEY_BLOCK;
            for (int64_t j = 0; j < count; ++j)
                if (j > own || j <= own - window) row[j] = -INFINITY;
        }
    }

    // Scores of a row become weights relative to the running maximum; what was gathered under the old one shrinks.
    void weigh(int64_t r, int64_t count) {
        float* row = scores + r * KEY_BLOCK;
        const int64_t padded = (count + V::width - 1) / V::width * V::width;
        for (int64_t j = count; j < padded; ++j) row[j] = -INFINITY;
        auto highest = V::set(maximum[r]);
        for (int64_t j = 0; j < padded; j += V::width) highest = V::max(highest, V::load(row + j));
        const float peak = V::highest(highest);
        auto sum = V::set(0.0f);
        for (int64_t j = 0; j < padded; j += V::width) {
            const auto weight = exponential<V>(V::sub(V::load(row + j), V::set(peak)));
            sum = V::add(sum, weight);
            V::store(row + j, weight);
        }
        if (peak > maximum[r]) {
            const float shrink = V::first(exponential<V>(V::set(maximum[r] - peak)));
            scale_row<V>(o + r * d, shrink, d);
            total[r] *= shrink;
            maximum[r] = peak;
        }
        total[r] += V::sum(sum);
    }
};

// Decodes `count` int8 rows of one group from `slot` on into x [count, d].
template <class V>
inline void decode(const int8_t* codes, const float* scales, const sbedge_ring* ring, int64_t slot, int64_t g,
                   int64_t count, float* x) {
    const int64_t d = ring->d;
    for (int64_t j = 0; j < count; ++j) {
        const int64_t row = (slot + j) * ring->groups + g;
        const auto scale = V::set(scales[row]);
        prefetch(codes + (row + KEY_BLOCK * ring->groups) * d, d);
        for_vectors<V>(d, [&](int64_t i, int64_t n) {
            V::store(x + j * d + i, V::mul(V::load_int8(codes + row * d + i, n), scale), n);
        });
    }
}

template <class V>
void attend_ring(Tile<V>& tile, const sbedge_ring* ring, int64_t g, float* keys, float* values) {
    const int64_t d = ring->d, stride = ring->groups * d, end = tile.position;
    for (int64_t p = most(0, end - ring->window + 1), count; p < end; p += count) {
        const int64_t slot = p % ring->window;
        count = least(least(KEY_BLOCK, end - p), ring->window - slot);
        if (ring->key_scales) {
            decode<V>((const int8_t*)ring->keys, ring->key_scales, ring, slot, g, count, keys);
            decode<V>((const int8_t*)ring->values, ring->value_scales, ring, slot, g, count, values);
            tile.attend(keys, d, values, d, count, p);
        } else {
            const int64_t offset = slot * stride + g * d;
            tile.attend((const float*)ring->keys + offset, stride, (const float*)ring->values + offset, stride, count,
                        p);
        }
    }
}

template <class V>
struct WindowGroup {
    const sbedge_window_input* in;
    sbedge_ring* ring;
    const WindowScratch& at;
    float* scratch;
    int64_t g, heads;   // group, and its query heads

    // Tokens t..t+tokens-1, the first of them at `position`.
    void run(int64_t t, int64_t tokens, int64_t position, float* out) {
        const int64_t d = ring->d;
        float *own_keys = scratch + at.own_keys, *own_values = scratch + at.own_values;
        Tile<V> tile{tokens, heads, d, ring->window, position, scratch + at.q, scratch + at.o, scratch + at.maximum,
                     scratch + at.total, scratch + at.scores, scratch + at.transposed, scratch + at.room};
        prepare(tile, t);
        attend_ring<V>(tile, ring, g, scratch + at.keys, scratch + at.values);
        tile.attend(own_keys, d, own_values, d, tokens, position);
        for (int64_t r = 0; r < tokens * heads; ++r) {
            float* row = out + (t + r / heads) * in->heads * d + (g * heads + r % heads) * d;
            const auto factor = V::set(1.0f / tile.total[r]);
            for_vectors<V>(d, [&](int64_t i, int64_t n) {
                V::store(row + i, V::mul(V::load(tile.o + r * d + i, n), factor), n);
            });
        }
        remember(tokens, position);
    }

    void prepare(Tile<V>& tile, int64_t t) {
        const int64_t d = ring->d, half = d / 2;
        const float scale = 1.0f / std::sqrt(float(d));
        for (int64_t i = 0; i < tile.tokens; ++i) {
            const float *cos = in->cos + (t + i) * half, *sin = in->sin + (t + i) * half;
            for (int64_t h = 0; h < heads; ++h) {
                float* q = tile.q + (i * heads + h) * d;
                rotate<V>(in->q + (t + i) * in->q_stride + (g * heads + h) * d, cos, sin, q, d);
                if (in->query_k > 0) spike<V>(q, in->query_k, d);
                scale_row<V>(q, scale, d);
            }
            float *key = scratch + at.own_keys + i * d, *value = scratch + at.own_values + i * d;
            rotate<V>(in->k + (t + i) * in->k_stride + g * d, cos, sin, key, d);
            std::memcpy(value, in->v + (t + i) * in->v_stride + g * d, d * sizeof(float));
            if (ring->key_scales) {
                int8_t* codes = (int8_t*)(scratch + at.own_codes);
                scratch[at.own_scales + i] = quantize<V>(key, codes + i * d, d);
                scratch[at.own_scales + at.tile + i] = quantize<V>(value, codes + (at.tile + i) * d, d);
            }
        }
        for (int64_t i = 0; i < tile.tokens * heads * d; ++i) tile.o[i] = 0;
        for (int64_t i = 0; i < tile.tokens * heads; ++i) tile.maximum[i] = -FLT_MAX, tile.total[i] = 0;
    }

    // Only once every query of the tile has read the older tokens whose slots these are.
    void remember(int64_t tokens, int64_t position) {
        const int64_t d = ring->d;
        for (int64_t i = most(0, tokens - ring->window); i < tokens; ++i) {
            const int64_t row = (position + i) % ring->window * ring->groups + g;
            if (ring->key_scales) {
                const int8_t* codes = (const int8_t*)(scratch + at.own_codes);
                std::memcpy((int8_t*)ring->keys + row * d, codes + i * d, d);
                std::memcpy((int8_t*)ring->values + row * d, codes + (at.tile + i) * d, d);
                ring->key_scales[row] = scratch[at.own_scales + i];
                ring->value_scales[row] = scratch[at.own_scales + at.tile + i];
            } else {
                std::memcpy((float*)ring->keys + row * d, scratch + at.own_keys + i * d, d * sizeof(float));
                std::memcpy((float*)ring->values + row * d, scratch + at.own_values + i * d, d * sizeof(float));
            }
        }
    }
};

template <class V>
int64_t window_scratch(int64_t heads, int64_t groups, int64_t d, int64_t, int64_t n) {
    return WindowScratch(heads, groups, d, n).floats;
}

template <class V>
void window(const sbedge_window_input* in, int64_t position, int64_t n, sbedge_ring* ring, float* out, float* scratch,
            int ith, int nth) {
    const WindowScratch at(in->heads, ring->groups, ring->d, n);
    const Range mine = share(ring->groups, 1, ith, nth);
    for (int64_t g = mine.begin; g < mine.end; ++g) {
        WindowGroup<V> group{in, ring, at, scratch + ith * at.floats, g, in->heads / ring->groups};
        for (int64_t t = 0; t < n; t += at.tile) group.run(t, least(at.tile, n - t), position + t, out);
    }
}

}  // namespace
}  // namespace sbedge
