// Paged attention with keys and values in bfloat16, for processors with bfloat16 dot products. Queries and softmax weights are rounded to bfloat16
// as they enter a product; scores, softmax and sums are in float32.
#include "attention.h"
#include "attention_tiles.h"

#if defined(__AVX512BF16__)
constexpr int WIDE = 4;         // accumulator registers per row: one chunk of scores, or 64 elements of a value
constexpr int ROWS = 6;         // rows at a time: ROWS * WIDE accumulators leave enough registers for the operands
constexpr float HIDDEN = -INFINITY;  // score of a masked position, as of one that overflowed: its weight is 0
constexpr float LOWEST = -FLT_MAX;   // initial running maximum; it is subtracted, so it must be finite
static_assert(CHUNK == WIDE * LANES);

static INLINE Ints rounded(Floats a, Floats b) { return (Ints)_mm512_cvtne2ps_pbh(b, a); }  // a's numbers before b's
static INLINE Floats multiply_pairs(Floats sum, Ints a, Ints b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// 2^x for x <= 0, relative error about 3e-6; NaN stays NaN, minus infinity gives 0.
static INLINE Floats power_of_two(Floats x) {
    const Floats whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), part = _mm512_sub_ps(x, whole);
    Floats power = broadcast(0.00133335581f);
    power = multiply_add(power, part, broadcast(0.00961812911f));
    power = multiply_add(power, part, broadcast(0.0555041087f));
    power = multiply_add(power, part, broadcast(0.240226507f));
    power = multiply_add(power, part, broadcast(0.693147181f));
    power = multiply_add(power, part, broadcast(1.0f));
    return _mm512_scalef_ps(power, whole);
}

namespace {
// A thread's working set for one part. Elements are stored in pairs, as they are multiplied: two head dims for scores, two positions for values.
struct Tile {
    std::vector<int32_t> q, keys, values;  // (rows, K / 2), (K / 2, CHUNK), (CHUNK / 2, width)
    std::vector<float> out, most, sums;    // (rows, width), (rows), (rows, LANES)
    std::vector<long> seen;                // number of positions that a row attends to, from the sequence's first
    std::vector<Bf16> nothing;
    long K, width;  // K padded to a multiple of WIDE registers

    void begin(const Part& part, long head_width) {
        K = head_width;
        width = (K + WIDE * LANES - 1) / (WIDE * LANES) * (WIDE * LANES);
        const long rows = part.rows();
        q.resize(rows * K / 2); keys.resize(K / 2 * CHUNK); values.assign(CHUNK / 2 * width, 0); nothing.assign(K, 0);
        out.assign(rows * width, 0); most.assign(rows, LOWEST); sums.assign(rows * LANES, 0); seen.resize(rows);
        const Floats scale = broadcast(1.44269504f / std::sqrt(float(K)));  // softmax in base 2
        for (long row = 0; row < rows; ++row) {
            const float* from = part.q + part.offset(row, K);
            seen[row] = part.visible(row, 0);
            for (long k = 0; k < K; k += LANES)
                _mm256_storeu_si256((__m256i*)&q[(row * K + k) / 2], (__m256i)_mm512_cvtneps_pbh(multiply(load(from + k), scale)));
        }
    }

    // Loads positions from `start` on, up to CHUNK of them before `end`; zeros after the last.
    void load_chunk(const Cache<Bf16>& cache, long kv, const int32_t* blocks, long start, long end) {
        const float *key_at[CHUNK], *value_at[CHUNK];  // of pairs
        const long count = std::min(CHUNK, end - start);
        cache.each_row(kv, blocks, start, count, [&](long p, long offset) {
            key_at[p] = (const float*)(cache.keys + offset);
            value_at[p] = (const float*)(cache.values + offset);
        });
        for (long p = count; p < CHUNK; ++p) key_at[p] = value_at[p] = (const float*)nothing.data();
        for (long p = 0; p < CHUNK; p += LANES)
            for (long k = 0; k < K / 2; k += 4) {
                Floats turned[4];
                for (int i = 0; i < 4; ++i) turned[i] = load_fours(key_at + p + i, k);
                transpose_fours(turned[0], turned[1], turned[2], turned[3]);
                for (int i = 0; i < 4; ++i) store((float*)&keys[(k + i) * CHUNK + p], turned[i]);
            }
        for (long p = 0; p < CHUNK; p += 2)
            for (long k = 0; k < K; k += LANES) {
                const __m512i first = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(value_at[p] + k / 2)));
                const __m512i second = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(value_at[p + 1] + k / 2)));
                _mm512_storeu_si512(&values[p / 2 * width + k], _mm512_or_si512(first, shift_left<16>(second)));
            }
    }

    // Online softmax: turns a row's scores into weights relative to the running maximum. Returns the factor that rescales earlier sums.
    INLINE float weigh(const float* scores, long row, long start, int32_t* weights) {
        Floats score[WIDE];
        unrolled<WIDE>([&](auto i) INLINED { score[i] = load(scores + i * LANES); });
        const long visible = seen[row] - start;
        if (visible < CHUNK)
            unrolled<WIDE>([&](auto i) INLINED {
                const long some = std::min(std::max(visible - i * LANES, 0L), long(LANES));
                score[i] = _mm512_mask_blend_ps(__mmask16((1u << some) - 1), broadcast(HIDDEN), score[i]);
            });
        const float before = most[row], now = std::max(before, reduce_max(maximum(maximum(score[0], score[1]), maximum(score[2], score[3]))));
        unrolled<WIDE>([&](auto i) INLINED { score[i] = power_of_two(_mm512_sub_ps(score[i], broadcast(now))); });
        const Floats kept = power_of_two(broadcast(before - now));
        store(&sums[row * LANES], multiply_add(load(&sums[row * LANES]), kept, add(add(score[0], score[1]), add(score[2], score[3]))));
        most[row] = now;
        _mm512_storeu_si512(weights, rounded(score[0], score[1]));
        _mm512_storeu_si512(weights + LANES, rounded(score[2], score[3]));
        return _mm512_cvtss_f32(kept);
    }

    // c (R rows) += a (R, depth pairs) b (depth pairs, WIDE registers).
    template <int R> static INLINE void multiply_rows(const int32_t* a, long a_stride, const int32_t* b, long b_stride, long depth, Floats (&c)[R][WIDE]) {
        for (long k = 0; k < depth; ++k) {
            Ints pairs[WIDE];
            unrolled<WIDE>([&](auto i) INLINED { pairs[i] = load_ints(b + k * b_stride + i * LANES); });
            unrolled<R>([&](auto r) INLINED {
                const Ints value = broadcast_int(a[r * a_stride + k]);
                unrolled<WIDE>([&](auto i) INLINED { c[r][i] = multiply_pairs(c[r][i], value, pairs[i]); });
            });
        }
    }

    template <int R> void attend_rows(long row, long start) {
        alignas(64) float scores[R][CHUNK];
        alignas(64) int32_t weights[R][CHUNK / 2];
        float kept[R];
        Floats score[R][WIDE];
        unrolled<R>([&](auto r) INLINED { unrolled<WIDE>([&](auto i) INLINED { score[r][i] = zeros(); }); });
        multiply_rows<R>(&q[row * K / 2], K / 2, keys.data(), CHUNK, K / 2, score);
        unrolled<R>([&](auto r) INLINED { unrolled<WIDE>([&](auto i) INLINED { store(scores[r] + i * LANES, score[r][i]); }); });
        for (int r = 0; r < R; ++r) kept[r] = weigh(scores[r], row + r, start, weights[r]);
        for (long k = 0; k < width; k += WIDE * LANES) {
            Floats sum[R][WIDE];
            float* to = &out[row * width + k];
            unrolled<R>([&](auto r) INLINED {
                unrolled<WIDE>([&](auto i) INLINED { sum[r][i] = multiply(load(to + r * width + i * LANES), broadcast(kept[r])); });
            });
            multiply_rows<R>(weights[0], CHUNK / 2, &values[k], width, CHUNK / 2, sum);
            unrolled<R>([&](auto r) INLINED { unrolled<WIDE>([&](auto i) INLINED { store(to + r * width + i * LANES, sum[r][i]); }); });
        }
    }
};

}  // namespace

// While one chunk is computed, the next one is prefetched: of the same part, or the first of the next part. Prefetches are spread over the
// computation: issued all at once, the last ones would stall, and demand loads with them.
static void attend(const Cache<Bf16>& cache, const Part& part, const Part* next) {
    const long K = cache.K, rows = part.rows(), end = part.first + part.tokens, groups = (rows + ROWS - 1) / ROWS;
    static thread_local Tile mine;
    Tile* tile = &mine;
    asm volatile("" : "+r"(tile));  // else the compiler looks up the thread-local again at every use
    tile->begin(part, K);
    for (long start = 0; start < end; start += CHUNK) {
        const bool goes_on = start + CHUNK < end;
        const Part* coming = goes_on ? &part : next;
        const long first = goes_on ? start + CHUNK : 0, some = coming ? std::min(CHUNK, coming->first + coming->tokens - first) : 0;
        const auto prefetch_share = [&](long share) {
            if (coming) prefetch(cache, *coming, first + share * some / (groups + 1), first + (share + 1) * some / (groups + 1));
        };
        prefetch_share(groups);
        tile->load_chunk(cache, part.heads.kv, part.blocks, start, end);
        for (long group = 0; group < groups; ++group) {
            prefetch_share(group);
            const long row = group * rows / groups;
            dispatch_rows<ROWS>((group + 1) * rows / groups - row, [&](auto some) { tile->attend_rows<some.value>(row, start); });
        }
    }
    for (long row = 0; row < rows; ++row) {
        float* to = part.out + part.offset(row, K);
        const float sum = reduce_add(load(&tile->sums[row * LANES]));
        for (long k = 0; k < K; k += LANES) store(to + k, divide(load(&tile->out[row * tile->width + k]), broadcast(sum)));
    }
}

extern "C" {

// As the float32 functions of the same names, except for the dtype of keys and values.
void manta_prefill_bf16(const float* q, const Bf16* keys, const Bf16* values, const int32_t* tables, const int64_t* starts, const int64_t* lengths,
                        const int64_t* heads, float* out, long S, long H, long G, long K, long M, long block_tokens, int threads) {
    const Cache<Bf16> cache{keys, values, block_tokens, G, K};
#if defined(__AMX_TILE__)
    if (fits_tiles(K))
        return each_part(
            q, tables, starts, lengths, heads, out, S, H, G, K, M, threads, [&](const Part& part) { attend_by_tiles(cache, part, nullptr); },
            ROWS_PER_PART);
#endif
    each_part(q, tables, starts, lengths, heads, out, S, H, G, K, M, threads, [&](const Part& part) { attend(cache, part, nullptr); });
}

void manta_decode_bf16(const float* q, const Bf16* keys, const Bf16* values, const int32_t* tables, const int64_t* lengths, const int64_t* heads,
                       float* out, long S, long H, long G, long K, long M, long block_tokens, int threads) {
    const Cache<Bf16> cache{keys, values, block_tokens, G, K};
#if defined(__AMX_TILE__)
    if (fits_tiles(K))
        return each_decode(q, tables, lengths, heads, out, S, H, G, K, M, threads,
                           [&](const Part& part, const Part* next) { attend_by_tiles(cache, part, next); });
#endif
    each_decode(q, tables, lengths, heads, out, S, H, G, K, M, threads,
                [&](const Part& part, const Part* next) { attend(cache, part, next); });
}

// `width` must be a multiple of LANES.
void manta_write_kv_bf16(const float* k, const float* v, long k_stride, long v_stride, const int64_t* slots, Bf16* keys, Bf16* values, long T,
                         long width, int threads) {
    parallel_for_rows(T, T * width > 32768 ? threads : 1, [&](long t) {
        for (long i = 0; i < width; i += LANES) {
            _mm256_storeu_si256((__m256i*)(keys + slots[t] * width + i), (__m256i)_mm512_cvtneps_pbh(load(k + t * k_stride + i)));
            _mm256_storeu_si256((__m256i*)(values + slots[t] * width + i), (__m256i)_mm512_cvtneps_pbh(load(v + t * v_stride + i)));
        }
    });
}
}
#endif
