// Weights in 8 and 4 bits with a scale per group of input features, multiplied with rows as integers, also with a scale per group. Rows have 16
// bits, which is as exact as float32, or 8 bits on processors that multiply four of these at a time (then one group of a row spans four groups of
// 4-bit weights). Sums within a group are exact.
#pragma once
#include <cmath>
#include <type_traits>
#include "linear.h"

// A row as integers of 16 or 8 bits.
template <class Number> struct QuantisedRow {
    static constexpr bool STRIDED = sizeof(Number) == 1;
    const Number* x;
    const float* scales;
    const int32_t* starts;  // initial sum of each group of weights: cancels the offset that stored weights contain
};

// The scales of LANES outputs for one group. The offset of stored numbers is cancelled by the initial sum ...
struct Scales {
    using Stored = uint16_t;  // half precision
    static constexpr int32_t OF_INT4 = 8;
    Floats scale;

    Scales() = default;
    INLINED explicit Scales(const Stored* at) : scale(halves_to_floats(at)) {}
    static INLINE Ints begin(int32_t start) { return broadcast_int(start); }
    INLINE Floats whole(Ints sum, int32_t) const { return to_floats(sum); }
    INLINE Floats taken_away(int32_t offset) const { return to_floats(broadcast_int(offset)); }
};

// ... or is a zero point per group, which is subtracted at the end of the group. Scale and zero point share 32 bits; see parallel/zero_points.py.
struct ScalesAndZeros {
    using Stored = uint32_t;
    static constexpr int32_t OF_INT4 = 1;  // to be multiplied by the zero
    Floats scale;
    Ints zero;

    ScalesAndZeros() = default;
    INLINED explicit ScalesAndZeros(const Stored* at) {
        const Ints word = load_ints(at);
        scale = half_ints_to_floats(word);
        zero = shift_right<16>(word);
    }
    static INLINE Ints begin(int32_t) { return zero_ints(); }
    INLINE Floats whole(Ints sum, int32_t start) const { return to_floats(add_ints(sum, multiply_ints(zero, broadcast_int(start)))); }
    INLINE Floats taken_away(int32_t) const { return to_floats(zero); }
};

// sums = initial + rows * weights, in integers within each group; `products` adds those of one group to its sums.
template <class Scales, int R, int P, class Row, class Products>
static INLINE void accumulate_groups(const Row* rows, const typename Scales::Stored* scales, long panel, long groups, long first, long last,
                                     InitialSums initial, float* sums, long stride, Products products) {
    for (long g = first; g < last; ++g) {
        Ints sum[R][P][2];
        unrolled<R>([&](auto r) INLINED { unrolled<P>([&](auto p) INLINED { sum[r][p][0] = sum[r][p][1] = Scales::begin(rows[r].starts[g]); }); });
        products(g, sum);
        unrolled<P>([&](auto p) INLINED {
            unrolled<2>([&](auto h) INLINED {
                const Scales held(scales + ((panel + p) * groups + g) * PANEL + h * LANES);
                unrolled<R>([&](auto r) INLINED {
                    float* at = sums + r * stride + p * PANEL + h * LANES;
                    const Floats whole = held.whole(sum[r][p][h], rows[r].starts[g]);
                    store(at, multiply_add(whole, multiply(broadcast(rows[r].scales[g]), held.scale), initial.load(r, p, h)));
                });
            });
        });
        initial = {sums, stride};
    }
}

// Adds two input features of R rows times those of the 2 * LANES outputs of a panel.
template <int R, int P> static INLINE void add_two(const QuantisedRow<int16_t>* rows, long k, Ints even, Ints odd, Ints (&sum)[R][P][2], int p) {
    unrolled<R>([&](auto r) INLINED {
        int32_t pair;
        memcpy(&pair, rows[r].x + k, 4);
        const Ints value = broadcast_int(pair);
        sum[r][p][0] = add_pairs(sum[r][p][0], even, value);
        keep_in_register(sum[r][p][0]);
        sum[r][p][1] = add_pairs(sum[r][p][1], odd, value);
        keep_in_register(sum[r][p][1]);
    });
}

struct Int8 {
    const int8_t* weights;    // [panel][k / 2][output][2]
    const uint16_t* scales;   // half precision, [panel][group][output]
    long K, group;
    using GroupScales = Scales;
    static constexpr long PANEL_MAJOR_PARTS = 0;
    using Number = int16_t;
    using Row = QuantisedRow<Number>;
    static constexpr int32_t OFFSET = 0;  // added to stored weights
    static constexpr int MAX_ROWS = MAX_TILE_ROWS, PART_ROWS = MAX_ROWS;
    static constexpr int panels_at_once(int rows) { return rows == 1 ? 4 : 1; }

    template <int R, int P>
    void tile(const Row* rows, long panel, long k0, long k1, InitialSums initial, float* sums, long stride, Ahead) const {
        const auto products = [&](long g, auto& sum) INLINED {
            for (long k = g * group; k < (g + 1) * group; k += 2)
                unrolled<P>([&](auto p) INLINED {
                    const int8_t* at = weights + ((panel + p) * K + k) * PANEL;
                    if (R <= 2) _mm_prefetch((const char*)(at + 1024), _MM_HINT_T0);
                    add_two<R, P>(rows, k, bytes_to_shorts(at), bytes_to_shorts(at + 2 * LANES), sum, p);
                });
        };
        accumulate_groups<GroupScales, R, P>(rows, scales, panel, K / group, k0 / group, k1 / group, initial, sums, stride, products);
    }
};

template <class Scales> struct Int4Of {
    const uint8_t* weights;  // [panel][k / 8][output] 32 bits: eight numbers from 0 to 15; bits 4s: k = 2s, bits 16 + 4s: k = 2s + 1
    const typename Scales::Stored* scales;  // [panel][group][output]
    long K, group;
    using GroupScales = Scales;
    static constexpr long PANEL_MAJOR_PARTS = 0;
    using Number = int16_t;
    using Row = QuantisedRow<Number>;
    static constexpr int32_t OFFSET = Scales::OF_INT4;
    static constexpr int MAX_ROWS = MAX_TILE_ROWS, PART_ROWS = MAX_ROWS;
    static constexpr int panels_at_once(int rows) { return rows == 1 ? 4 : 1; }

    template <int R, int P>
    void tile(const Row* rows, long panel, long k0, long k1, InitialSums initial, float* sums, long stride, Ahead) const {
        const Ints mask = broadcast_int(0x000f000f);
        const auto products = [&](long g, auto& sum) INLINED {
            for (long k = g * group; k < (g + 1) * group; k += 8)
                unrolled<P>([&](auto p) INLINED {
                    const uint8_t* at = weights + ((panel + p) * K + k) * (PANEL / 2);
                    if (R <= 2) _mm_prefetch((const char*)(at + 1024), _MM_HINT_T0);
                    unrolled<4>([&](auto s) INLINED {
                        keep_in_register(at);  // loaded again for each pair: registers are needed for the sums
                        const Ints even = bit_and(shift_right<4 * s>(load_ints(at)), mask);
                        const Ints odd = bit_and(shift_right<4 * s>(load_ints(at + 4 * LANES)), mask);
                        add_two<R, P>(rows, k + 2 * s, even, odd, sum, p);
                    });
                });
        };
        accumulate_groups<GroupScales, R, P>(rows, scales, panel, K / group, k0 / group, k1 / group, initial, sums, stride, products);
    }
};

using Int4 = Int4Of<Scales>;
using Int4Zeros = Int4Of<ScalesAndZeros>;

#if defined(__AVX512VNNI__)
constexpr long ROW_GROUP = 128;  // numbers of a row in 8 bits that share a scale

// Adds four input features of R rows times those of the 2 * LANES outputs of a panel (VPDPBUSD, whose left operand is unsigned).
template <int R, int P> static INLINE void add_four(const StridedRows<R, int8_t>& rows, Ints first, Ints second, Ints (&sum)[R][P][2], int p) {
    unrolled<R>([&](auto r) INLINED {
        const Ints value = rows.template at<r>();
        sum[r][p][0] = _mm512_dpbusd_epi32(sum[r][p][0], first, value);
        keep_in_register(sum[r][p][0]);
        sum[r][p][1] = _mm512_dpbusd_epi32(sum[r][p][1], second, value);
        keep_in_register(sum[r][p][1]);
    });
}

#if defined(__AMX_TILE__)
constexpr int VECTOR_ROWS = 4, VECTOR_ROWS_INT4 = 8;  // up to so many rows vectors are as fast as tiles (measured); the integers are the same

// sums (R rows of PANEL) = the products of rows x with a panel's inputs, `steps` times STEP of them. Calls meanwhile(part, parts) after every second
// or fourth product: what vectors do there takes the time in which the next products wait for tiles.
template <int R, int STEP, class Meanwhile>
static INLINE void multiply_byte_panel(const int8_t* x, long x_stride, const uint8_t* w, int steps, int32_t* sums, Meanwhile meanwhile) {
    constexpr bool HAS_SECOND = R > TILE_SIDE;
    constexpr long SUMS_STRIDE = PANEL * sizeof(int32_t);
    zero_tile<0>(), zero_tile<1>();
    if constexpr (HAS_SECOND) zero_tile<2>(), zero_tile<3>();
    for (int s = 0; s < steps; ++s, x += STEP, w += STEP * PANEL) {
        load_tile_of_rows<4>(x, x_stride);
        load_tile<6>(w, 2 * TILE_BYTES);
        multiply_byte_tiles<0, 4, 6>();
        load_tile<7>(w + TILE_BYTES, 2 * TILE_BYTES);
        multiply_byte_tiles<1, 4, 7>();
        meanwhile(2 * s, 2 * steps);
        if constexpr (HAS_SECOND) {
            load_tile_of_rows<5>(x + TILE_SIDE * x_stride, x_stride);
            multiply_byte_tiles<2, 5, 6>();
            multiply_byte_tiles<3, 5, 7>();
        }
        meanwhile(2 * s + 1, 2 * steps);
    }
    store_tile<0>(sums, SUMS_STRIDE), store_tile<1>(sums + TILE_SIDE, SUMS_STRIDE);
    if constexpr (HAS_SECOND) store_tile<2>(sums + TILE_SIDE * PANEL, SUMS_STRIDE), store_tile<3>(sums + TILE_SIDE * PANEL + TILE_SIDE, SUMS_STRIDE);
}
#endif

struct Int8Dot {
    const uint8_t* weights;   // [panel][k / 4][output][4], each + 128
    const uint16_t* scales;   // half precision, [panel][group][output]
    long K, group;
    using GroupScales = Scales;
    static constexpr long PANEL_MAJOR_PARTS = 12;
    using Number = int8_t;
    using Row = QuantisedRow<Number>;
    static constexpr int32_t OFFSET = 128;
#if defined(__AMX_TILE__)
    static constexpr int MAX_ROWS = 2 * TILE_SIDE, PART_ROWS = MAX_ROWS;
    static constexpr int tile_bytes(int rows) { return rows > VECTOR_ROWS ? TILE_BYTES : 0; }
#else
    static constexpr int MAX_ROWS = MAX_TILE_ROWS, PART_ROWS = 8;  // with up to 8 rows the sums over groups stay in registers, too
#endif
    static constexpr int panels_at_once(int rows) { return rows <= 2 ? 4 : rows <= 4 ? 2 : 1; }

    template <int R, int P>
    void tile(const Row* rows, long panel, long k0, long k1, InitialSums initial, float* sums, long stride, Ahead ahead) const {
#if defined(__AMX_TILE__)
        if constexpr (R > VECTOR_ROWS) multiply_tiles<R>(rows, panel, k0, k1, initial, sums, stride, ahead);
        else
#endif
            multiply_vectors<R, P>(rows, panel, k0, k1, initial, sums, stride, ahead);
    }

private:
    template <int R, int P>
    INLINE void multiply_vectors(const Row* rows, long panel, long k0, long k1, InitialSums initial, float* sums, long stride, Ahead ahead) const {
        StridedRows<R, int8_t> x(rows, k0);
        const auto products = [&](long g, Ints (&sum)[R][P][2]) INLINED {
            long k = g * ROW_GROUP;
            do {  // a loop with at least one iteration: for others the compiler copies registers
                unrolled<P>([&](auto p) INLINED {
                    const uint8_t* at = weights + ((panel + p) * K + k) * PANEL;
                    if (Ahead::IS_CLOSE || R <= 2 || P == 1) {  // for others prefetching costs more than it saves (measured)
                        prefetch_l2(ahead.from(at, PANEL));
                        prefetch_l2(ahead.from(at, PANEL) + 4 * LANES);
                    }
                    add_four<R, P>(x, load_ints(at), load_ints(at + 4 * LANES), sum, p);
                });
                x.advance(4);
                k += 4;
            } while (k < (g + 1) * ROW_GROUP);
        };
        if constexpr (R > 1 && R * P <= PART_ROWS)  // a single row waits for memory, and was slower this way
            accumulate_groups_in_registers<R, P>(rows, panel, k0 / ROW_GROUP, k1 / ROW_GROUP, initial, sums, stride, products);
        else
            accumulate_groups<GroupScales, R, P>(rows, scales, panel, K / ROW_GROUP, k0 / ROW_GROUP, k1 / ROW_GROUP, initial, sums, stride, products);
    }

#if defined(__AMX_TILE__)
    // The same numbers by tiles. While tiles multiply a group, vectors scale the sums of the one before: 12 to 17 % faster from near caches than one
    // after the other (measured).
    template <int R>
    void multiply_tiles(const Row* rows, long panel, long k0, long k1, InitialSums initial, float* sums, long stride, Ahead ahead) const {
        alignas(64) int32_t sum[2][R][PANEL];
        alignas(64) float total[R][PANEL];
        const long begin = k0 / ROW_GROUP, end = k1 / ROW_GROUP;
        const auto scale_rows = [&](long g, int first, int last) INLINED {
            const uint16_t* at = scales + (panel * (K / ROW_GROUP) + g) * PANEL;
            const Floats scale[2] = {halves_to_floats(at), halves_to_floats(at + LANES)};
            const InitialSums from = g == begin ? initial : InitialSums{total[0], PANEL};
            float* const to = g + 1 == end ? sums : total[0];
            const long distance = g + 1 == end ? stride : PANEL;
            for (int r = first; r < last; ++r) {
                const Ints start = broadcast_int(rows[r].starts[g]);
                const Floats of_row = broadcast(rows[r].scales[g]);
                unrolled<2>([&](auto h) INLINED {
                    const Floats found = to_floats(add_ints(load_ints(sum[g % 2][r] + h * LANES), start));
                    store(to + r * distance + h * LANES, multiply_add(found, multiply(of_row, scale[h]), from.load(r, 0, h)));
                });
            }
        };
        for (long g = begin; g < end; ++g) {
            const uint8_t* w = weights + (panel * K + g * ROW_GROUP) * PANEL;
            multiply_byte_panel<R, TILE_BYTES>(rows[0].x + g * ROW_GROUP, rows[1].x - rows[0].x, w, ROW_GROUP / TILE_BYTES, sum[g % 2][0],
                                               [&](int part, int parts) INLINED {
                                                   ahead.prefetch_part(w, PANEL, ROW_GROUP * PANEL, part, parts, Ahead::NOT_AS_CLOSE);
                                                   if (g > begin) scale_rows(g - 1, part * R / parts, (part + 1) * R / parts);
                                               });
        }
        scale_rows(end - 1, 0, R);
    }
#endif

    // accumulate_groups with the sums over groups in registers.
    template <int R, int P, class Products>
    INLINE void accumulate_groups_in_registers(const Row* rows, long panel, long first, long last, InitialSums initial, float* sums, long stride,
                                               Products products) const {
        Floats total[R][P][2];
        const auto each_sum = [&](auto run) INLINED {
            unrolled<P>([&](auto p) INLINED { unrolled<2>([&](auto h) INLINED { unrolled<R>([&](auto r) INLINED { run(r, p, h); }); }); });
        };
        each_sum([&](auto r, auto p, auto h) INLINED { total[r][p][h] = initial.load(r, p, h); });
        for (long g = first; g < last; ++g) {
            Ints sum[R][P][2];
            unrolled<R>([&](auto r) INLINED { unrolled<P>([&](auto p) INLINED { sum[r][p][0] = sum[r][p][1] = broadcast_int(rows[r].starts[g]); }); });
            products(g, sum);
            unrolled<P>([&](auto p) INLINED {
                unrolled<2>([&](auto h) INLINED {
                    const Floats scale = halves_to_floats(scales + ((panel + p) * (K / ROW_GROUP) + g) * PANEL + h * LANES);
                    unrolled<R>([&](auto r) INLINED {
                        total[r][p][h] = multiply_add(to_floats(sum[r][p][h]), multiply(broadcast(rows[r].scales[g]), scale), total[r][p][h]);
                    });
                });
            });
        }
        each_sum([&](auto r, auto p, auto h) INLINED { store(sums + r * stride + p * PANEL + h * LANES, total[r][p][h]); });
    }
};

template <class Scales, long GROUP> struct Int4DotOf {
    const uint8_t* weights;  // [panel][k / 8][output] four bytes: number k + i (0 to 15) in the lower half of byte i, k + 4 + i in the upper one
    const typename Scales::Stored* scales;  // [panel][group][output]
    long K, group;  // group is GROUP: asserted where weights are packed
    using GroupScales = Scales;
    static constexpr long PANEL_MAJOR_PARTS = 12;
    using Number = int8_t;
    using Row = QuantisedRow<Number>;  // with a scale for ROW_GROUP numbers
    static constexpr int32_t OFFSET = Scales::OF_INT4;
#if defined(__AMX_TILE__)
    static constexpr long STEP = std::min(GROUP, long(TILE_BYTES));
    static constexpr int MAX_ROWS = 2 * TILE_SIDE, PART_ROWS = MAX_ROWS;
    static constexpr int tile_bytes(int rows) { return rows > VECTOR_ROWS_INT4 ? STEP : 0; }
#else
    static constexpr int MAX_ROWS = 8, PART_ROWS = MAX_ROWS;  // each row needs two registers of integer sums and two of scaled sums
#endif
    static constexpr int panels_at_once(int rows) { return rows <= 2 ? 4 : rows <= 4 ? 2 : 1; }

    // Work per group matters most with many rows, so a group ends with a single multiply-add of its sum and its scale. The row's scale is applied
    // once per ROW_GROUP inputs.
    template <int R, int P>
    void tile(const Row* rows, long panel, long k0, long k1, InitialSums initial, float* sums, long stride, Ahead ahead) const {
#if defined(__AMX_TILE__)
        if constexpr (R > VECTOR_ROWS_INT4) multiply_tiles<R>(rows, panel, k0, k1, initial, sums, stride, ahead);
        else
#endif
            multiply_vectors<R, P>(rows, panel, k0, k1, initial, sums, stride, ahead);
    }

private:
#if defined(__AMX_TILE__)
    // The same numbers by tiles. Weights are unpacked to bytes once for all rows.
    template <int R>
    void multiply_tiles(const Row* rows, long panel, long k0, long k1, InitialSums initial, float* sums, long stride, Ahead ahead) const {
        constexpr long MOST = ROW_GROUP / GROUP;  // groups of weights per group of a row
        alignas(64) uint8_t bytes[ROW_GROUP * PANEL];
        alignas(64) int32_t sum[MOST][R][PANEL];
        const Ints mask = broadcast_int(0x0f0f0f0f);
        for (long k = k0; k < k1; k += ROW_GROUP) {
            const long num_inputs = std::min(ROW_GROUP, k1 - k), num_groups = num_inputs / GROUP, g = k / GROUP;
            const uint8_t* w = weights + (panel * K + k) * (PANEL / 2);
            for (long at = 0; at < num_inputs * PANEL / 2; at += TILE_BYTES) {  // of 32 outputs, the lower halves, then the upper ones
                const Ints words = load_ints(w + at);
                uint8_t* to = bytes + at / (2 * TILE_BYTES) * (4 * TILE_BYTES) + at % (2 * TILE_BYTES);
                store((float*)to, as_floats(bit_and(words, mask)));
                store((float*)(to + 2 * TILE_BYTES), as_floats(bit_and(shift_right<4>(words), mask)));
            }
            for (long i = 0; i < num_groups; ++i)
                multiply_byte_panel<R, STEP>(rows[0].x + k + i * GROUP, rows[1].x - rows[0].x, bytes + i * GROUP * PANEL, GROUP / STEP, sum[i][0],
                                             [&](int part, int parts) INLINED {
                                                 ahead.prefetch_part(w, PANEL / 2, num_inputs * PANEL / 2, i * parts + part, num_groups * parts,
                                                                     Ahead::NOT_AS_CLOSE);
                                             });
            unrolled<2>([&](auto h) INLINED {
                Scales held[MOST];
                for (long i = 0; i < num_groups; ++i) held[i] = Scales(scales + (panel * (K / GROUP) + g + i) * PANEL + h * LANES);
                const auto scale_row = [&](int r, auto all) INLINED {
                    Floats total;
                    unrolled<MOST>([&](auto i) INLINED {
                        if (!all && i >= num_groups) return;
                        const int32_t start = rows[r].starts[g + i];
                        const Floats found = held[i].whole(add_ints(load_ints(sum[i][r] + h * LANES), Scales::begin(start)), start);
                        total = i ? multiply_add(found, held[i].scale, total) : multiply(found, held[i].scale);
                    });
                    store(sums + r * stride + h * LANES, multiply_add(total, broadcast(rows[r].scales[k / ROW_GROUP]), initial.load(r, 0, h)));
                };
                if (num_groups == MOST) for (int r = 0; r < R; ++r) scale_row(r, std::true_type());
                else for (int r = 0; r < R; ++r) scale_row(r, std::false_type());
            });
            initial = {sums, stride};
        }
    }
#endif

    template <int R, int P>
    INLINE void multiply_vectors(const Row* rows, long panel, long k0, long k1, InitialSums initial, float* sums, long stride, Ahead ahead) const {
        const Ints mask = broadcast_int(0x0f0f0f0f);
        StridedRows<R, int8_t> x(rows, k0);
        Floats total[R][P][2];
        const auto add_group = [&](long g, auto is_first) INLINED {
            Ints sum[R][P][2];
            unrolled<R>([&](auto r) INLINED { unrolled<P>([&](auto p) INLINED { sum[r][p][0] = sum[r][p][1] = Scales::begin(rows[r].starts[g]); }); });
            for (long k = g * group; k < (g + 1) * group; k += 8)
                unrolled<2>([&](auto s) INLINED {
                    unrolled<P>([&](auto p) INLINED {
                        const uint8_t* at = weights + ((panel + p) * K + k) * (PANEL / 2);
                        prefetch_l2(ahead.from(at, PANEL / 2) + 4 * LANES * s);
                        const Ints first = bit_and(shift_right<4 * s>(load_ints(at)), mask);
                        const Ints second = bit_and(shift_right<4 * s>(load_ints(at + 4 * LANES)), mask);
                        add_four<R, P>(x, first, second, sum, p);
                    });
                    x.advance(4);
                });
            unrolled<P>([&](auto p) INLINED {
                unrolled<2>([&](auto h) INLINED {
                    const Scales held(scales + ((panel + p) * (K / group) + g) * PANEL + h * LANES);
                    unrolled<R>([&](auto r) INLINED {
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
            unrolled<R>([&](auto r) INLINED {
                const Floats scale = broadcast(rows[r].scales[k / ROW_GROUP]);
                unrolled<P>([&](auto p) INLINED {
                    unrolled<2>([&](auto h) INLINED {
                        float* at = sums + r * stride + p * PANEL + h * LANES;
                        store(at, multiply_add(total[r][p][h], scale, initial.load(r, p, h)));
                    });
                });
            });
            initial = {sums, stride};
        }
    }
};

using Int4Dot = Int4DotOf<Scales, ROW_GROUP / 4>;
using Int4ZerosDot = Int4DotOf<ScalesAndZeros, ROW_GROUP>;
#endif

constexpr long MAX_GROUP = FILL_WIDTH;
constexpr float MIN_ABS_MAX = 1e-33f;  // of a group; below it, the inverse of the scale would be infinite

// Quantises a group of x to 16-bit integers. A number that is not finite makes the scale NaN, and thereby every output of the row.
static inline void quantise_group(const float* x, long group, int32_t offset, int16_t* out, float* scale, int32_t* start) {
    Floats most = zeros(), poison = zeros();
    for (long i = 0; i < group; i += LANES) {
        Floats value = load(x + i);
        most = maximum(most, as_floats(bit_and(load_ints(x + i), broadcast_int(0x7fffffff))));
        poison = multiply_add(value, zeros(), poison);
    }
    const float bad = reduce_add(poison), found = bad == 0 ? reduce_max(most) : 0;
    const float top = found > MIN_ABS_MAX ? found : 0;
    const Floats inverse = broadcast(top > 0 ? 32767.0f / top : 0.0f);
    alignas(64) int32_t words[MAX_GROUP];
    Ints sum = zero_ints();
    for (long i = 0; i < group; i += LANES) {
        Ints number = bad == 0 ? to_ints(multiply(load(x + i), inverse)) : zero_ints();
        sum = add_ints(sum, number);
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
// Quantises ROW_GROUP numbers to 8-bit integers; their scale is multiplied by `factor`. There is an initial sum per `PER` registers.
template <int PER> static INLINE void quantise_registers(Floats (&x)[8], float factor, int32_t offset, int8_t* out, float* scale, int32_t* starts) {
    Ints most = zero_ints(), sum[8 / PER];
    unrolled<8>([&](auto i) INLINED { most = _mm512_max_epi32(most, bit_and(_mm512_castps_si512(x[i]), broadcast_int(0x7fffffff))); });
    const int32_t bits = _mm512_reduce_max_epi32(most);  // bits are in the order of magnitudes, with those that are not finite last
    float found;
    memcpy(&found, &bits, 4);
    const bool bad = bits >= 0x7f800000;
    const float top = !bad && found > MIN_ABS_MAX ? found : 0;
    const Floats inverse = broadcast(top > 0 ? 127.0f / top : 0.0f);
    unrolled<8 / PER>([&](auto g) INLINED { sum[g] = zero_ints(); });
    unrolled<8>([&](auto i) INLINED {
        const Ints number = bad ? zero_ints() : to_ints(multiply(x[i], inverse));
        sum[i / PER] = add_ints(sum[i / PER], number);
        _mm_storeu_si128((__m128i*)(out + i * LANES), _mm512_cvtepi32_epi8(number));
    });
    unrolled<8 / PER>([&](auto g) INLINED { starts[g] = -offset * _mm512_reduce_add_epi32(sum[g]); });
    *scale = bad ? NAN : top / 127.0f * factor;
}

constexpr float HADAMARD_SCALE = 0.08838834764831845f;  // one over the root of 128

// Flips the signs of half of the numbers of a group of 128, chosen pseudo-randomly by the digits of pi.
static INLINE void flip_signs(Floats (&x)[8]) {
    constexpr uint32_t NEGATIVE[4] = {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344};
    unrolled<8>([&](auto i) INLINED { x[i] = _mm512_mask_sub_ps(x[i], __mmask16(NEGATIVE[i / 2] >> 16 * (i % 2)), zeros(), x[i]); });
}

// Multiplies a group of 128 numbers with the Hadamard matrix: butterflies of neighbours, then of numbers two apart, four apart, ...
static INLINE void hadamard(Floats (&x)[8]) {
    const auto signs = [](uint16_t negative) INLINED { return _mm512_mask_blend_ps(negative, broadcast(1), broadcast(-1)); };
    const Floats by_one = signs(0xaaaa), by_two = signs(0xcccc), by_four = signs(0xf0f0), by_eight = signs(0xff00);
    unrolled<8>([&](auto i) INLINED {
        x[i] = multiply_add(x[i], by_one, _mm512_permute_ps(x[i], 0xb1));
        x[i] = multiply_add(x[i], by_two, _mm512_permute_ps(x[i], 0x4e));
        x[i] = multiply_add(x[i], by_four, _mm512_shuffle_f32x4(x[i], x[i], 0xb1));
        x[i] = multiply_add(x[i], by_eight, _mm512_shuffle_f32x4(x[i], x[i], 0x4e));
    });
    unrolled<3>([&](auto stage) INLINED {
        unrolled<8>([&](auto i) INLINED {
            constexpr int apart = 1 << stage, at = i;
            if constexpr (!(at & apart)) {
                const Floats left = x[at], right = x[at + apart];
                x[at] = add(left, right);
                x[at + apart] = _mm512_sub_ps(left, right);
            }
        });
    });
}

// Rotates groups of 128 numbers in place, or rotates them back: `parallel.quantisation` says why.
static inline void rotate_groups(float* x, long groups, bool back) {
    for (float* end = x + 128 * groups; x < end; x += 128) {
        Floats group[8];
        unrolled<8>([&](auto i) INLINED { group[i] = load(x + i * LANES); });
        if (!back) flip_signs(group);
        hadamard(group);
        unrolled<8>([&](auto i) INLINED { group[i] = multiply(group[i], broadcast(HADAMARD_SCALE)); });
        if (back) flip_signs(group);
        unrolled<8>([&](auto i) INLINED { store(x + i * LANES, group[i]); });
    }
}

// Rotated before they are rounded, which spreads outliers over the whole group.
static inline void quantise_group(const float* x, long, int32_t offset, int8_t* out, float* scale, int32_t* start) {
    Floats turned[8];
    unrolled<8>([&](auto i) INLINED { turned[i] = load(x + i * LANES); });
    flip_signs(turned);
    hadamard(turned);
    quantise_registers<8>(turned, HADAMARD_SCALE, offset, out, scale, start);
}
#endif

// Rows (count, K), padded with zeros to whole groups.
template <class Number, int32_t OFFSET> class QuantisedRows {
    long distance, padded, group;
    AlignedBuffer<Number> numbers;
    AlignedBuffer<float> scales;
    AlignedBuffer<int32_t> starts;

public:
    std::vector<QuantisedRow<Number>> rows;

    QuantisedRows(long count, long, long padded, long group)
        : distance(row_distance<Number>(padded)), padded(padded), group(group), numbers(count * distance), scales(count * (padded / group)),
          starts(count * (padded / group)), rows(count) {
        for (long r = 0; r < count; ++r) rows[r] = {&numbers[r * distance], &scales[r * (padded / group)], &starts[r * (padded / group)]};
    }

    void fill(long r, long first, const float* x, long width) {
        for (long k = 0; k < width; k += group) {
            const long g = r * (padded / group) + (first + k) / group;
            float filled[MAX_GROUP];
            if (width - k < group) {
                memset(filled, 0, sizeof(filled));
                memcpy(filled, x + k, sizeof(float) * (width - k));
            }
            quantise_group(width - k < group ? filled : x + k, group, OFFSET, &numbers[r * distance + first + k], &scales[g], &starts[g]);
        }
    }
};

#if defined(__AVX512VNNI__)
// Rows (count, K), rounded without rotation: a scale per ROW_GROUP numbers, an initial sum per group of 4-bit weights.
template <long GROUP, int32_t OFFSET> class Int4Rows {
    static constexpr long GROUPS = ROW_GROUP / GROUP;
    long groups, distance;
    AlignedBuffer<int8_t> numbers;
    AlignedBuffer<float> scales;
    AlignedBuffer<int32_t> starts;

public:
    std::vector<QuantisedRow<int8_t>> rows;

    Int4Rows(long count, long, long padded, long)
        : groups((padded + ROW_GROUP - 1) / ROW_GROUP), distance(row_distance<int8_t>(groups * ROW_GROUP)), numbers(count * distance),
          scales(count * groups), starts(count * groups * GROUPS), rows(count) {
        for (long r = 0; r < count; ++r) rows[r] = {&numbers[r * distance], &scales[r * groups], &starts[r * groups * GROUPS]};
    }

    void fill(long r, long first, const float* x, long width) {
        Floats group[8];
        unrolled<8>([&](auto i) INLINED {
            const long left = std::max(0L, std::min(long(LANES), width - i * LANES));
            group[i] = _mm512_maskz_loadu_ps(__mmask16((1u << left) - 1), x + i * LANES);
        });
        const long g = r * groups + first / ROW_GROUP;
        quantise_registers<GROUP / LANES>(group, 1, OFFSET, &numbers[r * distance + first], &scales[g], &starts[g * GROUPS]);
    }
};
static_assert(FILL_WIDTH == ROW_GROUP, "rows are filled one scale group at a time");
static_assert(K_BLOCK % ROW_GROUP == 0, "a tile of Int4Dot starts at a scale group of the row");
#endif
