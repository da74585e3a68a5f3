// KIND defines the exported functions of a kind of weights. Each file that uses it is compiled by itself, in parallel: these take longest.
#pragma once
#include <type_traits>
#include "integers.h"
#include "linear.h"

// Makes a kind of weights from the addresses and sizes that Python passes.
template <class W> struct Weights {
    static W make(const void* weights, const void* scales, long K, long group) {
        return {(const uint8_t*)weights, (const typename W::GroupScales::Stored*)scales, K, group};
    }
};
template <> struct Weights<Bf16Product> {
    static Bf16Product make(const void* weights, const void*, long K, long) { return {(const uint16_t*)weights, K}; }
};
#if defined(__AVX512BF16__)
template <> struct Weights<Bf16Dot> {
    static Bf16Dot make(const void* weights, const void*, long K, long) { return {(const uint16_t*)weights, K}; }
};
#endif
template <> struct Weights<Fp32Product> {
    static Fp32Product make(const void* weights, const void*, long K, long) { return {(const float*)weights, K}; }
};
template <> struct Weights<Int8> {
    static Int8 make(const void* weights, const void* scales, long K, long group) { return {(const int8_t*)weights, (const uint16_t*)scales, K, group}; }
};

// The form of rows that a kind of weights is multiplied with.
template <class W> struct Rows : QuantisedRows<typename W::Number, W::OFFSET> {
    using QuantisedRows<typename W::Number, W::OFFSET>::QuantisedRows;
};
template <class Stored> struct Rows<FloatProduct<Stored>> : FloatRows {
    using FloatRows::FloatRows;
};
#if defined(__AVX512BF16__)
template <> struct Rows<Bf16Dot> : Bf16Rows {
    using Bf16Rows::Bf16Rows;
};
#endif

#if defined(__AVX512VNNI__)
template <class Scales, long GROUP> struct Rows<Int4DotOf<Scales, GROUP>> : Int4Rows<GROUP, Scales::OF_INT4> {
    using Int4Rows<GROUP, Scales::OF_INT4>::Int4Rows;
};
#endif

// Converts x (count, K).
template <class W> static Rows<W> rows_of(const float* x, long count, long K, long padded, long group, int threads) {
    Rows<W> rows(count, K, padded, group);
    parallel_for_rows(count, count * K > 16384 ? threads : 1, [&](long r) {
        for (long k = 0; k < K; k += FILL_WIDTH) rows.fill(r, k, x + r * K + k, std::min(FILL_WIDTH, K - k));
    });
    return rows;
}

template <class W>
static void multiply(const float* x, const void* weights, const void* scales, const float* bias, float* y, long T, long K, long padded, long group,
                     long N, int threads) {
    const Rows<W> rows = rows_of<W>(x, T, K, padded, group, threads);
    run_gemms(std::vector<Gemm<W>>{{Weights<W>::make(weights, scales, padded, group), rows.rows.data(), T, bias, y, N, threads}}, threads);
}

// Assignments of rows of x (num_rows, D) to experts: assignment a is row rows[a] of x through its expert; the first counts[0] assignments go to
// expert 0, and so on. Without `rows`, assignment a is row a. up[e] and down[e] are addresses of weights, *_scales those of their scales. The inner
// width is I, padded to whole groups: `inner`.
//
// Without `weights`, out is (A, D): the result of each assignment. With weights (A) it is (num_rows, D): its content times out_scales (num_rows; null:
// zeros) plus the weighted results of each row, in the order of experts. (Another order would give other bits, so that a row's would depend on
// how many others there are.)
template <class W>
static void experts(const float* x, long num_rows, const int64_t* rows_of_x, const int64_t* counts, long num_experts, const void* const* up,
                    const void* const* up_scales, const void* const* down, const void* const* down_scales, const float* weights,
                    const float* out_scales, float* out, long D, long outer, long I, long inner, long group, int threads) {
    using Gated = GatedGemm<W, Rows<W>>;
    long total = 0, blocks = 0;
    for (long e = 0; e < num_experts; ++e) total += counts[e], blocks += Gated::blocks_of(counts[e]);
    const Rows<W> all_rows = rows_of<W>(x, num_rows, D, outer, group, threads);
    std::vector<typename W::Row> of_assignments(all_rows.rows);
    if (rows_of_x) {
        of_assignments.resize(total);
        for (long a = 0; a < total; ++a) of_assignments[a] = all_rows.rows[rows_of_x[a]];
    }
    Rows<W> middle(total, I, inner, group);
    const auto each_expert = [&](auto run) {
        for (long e = 0, first = 0; e < num_experts; first += counts[e++])
            if (counts[e]) run(e, first, long(counts[e]));
    };
    const auto up_of = [&](long e) { return Weights<W>::make(up[e], up_scales[e], outer, group); };
    const auto down_of = [&](long e) { return Weights<W>::make(down[e], down_scales[e], inner, group); };

    // With many rows, silu(gate) * up is computed from sums that are still in a near cache. With few, long runs of weights are read faster.
    const bool few = total <= MAX_TILE_ROWS * num_experts;
    if (few) {
        using Selected = SelectedRows<typename W::Row>;
        const Selected selected = rows_of_x ? Selected(std::move(of_assignments), outer, threads) : Selected(std::move(of_assignments));
        AlignedBuffer<float> gate_up(total * 2 * I);
        std::vector<Gemm<W>> ups;
        each_expert([&](long e, long first, long count) {
            ups.push_back({up_of(e), &selected.rows[first], count, nullptr, &gate_up[first * 2 * I], 2 * I, threads});
        });
        run_gemms(ups, threads);
        parallel_for_rows(total, total * I > SERIAL_NUMBERS ? threads : 1, [&](long a) {
            float* at = &gate_up[a * 2 * I];
            gate(at, at + I, at, I);
            for (long k = 0; k < I; k += FILL_WIDTH) middle.fill(a, k, at + k, std::min(FILL_WIDTH, I - k));
        });
    } else {
        // Each task copies the rows that were selected for its expert, so tasks are as large as the number of threads allows.
        const long parts = rows_of_x ? std::max(1L, MIN_TASKS_PER_THREAD * threads / blocks) : I;
        const long columns = std::max(1L, I / parts / FILL_WIDTH) * FILL_WIDTH;
        std::vector<Gated> gated;
        each_expert([&](long e, long first, long count) {
            gated.push_back({up_of(e), &of_assignments[first], rows_of_x != nullptr, count, &middle, first, I, columns});
        });
        run_gemms(gated, threads);
    }

    const RowSums sums{out, out_scales, num_rows, D};
    if (weights && !few) {
        SummedGemms<W> summed{{}, rows_of_x, weights, sums, threads};
        each_expert([&](long e, long first, long count) { summed.experts.push_back({down_of(e), &middle.rows[first], count}); });
        if (summed.is_possible()) {
            parallel_for(summed.tasks(), threads, [&](long task) { summed.run(task); });
            return;
        }
    }
    AlignedBuffer<float> results(weights ? total * D : 0);
    float* const y = weights ? &results[0] : out;
    std::vector<Gemm<W>> downs;
    each_expert([&](long e, long first, long count) {
        downs.push_back({down_of(e), &middle.rows[first], count, nullptr, y + first * D, D, threads});
    });
    run_gemms(downs, threads);
    if (!weights) return;
    std::vector<long> begin(num_rows + 1), of_row(total);  // each row's assignments, in order
    for (long a = 0; a < total; ++a) ++begin[rows_of_x[a] + 1];
    for (long n = 0; n < num_rows; ++n) begin[n + 1] += begin[n];
    std::vector<long> next(begin);
    for (long a = 0; a < total; ++a) of_row[next[rows_of_x[a]]++] = a;
    parallel_for_rows(num_rows, (num_rows + total) * D > SERIAL_NUMBERS ? threads : 1, [&](long n) {
        sums.begin(n, 0, D);
        for (long i = begin[n]; i < begin[n + 1]; ++i) sums.add(n, 0, D, y + of_row[i] * D, weights[of_row[i]]);
    });
}

// Number k of output `index` of a panel as stored, of weights with K padded inputs.
static inline float number_of(const Bf16Product& w, long panel, long index, long k) {
    const uint32_t bits = uint32_t(w.weights[(panel * w.K + k) * PANEL + index % LANES * 2 + index / LANES]) << 16;
    float number;
    memcpy(&number, &bits, 4);
    return number;
}
#if defined(__AVX512BF16__)
static inline float number_of(const Bf16Dot& w, long panel, long index, long k) {
    const uint32_t bits = uint32_t(w.weights[(panel * w.K + k / 2 * 2) * PANEL + index * 2 + k % 2]) << 16;
    float number;
    memcpy(&number, &bits, 4);
    return number;
}
#endif
static inline float number_of(const Fp32Product& w, long panel, long index, long k) { return w.weights[(panel * w.K + k) * PANEL + index]; }
static inline float number_of(const Int8& w, long panel, long index, long k) { return w.weights[(panel * w.K + k / 2 * 2) * PANEL + index * 2 + k % 2]; }
static inline int of_eight(const uint8_t* weights, long at, int bit) {
    uint32_t eight;
    memcpy(&eight, weights + at * 4, 4);
    return int(eight >> bit & 15);
}
template <class Scales> static inline float number_of(const Int4Of<Scales>& w, long panel, long index, long k) {
    return of_eight(w.weights, (panel * w.K + k / 8 * 8) / 8 * PANEL + index, k % 8 / 2 * 4 + k % 2 * 16);
}
#if defined(__AVX512VNNI__)
static inline float number_of(const Int8Dot& w, long panel, long index, long k) {
    return w.weights[(panel * w.K + k / 4 * 4) * PANEL + index * 4 + k % 4];
}
template <class Scales, long GROUP> static inline float number_of(const Int4DotOf<Scales, GROUP>& w, long panel, long index, long k) {
    return of_eight(w.weights, (panel * w.K + k / 8 * 8) / 8 * PANEL + index, k % 4 * 8 + k % 8 / 4 * 4);
}
#endif

// Applies scales and offsets to a row of stored numbers.
template <class W> static auto scale(const W& w, long panel, long index, float* row, int) -> decltype(w.scales, void()) {
    for (long g = 0; g < w.K / w.group; ++g) {
        const typename W::GroupScales held(w.scales + (panel * (w.K / w.group) + g) * PANEL + index / LANES * LANES);
        alignas(64) float scales[LANES], zeros[LANES];
        store(scales, held.scale);
        store(zeros, held.taken_away(W::OFFSET));
        for (long k = g * w.group; k < (g + 1) * w.group; ++k) row[k] = (row[k] - zeros[index % LANES]) * scales[index % LANES];
    }
}
template <class W> static void scale(const W&, long, long, float*, long) {}  // for kinds without scales

// rows (T, padded K) = the weights of `outputs`, numbered from `first`; zeros for those that are not among the N outputs. Returns how many are.
template <class W>
static long look_up(const void* weights, const void* scales, const int64_t* outputs, float* rows, long T, long padded, long group, long first, long N,
                    int threads) {
    const W w = Weights<W>::make(weights, scales, padded, group);
    std::atomic<long> found{0};
    parallel_for(T, T * padded > SERIAL_NUMBERS ? threads : 1, [&](long t) {
        const long output = outputs[t] - first, panel = output / PANEL, index = output % PANEL;
        float* row = rows + t * padded;
        if (output < 0 || output >= N) {
            memset(row, 0, sizeof(float) * padded);
            return;
        }
        found.fetch_add(1, std::memory_order_relaxed);
        for (long k = 0; k < padded; ++k) row[k] = number_of(w, panel, index, k);
        scale(w, panel, index, row, 0);
#if defined(__AVX512VNNI__)
        if constexpr (std::is_same_v<W, Int8Dot>) rotate_groups(row, padded / group, true);
#endif
    });
    return found;
}

// To be used within extern "C".
#define KIND(name, W)                                                                                                                              \
    void manta_linear_##name(const float* x, const void* weights, const void* scales, const float* bias, float* y, long T, long K, long padded,    \
                             long group, long N, int threads) {                                                                                    \
        multiply<W>(x, weights, scales, bias, y, T, K, padded, group, N, threads);                                                                 \
    }                                                                                                                                              \
    long manta_rows_##name(const void* weights, const void* scales, const int64_t* outputs, float* rows, long T, long padded, long group,          \
                           long first, long N, int threads) {                                                                                      \
        return look_up<W>(weights, scales, outputs, rows, T, padded, group, first, N, threads);                                                    \
    }                                                                                                                                              \
    void manta_experts_##name(const float* x, long num_rows, const int64_t* rows, const int64_t* counts, long num_experts,                         \
                              const void* const* up, const void* const* up_scales, const void* const* down, const void* const* down_scales,        \
                              const float* weights, const float* out_scales, float* out, long D, long outer, long I, long inner, long group,       \
                              int threads) {                                                                                                       \
        experts<W>(x, num_rows, rows, counts, num_experts, up, up_scales, down, down_scales, weights, out_scales, out, D, outer, I, inner, group,  \
                   threads);                                                                                                                       \
    }
