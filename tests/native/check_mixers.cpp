// Compares the mixer kernels of every instruction set this machine has with scalar, on seeded cases.
// Exit status 1 on any difference beyond rounding. Built against libsbedge's sources; runs under qemu-user too.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "sbedge.h"

namespace {

using Floats = std::vector<float>;

std::mt19937 generator(1);

Floats normal(int64_t count, float scale = 1, float mean = 0) {
    std::normal_distribution<float> distribution(mean, scale);
    Floats x(count);
    for (float& value : x) value = distribution(generator);
    return x;
}

int failures = 0, checks = 0;

void compare(const char* isa, const char* what, const Floats& found, const Floats& expected) {
    float scale = 1, worst = 0;
    for (float x : expected) scale = std::fmax(scale, std::fabs(x));
    bool finite = true;
    for (size_t i = 0; i < found.size(); ++i) {
        finite = finite && std::isfinite(found[i]);
        worst = std::fmax(worst, std::fabs(found[i] - expected[i]));
    }
    ++checks;
    if (finite && worst <= 2e-5f * scale) return;
    ++failures;
    std::printf("%s %s: off by %g at scale %g\n", isa, what, worst, scale);
}

struct Gla {
    int64_t heads, groups, d, n;
    Floats q, k, v, gate, norm, state;

    Gla(int64_t heads, int64_t groups, int64_t d, int64_t n, float gate_mean)
        : heads(heads), groups(groups), d(d), n(n), q(normal(n * heads * d)), k(normal(n * groups * d)),
          v(normal(n * groups * d)), gate(normal(n * groups * d, 3, gate_mean)), norm(normal(d)),
          state(normal(groups * d * d)) {}

    // Output, then the state after it.
    Floats run(const char* isa, int nth) const {
        sbedge_set_isa(isa);
        sbedge_gla_input in = {heads,      groups,     d,          q.data(),   k.data(),    v.data(), gate.data(),
                                     heads * d, groups * d, groups * d, groups * d, norm.data(), 1e-6f, 0};
        Floats after = state, out(n * heads * d), scratch(nth * sbedge_gla_scratch(heads, groups, d, n));
        for (int ith = 0; ith < nth; ++ith) sbedge_gla(&in, n, after.data(), out.data(), scratch.data(), ith, nth);
        out.insert(out.end(), after.begin(), after.end());
        return out;
    }
};

struct Window {
    int64_t heads, groups, d, window, n, position;
    int32_t type;
    Floats q, k, v, cos, sin, keys, values, scales;
    std::vector<int8_t> codes;
    std::vector<uint16_t> halves;

    Window(int64_t heads, int64_t groups, int64_t d, int64_t window, int64_t n, int64_t position, int32_t type)
        : heads(heads), groups(groups), d(d), window(window), n(n), position(position), type(type),
          q(normal(n * heads * d)), k(normal(n * groups * d)), v(normal(n * groups * d)), cos(n * d / 2),
          sin(n * d / 2), keys(normal(window * groups * d)), values(normal(window * groups * d)),
          scales(2 * window * groups, 0.02f), codes(2 * window * groups * d), halves(codes.size()) {
        for (size_t i = 0; i < cos.size(); ++i) cos[i] = std::cos(float(i)), sin[i] = std::sin(float(i));
        for (size_t i = 0; i < codes.size(); ++i) codes[i] = int8_t(i * 37 % 255 - 127);
        for (size_t i = 0; i < halves.size(); ++i)     // of either sign, from 2^-15 to 8
            halves[i] = uint16_t(i % 2 << 15 | i * 7919 % 0x4800);
    }

    // Output, then the ring after it.
    Floats run(const char* isa, int nth) const {
        sbedge_set_isa(isa);
        Window after = *this;
        const int64_t cells = window * groups;
        sbedge_ring ring = {window, groups, d, after.keys.data(), after.values.data(), nullptr, nullptr, SBEDGE_F32};
        if (type == SBEDGE_F16)
            ring = {window, groups, d, after.halves.data(), after.halves.data() + cells * d, nullptr, nullptr, type};
        if (type == SBEDGE_INT8)
            ring = {window, groups, d, after.codes.data(), after.codes.data() + cells * d, after.scales.data(),
                    after.scales.data() + cells, SBEDGE_INT8};
        sbedge_window_input in = {heads,      q.data(),  k.data(),   v.data(),   cos.data(),
                                        sin.data(), heads * d, groups * d, groups * d, type == SBEDGE_INT8 ? 3.0f : 0.0f, 0};
        Floats out(n * heads * d), scratch(nth * sbedge_window_scratch(heads, groups, d, window, n));
        for (int ith = 0; ith < nth; ++ith)
            sbedge_window(&in, position, n, &ring, out.data(), scratch.data(), ith, nth);
        out.insert(out.end(), after.keys.begin(), after.keys.end());
        out.insert(out.end(), after.values.begin(), after.values.end());
        out.insert(out.end(), after.scales.begin(), after.scales.end());
        out.insert(out.end(), after.codes.begin(), after.codes.end());
        out.insert(out.end(), after.halves.begin(), after.halves.end());
        return out;
    }
};

template <class Case>
void check(const char* isa, const char* what, const Case& one) {
    const Floats expected = one.run("scalar", 1), found = one.run(isa, 1);
    compare(isa, what, found, expected);
    for (int nth = 2; nth <= 3; ++nth) {
        const Floats shared = one.run(isa, nth);
        ++checks;
        if (!std::memcmp(shared.data(), found.data(), found.size() * sizeof(float))) continue;
        ++failures;
        std::printf("%s %s: differs on %d threads\n", isa, what, nth);
    }
}

struct SiluGate {
    Floats gate, up;

    Floats run(const char* isa, int) const {
        sbedge_set_isa(isa);
        Floats out(gate.size());
        sbedge_silu_gate(gate.data(), up.data(), out.data(), int64_t(gate.size()));
        return out;
    }
};

void check_isa(const char* isa) {
    char what[128];
    for (int64_t n : {1, 7, 64, 133}) {
        std::snprintf(what, sizeof what, "silu n=%d", int(n));
        check(isa, what, SiluGate{normal(n, 20), normal(n)});
    }
    for (int64_t group : {1, 7, 11})
        for (int64_t d : {1, 6, 33, 80})
            for (int64_t n : {1, 50}) {
                for (float gate : {20.0f, -30.0f, -3000.0f}) {
                    std::snprintf(what, sizeof what, "gla H/G=%d d=%d n=%d gate=%g", int(group), int(d), int(n), gate);
                    check(isa, what, Gla(2 * group, 2, d, n, gate));
                }
                if (d % 2 == 1) continue;
                for (int64_t window : {5, 90})
                    for (int32_t type : {SBEDGE_F32, SBEDGE_F16, SBEDGE_INT8}) {
                        std::snprintf(what, sizeof what, "window H/G=%d d=%d n=%d W=%d type=%d", int(group), int(d),
                                      int(n), int(window), int(type));
                        check(isa, what, Window(2 * group, 2, d, window, n, 1000003, type));
                    }
            }
}

}  // namespace

int main() {
    for (const char* isa : {"scalar", "avx2", "avx512vnni", "neon"}) {
        if (sbedge_set_isa(isa)) continue;
        check_isa(isa);
        std::printf("%s: %d checks, %d failures\n", isa, checks, failures);
    }
    return failures != 0;
}
