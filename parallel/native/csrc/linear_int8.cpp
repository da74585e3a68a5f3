// Products of 8-bit weights.
#include "linear_kinds.h"

extern "C" {
KIND(int8, Int8)
#if defined(__AVX512VNNI__)
KIND(int8_dot, Int8Dot)
// x (groups, 128) in place; see rotate_groups.
void manta_hadamard(float* x, long groups, int back, int threads) {
    const long parts = (groups + 511) / 512;
    parallel_for(parts, threads, [&](long part) { rotate_groups(x + part * 512 * 128, std::min(512L, groups - part * 512), back); });
}
#endif
}
