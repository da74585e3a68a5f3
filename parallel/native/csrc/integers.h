// Weights of 8 and 4 bits with a scale for each group of input features, times rows as integers with a scale for each group: of 16 bits,
// which is as exact as float32, or of 8 bits where a processor multiplies four of them at a time (then four groups of 4-bit weights meet one
// of a row). Sums within a group are exact.
#pragma once
#include <cmath>
#include <type_traits>
#include "linear.h"

// A row as integers of 16 or 8 bits.
template <class Number> struct QuantisedRow {
    static constexpr bool APART = sizeof(Number) == 1;
    const Number* x;
    const float* scales;
    const int32_t* starts;  // what the sum over each group of weights begins with: what is added to them while they are held, taken away again
};

// What is the same for a group's numbers of an output, of LANES outputs: a scale. What was added to the numbers while they are held is taken
// away where a sum begins ...
struct Scales {
    using Stored = uint16_t;  // half precision
    static constexpr int32_t OF_INT4 = 8;
    Floats scale;

    INLINED explicit Scales(const Stored* at) : scale(from_halves(at)) {}
    static INLINE Words begin(int32_t start) { return all_words(start); }
    INLINE Floats whole(Words sum, int32_t) const { return to_floats(sum); }
    INLINE Floats taken_away(int32_t offset) const { return to_floats(all_words(offset)); }
};

// ... or is a zero of the group's own, and is taken away at its end. Both together lie in 32 bits, see parallel/zeros.py.
struct ScalesAndZeros {
    using Stored = uint32_t;
    static constexpr int32_t OF_INT4 = 1;  // to be multiplied by the zero
    Floats scale;
    Words zero;

    INLINED explicit ScalesAndZeros(const Stored* at) {
        const Words word = load_words(at);
        scale = from_low_halves(word);
        zero = right<16>(word);
    }
    static INLINE Words begin(int32_t) { return no_words(); }
    INLINE Floats whole(Words sum, int32_t start) const { return to_floats(add_words(sum, multiply_words(zero, all_words(start)))); }
    INLINE Floats taken_away(int32_t) const { return to_floats(zero); }
};

// sums = begin + rows * weights in whole numbers, group by group; `products` adds those of one group to its sums.
template <class Scales, int R, int P, class Row, class Products>
static INLINE void group_by_group(const Row* rows, const typename Scales::Stored* scales, long panel, long groups, long first, long last, Begin begin, float* sums,
                                  long stride, Products products) {
    for (long g = first; g < last; ++g) {
        Words sum[R][P][2];
        each<R>([&](auto r) INLINED { each<P>([&](auto p) INLINED { sum[r][p][0] = sum[r][p][1] = Scales::begin(rows[r].starts[g]); }); });
        products(g, sum);
        each<P>([&](auto p) INLINED {
            each<2>([&](auto h) INLINED {
                const Scales held(scales + ((panel + p) * groups + g) * PANEL + h * LANES);
                each<R>([&](auto r) INLINED {
                    float* at = sums + r * stride + p * PANEL + h * LANES;
                    const Floats whole = held.whole(sum[r][p][h], rows[r].starts[g]);
                    store(at, multiply_add(whole, multiply(all(rows[r].scales[g]), held.scale), begin.load(r, p, h)));
                });
            });
        });
        begin = {sums, stride};
    }
}

// Two input features of R rows times those of a panel's 2 * LANES outputs.
template <int R, int P> static INLINE void add_two(const QuantisedRow<int16_t>* rows, long k, Words even, Words odd, Words (&sum)[R][P][2], int p) {
    each<R>([&](auto r) INLINED {
        int32_t pair;
        memcpy(&pair, rows[r].x + k, 4);
        const Words value = all_words(pair);
        sum[r][p][0] = add_pairs(sum[r][p][0], even, value);
        hold(sum[r][p][0]);
        sum[r][p][1] = add_pairs(sum[r][p][1], odd, value);
        hold(sum[r][p][1]);
    });
}

struct Int8 {
    const int8_t* weights;    // [panel][k / 2][output][2]
    const uint16_t* scales;   // half precision, [panel][group][output]
    long K, group;
    using Held = Scales;
    static constexpr long PARTS_BY_PANEL = 0;
    using Number = int16_t;
    using Row = QuantisedRow<Number>;
    static constexpr int32_t OFFSET = 0;  // what is added to a weight before it is multiplied
    static constexpr int MOST = MOST_ROWS, OF_MANY = MOST;
    static constexpr int panels_at_once(int rows) { return rows == 1 ? 4 : 1; }

    template <int R, int P> void tile(const Row* rows, long panel, long k0, long k1, Begin begin, float* sums, long stride, long) const {
        group_by_group<Held, R, P>(rows, scales, panel, K / group, k0 / group, k1 / group, begin, sums, stride, [&](long g, auto& sum) INLINED {
            for (long k = g * group; k < (g + 1) * group; k += 2)
                each<P>([&](auto p) INLINED {
                    const int8_t* at = weights + ((panel + p) * K + k) * PANEL;
                    if (R <= 2) _mm_prefetch((const char*)(at + 1024), _MM_HINT_T0);
                    add_two<R, P>(rows, k, from_bytes(at), from_bytes(at + 2 * LANES), sum, p);
                });
        });
    }
};

template <class Scales> struct Int4Of {
    const uint8_t* weights;  // [panel][k / 8][output] 32 bits: eight numbers from 0 to 15; bits 4s: k = 2s, bits 16 + 4s: k = 2s + 1
    const typename Scales::Stored* scales;  // [panel][group][output]
    long K, group;
    using Held = Scales;
    static constexpr long PARTS_BY_PANEL = 0;
    using Number = int16_t;
    using Row = QuantisedRow<Number>;
    static constexpr int32_t OFFSET = Scales::OF_INT4;
    static constexpr int MOST = MOST_ROWS, OF_MANY = MOST;
    static constexpr int panels_at_once(int rows) { return rows == 1 ? 4 : 1; }

    template <int R, int P> void tile(const Row* rows, long panel, long k0, long k1, Begin begin, float* sums, long stride, long) const {
        const Words mask = all_words(0x000f000f);
        group_by_group<Held, R, P>(rows, scales, panel, K / group, k0 / group, k1 / group, begin, sums, stride, [&](long g, auto& sum) INLINED {
            for (long k = g * group; k < (g + 1) * group; k += 8)
                each<P>([&](auto p) INLINED {
                    const uint8_t* at = weights + ((panel + p) * K + k) * (PANEL / 2);
                    if (R <= 2) _mm_prefetch((const char*)(at + 1024), _MM_HINT_T0);
                    each<4>([&](auto s) INLINED {
                        hold(at);  // loaded again for each two: the registers are wanted for the sums
                        const Words even = both(right<4 * s>(load_words(at)), mask), odd = both(right<4 * s>(load_words(at + 4 * LANES)), mask);
                        add_two<R, P>(rows, k + 2 * s, even, odd, sum, p);
                    });
                });
        });
    }
};

using Int4 = Int4Of<Scales>;
using Int4Zeros = Int4Of<ScalesAndZeros>;

#if defined(__AVX512VNNI__)
constexpr long ROW_GROUP = 128;  // numbers of a row that share a scale where they have 8 bits

// Four input features of R rows times those of a panel's 2 * LANES outputs (VPDPBUSD: its left numbers are without a sign).
template <int R, int P> static INLINE void add_four(const Apart<R, int8_t>& rows, Words first, Words second, Words (&sum)[R][P][2], int p) {
    each<R>([&](auto r) INLINED {
        const Words value = rows.template at<r>();
        sum[r][p][0] = _mm512_dpbusd_epi32(sum[r][p][0], first, value);
        hold(sum[r][p][0]);
        sum[r][p][1] = _mm512_dpbusd_epi32(sum[r][p][1], second, value);
        hold(sum[r][p][1]);
    });
}

struct Int8Dot {
    const uint8_t* weights;   // [panel][k / 4][output][4], each + 128
    const uint16_t* scales;   // half precision, [panel][group][output]
    long K, group;
    using Held = Scales;
    static constexpr long PARTS_BY_PANEL = 12;
    using Number = int8_t;
    using Row = QuantisedRow<Number>;
    static constexpr int32_t OFFSET = 128;
    static constexpr int MOST = MOST_ROWS, OF_MANY = 8;  // by registers: of 8 rows what is summed up over groups stays there too
    static constexpr int panels_at_once(int rows) { return rows <= 2 ? 4 : rows <= 4 ? 2 : 1; }

    template <int R, int P> void tile(const Row* rows, long panel, long k0, long k1, Begin begin, float* sums, long stride, long ahead) const {
        Apart<R, int8_t> x(rows, k0);
        const auto products = [&](long g, Words (&sum)[R][P][2]) INLINED {
            long k = g * ROW_GROUP;
            do {  // at least once: with a loop that may have none registers are copied
                each<P>([&](auto p) INLINED {
                    const uint8_t* at = weights + ((panel + p) * K + k) * PANEL;
                    if (R <= 2 || P == 1) {  // between, it costs more than it gives
                        fetch(at + ahead * PANEL);
                        fetch(at + ahead * PANEL + 4 * LANES);
                    }
                    add_four<R, P>(x, load_words(at), load_words(at + 4 * LANES), sum, p);
                });
                x.advance(4);
                k += 4;
            } while (k < (g + 1) * ROW_GROUP);
        };
        if constexpr (R > 1 && R * P <= OF_MANY)  // one row waits for memory, and was slower so
            group_by_group_held<R, P>(rows, panel, k0 / ROW_GROUP, k1 / ROW_GROUP, begin, sums, stride, products);
        else
            group_by_group<Held, R, P>(rows, scales, panel, K / ROW_GROUP, k0 / ROW_GROUP, k1 / ROW_GROUP, begin, sums, stride, products);
    }

private:
    // As group_by_group, with registers for what is summed up over groups.
    template <int R, int P, class Products>
    INLINE void group_by_group_held(const Row* rows, long panel, long first, long last, Begin begin, float* sums, long stride, Products products) const {
        Floats total[R][P][2];
        const auto each_sum = [&](auto run) INLINED {
            each<P>([&](auto p) INLINED { each<2>([&](auto h) INLINED { each<R>([&](auto r) INLINED { run(r, p, h); }); }); });
        };
        each_sum([&](auto r, auto p, auto h) INLINED { total[r][p][h] = begin.load(r, p, h); });
        for (long g = first; g < last; ++g) {
            Words sum[R][P][2];
            each<R>([&](auto r) INLINED { each<P>([&](auto p) INLINED { sum[r][p][0] = sum[r][p][1] = all_words(rows[r].starts[g]); }); });
            products(g, sum);
            each<P>([&](auto p) INLINED {
                each<2>([&](auto h) INLINED {
                    const Floats scale = from_halves(scales + ((panel + p) * (K / ROW_GROUP) + g) * PANEL + h * LANES);
                    each<R>([&](auto r) INLINED {
                        total[r][p][h] = multiply_add(to_floats(sum[r][p][h]), multiply(all(rows[r].scales[g]), scale), total[r][p][h]);
                    });
                });
            });
        }
        each_sum([&](auto r, auto p, auto h) INLINED { store(sums + r * stride + p * PANEL + h * LANES, total[r][p][h]); });
    }
};

template <class Scales, long GROUP> struct Int4DotOf {
    const uint8_t* weights;  // [panel][k / 8][output] four bytes: numbers k + i, from 0 to 15, in the lower halves, k + 4 + i in the upper ones
    const typename Scales::Stored* scales;  // [panel][group][output]
    long K, group;  // GROUP: asserted where weights are packed
    using Held = Scales;
    static constexpr long PARTS_BY_PANEL = 12;
    using Number = int8_t;
    using Row = QuantisedRow<Number>;  // with a scale for ROW_GROUP numbers
    static constexpr int32_t OFFSET = Scales::OF_INT4;
    static constexpr int MOST = 8, OF_MANY = MOST;  // rows, by registers: two of whole numbers and two of their scaled sums for each
    static constexpr int panels_at_once(int rows) { return rows <= 2 ? 4 : rows <= 4 ? 2 : 1; }

    // What stands in a loop costs most where rows are many, so a group ends in one operation of the unit that multiplies: its scale times
    // its sum, added up. The row's scale comes once for ROW_GROUP inputs.
    template <int R, int P> void tile(const Row* rows, long panel, long k0, long k1, Begin begin, float* sums, long stride, long ahead) const {
        const Words mask = all_words(0x0f0f0f0f);
        Apart<R, int8_t> x(rows, k0);
        Floats total[R][P][2];
        const auto add_group = [&](long g, auto is_first) INLINED {
            Words sum[R][P][2];
            each<R>([&](auto r) INLINED { each<P>([&](auto p) INLINED { sum[r][p][0] = sum[r][p][1] = Scales::begin(rows[r].starts[g]); }); });
            for (long k = g * group; k < (g + 1) * group; k += 8)
                each<2>([&](auto s) INLINED {
                    each<P>([&](auto p) INLINED {
                        const uint8_t* at = weights + ((panel + p) * K + k) * (PANEL / 2);
                        fetch(at + ahead * PANEL / 2 + 4 * LANES * s);
                        const Words first = both(right<4 * s>(load_words(at)), mask), second = both(right<4 * s>(load_words(at + 4 * LANES)), mask);
                        add_four<R, P>(x, first, second, sum, p);
                    });
                    x.advance(4);
                });
            each<P>([&](auto p) INLINED {
                each<2>([&](auto h) INLINED {
                    const Scales held(scales + ((panel + p) * (K / group) + g) * PANEL + h * LANES);
                    each<R>([&](auto r) INLINED {
                        const Floats found = held.whole(sum[r][p][h], rows[r].starts[g]);
                        total[r][p][h] = is_first ? multiply(found, held.scale) : multiply_add(found, held.scale, total[r][p][h]);
                    });
                });
            });
        };
        for (long k = k0; k < k1; k += ROW_GROUP) {
            const long first = k / group, last = std::min(k + ROW_GROUP, k1) / group;
            add_group(first, std::true_type());
            for (long g = first + 1; g < last; ++g) add_group(g, std::false_type());
            each<R>([&](auto r) INLINED {
                const Floats scale = all(rows[r].scales[k / ROW_GROUP]);
                each<P>([&](auto p) INLINED {
                    each<2>([&](auto h) INLINED {
                        float* at = sums + r * stride + p * PANEL + h * LANES;
                        store(at, multiply_add(total[r][p][h], scale, begin.load(r, p, h)));
                    });
                });
            });
            begin = {sums, stride};
        }
    }
};

using Int4Dot = Int4DotOf<Scales, ROW_GROUP / 4>;
using Int4ZerosDot = Int4DotOf<ScalesAndZeros, ROW_GROUP>;
#endif

constexpr long MOST_GROUP = PIECE;
constexpr float LEAST_TOP = 1e-33f;  // of a group: below, what its numbers are multiplied by would be infinite

// A group of x as 16-bit integers. What is not finite makes the scale NaN, and so every output of the row.
static inline void quantise_group(const float* x, long group, int32_t offset, int16_t* out, float* scale, int32_t* start) {
    Floats most = zeros(), poison = zeros();
    for (long i = 0; i < group; i += LANES) {
        Floats value = load(x + i);
        most = highest(most, as_floats(both(load_words(x + i), all_words(0x7fffffff))));
        poison = multiply_add(value, zeros(), poison);
    }
    const float bad = sum_of(poison), found = bad == 0 ? highest_of(most) : 0;
    const float top = found > LEAST_TOP ? found : 0;
    const Floats inverse = all(top > 0 ? 32767.0f / top : 0.0f);
    alignas(64) int32_t words[MOST_GROUP];
    Words sum = no_words();
    for (long i = 0; i < group; i += LANES) {
        Words number = bad == 0 ? to_words(multiply(load(x + i), inverse)) : no_words();
        sum = add_words(sum, number);
        store((float*)words + i, as_floats(number));
    }
    for (long i = 0; i < group; ++i) out[i] = int16_t(words[i]);
    alignas(64) int32_t parts[LANES];
    store((float*)parts, as_floats(sum));
    int32_t total = 0;
    for (int i = 0; i < LANES; ++i) total += parts[i];
    *start = -offset * total;
    *scale = bad == 0 ? top / 32767.0f : bad;
}

#if defined(__AVX512VNNI__)
// ROW_GROUP numbers as 8-bit integers of a scale by which `factor` is multiplied; a start for each `PER` registers.
template <int PER> static INLINE void quantise_registers(Floats (&x)[8], float factor, int32_t offset, int8_t* out, float* scale, int32_t* starts) {
    Words most = no_words(), sum[8 / PER];
    each<8>([&](auto i) INLINED { most = _mm512_max_epi32(most, both(_mm512_castps_si512(x[i]), all_words(0x7fffffff))); });
    const int32_t bits = _mm512_reduce_max_epi32(most);  // in the order of the numbers, those that are not finite last
    float found;
    memcpy(&found, &bits, 4);
    const bool bad = bits >= 0x7f800000;
    const float top = !bad && found > LEAST_TOP ? found : 0;
    const Floats inverse = all(top > 0 ? 127.0f / top : 0.0f);
    each<8 / PER>([&](auto g) INLINED { sum[g] = no_words(); });
    each<8>([&](auto i) INLINED {
        const Words number = bad ? no_words() : to_words(multiply(x[i], inverse));
        sum[i / PER] = add_words(sum[i / PER], number);
        _mm_storeu_si128((__m128i*)(out + i * LANES), _mm512_cvtepi32_epi8(number));
    });
    each<8 / PER>([&](auto g) INLINED { starts[g] = -offset * _mm512_reduce_add_epi32(sum[g]); });
    *scale = bad ? NAN : top / 127.0f * factor;
}

constexpr float SHORTENED = 0.08838834764831845f;  // one over the root of 128

// Half of the numbers of a group of 128 become negative: as good as drawn by lot, by the digits of pi.
static INLINE void change_signs(Floats (&x)[8]) {
    constexpr uint32_t NEGATIVE[4] = {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344};
    each<8>([&](auto i) INLINED { x[i] = _mm512_mask_sub_ps(x[i], __mmask16(NEGATIVE[i / 2] >> 16 * (i % 2)), zeros(), x[i]); });
}

// A group of 128 numbers times the Hadamard matrix of 1 and -1: first neighbours are added and subtracted, then what is two apart, four ...
static INLINE void sums_and_differences(Floats (&x)[8]) {
    const auto signs = [](uint16_t negative) INLINED { return _mm512_mask_blend_ps(negative, all(1), all(-1)); };
    const Floats by_one = signs(0xaaaa), by_two = signs(0xcccc), by_four = signs(0xf0f0), by_eight = signs(0xff00);
    each<8>([&](auto i) INLINED {
        x[i] = multiply_add(x[i], by_one, _mm512_permute_ps(x[i], 0xb1));
        x[i] = multiply_add(x[i], by_two, _mm512_permute_ps(x[i], 0x4e));
        x[i] = multiply_add(x[i], by_four, _mm512_shuffle_f32x4(x[i], x[i], 0xb1));
        x[i] = multiply_add(x[i], by_eight, _mm512_shuffle_f32x4(x[i], x[i], 0x4e));
    });
    each<3>([&](auto stage) INLINED {
        each<8>([&](auto i) INLINED {
            constexpr int apart = 1 << stage, at = i;
            if constexpr (!(at & apart)) {
                const Floats left = x[at], right = x[at + apart];
                x[at] = add(left, right);
                x[at + apart] = _mm512_sub_ps(left, right);
            }
        });
    });
}

// Groups of 128 numbers turned, or turned back, in place: `parallel.rounding` says what for.
static inline void turn_groups(float* x, long groups, bool back) {
    for (float* end = x + 128 * groups; x < end; x += 128) {
        Floats group[8];
        each<8>([&](auto i) INLINED { group[i] = load(x + i * LANES); });
        if (!back) change_signs(group);
        sums_and_differences(group);
        each<8>([&](auto i) INLINED { group[i] = multiply(group[i], all(SHORTENED)); });
        if (back) change_signs(group);
        each<8>([&](auto i) INLINED { store(x + i * LANES, group[i]); });
    }
}

// Turned before they are rounded: a number far above the others is then shared out among all of them.
static inline void quantise_group(const float* x, long, int32_t offset, int8_t* out, float* scale, int32_t* start) {
    Floats turned[8];
    each<8>([&](auto i) INLINED { turned[i] = load(x + i * LANES); });
    change_signs(turned);
    sums_and_differences(turned);
    quantise_registers<8>(turned, SHORTENED, offset, out, scale, start);
}
#endif

// Rows (count, K), filled up with zeros to whole groups.
template <class Number, int32_t OFFSET> class QuantisedRows {
    Room<Number> numbers;
    Room<float> scales;
    Room<int32_t> starts;
    long padded, group;

public:
    std::vector<QuantisedRow<Number>> rows;

    QuantisedRows(long count, long, long padded, long group)
        : numbers(count * padded), scales(count * (padded / group)), starts(count * (padded / group)), padded(padded), group(group), rows(count) {
        for (long r = 0; r < count; ++r) rows[r] = {&numbers[r * padded], &scales[r * (padded / group)], &starts[r * (padded / group)]};
    }

    void fill(long r, long first, const float* x, long width) {
        for (long k = 0; k < width; k += group) {
            const long g = r * (padded / group) + (first + k) / group;
            float filled[MOST_GROUP];
            if (width - k < group) {
                memset(filled, 0, sizeof(filled));
                memcpy(filled, x + k, sizeof(float) * (width - k));
            }
            quantise_group(width - k < group ? filled : x + k, group, OFFSET, &numbers[r * padded + first + k], &scales[g], &starts[g]);
        }
    }
};

#if defined(__AVX512VNNI__)
// Rows (count, K), rounded as they are: a scale for ROW_GROUP numbers, a start for each group of 4-bit weights within them.
template <long GROUP, int32_t OFFSET> class RowsOfInt4 {
    static constexpr long GROUPS = ROW_GROUP / GROUP;
    Room<int8_t> numbers;
    Room<float> scales;
    Room<int32_t> starts;
    long groups;

public:
    std::vector<QuantisedRow<int8_t>> rows;

    RowsOfInt4(long count, long, long padded, long)
        : numbers(count * filled(padded)), scales(count * (filled(padded) / ROW_GROUP)), starts(count * (filled(padded) / GROUP)),
          groups(filled(padded) / ROW_GROUP), rows(count) {
        for (long r = 0; r < count; ++r) rows[r] = {&numbers[r * groups * ROW_GROUP], &scales[r * groups], &starts[r * groups * GROUPS]};
    }

    void fill(long r, long first, const float* x, long width) {
        Floats group[8];
        each<8>([&](auto i) INLINED {
            const long left = std::max(0L, std::min(long(LANES), width - i * LANES));
            group[i] = _mm512_maskz_loadu_ps(__mmask16((1u << left) - 1), x + i * LANES);
        });
        const long g = r * groups + first / ROW_GROUP;
        quantise_registers<GROUP / LANES>(group, 1, OFFSET, &numbers[g * ROW_GROUP], &scales[g], &starts[g * GROUPS]);
    }

private:
    static long filled(long padded) { return (padded + ROW_GROUP - 1) / ROW_GROUP * ROW_GROUP; }
};
static_assert(PIECE == ROW_GROUP, "rows are filled a scale at a time");
static_assert(K_BLOCK % ROW_GROUP == 0, "a tile of Int4Dot begins with a row's scale");
#endif
