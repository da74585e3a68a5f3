// Attention with keys and values in bfloat16 by tiles (AMX). Everything is transposed, with 16 rows of a part (queries) next to each other in a
// register: scores = keys x queries, so keys are multiplied as they lie in the cache, maxima and sums over positions are elementwise, and weights
// are already the right operand of out = values x weights, for which values are transposed once per chunk for all rows of the part.
#pragma once
#include "attention.h"

#if defined(__AMX_TILE__)
#include "tiles.h"

constexpr long LONG_CHUNK = 128;      // positions computed at a time, aligned to the sequence's start
constexpr long STEP = 2 * TILE_SIDE;  // positions of one tile of weights
constexpr long ROWS_PER_PART = 224;   // queries that share transposed values; with 7 heads, 32 tokens in 14 full groups
static_assert(LANES == TILE_SIDE && LONG_CHUNK % STEP == 0);

// 2^x for x <= 0, relative error about 3e-6; NaN stays NaN, minus infinity gives 0.
static INLINE Floats weight_of(Floats x) {
    const Floats part = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
    Floats power = broadcast(0.0134266817f);
    power = multiply_add(power, part, broadcast(0.0522424784f));
    power = multiply_add(power, part, broadcast(0.241280203f));
    power = multiply_add(power, part, broadcast(0.693044845f));
    power = multiply_add(power, part, broadcast(1.0f));
    return _mm512_scalef_ps(power, x);
}

// Pairs of a's and b's numbers rounded to bfloat16: a's in the lower halves. Not for NaN whose lower half is set, which no product gives.
static INLINE Ints rounded_pairs(Floats a, Floats b) {
    const Ints half = broadcast_int(0x8000), upper = broadcast_int(int(0xffff0000));
    return _mm512_ternarylogic_epi32(shift_right<16>(add_ints((Ints)a, half)), add_ints((Ints)b, half), upper, 0xf8);  // first | second & upper
}

// 16 x 16 numbers of 32 bits: row i of `to` is column i of the rows at `from`.
static INLINE void transpose_tile(const float* const* from, long k, float* to, long stride) {
    for (int i = 0; i < TILE_SIDE; i += 4) {
        Floats turned[4];
        for (int j = 0; j < 4; ++j) turned[j] = load_fours(from + j, k + i);
        transpose_fours(turned[0], turned[1], turned[2], turned[3]);
        for (int j = 0; j < 4; ++j) store(to + (i + j) * stride, turned[j]);
    }
}

namespace {
// Memory aligned to cache lines: rows of tiles that straddle two are loaded at half the speed.
template <class T> class Lines {
    struct alignas(64) Line {
        T numbers[64 / sizeof(T)];
    };
    std::vector<Line> lines;

public:
    void resize(long count) { lines.resize((count * sizeof(T) + 63) / 64); }
    void assign(long count, T value) {
        resize(count);
        std::fill_n(data(), count, value);
    }
    T* data() { return lines.data()->numbers; }
    const T* data() const { return lines.data()->numbers; }
    T& operator[](long i) { return data()[i]; }
    const T& operator[](long i) const { return data()[i]; }
};

// A thread's working set for one part, whose rows are computed in groups of LANES.
class TiledPart {
    static constexpr long TILE = TILE_SIDE * TILE_SIDE;  // 32-bit numbers of a tile

    const Part* part = nullptr;
    Lines<int32_t> q;              // (groups, K / 32) tiles: pairs of head dims x rows
    Lines<int32_t> values;         // (K / 16, LONG_CHUNK / STEP) tiles: head dims x pairs of positions
    Lines<int32_t> pairs;          // (LONG_CHUNK / 2, K): what is to be transposed
    Lines<float> out, most, sums;  // (groups, K, LANES), (groups, LANES), (groups, LANES)
    Lines<int32_t> seen;           // (groups, LANES): number of positions that a row attends to, from the sequence's first
    Lines<Bf16> nothing, copied;   // (K): zeros; (LONG_CHUNK, K): keys
    const Bf16* key_at[LONG_CHUNK / TILE_SIDE];
    long key_stride[LONG_CHUNK / TILE_SIDE];  // in bytes
    long K = 0, rows = 0;

    long rows_of(long group) const { return std::min(long(LANES), rows - group * LANES); }

    // Queries of a group, scaled and rounded.
    void load_queries(long group) {
        const Floats scale = broadcast(1.44269504f / std::sqrt(float(K)));  // softmax in base 2
        const float* at[LANES];
        for (long r = 0; r < LANES; ++r) {
            const long row = group * LANES + r;
            seen[row] = part->visible(std::min(row, rows - 1), 0);
            at[r] = (const float*)nothing.data();
            if (row >= rows) continue;
            const float* from = part->q + part->offset(row, K);
            Bf16* to = (Bf16*)pairs.data() + r * K;
            for (long k = 0; k < K; k += LANES) _mm256_storeu_si256((__m256i*)(to + k), (__m256i)_mm512_cvtneps_pbh(multiply(load(from + k), scale)));
            at[r] = (const float*)to;
        }
        for (long k = 0; k < K / 2; k += LANES) transpose_tile(at, k, (float*)&q[(group * K / 2 + k) * LANES], LANES);
    }

    // Scores (count, LANES) of a group for the first positions of the chunk, a multiple of STEP.
    void score(long group, long count, float* to) const {
        const int32_t* queries = &q[group * K / 2 * LANES];
        if (K == 64) {  // all queries stay in two tiles
            load_tile<6>(queries, TILE_BYTES);
            load_tile<7>(queries + TILE, TILE_BYTES);
            for (long t = 0; t < count / TILE_SIDE; t += 2, to += 2 * TILE) {
                zero_tile<0>();
                zero_tile<1>();
                load_tile<4>(key_at[t], key_stride[t]);
                multiply_bf16_tiles<0, 4, 6>();
                load_tile<5>(key_at[t + 1], key_stride[t + 1]);
                multiply_bf16_tiles<1, 5, 6>();
                load_tile<2>(key_at[t] + 32, key_stride[t]);
                multiply_bf16_tiles<0, 2, 7>();
                load_tile<3>(key_at[t + 1] + 32, key_stride[t + 1]);
                multiply_bf16_tiles<1, 3, 7>();
                store_tile<0>(to, TILE_BYTES);
                store_tile<1>(to + TILE, TILE_BYTES);
            }
            return;
        }
        for (long t = 0; t < count / TILE_SIDE; ++t, to += TILE) {
            zero_tile<0>();
            for (long k = 0; k < K / 32; ++k) {
                load_tile<6>(queries + k * TILE, TILE_BYTES);
                load_tile<4>(key_at[t] + k * 32, key_stride[t]);
                multiply_bf16_tiles<0, 4, 6>();
            }
            store_tile<0>(to, TILE_BYTES);
        }
    }

    // Masks a group's scores and returns each row's highest, or `before` if that is higher.
    INLINE Floats highest(long group, long start, long count, float* scores, Floats before) const {
        const int32_t* see = &seen[group * LANES];
        const Ints sees = load_ints(see);
        for (long p = std::max(0L, see[0] - start); p < count; ++p) {
            const __mmask16 hidden = _mm512_cmple_epi32_mask(sees, broadcast_int(start + p));
            store(scores + p * LANES, _mm512_mask_blend_ps(hidden, load(scores + p * LANES), broadcast(-INFINITY)));
        }
        Floats most_of[4] = {before, before, before, before};
        for (long p = 0; p < count; p += 4)
            unrolled<4>([&](auto i) INLINED { most_of[i] = maximum(most_of[i], load(scores + (p + i) * LANES)); });
        return maximum(maximum(most_of[0], most_of[1]), maximum(most_of[2], most_of[3]));
    }

    // out of N tiles of head dims, from the tile `dims` on, += values x weights.
    template <int N> void add_values(long group, long dims, long count, const int32_t* weights) {
        float* to = &out[(group * K + dims * TILE_SIDE) * LANES];
        const int32_t* from = &values[dims * (LONG_CHUNK / STEP) * TILE];
        unrolled<N>([&](auto n) INLINED { load_tile<n.value>(to + n * TILE, TILE_BYTES); });
        for (long step = 0; step < count / STEP; ++step) {
            load_tile<6>(weights + step * TILE, TILE_BYTES);
            unrolled<N>([&](auto n) INLINED {
                load_tile<4 + n.value % 2>(from + (n * (LONG_CHUNK / STEP) + step) * TILE, TILE_BYTES);
                multiply_bf16_tiles<n.value, 4 + n.value % 2, 6>();
            });
        }
        unrolled<N>([&](auto n) INLINED { store_tile<n.value>(to + n * TILE, TILE_BYTES); });
    }

    void store_rows(long group) {
        alignas(64) float turned[TILE];
        const Floats inverse = divide(broadcast(1), load(&sums[group * LANES]));
        float* from = &out[group * K * LANES];
        for (long k = 0; k < K; ++k) store(from + k * LANES, multiply(load(from + k * LANES), inverse));
        for (long k = 0; k < K; k += LANES) {
            const float* at[LANES];
            for (long i = 0; i < LANES; ++i) at[i] = from + (k + i) * LANES;
            transpose_tile(at, 0, turned, LANES);
            for (long r = 0; r < rows_of(group); ++r) store(part->out + part->offset(group * LANES + r, K) + k, load(turned + r * LANES));
        }
    }

public:
    void begin(const Part& of, long head_width) {
        part = &of;
        K = head_width;
        rows = of.rows();
        const long padded = groups() * LANES;
        q.resize(padded * K / 2); values.resize(LONG_CHUNK / 2 * K); pairs.resize(LONG_CHUNK / 2 * K);
        out.assign(padded * K, 0); most.assign(padded, -FLT_MAX); sums.assign(padded, 0); seen.resize(padded);
        nothing.assign(K, 0); copied.resize(LONG_CHUNK * K);
        for (long group = 0; group < groups(); ++group) load_queries(group);
    }

    void finish() {
        for (long group = 0; group < groups(); ++group) store_rows(group);
    }

    long groups() const { return (rows + LANES - 1) / LANES; }

    // Prepares positions from `start` on, up to LONG_CHUNK of them before `end`: where keys are, and values transposed, with zeros after the last.
    // Calls meanwhile(step) with each STEP positions.
    template <class Run> void load_chunk(const Cache<Bf16>& cache, long start, long end, Run meanwhile) {
        const Bf16 *keys[LONG_CHUNK], *value_at[LONG_CHUNK];
        const long count = std::min(LONG_CHUNK, end - start), steps = (count + STEP - 1) / STEP;
        const bool in_place = groups() == 1 && cache.block_tokens % TILE_SIDE == 0;  // a block has whole tiles of positions
        cache.each_row(part->heads.kv, part->blocks, start, count, [&](long p, long offset) {
            keys[p] = cache.keys + offset;
            value_at[p] = cache.values + offset;
        });
        for (long p = count; p < steps * STEP; ++p) keys[p] = value_at[p] = nothing.data();
        for (long p = 0; p < steps * STEP; p += TILE_SIDE) {
            const Bf16*& at = key_at[p / TILE_SIDE];
            long& stride = key_stride[p / TILE_SIDE];
            if (p >= count) {
                at = nothing.data(), stride = 0;
            } else if (in_place) {  // also positions after the last, which are masked
                at = keys[p], stride = cache.G * K * sizeof(Bf16);
            } else {
                at = &copied[p * K], stride = K * sizeof(Bf16);
                for (long i = p; i < p + TILE_SIDE; ++i)
                    for (long k = 0; k < K; k += 2 * LANES) _mm512_storeu_si512(&copied[i * K + k], load_ints(keys[i] + k));
            }
        }
        for (long step = 0; step < steps; ++step) {
            meanwhile(step);
            const float* at[TILE_SIDE];
            for (long i = 0; i < TILE_SIDE; ++i) {
                const Bf16 *even = value_at[step * STEP + 2 * i], *odd = value_at[step * STEP + 2 * i + 1];
                int32_t* to = &pairs[i * K];
                for (long k = 0; k < K; k += 2 * LANES) {  // in the order 0-3, 8-11, 16-19, 24-27, 4-7, ... of head dims
                    const Ints a = load_ints(even + k), b = load_ints(odd + k);
                    _mm512_storeu_si512(to + k, _mm512_unpacklo_epi16(a, b));
                    _mm512_storeu_si512(to + k + LANES, _mm512_unpackhi_epi16(a, b));
                }
                at[i] = (const float*)to;
            }
            for (long k = 0; k < K; k += 4) {
                const long within = k % 32, from = k - within + within / 8 * 4 + within / 4 % 2 * LANES;
                float* to = (float*)&values[(k / TILE_SIDE * (LONG_CHUNK / STEP) + step) * TILE + k % TILE_SIDE * LANES];
                Floats turned[4];
                for (int j = 0; j < 4; ++j) turned[j] = load_fours(at + j, from);
                transpose_fours(turned[0], turned[1], turned[2], turned[3]);
                for (int j = 0; j < 4; ++j) store(to + j * LANES, turned[j]);
            }
        }
    }

    // Online softmax of a group over the chunk that was loaded.
    void add_chunk(long group, long start) {
        alignas(64) float scores[LONG_CHUNK * LANES];
        alignas(64) int32_t weights[LONG_CHUNK / 2 * LANES];
        const long visible = seen[(group + 1) * LANES - 1] - start, count = std::min(LONG_CHUNK, (visible + STEP - 1) / STEP * STEP);
        if (visible <= 0) return;
        score(group, count, scores);
        const Floats before = load(&most[group * LANES]), now = highest(group, start, count, scores, before);
        store(&most[group * LANES], now);
        const Floats kept = weight_of(_mm512_sub_ps(before, now));
        if (_mm512_cmp_ps_mask(kept, broadcast(1), _CMP_NEQ_UQ)) {
            float* to = &out[group * K * LANES];
            for (long k = 0; k < K; ++k) store(to + k * LANES, multiply(load(to + k * LANES), kept));
        }
        Floats total[4] = {zeros(), zeros(), zeros(), zeros()};
        for (long p = 0; p < count; p += 4) {
            Floats weight[4];
            unrolled<4>([&](auto i) INLINED {
                weight[i] = weight_of(_mm512_sub_ps(load(scores + (p + i) * LANES), now));
                total[i] = add(total[i], weight[i]);
            });
            _mm512_store_si512(weights + p / 2 * LANES, rounded_pairs(weight[0], weight[1]));
            _mm512_store_si512(weights + (p / 2 + 1) * LANES, rounded_pairs(weight[2], weight[3]));
        }
        store(&sums[group * LANES], multiply_add(load(&sums[group * LANES]), kept, add(add(total[0], total[1]), add(total[2], total[3]))));
        long dims = 0;
        for (; dims + 4 <= K / TILE_SIDE; dims += 4) add_values<4>(group, dims, count, weights);
        if (dims < K / TILE_SIDE) add_values<2>(group, dims, count, weights);
    }
};
}  // namespace

static inline bool fits_tiles(long K) { return K % 32 == 0; }

static void attend_by_tiles(const Cache<Bf16>& cache, const Part& part, const Part* next) {
    const long end = part.first + part.tokens;
    static thread_local TiledPart mine;
    TiledPart* tiled = &mine;
    asm volatile("" : "+r"(tiled));  // else the compiler looks up the thread-local again at every use
    configure_tiles(TILE_SIDE, TILE_BYTES);
    tiled->begin(part, cache.K);
    for (long start = 0; start < end; start += LONG_CHUNK) {
        const bool goes_on = start + LONG_CHUNK < end;
        const Part* coming = goes_on ? &part : next;
        const long first = goes_on ? start + LONG_CHUNK : 0, last = coming ? std::min(first + LONG_CHUNK, coming->first + coming->tokens) : 0;
        tiled->load_chunk(cache, start, end, [&](long step) {  // the same positions of the next chunk are prefetched
            if (first + step * STEP < last) prefetch(cache, *coming, first + step * STEP, std::min(last, first + (step + 1) * STEP));
        });
        for (long group = 0; group < tiled->groups(); ++group) tiled->add_chunk(group, start);
    }
    tiled->finish();
    release_tiles();
}
#endif
