// The event-driven matmul on AVX2 with VNNI (client processors without AVX-512): four rows straight into int32.
#include "internal.h"

#ifdef __AVXVNNI__

#include "spike_avx2.h"

namespace sbedge {
namespace {

struct AvxVnni : Avx2 {
    using Narrow = AvxVnni;
    static constexpr int LIMIT = 127, TOKENS = 2;
    static V raised(V v) { return _mm256_and_si256(v, _mm256_set1_epi8(-16)); }
    static V lowered(V sums) { return _mm256_srai_epi32(sums, 4); }
    static V dot(V sums, V codes, V counts) { return _mm256_dpbusd_avx_epi32(sums, codes, counts); }
    static V whole_dot(V sums, V codes, V counts) { return dot(sums, codes, counts); }
};

}  // namespace

const LinearKernels* const spike_avxvnni = &linear_table<Dot<AvxVnni>>;

}  // namespace sbedge

#else

namespace sbedge {
const LinearKernels* const spike_avxvnni = nullptr;
}

#endif
