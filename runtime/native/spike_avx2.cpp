// The event-driven matmul on AVX2.
#include "internal.h"

#ifdef __AVX2__

#include "spike_avx2.h"

namespace sbedge {
const LinearKernels* const spike_avx2 = &linear_table<Dot<Avx2>>;
}

#else

namespace sbedge {
const LinearKernels* const spike_avx2 = nullptr;
}

#endif
