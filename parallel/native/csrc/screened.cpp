// The highest outputs of a large matrix, exactly, without multiplying most of it exactly: `parallel.native.screened` says how. All rows meet the
// matrix as 8-bit integers; how far each output may be from what the product in bfloat16 gives is known, and panels that could hold one of the
// highest are multiplied as they are.
#include <cmath>
#include <limits>
#include "integers.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
// Of |x| |w|, what the exact product of K features may round, which rounds each sum, and then what the turn and the rough product do.
static inline float spare(long K) { return 1e-4f + K * 0x1p-23f; }
constexpr float MORE = 1.001f;    // times lengths that are found in float32
constexpr float LEAST = 1e-15f;  // of a row's length: below, the squares of its parts may vanish

using RoughRows = QuantisedRows<int8_t, Int8Dot::OFFSET>;

static inline float bf16_number(uint16_t bits) {
    const uint32_t word = uint32_t(bits) << 16;
    float number;
    memcpy(&number, &word, 4);
    return number;
}

static INLINE Floats or_not_a_number(Floats a, Floats b) {  // the higher
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q), highest(a, b), all(NAN));
}

static INLINE void turn_group(const float* x, Floats (&group)[8]) {
    each<8>([&](auto i) INLINED { group[i] = load(x + i * LANES); });
    change_signs(group);
    sums_and_differences(group);
    each<8>([&](auto i) INLINED { group[i] = multiply(group[i], all(SHORTENED)); });
}

// What is known of a panel's outputs: the length of the longest as it is rounded, and the most that one may lose by it for a row of length 1.
struct Lengths {
    float rounded, lost;
};

// One output, its group turned and rounded to numbers + 128 that lie PANEL * 4 bytes apart, four together; squares are added up.
static INLINE void round_group(const float* x, uint8_t* numbers, uint16_t* scale, Floats& kept, Floats& lost, Floats& whole) {
    Floats group[8], most = zeros();
    turn_group(x, group);
    each<8>([&](auto i) INLINED { most = highest(most, as_floats(both(_mm512_castps_si512(group[i]), all_words(0x7fffffff)))); });
    *scale = _cvtss_sh(highest_of(most) / 127, _MM_FROUND_TO_NEAREST_INT);
    const float held = _cvtsh_ss(*scale);
    const Floats back = all(held == 0 ? 0 : 1 / held);
    each<8>([&](auto i) INLINED {
        const Words number = _mm512_max_epi32(_mm512_min_epi32(to_words(multiply(group[i], back)), all_words(127)), all_words(-127));
        const Floats again = multiply(to_floats(number), all(held)), apart = _mm512_sub_ps(group[i], again);
        kept = multiply_add(again, again, kept);
        lost = multiply_add(apart, apart, lost);
        whole = multiply_add(group[i], group[i], whole);
        alignas(16) uint8_t bytes[LANES];
        _mm_store_si128((__m128i*)bytes, _mm512_cvtepi32_epi8(add_words(number, all_words(Int8Dot::OFFSET))));
        for (int four = 0; four < LANES / 4; ++four) memcpy(numbers + (i * LANES / 4 + four) * PANEL * 4, bytes + four * 4, 4);
    });
}

// What rounding to 8 bits leaves of a row x, turned back: to be rounded once more.
static void rest_of(const QuantisedRow<int8_t>& row, const float* x, long groups, float* rest) {
    for (long g = 0; g < groups; ++g) {
        Floats group[8];
        turn_group(x + g * ROW_GROUP, group);
        each<8>([&](auto i) INLINED {
            const Floats number = to_floats(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(row.x + g * ROW_GROUP + i * LANES))));
            store(rest + g * ROW_GROUP + i * LANES, _mm512_fnmadd_ps(number, all(row.scales[g]), group[i]));
        });
    }
    turn_groups(rest, groups, true);
}

static float length_of(const float* x, long count) {
    Floats sum = zeros();
    for (long i = 0; i < count; i += LANES) sum = multiply_add(load(x + i), load(x + i), sum);
    return std::sqrt(sum_of(sum)) * MORE;
}

// The highest of each of `panels` panels, the last of `width` outputs; NaN where one is.
static void highest_of_panels(const float* y, long panels, long width, float* highest_of_each) {
    for (long p = 0; p < panels; p += LANES) {
        Floats of_four[4] = {all(NAN), all(NAN), all(NAN), all(NAN)};  // in each, those of four panels: by fours of lanes, a place each
        const auto of_panel = [&](long panel) INLINED {
            if (panel >= panels) return all(NAN);
            const float* at = y + panel * PANEL;
            if (panel == panels - 1 && width < PANEL) {
                Floats most = all(-INFINITY);
                for (long i = 0; i < width; i += LANES) {
                    const __mmask16 there = width - i < LANES ? (1u << (width - i)) - 1 : 0xffff;
                    most = or_not_a_number(most, _mm512_mask_loadu_ps(all(-INFINITY), there, at + i));
                }
                return most;
            }
            return or_not_a_number(load(at), load(at + LANES));
        };
        each<4>([&](auto f) INLINED {
            Floats a = of_panel(p + 4 * f), b = of_panel(p + 4 * f + 1), c = of_panel(p + 4 * f + 2), d = of_panel(p + 4 * f + 3);
            turn(a, b, c, d);
            of_four[f] = or_not_a_number(or_not_a_number(a, b), or_not_a_number(c, d));
        });
        // Of four lanes each: the first has the first panel's part, the second the second's. Four such parts are left of each panel.
        const Floats a = _mm512_shuffle_f32x4(of_four[0], of_four[1], 0x88), b = _mm512_shuffle_f32x4(of_four[0], of_four[1], 0xdd);
        const Floats c = _mm512_shuffle_f32x4(of_four[2], of_four[3], 0x88), d = _mm512_shuffle_f32x4(of_four[2], of_four[3], 0xdd);
        const Floats first = or_not_a_number(a, b), second = or_not_a_number(c, d);
        const Floats found = or_not_a_number(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xdd));
        _mm512_mask_storeu_ps(highest_of_each + p, __mmask16((1u << std::min(long(LANES), panels - p)) - 1), found);
    }
}

// For what is not read soon: reading a line of memory before it is overwritten takes as long as writing it.
static void write_past_caches(const float* from, long count, float* to) {
    long i = 0;
    if (uintptr_t(to) % (LANES * sizeof(float)) == 0)
        for (; i + LANES <= count; i += LANES) _mm512_stream_ps(to + i, load(from + i));
    memcpy(to + i, from + i, sizeof(float) * (count - i));
}

// All rows by the matrix in 8 bits, and of each panel the highest while it is near. Of the last rows the first ones' rest is the product of.
struct RoughJob {
    Job<Int8Dot> job;
    long T;
    float* highest_of_each;  // (T, panels)

    long tasks() const { return job.tasks(); }
    void run(long task) const {
        const auto [first, last, panel, panels] = job.part(task);
        const long column = panel * PANEL, width = std::min(panels * PANEL, job.N - column), stride = panels * PANEL;
        static thread_local Room<float> sums(ROW_BLOCK * WIDE_CHUNK * PANEL);
        block(job.w, job.rows + first, last - first, panel, panels, nullptr, &sums[0], stride);
        for (long t = first; t < std::min(last, T); ++t) {
            float* at = &sums[(t - first) * stride];
            if (job.count > T)  // then they are few, and all of them here
                for (long i = 0; i < width; ++i) at[i] += at[T * stride + i];
            highest_of_panels(at, panels, width - (panels - 1) * PANEL, highest_of_each + t * job.panels() + panel);
            write_past_caches(at, width, job.y + t * job.N + column);
        }
        _mm_sfence();  // such writes are seen in no order otherwise
    }
};

// A row as both products take it: its length, and that of what rounding takes from it.
struct Rounded {
    float length, lost;
};

extern "C" {

// The matrix (N, K) of bf16_dot as int8_dot holds it, and the Lengths of each panel: all of the first kind, then all of the second.
void manta_screen_of(const uint16_t* weights, uint8_t* numbers, uint16_t* scales, float* lengths, long padded, long rough_padded, long N, int threads) {
    const long panels = (N + PANEL - 1) / PANEL, groups = rough_padded / ROW_GROUP;
    share_out(panels, threads, [&](long panel) {
        std::vector<float> rows(PANEL * rough_padded, 0.0f);
        for (long k = 0; k < padded; ++k)
            for (long output = 0; output < PANEL; ++output)
                rows[output * rough_padded + k] = bf16_number(weights[(panel * padded + k / 2 * 2) * PANEL + output * 2 + k % 2]);
        Lengths found = {0, 0};
        for (long output = 0; output < PANEL; ++output) {
            Floats kept = zeros(), lost = zeros(), whole = zeros();
            for (long g = 0; g < groups; ++g)
                round_group(&rows[output * rough_padded + g * ROW_GROUP], numbers + (panel * rough_padded + g * ROW_GROUP) * PANEL + output * 4,
                            scales + (panel * groups + g) * PANEL + output, kept, lost, whole);
            const float rounded = std::sqrt(sum_of(kept)) * MORE, away = std::sqrt(sum_of(lost)) * MORE + std::sqrt(sum_of(whole)) * spare(padded);
            found.rounded = found.rounded >= rounded || found.rounded != found.rounded ? found.rounded : rounded;  // what is no number stays
            found.lost = found.lost >= away || found.lost != found.lost ? found.lost : away;
        }
        lengths[panel] = found.rounded, lengths[panels + panel] = found.lost;
    });
}

// The first T rows of y (`rough_rows`, N): of row t the `sought[t]` highest of the first `limit` outputs to the bits of linear_bf16_dot, and
// what ties with them, whatever of the outputs lowered[ends[t - 1]..ends[t]] are lowered afterwards; every other is lower than these, and as
// near as 8 bits come. Returns how many panels of a row were multiplied as they are, or -1 where that would be more than `most`, or of more
// than `most_panels`: then y means nothing. With twice as many `rough_rows` what 8 bits leave of a row is rounded to 8 bits as well: for few
// rows, whose product is nothing but reading.
long manta_screened(const float* x, const uint8_t* numbers, const uint16_t* scales, const uint16_t* weights, const float* lengths, const int32_t* sought,
                    const int64_t* lowered, const int64_t* ends, float* y, long T, long rough_rows, long K, long padded, long rough_padded, long N, long limit, long most,
                    long most_panels, int threads) {
    const long panels = (N + PANEL - 1) / PANEL, groups = rough_padded / ROW_GROUP;
    Bf16Rows exact(T, K, padded, 1);
    RoughRows rough(rough_rows, K, rough_padded, ROW_GROUP);
    std::vector<Rounded> row(T);
    share_out(T, T * K > SERIAL_NUMBERS ? threads : 1, [&](long t) {
        Room<float> as_multiplied(rough_padded), rest(rough_padded);
        for (long k = 0; k < K; k += PIECE) exact.fill(t, k, x + t * K + k, std::min(PIECE, K - k));
        for (long k = 0; k < rough_padded; ++k) as_multiplied[k] = k < K ? bf16_number(exact.rows[t].x[k]) : 0;
        const auto round = [&](long r, const float* from, float* left) {
            for (long k = 0; k < rough_padded; k += ROW_GROUP) rough.fill(r, k, from + k, ROW_GROUP);
            rest_of(rough.rows[r], from, groups, left);
        };
        const float length = length_of(&as_multiplied[0], rough_padded);
        row[t].length = length > LEAST ? length : NAN;  // then all are in doubt
        round(t, &as_multiplied[0], &rest[0]);
        if (rough_rows > T) round(T + t, &rest[0], &as_multiplied[0]);
        row[t].lost = length_of(rough_rows > T ? &as_multiplied[0] : &rest[0], rough_padded);
    });
    Room<float> highest_of_each(T * panels);
    const Job<Int8Dot> job = {{numbers, scales, rough_padded, ROW_GROUP}, rough.rows.data(), rough_rows, nullptr, y, N, threads};
    run_jobs(std::vector<RoughJob>{{job, T, &highest_of_each[0]}}, threads);

    std::vector<std::vector<int32_t>> possible(T);  // panels that may hold what is sought
    std::atomic<long> total{0};
    share_out(T, threads, [&](long t) {
        std::vector<float> high(panels), low(panels);
        for (long p = 0; p < panels; ++p) {
            const float found = highest_of_each[t * panels + p], away = row[t].lost * lengths[p] + row[t].length * lengths[panels + p];
            high[p] = found + away, low[p] = found - away;
        }
        std::fill(low.begin() + std::min(panels, limit / PANEL), low.end(), -INFINITY);
        for (long i = t ? ends[t - 1] : 0; i < ends[t]; ++i) low[lowered[i] / PANEL] = -INFINITY;
        for (float& one : low) if (!(one > -INFINITY)) one = -INFINITY;  // what is no number tells nothing
        float least = -INFINITY;  // at least so many are as high: each the highest of its panel
        if (sought[t] == 1) least = *std::max_element(low.begin(), low.end());
        else if (sought[t] <= panels) {
            std::nth_element(low.begin(), low.begin() + sought[t] - 1, low.end(), std::greater<float>());
            least = low[sought[t] - 1];
        }
        for (long p = 0; p < panels; ++p) if (!(high[p] < least)) possible[t].push_back(p);
        total.fetch_add(possible[t].size(), std::memory_order_relaxed);
    });
    if (total > most) return -1;

    std::vector<std::vector<int32_t>> wanting(panels);  // rows, by panel
    std::vector<int32_t> wanted;
    for (long t = 0; t < T; ++t)
        for (int32_t panel : possible[t]) {
            if (wanting[panel].empty()) wanted.push_back(panel);
            wanting[panel].push_back(t);
        }
    if (long(wanted.size()) > most_panels) return -1;
    const Bf16Dot w = {weights, padded};
    const long num_wanted = wanted.size();
    share_out_ahead(num_wanted, threads, [&](long i, long next) {
        const long panel = wanted[i], count = wanting[panel].size();
        std::vector<Bf16Row> chosen;
        std::vector<char> room;
        for (int32_t t : wanting[panel]) chosen.push_back(exact.rows[t]);
        if (count > 1) lay_apart(chosen, padded, room);
        Room<float> sums(count * PANEL);
        block(w, chosen.data(), count, panel, 1, nullptr, &sums[0], PANEL, next < num_wanted ? wanted[next] - panel : 0);
        for (long r = 0; r < count; ++r)
            memcpy(y + wanting[panel][r] * N + panel * PANEL, &sums[r * PANEL], sizeof(float) * std::min(long(PANEL), N - panel * PANEL));
    });
    return total;
}
}
#endif
