// Sliding-window attention of many tokens: blocks of keys against tiles of queries, softmax with a running maximum.
#pragma once

#include "mixer_rows.h"
#include "mixer_window_step.h"

namespace sbedge {
namespace {

constexpr int64_t KEY_BLOCK = 64;    // keys scored at a time
constexpr int64_t WINDOW_ROWS = 192; // queries (tokens * heads of a group) that share a pass over the keys, about
constexpr int64_t FEW_TILES = 4;     // threads want some to share out, even of few groups
constexpr int64_t FEW_TOKENS = 8;    // but none smaller than this

// Tokens taken together: as many as fit, in tiles of about the same size.
inline int64_t tile_tokens(int64_t heads, int64_t groups, int64_t n) {
    const int64_t most_tokens = most(1, WINDOW_ROWS * groups / heads);
    int64_t tiles = (n + most_tokens - 1) / most_tokens;
    tiles = most(tiles, least((FEW_TILES + groups - 1) / groups, n / FEW_TOKENS));
    return (n + tiles - 1) / tiles;
}

template <class V>
struct WindowScratch {
    int64_t tile, rows, columns, q, scores, maximum, total, shrink, o, keys, values, row, own, floats;
    WindowScratch(int64_t heads, int64_t groups, int64_t d, int64_t n) {
        tile = tile_tokens(heads, groups, n);
        rows = panel_count<V>(heads / groups * tile) * PANEL<V>;    // queries, in whole panels
        columns = panel_count<V>(d) * PANEL<V>;
        Layout layout;
        q = layout.take(rows * d);                  // panels [d, PANEL]: queries are columns
        scores = layout.take(KEY_BLOCK * rows);     // [KEY_BLOCK, rows]
        maximum = layout.take(rows);                // running maximum of each query's scores
        total = layout.take(rows);                  // running sum of its weights
        shrink = layout.take(rows);                 // what a new maximum makes of what was gathered before
        o = layout.take(rows * columns);            // [rows, columns] weighted sums of values
        keys = layout.take(KEY_BLOCK * d);          // [KEY_BLOCK, d]
        values = layout.take(KEY_BLOCK * columns);  // panels [KEY_BLOCK, PANEL]
        row = layout.take(d);
        own = layout.take(d);                       // a row as the ring would store it
        floats = layout.floats;
    }
};

// The queries of `tokens` tokens from `t` on, of one group. Token t of the call is at position + t.
template <class V, class T>
struct WindowTile {
    WindowRows<V, T> rows;
    int64_t position, g, t, tokens;
    const WindowScratch<V>& at;
    float* scratch;
    int64_t d = rows.d, heads = rows.heads, window = rows.ring->window;

    void run(float* out) {
        prepare();
        const int64_t first = most(0, position + t - window + 1);
        for (int64_t p = first, count; p < position; p += count) {     // from the ring, as it was before this call
            const int64_t slot = p % window;
            count = least(least(KEY_BLOCK, position - p), window - slot);
            recall(slot, count);
            attend(p, count);
        }
        for (int64_t i = most(0, first - position), count; i < t + tokens; i += count) {     // from the call itself
            count = least(KEY_BLOCK, t + tokens - i);
            take(i, count);
            attend(position + i, count);
        }
        finish(out);
    }

    // Queries become columns: what follows goes through them a vector at a time.
    void prepare() {
        float *q = scratch + at.q, *row = scratch + at.row;
        for (int64_t i = 0; i < at.rows * d; ++i) q[i] = 0;
        for (int64_t r = 0; r < tokens * heads; ++r) {
            rows.query(t + r / heads, g * heads + r % heads, row);
            float* column = q + r / PANEL<V> * PANEL<V> * d + r % PANEL<V>;
            for (int64_t i = 0; i < d; ++i) column[i * PANEL<V>] = row[i];
        }
        for (int64_t i = 0; i < at.rows; ++i) scratch[at.maximum + i] = -FLT_MAX, scratch[at.total + i] = 0;
        for (int64_t i = 0; i < at.rows * at.columns; ++i) scratch[at.o + i] = 0;
    }

    // Rows of the ring into keys and values.
    void recall(int64_t slot, int64_t count) {
        const int64_t stride = rows.ring->groups * d;
        for (int64_t j = 0; j < count; ++j) copy(rows.keys(slot + j, g), scratch + at.keys + j * d);
        pack_values(rows.values(slot, g), stride, count, 0);
        if (!std::is_same<T, int8_t>::value) return;
        for (int64_t j = 0; j < count; ++j) {
            const int64_t cell = (slot + j) * rows.ring->groups + g;
            scale_row<V>(scratch + at.keys + j * d, rows.ring->key_scales[cell], d);
            for (int64_t c = 0; c < at.columns; c += PANEL<V>)
                scale_row<V>(scratch + at.values + c * KEY_BLOCK + j * PANEL<V>, rows.ring->value_scales[cell],
                             PANEL<V>);
        }
    }

    // Tokens of this call, as the ring will hold them.
    void take(int64_t i, int64_t count) {
        T* own = (T*)(scratch + at.own);
        for (int64_t j = 0; j < count; ++j) {
            float *key = scratch + at.keys + j * d, *value = scratch + at.row;
            rows.key(i + j, g, key);
            keep<V>(key, own, d);
            std::memcpy(value, rows.value(i + j, g), d * sizeof(float));
            keep<V>(value, own, d);
            pack_values(value, d, 1, j);
        }
    }

    void copy(const T* x, float* y) {
        for_vectors<V>(d, [&](int64_t i, int64_t count) { V::store(y + i, V::load(x + i, count), count); });
    }

    template <class B>
    void pack_values(const B* x, int64_t stride, int64_t count, int64_t row) {
        for (int64_t c = 0; c < at.columns; c += PANEL<V>)
            pack<V>(count, d - c, x + c, stride, scratch + at.values + c * KEY_BLOCK + row * PANEL<V>);
    }

    // Keys at positions first..first+count-1.
    void attend(int64_t first, int64_t count) {
        const bool all_visible = first > position + t + tokens - 1 - window && first + count - 1 <= position + t;
        const int64_t queries = tokens * heads;
        for (int64_t r = 0; r < queries; r += PANEL<V>) {
            multiply_panel<V>(count, queries - r, d, ByRows{scratch + at.keys, d}, scratch + at.q + r * d,
                              scratch + at.scores + r, at.rows, {false, nullptr});
        }
        if (!all_visible) hide(first, count);
        for (int64_t r = 0; r < queries; r += V::width) weigh(r, count);
        for (int64_t c = 0; c < at.columns; c += PANEL<V>)
            multiply_panel<V>(queries, d - c, count, ByColumns{scratch + at.scores, at.rows},
                              scratch + at.values + c * KEY_BLOCK, scratch + at.o + c, at.columns,
                              {true, scratch + at.shrink});
    }

    // A token sees positions (its own - window, its own].
    void hide(int64_t first, int64_t count) {
        for (int64_t j = 0; j < count; ++j) {
            float* row = scratch + at.scores + j * at.rows;
            const int64_t seer = first + j - position - t;     // the first token that sees this key; window - 1 more do
            const int64_t begin = least(most(0, seer), tokens);
            const int64_t end = seer + window < tokens ? most(0, seer + window) : tokens;
            for (int64_t r = 0; r < begin * heads; ++r) row[r] = -INFINITY;
            for (int64_t r = end * heads; r < tokens * heads; ++r) row[r] = -INFINITY;
        }
    }

    // A vector of queries: scores become weights relative to the running maximum.
    void weigh(int64_t r, int64_t count) {
        float *scores = scratch + at.scores + r, *maximum = scratch + at.maximum + r, *total = scratch + at.total + r;
        const auto before = V::load(maximum);
        auto peak = before, sum = V::set(0.0f);
        for (int64_t j = 0; j < count; ++j) peak = V::max(peak, V::load(scores + j * at.rows));
        for (int64_t j = 0; j < count; ++j) {
            const auto weight = exponential<V>(V::sub(V::load(scores + j * at.rows), peak));
            sum = V::add(sum, weight);
            V::store(scores + j * at.rows, weight);
        }
        const auto shrink = exponential<V>(V::sub(before, peak));
        V::store(scratch + at.shrink + r, shrink);
        V::store(total, V::fma(V::load(total), shrink, sum));
        V::store(maximum, peak);
    }

    void finish(float* out) {
        for (int64_t r = 0; r < tokens * heads; ++r) {
            const float* o = scratch + at.o + r * at.columns;
            float* row = out + ((t + r / heads) * rows.in->heads + g * heads + r % heads) * d;
            const auto factor = V::set(1.0f / scratch[at.total + r]);
            for_vectors<V>(d, [&](int64_t i, int64_t n) { V::store(row + i, V::mul(V::load(o + i, n), factor), n); });
        }
    }
};

// Tiles of all groups are dealt out to threads. The ring stays as it was until the last of them has read it.
template <class V, class T>
void window_tiles(sbedge_window_input* in, int64_t position, int64_t n, sbedge_ring* ring, float* out, float* scratch,
                  int ith, int nth) {
    const WindowScratch<V> at(in->heads, ring->groups, ring->d, n);
    const WindowRows<V, T> rows{in, ring};
    scratch += ith * at.floats;
    const int64_t tiles = (n + at.tile - 1) / at.tile;
    for (int64_t i = ith; i < tiles * ring->groups; i += nth) {
        const int64_t t = i / ring->groups * at.tile;
        WindowTile<V, T>{rows, position, i % ring->groups, t, least(at.tile, n - t), at, scratch}.run(out);
    }
    if (!last_to_arrive(&in->arrived, nth)) return;
    for (int64_t t = most(0, n - ring->window); t < n; ++t)
        rows.remember(t, (position + t) % ring->window, scratch + at.row);
}

template <class V>
int64_t window_scratch(int64_t heads, int64_t groups, int64_t d, int64_t, int64_t n) {
    const WindowStepScratch step(heads, d);
    return n == 1 ? step.shared + step.floats : WindowScratch<V>(heads, groups, d, n).floats;
}

template <class V, class T>
void window_of(sbedge_window_input* in, int64_t position, int64_t n, sbedge_ring* ring, float* out, float* scratch,
               int ith, int nth) {
    if (n == 1)
        window_step<V, T>(in, position, ring, out, scratch, ith, nth);
    else
        window_tiles<V, T>(in, position, n, ring, out, scratch, ith, nth);
}

template <class V>
void window(sbedge_window_input* in, int64_t position, int64_t n, sbedge_ring* ring, float* out, float* scratch,
            int ith, int nth) {
    switch (ring->type) {
        case SBEDGE_F32: return window_of<V, float>(in, position, n, ring, out, scratch, ith, nth);
        case SBEDGE_F16: return window_of<V, half>(in, position, n, ring, out, scratch, ith, nth);
        case SBEDGE_INT8: return window_of<V, int8_t>(in, position, n, ring, out, scratch, ith, nth);
    }
}

}  // namespace
}  // namespace sbedge
