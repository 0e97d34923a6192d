// Chooses the instruction set once, at load, and forwards the public functions to it.
#include <cstdlib>
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#endif

#include "internal.h"

namespace sbedge {
namespace {

struct Isa {
    const char* name;
    const LinearKernels* linear;
    const MixerKernels* mixer;
    bool (*supported)();
};

bool always() { return true; }

#if defined(__x86_64__)
// A bit of CPUID, for what __builtin_cpu_supports has no name for in Clang before 18 and GCC before 11.
bool has_bit(unsigned leaf, unsigned subleaf, bool in_eax, int bit) {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx) && (in_eax ? eax : ecx) >> bit & 1;
}
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_bit(1, 0, false, 29);  // F16C
}
bool has_avxvnni() { return has_avx2() && has_bit(7, 1, true, 4); }
bool has_avx512vnni() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
#else
bool has_avx2() { return false; }
bool has_avxvnni() { return false; }
bool has_avx512vnni() { return false; }
#endif

#if defined(__aarch64__) && defined(__linux__)
bool has_neon() { return getauxval(AT_HWCAP) & (1 << 20); }  // HWCAP_ASIMDDP
#elif defined(__aarch64__)
bool has_neon() { return true; }
#else
bool has_neon() { return false; }
#endif

// Best first.
const Isa* isas(int* count) {
    static const Isa all[] = {
        {"avx512vnni", spike_avx512vnni, mixer_avx512vnni, has_avx512vnni},
        {"avxvnni", spike_avxvnni, mixer_avx2, has_avxvnni},
        {"avx2", spike_avx2, mixer_avx2, has_avx2},
        {"neon", spike_neon, mixer_neon, has_neon},
        {"scalar", spike_scalar, mixer_scalar, always},
    };
    *count = sizeof(all) / sizeof(all[0]);
    return all;
}

const Isa* find(const char* name) {
    int count = 0;
    const Isa* all = isas(&count);
    for (int i = 0; i < count; ++i) {
        const bool built = all[i].linear && all[i].mixer;
        if (built && all[i].supported() && (!name || !std::strcmp(name, all[i].name))) return &all[i];
    }
    return nullptr;
}

const Isa*& current() {
    static const Isa* chosen = [] {
        const char* forced = std::getenv("SBEDGE_ISA");
        const Isa* isa = forced && *forced ? find(forced) : nullptr;
        return isa ? isa : find(nullptr);
    }();
    return chosen;
}

}  // namespace
}  // namespace sbedge

using sbedge::current;

extern "C" {

int sbedge_abi(void) { return SBEDGE_ABI; }

const char* sbedge_isa(void) { return current()->name; }

int sbedge_set_isa(const char* name) {
    const sbedge::Isa* isa = sbedge::find(name);
    if (!isa) return -1;
    current() = isa;
    return 0;
}

void sbedge_spike_encode(const float* x, int64_t n, int64_t width, float k, float dead_zone, int32_t* counts,
                         float* thresholds, int ith, int nth) {
    current()->linear->spike_encode(x, n, width, k, dead_zone, counts, thresholds, ith, nth);
}

int64_t sbedge_spike_matmul_w8(const sbedge_w8* w, const int32_t* counts, const float* thresholds, int64_t n, float* y,
                               int64_t y_stride, int ith, int nth) {
    return current()->linear->spike_matmul_w8(w, counts, thresholds, n, y, y_stride, ith, nth);
}

int64_t sbedge_spike_matmul_w4(const sbedge_w4* w, const int32_t* counts, const float* thresholds, int64_t n, float* y,
                               int64_t y_stride, int ith, int nth) {
    return current()->linear->spike_matmul_w4(w, counts, thresholds, n, y, y_stride, ith, nth);
}

void sbedge_block_encode(const float* x, int64_t n, int64_t width, int8_t* codes, float* scales, int32_t* sums, int ith,
                         int nth) {
    current()->linear->block_encode(x, n, width, codes, scales, sums, ith, nth);
}

void sbedge_dense_matmul(const sbedge_dense* w, const int8_t* codes, const float* scales, const int32_t* sums,
                         int64_t n, float* y, int64_t y_stride, int ith, int nth) {
    current()->linear->dense_matmul(w, codes, scales, sums, n, y, y_stride, ith, nth);
}

int64_t sbedge_gla_scratch(int64_t heads, int64_t groups, int64_t d, int64_t n) {
    return current()->mixer->gla_scratch(heads, groups, d, n);
}

void sbedge_gla(sbedge_gla_input* in, int64_t n, float* state, float* out, float* scratch, int ith, int nth) {
    current()->mixer->gla(in, n, state, out, scratch, ith, nth);
}

int64_t sbedge_window_scratch(int64_t heads, int64_t groups, int64_t d, int64_t window, int64_t n) {
    return current()->mixer->window_scratch(heads, groups, d, window, n);
}

void sbedge_window(sbedge_window_input* in, int64_t position, int64_t n, sbedge_ring* ring, float* out,
                   float* scratch, int ith, int nth) {
    current()->mixer->window(in, position, n, ring, out, scratch, ith, nth);
}

void sbedge_silu_gate(const float* gate, const float* up, float* out, int64_t n) {
    current()->mixer->silu_gate(gate, up, out, n);
}

}  // extern "C"
