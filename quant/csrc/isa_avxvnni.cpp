// The AVX2 kernels with AVX-VNNI's dot product: Alder Lake and later, Zen 5 and later.
#define PM_AVXVNNI
#include "isa_avx2.cpp"
