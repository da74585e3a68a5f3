// Products of bfloat16 and float32 weights.
#include "linear_kinds.h"

extern "C" {
int manta_lanes() { return LANES; }
KIND(bf16, Bf16Product)
#if defined(__AVX512BF16__)
KIND(bf16_dot, Bf16Dot)
#endif
KIND(fp32, Fp32Product)
}
