// Paged attention in float32.
#include "attention.h"

// c (R rows, two registers wide) += a (R, depth) times b (depth, two registers).
template <int R> static INLINE void add_product(const float* a, long a_stride, const float* b, long b_stride, long depth, float* c, long c_stride) {
    Floats sum[R][2];
    unrolled<R>([&](auto r) INLINED { unrolled<2>([&](auto h) INLINED { sum[r][h] = load(c + r * c_stride + h * LANES); }); });
    for (long k = 0; k < depth; ++k) {
        const Floats low = load(b + k * b_stride), high = load(b + k * b_stride + LANES);
        unrolled<R>([&](auto r) INLINED {
            const Floats value = broadcast(a[r * a_stride + k]);
            sum[r][0] = multiply_add(value, low, sum[r][0]);
            sum[r][1] = multiply_add(value, high, sum[r][1]);
        });
    }
    unrolled<R>([&](auto r) INLINED { unrolled<2>([&](auto h) INLINED { store(c + r * c_stride + h * LANES, sum[r][h]); }); });
}

static void multiply_tile(const float* a, long a_stride, const float* b, long b_stride, long depth, float* c, long c_stride, long rows, long width) {
    for (long row = 0; row < rows; row += MAX_TILE_ROWS)
        dispatch_rows(std::min(long(MAX_TILE_ROWS), rows - row), [&](auto some) {
            for (long x = 0; x < width; x += 2 * LANES)
                add_product<some.value>(a + row * a_stride, a_stride, b + x, b_stride, depth, c + row * c_stride + x, c_stride);
        });
}

namespace {
// A thread's working set for one tile: everything contiguous, keys transposed so that positions are adjacent.
struct Tile {
    std::vector<float> q, keys, values, scores, out, most, sums, nothing;
    const float *key_at[CHUNK], *value_at[CHUNK];
    long width;  // K padded to a multiple of two registers

    void begin(long rows, long K) {
        width = (K + 2 * LANES - 1) / (2 * LANES) * (2 * LANES);
        q.resize(rows * K); keys.resize(K * CHUNK); values.resize(CHUNK * width); scores.resize(rows * CHUNK);
        out.assign(rows * width, 0); most.assign(rows, -INFINITY); sums.assign(rows, 0); nothing.assign(K, 0);
    }

    void load_chunk(const Cache<float>& cache, long kv, const int32_t* blocks, long start, long count) {  // zeros after the last position
        cache.each_row(kv, blocks, start, count, [&](long p, long offset) {
            key_at[p] = cache.keys + offset;
            value_at[p] = cache.values + offset;
        });
        for (long p = count; p < CHUNK; ++p) key_at[p] = value_at[p] = nothing.data();
        for (long p = 0; p < CHUNK; p += LANES)
            for (long k = 0; k < cache.K; k += 4) {
                Floats turned[4];
                for (int i = 0; i < 4; ++i) turned[i] = load_fours(key_at + p + i, k);
                transpose_fours(turned[0], turned[1], turned[2], turned[3]);
                for (int i = 0; i < 4; ++i) store(&keys[(k + i) * CHUNK + p], turned[i]);
            }
    }

    // out += weights times values. For few rows the values are read from the cache directly, without a copy.
    void weigh_values(const Cache<float>& cache, long start, long count, long rows) {
        if (width == cache.K && rows <= MAX_TILE_ROWS) {
            for (long p = 0, some; p < count; p += some) {
                some = std::min(cache.block_tokens - (start + p) % cache.block_tokens, count - p);
                multiply_tile(&scores[p], CHUNK, value_at[p], cache.G * cache.K, some, out.data(), width, rows, width);
            }
            return;
        }
        for (long p = 0; p < CHUNK; ++p) memcpy(&values[p * width], value_at[p], sizeof(float) * cache.K);
        multiply_tile(scores.data(), CHUNK, values.data(), width, CHUNK, out.data(), width, rows, width);
    }

    // Online softmax: turns a row's scores into weights relative to the running maximum. Only the first `visible` positions count.
    void weigh(long row, long visible) {
        float* s = &scores[row * CHUNK];
        if (visible <= 0) {
            memset(s, 0, sizeof(float) * CHUNK);
            return;
        }
        // exponential() loses NaN and +infinity, so they are carried into the sum separately. A score that overflowed to -infinity has weight 0.
        Floats poisons = zeros();
        long seen = 0;
        for (; seen + LANES <= visible; seen += LANES) poisons = multiply_add(maximum(broadcast(-FLT_MAX), load(s + seen)), zeros(), poisons);
        float poison = reduce_add(poisons);
        for (; seen < visible; ++seen) poison += (s[seen] < -FLT_MAX ? 0 : s[seen]) * 0;
        for (long i = visible; i < CHUNK; ++i) s[i] = -INFINITY;
        Floats highest_each = load(s);
        for (long i = LANES; i < CHUNK; i += LANES) highest_each = maximum(highest_each, load(s + i));
        const float before = most[row], now = std::max(before, reduce_max(highest_each));
        if (now == -INFINITY && poison == 0) {  // no position has a weight yet; if that stays so the result is 0 / 0
            memset(s, 0, sizeof(float) * CHUNK);
            return;
        }
        Floats total = zeros();
        for (long i = 0; i < CHUNK; i += LANES) store(s + i, exponential(add(load(s + i), broadcast(-now))));
        for (long i = visible; i < CHUNK; ++i) s[i] = 0;
        for (long i = 0; i < CHUNK; i += LANES) total = add(total, load(s + i));
        const float kept = before == now ? 1 : std::exp(before - now);
        sums[row] = sums[row] * kept + reduce_add(total) + poison;
        most[row] = now;
        if (kept != 1)
            for (long k = 0; k < width; k += LANES) store(&out[row * width + k], multiply(load(&out[row * width + k]), broadcast(kept)));
    }
};

}  // namespace

static void attend(const Cache<float>& cache, const Part& part) {
    const long K = cache.K, rows = part.rows(), end = part.first + part.tokens;
    const float scale = 1 / std::sqrt(float(K));
    static thread_local Tile tile;
    tile.begin(rows, K);
    for (long row = 0; row < rows; ++row) {
        const float* from = part.q + part.offset(row, K);
        for (long k = 0; k < K; ++k) tile.q[row * K + k] = from[k] * scale;
    }
    for (long start = 0; start < end; start += CHUNK) {
        const long count = std::min(CHUNK, end - start);
        tile.load_chunk(cache, part.heads.kv, part.blocks, start, count);
        std::fill(tile.scores.begin(), tile.scores.end(), 0.0f);
        multiply_tile(tile.q.data(), K, tile.keys.data(), CHUNK, K, tile.scores.data(), CHUNK, rows, CHUNK);
        for (long row = 0; row < rows; ++row) tile.weigh(row, std::min(CHUNK, part.visible(row, start)));
        tile.weigh_values(cache, start, count, rows);
    }
    for (long row = 0; row < rows; ++row) {
        float* to = part.out + part.offset(row, K);
        for (long k = 0; k < K; ++k) to[k] = tile.out[row * tile.width + k] / tile.sums[row];
    }
}

extern "C" {

// out (T, H, K), see each_part.
void manta_prefill(const float* q, const float* keys, const float* values, const int32_t* tables, const int64_t* starts, const int64_t* lengths,
                   const int64_t* heads, float* out, long S, long H, long G, long K, long M, long block_tokens, int threads) {
    const Cache<float> cache{keys, values, block_tokens, G, K};
    each_part(q, tables, starts, lengths, heads, out, S, H, G, K, M, threads, [&](const Part& part) { attend(cache, part); });
}

// out (S, H, K), see each_decode.
void manta_decode(const float* q, const float* keys, const float* values, const int32_t* tables, const int64_t* lengths, const int64_t* heads,
                  float* out, long S, long H, long G, long K, long M, long block_tokens, int threads) {
    const Cache<float> cache{keys, values, block_tokens, G, K};
    each_decode(q, tables, lengths, heads, out, S, H, G, K, M, threads, [&](const Part& part, const Part*) { attend(cache, part); });
}

// Writes k and v (T rows, k_stride and v_stride apart, of `width` = G heads of K) to their slots of the cache.
void manta_write_kv(const float* k, const float* v, long k_stride, long v_stride, const int64_t* slots, float* keys, float* values, long T, long width,
                    int threads) {
    parallel_for_rows(T, T * width > 32768 ? threads : 1, [&](long t) {
        memcpy(keys + slots[t] * width, k + t * k_stride, sizeof(float) * width);
        memcpy(values + slots[t] * width, v + t * v_stride, sizeof(float) * width);
    });
}
}
