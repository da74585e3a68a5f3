// The highest outputs of a large matrix, exactly, while most of the matrix is only multiplied approximately: `parallel.native.screened` explains
// the method. All rows are multiplied with an 8-bit copy of the matrix. The error of these outputs is bounded, and panels that may contain one of
// the highest are multiplied again in bfloat16.
#include <cmath>
#include <limits>
#include "integers.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
// Relative to |x| |w|: the rounding of the exact product, whose K sums are all rounded, and that of the rotation and the rough product.
static inline float rounding_margin(long K) { return 1e-4f + K * 0x1p-23f; }
constexpr float NORM_MARGIN = 1.001f;  // factor for norms, which are computed in float32
constexpr float MIN_NORM = 1e-15f;     // of a row; below it, squares of its elements may underflow

using RoughRows = QuantisedRows<int8_t, Int8Dot::OFFSET>;

static inline float bf16_number(uint16_t bits) {
    const uint32_t word = uint32_t(bits) << 16;
    float number;
    memcpy(&number, &word, 4);
    return number;
}

static INLINE Floats max_or_nan(Floats a, Floats b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q), maximum(a, b), broadcast(NAN));
}

static INLINE void rotate_group(const float* x, Floats (&group)[8]) {
    unrolled<8>([&](auto i) INLINED { group[i] = load(x + i * LANES); });
    flip_signs(group);
    hadamard(group);
    unrolled<8>([&](auto i) INLINED { group[i] = multiply(group[i], broadcast(HADAMARD_SCALE)); });
}

// Of the outputs of a panel: the largest norm of rounded weights, and the largest error of an output for a row of norm 1.
struct PanelNorms {
    float rounded, error;
};

// Rotates and rounds a group of one output. The numbers, + 128, are stored by fours, PANEL * 4 bytes apart. Adds the squares of the rounded weights,
// of the errors and of the weights to `kept`, `lost` and `whole`.
static INLINE void quantise_output_group(const float* x, uint8_t* numbers, uint16_t* scale, Floats& kept, Floats& lost, Floats& whole) {
    Floats group[8], most = zeros();
    rotate_group(x, group);
    unrolled<8>([&](auto i) INLINED { most = maximum(most, as_floats(bit_and(_mm512_castps_si512(group[i]), broadcast_int(0x7fffffff)))); });
    *scale = _cvtss_sh(reduce_max(most) / 127, _MM_FROUND_TO_NEAREST_INT);
    const float held = _cvtsh_ss(*scale);
    const Floats back = broadcast(held == 0 ? 0 : 1 / held);
    unrolled<8>([&](auto i) INLINED {
        const Ints number = _mm512_max_epi32(_mm512_min_epi32(to_ints(multiply(group[i], back)), broadcast_int(127)), broadcast_int(-127));
        const Floats again = multiply(to_floats(number), broadcast(held)), apart = _mm512_sub_ps(group[i], again);
        kept = multiply_add(again, again, kept);
        lost = multiply_add(apart, apart, lost);
        whole = multiply_add(group[i], group[i], whole);
        alignas(16) uint8_t bytes[LANES];
        _mm_store_si128((__m128i*)bytes, _mm512_cvtepi32_epi8(add_ints(number, broadcast_int(Int8Dot::OFFSET))));
        for (int four = 0; four < LANES / 4; ++four) memcpy(numbers + (i * LANES / 4 + four) * PANEL * 4, bytes + four * 4, 4);
    });
}

// The residual of rounding row x to 8 bits, rotated back, so that it can be rounded as well.
static void residual_of(const QuantisedRow<int8_t>& row, const float* x, long groups, float* rest) {
    for (long g = 0; g < groups; ++g) {
        Floats group[8];
        rotate_group(x + g * ROW_GROUP, group);
        unrolled<8>([&](auto i) INLINED {
            const Floats number = to_floats(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(row.x + g * ROW_GROUP + i * LANES))));
            store(rest + g * ROW_GROUP + i * LANES, _mm512_fnmadd_ps(number, broadcast(row.scales[g]), group[i]));
        });
    }
    rotate_groups(rest, groups, true);
}

static float norm_of(const float* x, long count) {
    Floats sum = zeros();
    for (long i = 0; i < count; i += LANES) sum = multiply_add(load(x + i), load(x + i), sum);
    return std::sqrt(reduce_add(sum)) * NORM_MARGIN;
}

// The maximum of each of `panels` panels, the last of which has `width` outputs; NaN if one of them is NaN.
static void panel_maxima(const float* y, long panels, long width, float* maxima) {
    for (long p = 0; p < panels; p += LANES) {
        // Each holds partial maxima of four panels, one lane of four per panel.
        Floats of_four[4] = {broadcast(NAN), broadcast(NAN), broadcast(NAN), broadcast(NAN)};
        const auto of_panel = [&](long panel) INLINED {
            if (panel >= panels) return broadcast(NAN);
            const float* at = y + panel * PANEL;
            if (panel == panels - 1 && width < PANEL) {
                Floats most = broadcast(-INFINITY);
                for (long i = 0; i < width; i += LANES) {
                    const __mmask16 there = width - i < LANES ? (1u << (width - i)) - 1 : 0xffff;
                    most = max_or_nan(most, _mm512_mask_loadu_ps(broadcast(-INFINITY), there, at + i));
                }
                return most;
            }
            return max_or_nan(load(at), load(at + LANES));
        };
        unrolled<4>([&](auto f) INLINED {
            Floats a = of_panel(p + 4 * f), b = of_panel(p + 4 * f + 1), c = of_panel(p + 4 * f + 2), d = of_panel(p + 4 * f + 3);
            transpose_fours(a, b, c, d);
            of_four[f] = max_or_nan(max_or_nan(a, b), max_or_nan(c, d));
        });
        // Lane i of every four belongs to panel i, so four partial maxima are left per panel.
        const Floats a = _mm512_shuffle_f32x4(of_four[0], of_four[1], 0x88), b = _mm512_shuffle_f32x4(of_four[0], of_four[1], 0xdd);
        const Floats c = _mm512_shuffle_f32x4(of_four[2], of_four[3], 0x88), d = _mm512_shuffle_f32x4(of_four[2], of_four[3], 0xdd);
        const Floats first = max_or_nan(a, b), second = max_or_nan(c, d);
        const Floats found = max_or_nan(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xdd));
        _mm512_mask_storeu_ps(maxima + p, __mmask16((1u << std::min(long(LANES), panels - p)) - 1), found);
    }
}

// Non-temporal stores, for data that is not read soon: other stores first read each line of memory that they overwrite.
static void write_past_caches(const float* from, long count, float* to) {
    long i = 0;
    if (uintptr_t(to) % (LANES * sizeof(float)) == 0)
        for (; i + LANES <= count; i += LANES) _mm512_stream_ps(to + i, load(from + i));
    memcpy(to + i, from + i, sizeof(float) * (count - i));
}

// Multiplies all rows with the 8-bit matrix and takes the maximum of each panel while it is in a near cache. Rows from T on are the residuals of the
// first T rows; their products are added.
struct RoughGemm {
    Gemm<Int8Dot> gemm;
    long T;
    float* maxima;  // (T, panels)

    long tasks() const { return gemm.tasks(); }
    void run(long task) const {
        const auto [first, last, panel, panels] = gemm.bounds(task);
        const long column = panel * PANEL, width = std::min(panels * PANEL, gemm.N - column), stride = panels * PANEL;
        static thread_local AlignedBuffer<float> sums(ROW_BLOCK * WIDE_CHUNK * PANEL);
        multiply_panels(gemm.w, gemm.rows + first, last - first, panel, panels, nullptr, &sums[0], stride);
        for (long t = first; t < std::min(last, T); ++t) {
            float* at = &sums[(t - first) * stride];
            if (gemm.count > T)  // with residuals there are few rows, so all of them are in this task
                for (long i = 0; i < width; ++i) at[i] += at[T * stride + i];
            panel_maxima(at, panels, width - (panels - 1) * PANEL, maxima + t * gemm.panels() + panel);
            write_past_caches(at, width, gemm.y + t * gemm.N + column);
        }
        _mm_sfence();  // non-temporal stores are not ordered otherwise
    }
};

// Of a row as it is multiplied: its norm and that of its rounding error.
struct RowNorms {
    float norm, error;
};

extern "C" {

// Makes the 8-bit copy (int8_dot) of a matrix (N, K) of bf16_dot. norms (2, panels): `rounded` and `error` of PanelNorms.
void manta_screen_of(const uint16_t* weights, uint8_t* numbers, uint16_t* scales, float* norms, long padded, long rough_padded, long N, int threads) {
    const long panels = (N + PANEL - 1) / PANEL, groups = rough_padded / ROW_GROUP;
    parallel_for(panels, threads, [&](long panel) {
        std::vector<float> rows(PANEL * rough_padded, 0.0f);
        for (long k = 0; k < padded; ++k)
            for (long output = 0; output < PANEL; ++output)
                rows[output * rough_padded + k] = bf16_number(weights[(panel * padded + k / 2 * 2) * PANEL + output * 2 + k % 2]);
        PanelNorms found = {0, 0};
        for (long output = 0; output < PANEL; ++output) {
            Floats kept = zeros(), lost = zeros(), whole = zeros();
            for (long g = 0; g < groups; ++g)
                quantise_output_group(&rows[output * rough_padded + g * ROW_GROUP],
                                      numbers + (panel * rough_padded + g * ROW_GROUP) * PANEL + output * 4,
                                      scales + (panel * groups + g) * PANEL + output, kept, lost, whole);
            const float rounded = std::sqrt(reduce_add(kept)) * NORM_MARGIN;
            const float error = std::sqrt(reduce_add(lost)) * NORM_MARGIN + std::sqrt(reduce_add(whole)) * rounding_margin(padded);
            found.rounded = found.rounded >= rounded || found.rounded != found.rounded ? found.rounded : rounded;  // NaN stays
            found.error = found.error >= error || found.error != found.error ? found.error : error;
        }
        norms[panel] = found.rounded, norms[panels + panel] = found.error;
    });
}

// Computes y (T, N). Row t holds the `num_top[t]` highest of its first `limit` outputs, and all that tie with the last
// of them, with the bits of linear_bf16_dot, even after outputs lowered[ends[t - 1]..ends[t]] have been lowered. All other outputs are lower than
// these, and approximate. With rough_rows = 2 * T the residual of each row is quantised as well, which halves the number of candidates: for few
// rows, whose product is bound by memory. Returns the number of (row, panel) pairs that were multiplied again, or -1 (y is then undefined) if these
// would be more than `max_pairs`, or more than `max_panels` different panels.
long manta_screened(const float* x, const uint8_t* numbers, const uint16_t* scales, const uint16_t* weights, const float* norms,
                    const int32_t* num_top, const int64_t* lowered, const int64_t* ends, float* y, long T, long rough_rows, long K, long padded, long rough_padded, long N,
                    long limit, long max_pairs, long max_panels, int threads) {
    const long panels = (N + PANEL - 1) / PANEL, groups = rough_padded / ROW_GROUP;
    Bf16Rows exact(T, K, padded, 1);
    RoughRows rough(rough_rows, K, rough_padded, ROW_GROUP);
    std::vector<RowNorms> row(T);
    parallel_for(T, T * K > SERIAL_NUMBERS ? threads : 1, [&](long t) {
        AlignedBuffer<float> as_multiplied(rough_padded), residual(rough_padded);
        for (long k = 0; k < K; k += FILL_WIDTH) exact.fill(t, k, x + t * K + k, std::min(FILL_WIDTH, K - k));
        for (long k = 0; k < rough_padded; ++k) as_multiplied[k] = k < K ? bf16_number(exact.rows[t].x[k]) : 0;
        const auto round = [&](long r, const float* from, float* left) {
            for (long k = 0; k < rough_padded; k += ROW_GROUP) rough.fill(r, k, from + k, ROW_GROUP);
            residual_of(rough.rows[r], from, groups, left);
        };
        const float norm = norm_of(&as_multiplied[0], rough_padded);
        row[t].norm = norm > MIN_NORM ? norm : NAN;  // NaN makes all panels candidates
        round(t, &as_multiplied[0], &residual[0]);
        if (rough_rows > T) round(T + t, &residual[0], &as_multiplied[0]);
        row[t].error = norm_of(rough_rows > T ? &as_multiplied[0] : &residual[0], rough_padded);
    });
    AlignedBuffer<float> maxima(T * panels);
    const Gemm<Int8Dot> gemm = {{numbers, scales, rough_padded, ROW_GROUP}, rough.rows.data(), rough_rows, nullptr, y, N, threads};
    run_gemms(std::vector<RoughGemm>{{gemm, T, &maxima[0]}}, threads);

    std::vector<std::vector<int32_t>> candidates(T);  // by row: panels that may contain one of its highest outputs
    std::atomic<long> total{0};
    parallel_for(T, threads, [&](long t) {
        std::vector<float> high(panels), low(panels);
        for (long p = 0; p < panels; ++p) {
            const float found = maxima[t * panels + p], error = row[t].error * norms[p] + row[t].norm * norms[panels + p];
            high[p] = found + error, low[p] = found - error;
        }
        std::fill(low.begin() + std::min(panels, limit / PANEL), low.end(), -INFINITY);
        for (long i = t ? ends[t - 1] : 0; i < ends[t]; ++i) low[lowered[i] / PANEL] = -INFINITY;
        for (float& one : low) if (!(one > -INFINITY)) one = -INFINITY;  // NaN is no lower bound
        float least = -INFINITY;  // num_top[t] outputs, the maxima of as many panels, are at least as high
        if (num_top[t] == 1) least = *std::max_element(low.begin(), low.end());
        else if (num_top[t] <= panels) {
            std::nth_element(low.begin(), low.begin() + num_top[t] - 1, low.end(), std::greater<float>());
            least = low[num_top[t] - 1];
        }
        for (long p = 0; p < panels; ++p) if (!(high[p] < least)) candidates[t].push_back(p);
        total.fetch_add(candidates[t].size(), std::memory_order_relaxed);
    });
    if (total > max_pairs) return -1;

    std::vector<std::vector<int32_t>> rows_of_panel(panels);
    std::vector<int32_t> candidate_panels;
    for (long t = 0; t < T; ++t)
        for (int32_t panel : candidates[t]) {
            if (rows_of_panel[panel].empty()) candidate_panels.push_back(panel);
            rows_of_panel[panel].push_back(t);
        }
    if (long(candidate_panels.size()) > max_panels) return -1;
    const Bf16Dot w = {weights, padded};
    const long num_panels = candidate_panels.size();
    parallel_for_prefetching(num_panels, threads, [&](long i, long next) {
        const long panel = candidate_panels[i], count = rows_of_panel[panel].size();
        std::vector<Bf16Row> chosen;
        for (int32_t t : rows_of_panel[panel]) chosen.push_back(exact.rows[t]);
        const SelectedRows<Bf16Row> selected(std::move(chosen), padded, 1);
        AlignedBuffer<float> sums(count * PANEL);
        multiply_panels(w, selected.rows.data(), count, panel, 1, nullptr, &sums[0], PANEL, next < num_panels ? candidate_panels[next] - panel : 0);
        for (long r = 0; r < count; ++r)
            memcpy(y + rows_of_panel[panel][r] * N + panel * PANEL, &sums[r * PANEL], sizeof(float) * std::min(long(PANEL), N - panel * PANEL));
    });
    return total;
}
}
#endif
