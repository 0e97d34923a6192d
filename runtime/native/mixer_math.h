// What the mixer kernels are made of, over a vector type V (one for each mixer_ISA.cpp, with masked tails).
// Everything has internal linkage: each instruction set compiles its own copy.
#pragma once

#include <cmath>
#include <type_traits>

#include "internal.h"

namespace sbedge {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

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

// c [R, count] (+)= a [R, K] b [K, count], R * N vectors in registers; `count` may be ragged where N is 1.
template <class V, int R, int N>
inline void multiply_tile(int64_t K, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                          int64_t count, Before before) {
    typename V::reg sum[R][N];
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < N; ++j) {
            sum[r][j] = !before.keep ? V::set(0.0f)
                        : N == 1     ? V::load(c + r * ldc, count)
                                     : V::load(c + r * ldc + j * V::width);
            if (before.decay) sum[r][j] = V::mul(sum[r][j], V::set(before.decay[r]));
        }
    for (int64_t k = 0; k < K; ++k) {
        typename V::reg row[N];
        for (int j = 0; j < N; ++j)
            row[j] = N == 1 ? V::load(b + k * ldb, count) : V::load(b + k * ldb + j * V::width);
        for (int r = 0; r < R; ++r) {
            const auto x = V::set(a[r * lda + k]);
            for (int j = 0; j < N; ++j) sum[r][j] = V::fma(x, row[j], sum[r][j]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < N; ++j) {
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

// All rows of one column panel.
template <class V, int N>
inline void multiply_panel(int64_t M, int64_t K, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                           int64_t ldc, int64_t count, Before before) {
    for (; M >= V::rows; M -= V::rows, a += V::rows * lda, c += V::rows * ldc) {
        multiply_tile<V, V::rows, N>(K, a, lda, b, ldb, c, ldc, count, before);
        if (before.decay) before.decay += V::rows;
    }
    with_rows<V::rows - 1>(M, [&](auto rest) {
        multiply_tile<V, decltype(rest)::value, N>(K, a, lda, b, ldb, c, ldc, count, before);
    });
}

constexpr int64_t PANEL = 32;   // columns of b that are packed together, at most

// c [M, N] (+)= a [M, K] b [K, N], row-major with the given row strides. Where many rows pass over them, panels of b
// are packed into `room` [K, PANEL] first: rows a power of two apart would evict each other from L1.
template <class V>
inline void multiply(int64_t M, int64_t N, int64_t K, const float* a, int64_t lda, const float* b, int64_t ldb,
                     float* c, int64_t ldc, Before before, float* room) {
    constexpr int64_t panel = V::panel * V::width;
    static_assert(panel <= PANEL, "room for one panel");
    const bool pack = M >= 3 * V::rows && ldb > panel;
    int64_t j = 0;
    for (; j + panel <= N; j += panel) {
        if (pack)
            for (int64_t k = 0; k < K; ++k)
                for (int64_t i = 0; i < panel; i += V::width)
                    V::store(room + k * panel + i, V::load(b + k * ldb + j + i));
        multiply_panel<V, V::panel>(M, K, a, lda, pack ? room : b + j, pack ? panel : ldb, c + j, ldc, panel, before);
    }
    for (; j < N; j += V::width)
        multiply_panel<V, 1>(M, K, a, lda, b + j, ldb, c + j, ldc, least(V::width, N - j), before);
}

// Asks for a row ahead of its use; strided rows are nothing the hardware foresees.
inline void prefetch(const void* row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)row + i, 0, 2);
}

template <class V>
inline void scale_row(float* x, float factor, int64_t n) {
    const auto f = V::set(factor);
    for_vectors<V>(n, [&](int64_t i, int64_t count) { V::store(x + i, V::mul(V::load(x + i, count), f), count); });
}

}  // namespace
}  // namespace sbedge
