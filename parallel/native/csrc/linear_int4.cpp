// Products of 4-bit weights.
#include "linear_kinds.h"

extern "C" {
KIND(int4, Int4)
#if defined(__AVX512VNNI__)
KIND(int4_dot, Int4Dot)
#endif
}
