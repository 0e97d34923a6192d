// What the mixer kernels are made of, over a vector type V (one for each mixer_ISA.cpp, with masked tails).
// Everything has internal linkage: each instruction set compiles its own copy.
#pragma once

#include <cmath>
#include <type_traits>

#include "internal.h"

namespace sbedge {
namespace {

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Loops over registers: unless they are unrolled early, GCC keeps the sums in memory.
#define SBEDGE_UNROLL _Pragma("GCC unroll 16")

struct half {   // IEEE binary16
    uint16_t bits;
};

constexpr float HALF_MAX = 65504.0f;

// Offsets of arrays in one thread's scratch, each on a cache line of its own.
struct Layout {
    int64_t floats = 0;
    int64_t take(int64_t count) {
        const int64_t offset = floats;
        floats += (count + 15) / 16 * 16;
        return offset;
    }
};

// f(i, count) for each vector of a row; count < V::width at the tail.
template <class V, class F>
inline void for_vectors(int64_t n, F f) {
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) f(i, int64_t(V::width));
    if (i < n) f(i, n - i);
}

// e^x within 2 ulp for x <= 88; 0 below -104, denormals between.
template <class V>
inline typename V::reg exponential(typename V::reg x) {
    x = V::max(V::set(-104.0f), V::min(V::set(88.3f), x));
    const auto n = V::round(V::mul(x, V::set(1.44269504f)));
    auto r = V::fma(n, V::set(-0.693359375f), x);
    r = V::fma(n, V::set(2.12194440e-4f), r);
    auto p = V::set(1.9875691500e-4f);
    p = V::fma(p, r, V::set(1.3981999507e-3f));
    p = V::fma(p, r, V::set(8.3334519073e-3f));
    p = V::fma(p, r, V::set(4.1665795894e-2f));
    p = V::fma(p, r, V::set(1.6666665459e-1f));
    p = V::fma(p, r, V::set(5.0000001201e-1f));
    p = V::add(V::fma(p, V::mul(r, r), r), V::set(1.0f));
    return V::scale(p, n);
}

// out = silu(gate) * up, [n]; silu(x) = x / (1 + e^-x)
template <class V>
void silu_gate(const float* gate, const float* up, float* out, int64_t n) {
    const auto zero = V::set(0.0f), one = V::set(1.0f);
    for_vectors<V>(n, [&](int64_t i, int64_t count) {
        const auto x = V::load(gate + i, count);
        const auto y = V::div(x, V::add(one, exponential<V>(V::sub(zero, x))));
        V::store(out + i, V::mul(y, V::load(up + i, count)), count);
    });
}

// log(1 + e^x) - x, negated: min(x, 0) - log1p(u), u = e^-|x|, with log1p(u) = 2 atanh(u / (2 + u)).
template <class V>
inline typename V::reg log_sigmoid(typename V::reg x) {
    const auto zero = V::set(0.0f);
    const auto u = exponential<V>(V::min(x, V::sub(zero, x)));
    const auto s = V::div(u, V::add(u, V::set(2.0f)));
    const auto s2 = V::mul(s, s);
    auto p = V::set(2.0f / 15);
    for (float odd = 13; odd >= 3; odd -= 2) p = V::fma(p, s2, V::set(2.0f / odd));
    p = V::fma(V::mul(p, s2), s, V::add(s, s));
    return V::sub(V::min(x, zero), p);
}

// What becomes of the values already in c: dropped, kept, or decayed by a factor for each row.
struct Before {
    bool keep;
    const float* decay;     // [rows] or NULL
};

// A left factor whose rows lie `stride` floats apart, and one whose columns do.
struct ByRows {
    const float* x;
    int64_t stride;
    float at(int64_t r, int64_t k) const { return x[r * stride + k]; }
    ByRows from(int64_t r) const { return {x + r * stride, stride}; }
};

struct ByColumns {
    const float* x;
    int64_t stride;
    float at(int64_t r, int64_t k) const { return x[k * stride + r]; }
    ByColumns from(int64_t r) const { return {x + r, stride}; }
};

// Memory that is wanted next and laid out like what is being read: asked for piece by piece in the same pace, so that
// requests neither pile up nor take loops of their own.
struct Nothing {};
inline Nothing operator+(Nothing, int64_t) { return {}; }

template <class V>
inline void ask(Nothing, int64_t) {}

template <class V, class T>
inline void ask(const T* next, int64_t i) {
    constexpr int64_t line = 64 / sizeof(T);
    if (V::width >= line || i % line == 0) __builtin_prefetch(next + i, 0, 2);
}

// c [R, count] (+)= a [R, K] b [K, count], R * N vectors in registers; `count` may be ragged where N is 1. b is of any
// type that V loads.
template <class V, int R, int N, class A, class B, class Next>
inline void multiply_tile(int64_t K, A a, const B* b, int64_t ldb, float* c, int64_t ldc, int64_t count, Before before,
                          Next next) {
    typename V::reg sum[R][N];
    SBEDGE_UNROLL for (int r = 0; r < R; ++r)
        SBEDGE_UNROLL for (int j = 0; j < N; ++j) {
            sum[r][j] = !before.keep ? V::set(0.0f)
                        : N == 1     ? V::load(c + r * ldc, count)
                                     : V::load(c + r * ldc + j * V::width);
            if (before.decay) sum[r][j] = V::mul(sum[r][j], V::set(before.decay[r]));
        }
    for (int64_t k = 0; k < K; ++k) {
        typename V::reg row[N];
        SBEDGE_UNROLL for (int j = 0; j < N; ++j)
            row[j] = N == 1 ? V::load(b + k * ldb, count) : V::load(b + k * ldb + j * V::width);
        SBEDGE_UNROLL for (int j = 0; j < N; ++j) ask<V>(next + k * ldb, j * V::width);
        SBEDGE_UNROLL for (int r = 0; r < R; ++r) {
            const auto x = V::set(a.at(r, k));
            SBEDGE_UNROLL for (int j = 0; j < N; ++j) sum[r][j] = V::fma(x, row[j], sum[r][j]);
        }
    }
    SBEDGE_UNROLL for (int r = 0; r < R; ++r)
        SBEDGE_UNROLL for (int j = 0; j < N; ++j) {
            if (N == 1)
                V::store(c + r * ldc, sum[r][j], count);
            else
                V::store(c + r * ldc + j * V::width, sum[r][j]);
        }
}

// f(std::integral_constant<int, R>) for R = rows, 1..MAX: a run-time count becomes registers.
template <int MAX, class F>
inline void with_rows(int64_t rows, F f) {
    if constexpr (MAX > 0) {
        if (rows == MAX)
            f(std::integral_constant<int, MAX>());
        else
            with_rows<MAX - 1>(rows, f);
    }
}

// All rows of N vectors of columns.
template <class V, int N, class A, class B, class Next = Nothing>
inline void multiply_columns(int64_t M, int64_t K, A a, const B* b, int64_t ldb, float* c, int64_t ldc, int64_t count,
                             Before before, Next next = {}) {
    for (; M >= V::rows; M -= V::rows, a = a.from(V::rows), c += V::rows * ldc) {
        multiply_tile<V, V::rows, N>(K, a, b, ldb, c, ldc, count, before, next);
        if (before.decay) before.decay += V::rows;
    }
    with_rows<V::rows - 1>(M, [&](auto rest) {
        multiply_tile<V, decltype(rest)::value, N>(K, a, b, ldb, c, ldc, count, before, next);
    });
}

// c [M, N] (+)= a [M, K] b [K, N], row-major with the given row strides: for few rows, that pass over b once. `next` is
// laid out like b.
template <class V, class A, class B, class Next = Nothing>
inline void multiply(int64_t M, int64_t N, int64_t K, A a, const B* b, int64_t ldb, float* c, int64_t ldc,
                     Before before, Next next = {}) {
    constexpr int64_t panel = V::panel * V::width;
    int64_t j = 0;
    for (; j + panel <= N; j += panel)
        multiply_columns<V, V::panel>(M, K, a, b + j, ldb, c + j, ldc, panel, before, next + j);
    for (; j < N; j += V::width)
        multiply_columns<V, 1>(M, K, a, b + j, ldb, c + j, ldc, least(V::width, N - j), before, next + j);
}

// Many rows want b packed in panels, each the rows of PANEL columns in one piece (zeros where b has no more columns):
// rows a power of two apart would evict each other from L1.
template <class V>
constexpr int64_t PANEL = V::panel * V::width;

template <class V>
inline int64_t panel_count(int64_t columns) {
    return (columns + PANEL<V> - 1) / PANEL<V>;
}

// Rows of up to PANEL columns into a panel.
template <class V, class B>
inline void pack(int64_t rows, int64_t columns, const B* b, int64_t ldb, float* panel) {
    for (int64_t k = 0; k < rows; ++k, b += ldb, panel += PANEL<V>)
        for (int64_t j = 0; j < PANEL<V>; j += V::width)
            V::store(panel + j, j < columns ? V::load(b + j, columns - j) : V::set(0.0f));
}

template <class V>
inline void unpack(int64_t rows, int64_t columns, const float* panel, float* b, int64_t ldb) {
    for (int64_t k = 0; k < rows; ++k, b += ldb, panel += PANEL<V>)
        for (int64_t j = 0; j < least(columns, PANEL<V>); j += V::width)
            V::store(b + j, V::load(panel + j), columns - j);
}

// c [M, PANEL] (+)= a [M, K] panel [K, PANEL], of which `columns` are wanted: c has room for all of them.
template <class V, class A>
inline void multiply_panel(int64_t M, int64_t columns, int64_t K, A a, const float* panel, float* c, int64_t ldc,
                           Before before) {
    if (columns > V::width)
        multiply_columns<V, V::panel>(M, K, a, panel, PANEL<V>, c, ldc, PANEL<V>, before);
    else
        multiply_columns<V, 1>(M, K, a, panel, PANEL<V>, c, ldc, V::width, before);
}

// Asks for a row ahead of its use; strided rows are nothing the hardware foresees. A macro's worth of code: GCC takes a
// function that only prefetches for one without effect, and drops the call.
__attribute__((always_inline)) inline void prefetch(const void* row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)row + i, 0, 2);
}

template <class V>
inline float dot(const float* x, const float* y, int64_t n) {
    auto sum = V::set(0.0f);
    for_vectors<V>(n, [&](int64_t i, int64_t count) { sum = V::fma(V::load(x + i, count), V::load(y + i, count), sum); });
    return V::sum(sum);
}

// Whether all other parts of this call have finished: what is left then (joining their results, writing what they read)
// falls to this one. No part ever waits, so parts may run in any order and on fewer threads than there are parts.
inline bool last_to_arrive(int32_t* arrived, int nth) {
    if (nth == 1) return true;
    if (__atomic_add_fetch(arrived, 1, __ATOMIC_ACQ_REL) < nth) return false;
    __atomic_store_n(arrived, 0, __ATOMIC_RELAXED);     // ready for the next call
    return true;
}

template <class V>
inline void scale_row(float* x, float factor, int64_t n) {
    const auto f = V::set(factor);
    for_vectors<V>(n, [&](int64_t i, int64_t count) { V::store(x + i, V::mul(V::load(x + i, count), f), count); });
}

}  // namespace
}  // namespace sbedge
