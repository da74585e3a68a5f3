// One set of names for a register of LANES 32-bit numbers in AVX2 (8) and in AVX-512 (16), so that each kernel is written once.
#pragma once
#include <immintrin.h>
#include <cstdint>
#include <utility>

#define INLINED __attribute__((always_inline))
#define INLINE inline INLINED

// Calls f(0), f(1) ... f(N - 1), unrolled with compile-time indices, so that arrays indexed by them are kept in registers.
template <class F, int... I> static INLINE void unrolled_over(std::integer_sequence<int, I...>, F&& f) { (f(std::integral_constant<int, I>()), ...); }
template <int N, class F> static INLINE void unrolled(F&& f) { unrolled_over(std::make_integer_sequence<int, N>(), f); }

#if defined(__AVX512F__)
constexpr int LANES = 16;
using Floats = __m512;
using Ints = __m512i;
static inline Floats zeros() { return _mm512_setzero_ps(); }
static inline Ints zero_ints() { return _mm512_setzero_si512(); }
static inline Floats broadcast(float x) { return _mm512_set1_ps(x); }
static inline Ints broadcast_int(int32_t x) { return _mm512_set1_epi32(x); }
static inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
static inline Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
static inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
static inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
static inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
static inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
static inline Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
static inline Floats minimum(Floats a, Floats b) { return _mm512_min_ps(a, b); }
static inline Ints subtract_ints(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
static inline Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
static inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
static inline Ints to_ints(Floats x) { return _mm512_cvtps_epi32(x); }
static inline Floats as_floats(Ints x) { return _mm512_castsi512_ps(x); }
template <int N> static inline Ints shift_left(Ints x) { return _mm512_slli_epi32(x, N); }
template <int N> static inline Ints shift_right(Ints x) { return _mm512_srli_epi32(x, N); }
static inline Ints bit_and(Ints a, Ints b) { return _mm512_and_si512(a, b); }
static inline Ints multiply_ints(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
static inline Floats half_ints_to_floats(Ints x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }
static inline Floats halves_to_floats(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline Ints bytes_to_shorts(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
static inline Ints add_pairs(Ints sum, Ints a, Ints b) {  // sum + a.low * b.low + a.high * b.high, 16-bit numbers in 32-bit lanes
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(sum, a, b);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}
static inline float reduce_add(Floats x) {  // always in the same order
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(x), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
static inline float reduce_max(Floats x) { return _mm512_reduce_max_ps(x); }
static inline unsigned nan_mask(Floats x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }  // 0: all are numbers
// Elements k .. k + 3 of rows 0, 4, 8 and 12 of `rows`, concatenated.
static inline Floats load_fours(const float* const* rows, long k) {
    Floats x = _mm512_castps128_ps512(_mm_loadu_ps(rows[0] + k));
    x = _mm512_insertf32x4(x, _mm_loadu_ps(rows[4] + k), 1);
    x = _mm512_insertf32x4(x, _mm_loadu_ps(rows[8] + k), 2);
    return _mm512_insertf32x4(x, _mm_loadu_ps(rows[12] + k), 3);
}
static inline Floats unpack_low(Floats a, Floats b) { return _mm512_unpacklo_ps(a, b); }
static inline Floats unpack_high(Floats a, Floats b) { return _mm512_unpackhi_ps(a, b); }
static inline Floats shuffle_low(Floats a, Floats b) { return _mm512_shuffle_ps(a, b, 0x44); }
static inline Floats shuffle_high(Floats a, Floats b) { return _mm512_shuffle_ps(a, b, 0xee); }
using Doubles = __m512d;
constexpr int DOUBLES = 8;
static inline Doubles broadcast_double(double x) { return _mm512_set1_pd(x); }
static inline Doubles load_doubles(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
static inline void store_doubles(double* p, Doubles x) { _mm512_storeu_pd(p, x); }
static inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) { return _mm512_fmadd_pd(a, b, c); }
static inline Doubles subtract(Doubles a, Doubles b) { return _mm512_sub_pd(a, b); }
static inline Doubles maximum(Doubles a, Doubles b) { return _mm512_max_pd(a, b); }
static inline Doubles rounded(Doubles x) { return _mm512_roundscale_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Doubles rounded_down(Doubles x) { return _mm512_roundscale_pd(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
static inline Doubles times_power_of_2(Doubles x, Doubles n) { return _mm512_scalef_pd(x, n); }  // n: integers of small size
#else
constexpr int LANES = 8;
using Floats = __m256;
using Ints = __m256i;
static inline Floats zeros() { return _mm256_setzero_ps(); }
static inline Ints zero_ints() { return _mm256_setzero_si256(); }
static inline Floats broadcast(float x) { return _mm256_set1_ps(x); }
static inline Ints broadcast_int(int32_t x) { return _mm256_set1_epi32(x); }
static inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
static inline Ints load_ints(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
static inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
static inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
static inline Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
static inline Floats maximum(Floats a, Floats b) { return _mm256_max_ps(a, b); }
static inline Floats minimum(Floats a, Floats b) { return _mm256_min_ps(a, b); }
static inline Ints subtract_ints(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
static inline Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
static inline Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
static inline Ints to_ints(Floats x) { return _mm256_cvtps_epi32(x); }
static inline Floats as_floats(Ints x) { return _mm256_castsi256_ps(x); }
template <int N> static inline Ints shift_left(Ints x) { return _mm256_slli_epi32(x, N); }
template <int N> static inline Ints shift_right(Ints x) { return _mm256_srli_epi32(x, N); }
static inline Ints bit_and(Ints a, Ints b) { return _mm256_and_si256(a, b); }
static inline Ints multiply_ints(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
static inline Floats half_ints_to_floats(Ints x) {
    const Ints low = bit_and(x, broadcast_int(0xffff));
    return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08)));
}
static inline Floats halves_to_floats(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline Ints bytes_to_shorts(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
static inline Ints add_pairs(Ints sum, Ints a, Ints b) {  // sum + a.low * b.low + a.high * b.high, 16-bit numbers in 32-bit lanes
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
static inline float reduce_add(Floats x) {  // always in the same order
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
static inline unsigned nan_mask(Floats x) { return _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)); }
static inline float reduce_max(Floats x) {
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
// Elements k .. k + 3 of rows 0 and 4 of `rows`, concatenated.
static inline Floats load_fours(const float* const* rows, long k) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[0] + k)), _mm_loadu_ps(rows[4] + k), 1);
}
using Doubles = __m256d;
constexpr int DOUBLES = 4;
static inline Doubles broadcast_double(double x) { return _mm256_set1_pd(x); }
static inline Doubles load_doubles(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
static inline void store_doubles(double* p, Doubles x) { _mm256_storeu_pd(p, x); }
static inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) { return _mm256_fmadd_pd(a, b, c); }
static inline Doubles subtract(Doubles a, Doubles b) { return _mm256_sub_pd(a, b); }
static inline Doubles maximum(Doubles a, Doubles b) { return _mm256_max_pd(a, b); }
static inline Doubles rounded(Doubles x) { return _mm256_round_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Doubles rounded_down(Doubles x) { return _mm256_round_pd(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
static inline Doubles times_power_of_2(Doubles x, Doubles n) {
    const __m256i exponent = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n)), _mm256_set1_epi64x(1023));
    return _mm256_mul_pd(x, _mm256_castsi256_pd(_mm256_slli_epi64(exponent, 52)));
}
static inline Floats unpack_low(Floats a, Floats b) { return _mm256_unpacklo_ps(a, b); }
static inline Floats unpack_high(Floats a, Floats b) { return _mm256_unpackhi_ps(a, b); }
static inline Floats shuffle_low(Floats a, Floats b) { return _mm256_shuffle_ps(a, b, 0x44); }
static inline Floats shuffle_high(Floats a, Floats b) { return _mm256_shuffle_ps(a, b, 0xee); }
#endif

// Transposes 4 x 4 blocks: within each 128-bit lane of the four registers.
static inline void transpose_fours(Floats& a, Floats& b, Floats& c, Floats& d) {
    const Floats ab_low = unpack_low(a, b), ab_high = unpack_high(a, b), cd_low = unpack_low(c, d), cd_high = unpack_high(c, d);
    a = shuffle_low(ab_low, cd_low);
    b = shuffle_high(ab_low, cd_low);
    c = shuffle_low(ab_high, cd_high);
    d = shuffle_high(ab_high, cd_high);
}

// Forces x into a register here, so that the compiler neither hoists loads far ahead nor spills accumulators.
static INLINE void keep_in_register(Ints& x) { asm volatile("" : "+v"(x)); }
template <class T> static INLINE void keep_in_register(const T*& p) { asm volatile("" : "+r"(p)); }

constexpr int MAX_TILE_ROWS = LANES == 16 ? 12 : 6;  // with two accumulator registers each, this leaves enough registers for the operands

// Prefetches a cache line into L2 and not L1, where it would evict what is being multiplied.
static INLINE void prefetch_l2(const void* at) { _mm_prefetch((const char*)at, _MM_HINT_T1); }

// Calls run with the number of rows as a compile-time constant.
template <int R = MAX_TILE_ROWS, class Run> static INLINE void dispatch_rows(long count, Run run) {
    if (count == R) run(std::integral_constant<int, R>());
    else if constexpr (R > 1) dispatch_rows<R - 1>(count, run);
}

// e^x to about 2 ulp: 2^n times a polynomial of degree 6 on [-ln2/2, ln2/2] (coefficients 1/k!). Below -87 it returns 1e-38, not zero.
static inline Floats exponential(Floats x) {
    x = maximum(minimum(x, broadcast(88.0f)), broadcast(-87.0f));
    Ints n = to_ints(multiply(x, broadcast(1.44269504f)));
    Floats f = multiply_add(to_floats(n), broadcast(-0.693145752f), x);
    f = multiply_add(to_floats(n), broadcast(-1.42860677e-6f), f);
    Floats p = broadcast(1.0f / 720);
    p = multiply_add(p, f, broadcast(1.0f / 120));
    p = multiply_add(p, f, broadcast(1.0f / 24));
    p = multiply_add(p, f, broadcast(1.0f / 6));
    p = multiply_add(p, f, broadcast(0.5f));
    p = multiply_add(p, f, broadcast(1.0f));
    p = multiply_add(p, f, broadcast(1.0f));
    return multiply(p, as_floats(shift_left<23>(add_ints(n, broadcast_int(127)))));
}
