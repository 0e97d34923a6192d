// Compares the spike kernels of every instruction set of this build and machine with the scalar ones, to the bit, on
// seeded random cases. Needs nothing but the library, so that it runs under an emulator too:
//   c++ -std=c++17 -Iruntime/native tests/native/check_kernels.cpp -Lbuild -lsbedge -o check_kernels
// Prints one line a kernel; the exit code is 1 if any result differs.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "sbedge.h"

namespace {

std::mt19937 generator(1);

int64_t uniform(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
float normal() { return std::normal_distribution<float>()(generator); }

template <class T>
T pick(std::initializer_list<T> choices) {
    return choices.begin()[uniform(0, choices.size() - 1)];
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && !std::memcmp(a.data(), b.data(), a.size() * sizeof(T));
}

struct Result {
    std::vector<float> values;
    std::vector<int32_t> integers;
    bool operator==(const Result& other) const {
        return same(values, other.values) && same(integers, other.integers);
    }
};

// Runs `kernel` under scalar and under `isa`, each time over its own number of threads.
template <class Kernel>
bool agrees(const char* isa, Kernel kernel) {
    sbedge_set_isa("scalar");
    const Result wanted = kernel(1);
    sbedge_set_isa(isa);
    return kernel(uniform(1, 3)) == wanted;
}

bool check_encode(const char* isa) {
    const int64_t n = uniform(1, 4), width = uniform(1, 300);
    const float k = pick({1.0f, 3.0f, 4.5f}), dead_zone = pick({0.0f, 0.4f});
    const float size = pick({1e-30f, 1e-3f, 1.0f, 1e8f});
    std::vector<float> x(n * width);
    for (float& value : x) value = uniform(0, 9) ? normal() * size : 0.0f;
    return agrees(isa, [&](int nth) {
        Result result{std::vector<float>(n), std::vector<int32_t>(n * width)};
        for (int ith = 0; ith < nth; ++ith)
            sbedge_spike_encode(x.data(), n, width, k, dead_zone, result.integers.data(), result.values.data(), ith,
                                nth);
        return result;
    });
}

struct Spikes {
    int64_t n;
    std::vector<int32_t> counts;
    std::vector<float> thresholds;
};

// Some silent, most small, some large.
Spikes spikes(int64_t in) {
    Spikes result{pick<int64_t>({1, 1, 2, 5, 66}), {}, {}};
    const int64_t silent = uniform(0, 10), large = pick<int64_t>({0, 64, 65, 127, 128, 60000});
    for (int64_t i = 0; i < result.n * in; ++i)
        result.counts.push_back(uniform(0, 9) < silent ? 0
                                : large && !uniform(0, 20) ? uniform(-large, large)
                                                           : uniform(-7, 7));
    for (int64_t t = 0; t < result.n; ++t) result.thresholds.push_back(0.5f + std::fabs(normal()));
    return result;
}

template <class Layer, class Matmul>
bool check_matmul(const char* isa, const Layer& layer, Matmul matmul) {
    const Spikes s = spikes(layer.in);
    return agrees(isa, [&](int nth) {
        Result result{std::vector<float>(s.n * layer.out), {0}};
        for (int ith = 0; ith < nth; ++ith)
            result.integers[0] += static_cast<int32_t>(matmul(&layer, s.counts.data(), s.thresholds.data(), s.n,
                                                              result.values.data(), layer.out, ith, nth));
        return result;
    });
}

bool check_w8(const char* isa, bool with_residual) {
    const int64_t in = pick<int64_t>({128, 256, 300}), out = pick<int64_t>({1, 63, 64, 65, 200, 257});
    std::vector<int8_t> codes(in * out);
    std::vector<float> scales((in + SBEDGE_GROUP - 1) / SBEDGE_GROUP * out), bias(out);
    std::vector<int32_t> start{0}, output, value;
    for (int8_t& code : codes) code = static_cast<int8_t>(uniform(-128, 127));
    for (float& scale : scales) scale = normal() * 0.01f;
    for (float& b : bias) b = normal();
    for (int64_t i = 0; i < in; ++i) {
        for (int64_t o = 0; o < out; ++o)
            if (!uniform(0, 50)) output.push_back(static_cast<int32_t>(o)), value.push_back(uniform(-300, 300));
        start.push_back(static_cast<int32_t>(output.size()));
    }
    const sbedge_w8 layer{in, out, pick<int64_t>({0, 64, 128}), codes.data(), scales.data(),
                          uniform(0, 1) ? bias.data() : nullptr, with_residual ? start.data() : nullptr, output.data(),
                          value.data(), uniform(0, 1)};
    return check_matmul(isa, layer, sbedge_spike_matmul_w8);
}

bool check_w4(const char* isa, int64_t group) {
    const int64_t in = pick<int64_t>({128, 384}), out = 64 * uniform(1, 5);
    std::vector<uint8_t> nibbles(in * out / 2), zeros(in / group * out);
    std::vector<uint16_t> scales(zeros.size());
    std::vector<float> bias(out);
    for (uint8_t& two : nibbles) two = static_cast<uint8_t>(uniform(0, 255));
    for (uint8_t& zero : zeros) zero = static_cast<uint8_t>(uniform(0, 15));
    for (uint16_t& scale : scales) scale = static_cast<uint16_t>(uniform(0, 0x3c00) | uniform(0, 1) << 15);  // -1 to 1
    for (float& b : bias) b = normal();
    const sbedge_w4 layer{in, out, pick<int64_t>({0, 64, 128}), group, nibbles.data(), scales.data(), uniform(0, 1) ? zeros.data() : nullptr,
                          uniform(0, 1) ? bias.data() : nullptr};
    return check_matmul(isa, layer, sbedge_spike_matmul_w4);
}

template <class Check>
bool report(const char* isa, const char* kernel, Check check) {
    constexpr int CASES = 60;
    int wrong = 0;
    for (int i = 0; i < CASES; ++i) wrong += !check();
    std::printf("%-10s %-18s %s (%d of %d cases differ)\n", isa, kernel, wrong ? "WRONG" : "ok", wrong, CASES);
    return !wrong;
}

}  // namespace

int main() {
    bool good = true;
    for (const char* isa : {"scalar", "avx2", "avxvnni", "avx512vnni", "neon"}) {
        if (sbedge_set_isa(isa)) continue;
        good &= report(isa, "spike_encode", [=] { return check_encode(isa); });
        good &= report(isa, "w8", [=] { return check_w8(isa, false); });
        good &= report(isa, "w8 with residual", [=] { return check_w8(isa, true); });
        good &= report(isa, "w4 group 32", [=] { return check_w4(isa, 32); });
        good &= report(isa, "w4 group 64", [=] { return check_w4(isa, 64); });
        good &= report(isa, "w4 group 128", [=] { return check_w4(isa, 128); });
    }
    return good ? 0 : 1;
}
