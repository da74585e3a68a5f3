// Scale search for int4 weights; bit-identical to `parallel.scale_search`, which documents the method.
#include <algorithm>
#include <cmath>
#include "simd.h"
#include "tasks.h"

constexpr int GROUP = 32, PARTS = GROUP / LANES, TRIED = 8, FIRST_TRIED = 465, STEP_TRIED = 16, COUNT_BITS = 4;
constexpr float WHOLE = 511, LEAST = 1e-30f;

// Operations on registers of 16-bit integers.
#if defined(__AVX512F__)
static inline Ints all_shorts(int16_t x) { return _mm512_set1_epi16(x); }
static inline Ints to_shorts(Ints a, Ints b) { return _mm512_packs_epi32(a, b); }  // interleaves a and b in blocks of 128 bits
static inline Ints sizes_of_shorts(Ints x) { return _mm512_abs_epi16(x); }
static inline Ints add_shorts(Ints a, Ints b) { return _mm512_add_epi16(a, b); }
static inline Ints multiply_shorts(Ints a, Ints b) { return _mm512_mullo_epi16(a, b); }
template <int N> static inline Ints right_shorts(Ints x) { return _mm512_srli_epi16(x, N); }
static inline Ints scale_shorts(Ints a, Ints b) { return _mm512_mulhrs_epi16(a, b); }  // (a * b + 2^14) >> 15
static inline Ints between_shorts(Ints x, Ints low, Ints high) { return _mm512_max_epi16(_mm512_min_epi16(x, high), low); }
static inline Ints sums_of_pairs(Ints a, Ints b) { return _mm512_madd_epi16(a, b); }
static inline Ints between(Ints x, Ints low, Ints high) { return _mm512_max_epi32(_mm512_min_epi32(x, high), low); }
static inline void store_bytes(int8_t* p, Ints x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x)); }
static inline __m256i halved(Ints x) { return _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1)); }
#else
static inline Ints all_shorts(int16_t x) { return _mm256_set1_epi16(x); }
static inline Ints to_shorts(Ints a, Ints b) { return _mm256_packs_epi32(a, b); }
static inline Ints sizes_of_shorts(Ints x) { return _mm256_abs_epi16(x); }
static inline Ints add_shorts(Ints a, Ints b) { return _mm256_add_epi16(a, b); }
static inline Ints multiply_shorts(Ints a, Ints b) { return _mm256_mullo_epi16(a, b); }
template <int N> static inline Ints right_shorts(Ints x) { return _mm256_srli_epi16(x, N); }
static inline Ints scale_shorts(Ints a, Ints b) { return _mm256_mulhrs_epi16(a, b); }
static inline Ints between_shorts(Ints x, Ints low, Ints high) { return _mm256_max_epi16(_mm256_min_epi16(x, high), low); }
static inline Ints sums_of_pairs(Ints a, Ints b) { return _mm256_madd_epi16(a, b); }
static inline Ints between(Ints x, Ints low, Ints high) { return _mm256_max_epi32(_mm256_min_epi32(x, high), low); }
static inline void store_bytes(int8_t* p, Ints x) {
    const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(shorts, shorts));
}
static inline __m256i halved(Ints x) { return x; }
#endif

// The sums of eight registers, as one register.
static INLINE __m256i sums_of(const __m256i (&x)[8]) {
    const auto four = [&](int i) INLINED {
        return _mm256_hadd_epi32(_mm256_hadd_epi32(x[i], x[i + 1]), _mm256_hadd_epi32(x[i + 2], x[i + 3]));
    };
    const __m256i low = four(0), high = four(4);
    return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}

static INLINE int32_t sum_of_words(__m256i x) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    four = _mm_hadd_epi32(four, four);
    return _mm_cvtsi128_si32(_mm_hadd_epi32(four, four));
}

static INLINE void choose_scale(const float* weights, int8_t* numbers, uint16_t* scale) {
    Floats x[PARTS];
    unrolled<PARTS>([&](auto i) INLINED { x[i] = load(weights + i * LANES); });
    Floats high = x[0], low = x[0], poison = zeros();
    unrolled<PARTS>([&](auto i) INLINED {
        high = maximum(high, x[i]);
        low = minimum(low, x[i]);
        poison = multiply_add(x[i], zeros(), poison);
    });
    const bool is_sound = reduce_add(poison) == 0;
    const float top = reduce_max(high), bottom = reduce_max(multiply(low, broadcast(-1))), most = std::max(top, bottom);
    if (!is_sound || !(most > LEAST)) {
        *scale = is_sound ? 0 : 0x7e00;  // NaN
        unrolled<PARTS>([&](auto i) INLINED { store_bytes(numbers + i * LANES, zero_ints()); });
        return;
    }
    const float furthest = bottom >= top ? most : -most;
    const Floats inverse = broadcast(WHOLE / furthest);
    Ints whole[PARTS / 2], counts[PARTS / 2], counted[PARTS / 2], sizes = zero_ints();
    unrolled<PARTS / 2>([&](auto i) INLINED {
        whole[i] = to_shorts(to_ints(multiply(x[2 * i], inverse)), to_ints(multiply(x[2 * i + 1], inverse)));
        counts[i] = sizes_of_shorts(whole[i]);
        sizes = add_ints(sizes, sums_of_pairs(counts[i], all_shorts(1)));
    });
    const Ints mean = all_shorts(int16_t(sum_of_words(halved(sizes)) / GROUP));
    unrolled<PARTS / 2>([&](auto i) INLINED {
        counts[i] = right_shorts<COUNT_BITS>(add_shorts(counts[i], mean));
        counted[i] = multiply_shorts(counts[i], whole[i]);
    });
    __m256i products[TRIED], squares[TRIED];
    unrolled<TRIED>([&](auto tried) INLINED {
        Ints product = zero_ints(), square = zero_ints();
        unrolled<PARTS / 2>([&](auto i) INLINED {
            const Ints number = between_shorts(scale_shorts(whole[i], all_shorts(FIRST_TRIED + tried * STEP_TRIED)), all_shorts(-8), all_shorts(7));
            product = add_ints(product, sums_of_pairs(number, counted[i]));
            square = add_ints(square, sums_of_pairs(number, multiply_shorts(number, counts[i])));
        });
        products[tried] = halved(product), squares[tried] = halved(square);
    });
    const __m256 product = _mm256_cvtepi32_ps(sums_of(products)), square = _mm256_cvtepi32_ps(sums_of(squares));
    alignas(32) float explained[TRIED], fitted[TRIED];
    _mm256_store_ps(explained, _mm256_div_ps(_mm256_mul_ps(product, product), square));
    _mm256_store_ps(fitted, _mm256_div_ps(product, square));
    const long best = std::max_element(explained, explained + TRIED) - explained;  // the first among equals
    *scale = _cvtss_sh(fitted[best] * (furthest / WHOLE), _MM_FROUND_TO_NEAREST_INT);
    const float held = _cvtsh_ss(*scale);
    const Floats back = broadcast(held == 0 ? 0 : 1 / held);
    unrolled<PARTS>([&](auto i) INLINED { store_bytes(numbers + i * LANES, between(to_ints(multiply(x[i], back)), broadcast_int(-8), broadcast_int(7))); });
}

// weights and numbers (groups, 32), scales (groups).
extern "C" void manta_choose_scales(const float* weights, int8_t* numbers, uint16_t* scales, long groups, int threads) {
    constexpr long AT_ONCE = 512;
    parallel_for((groups + AT_ONCE - 1) / AT_ONCE, threads, [&](long part) {
        for (long g = part * AT_ONCE; g < std::min(groups, (part + 1) * AT_ONCE); ++g)
            choose_scale(weights + g * GROUP, numbers + g * GROUP, scales + g);
    });
}
