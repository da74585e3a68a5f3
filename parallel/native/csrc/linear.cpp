// What Python calls of linear.h and integers.h.
#include "integers.h"
#include "linear.h"
#include "small.h"

// How a kind of weights is named from outside: two addresses and its sizes.
template <class W> struct Weights {
    static W make(const void* weights, const void* scales, long K, long group) { return {(const uint8_t*)weights, (const uint16_t*)scales, K, group}; }
};
template <> struct Weights<Bf16> {
    static Bf16 make(const void* weights, const void*, long K, long) { return {(const uint16_t*)weights, K}; }
};
#if defined(__AVX512BF16__)
template <> struct Weights<Bf16Dot> {
    static Bf16Dot make(const void* weights, const void*, long K, long) { return {(const uint16_t*)weights, K}; }
};
#endif
template <> struct Weights<Fp32> {
    static Fp32 make(const void* weights, const void*, long K, long) { return {(const float*)weights, K}; }
};
template <> struct Weights<Int8> {
    static Int8 make(const void* weights, const void* scales, long K, long group) { return {(const int8_t*)weights, (const uint16_t*)scales, K, group}; }
};

// What rows of x become for a kind of weights.
template <class W> struct Rows : QuantisedRows<typename W::Number, W::OFFSET> {
    using QuantisedRows<typename W::Number, W::OFFSET>::QuantisedRows;
};
template <class Stored> struct Rows<Exact<Stored>> {
    std::vector<FloatRow> rows;
    template <class RowAt> Rows(RowAt row_at, long count, long, long, long, int) {
        rows.resize(count);
        for (long r = 0; r < count; ++r) rows[r].x = row_at(r);
    }
};

#if defined(__AVX512BF16__)
template <> struct Rows<Bf16Dot> : Bf16Rows {
    using Bf16Rows::Bf16Rows;
};
#endif

template <class W>
static void multiply(const float* x, const void* weights, const void* scales, const float* bias, float* y, long T, long K, long padded, long group,
                     long N, int threads) {
    Rows<W> rows([&](long t) { return x + t * K; }, T, K, padded, group, threads);
    run_jobs(std::vector<Job<W>>{{Weights<W>::make(weights, scales, padded, group), rows.rows.data(), T, bias, y, N, threads}}, threads);
}

// out (A, D): assignment a is row rows[a] of x (., D) through its expert; the first counts[0] of them go to expert 0 and so on.
// up[e], down[e] are addresses of weights, *_scales of their scales; the inner width is I, padded for the group to inner.
template <class W>
static void experts(const float* x, long num_rows, const int64_t* rows_of, const int64_t* counts, long num_experts, const void* const* up,
                    const void* const* up_scales, const void* const* down, const void* const* down_scales, float* out, long D, long outer, long I,
                    long inner, long group, int threads) {
    long total = 0;
    for (long e = 0; e < num_experts; ++e) total += counts[e];
    Rows<W> all_rows([&](long r) { return x + r * D; }, num_rows, D, outer, group, threads);
    std::vector<typename W::Row> chosen(total);
    for (long a = 0; a < total; ++a) chosen[a] = all_rows.rows[rows_of[a]];
    std::vector<int8_t> room;
    lay_apart(chosen, outer, room);
    std::vector<float> gate_up(total * 2 * I), middle(total * I);
    std::vector<Job<W>> jobs;
    for (long e = 0, first = 0; e < num_experts; first += counts[e++])
        if (counts[e])
            jobs.push_back({Weights<W>::make(up[e], up_scales[e], outer, group), &chosen[first], long(counts[e]), nullptr, &gate_up[first * 2 * I], 2 * I, threads});
    run_jobs(jobs, threads);
    share_out(total, total * I > SERIAL_NUMBERS ? threads : 1, [&](long a) { gate(&gate_up[a * 2 * I], &middle[a * I], I); });
    Rows<W> middle_rows([&](long a) { return &middle[a * I]; }, total, I, inner, group, threads);
    jobs.clear();
    for (long e = 0, first = 0; e < num_experts; first += counts[e++])
        if (counts[e])
            jobs.push_back({Weights<W>::make(down[e], down_scales[e], inner, group), &middle_rows.rows[first], long(counts[e]), nullptr, out + first * D, D, threads});
    run_jobs(jobs, threads);
}

#define KIND(name, W)                                                                                                                              \
    void manta_linear_##name(const float* x, const void* weights, const void* scales, const float* bias, float* y, long T, long K, long padded,    \
                             long group, long N, int threads) {                                                                                    \
        multiply<W>(x, weights, scales, bias, y, T, K, padded, group, N, threads);                                                                 \
    }                                                                                                                                              \
    void manta_experts_##name(const float* x, long num_rows, const int64_t* rows_of, const int64_t* counts, long num_experts,                      \
                              const void* const* up, const void* const* up_scales, const void* const* down, const void* const* down_scales,        \
                              float* out, long D, long outer, long I, long inner, long group, int threads) {                                       \
        experts<W>(x, num_rows, rows_of, counts, num_experts, up, up_scales, down, down_scales, out, D, outer, I, inner, group, threads);          \
    }

extern "C" {
int manta_lanes() { return LANES; }
KIND(bf16, Bf16)
#if defined(__AVX512BF16__)
KIND(bf16_dot, Bf16Dot)
#endif
KIND(fp32, Fp32)
KIND(int8, Int8)
KIND(int4, Int4)
#if defined(__AVX512VNNI__)
KIND(int8_dot, Int8Dot)
KIND(int4_dot, Int4Dot)
// x (groups, 128) in place: see turn_groups.
void manta_turn(float* x, long groups, int back, int threads) {
    const long parts = (groups + 511) / 512;
    share_out(parts, threads, [&](long part) { turn_groups(x + part * 512 * 128, std::min(512L, groups - part * 512), back); });
}
#endif
}
