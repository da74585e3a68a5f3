// Products of 4-bit weights with zero points.
#include "linear_kinds.h"

extern "C" {
KIND(int4_zeros, Int4Zeros)
#if defined(__AVX512VNNI__)
KIND(int4_zeros_dot, Int4ZerosDot)
#endif
}
