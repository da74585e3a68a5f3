// Attention over blocks: one new token of each sequence against its context in place, and prompts in tiles.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>
#include "simd.h"
#include "tasks.h"

// The query heads of one KV head, so that keys and values are read once for all of them.
struct Heads {
    long first, count, kv;
};

struct Cache {
    const float *keys, *values;  // (N, B, G, K)
    long block_tokens, G, K;
    const float* at(const float* cache, const int32_t* blocks, long block) const { return cache + long(blocks[block]) * block_tokens * G * K; }
};

static inline void scores_of(const Cache& cache, const Heads& heads, const float* q, const int32_t* blocks, long length, float* scores) {
    const float scale = 1 / std::sqrt(float(cache.K));
    for (long start = 0; start < length; start += cache.block_tokens) {
        const float* keys = cache.at(cache.keys, blocks, start / cache.block_tokens) + heads.kv * cache.K;
        const long count = std::min(cache.block_tokens, length - start);
        for (long h = 0; h < heads.count; ++h)
            for (long p = 0; p < count; ++p) {
                const float *a = q + h * cache.K, *b = keys + p * cache.G * cache.K;
                Floats even = zeros(), odd = zeros();
                long k = 0;
                for (; k + 2 * LANES <= cache.K; k += 2 * LANES) {
                    even = multiply_add(load(a + k), load(b + k), even);
                    odd = multiply_add(load(a + k + LANES), load(b + k + LANES), odd);
                }
                if (k < cache.K) even = multiply_add(load(a + k), load(b + k), even);
                scores[h * length + start + p] = sum_of(add(even, odd)) * scale;
            }
    }
}

static inline void softmax(float* x, long length) {
    float most = -INFINITY;
    for (long i = 0; i < length; ++i) most = x[i] > most || x[i] != x[i] ? x[i] : most;  // NaN stays
    Floats sums = zeros();
    long i = 0;
    for (; i + LANES <= length; i += LANES) {
        Floats e = exponential(add(load(x + i), all(-most)));
        sums = add(sums, e);
        store(x + i, e);
    }
    float sum = sum_of(sums);
    for (; i < length; ++i) sum += x[i] = std::exp(x[i] - most);
    const float inverse = most != most ? NAN : 1 / sum;
    for (i = 0; i < length; ++i) x[i] *= inverse;
}

static inline void weigh_values(const Cache& cache, const Heads& heads, const float* weights, const int32_t* blocks, long length, float* out) {
    memset(out, 0, sizeof(float) * heads.count * cache.K);
    constexpr long MOST = 8;  // registers of sums
    for (long start = 0; start < length; start += cache.block_tokens) {
        const float* values = cache.at(cache.values, blocks, start / cache.block_tokens) + heads.kv * cache.K;
        const long count = std::min(cache.block_tokens, length - start);
        for (long h = 0; h < heads.count; ++h)
            for (long k0 = 0; k0 < cache.K; k0 += MOST * LANES) {
                const long parts = std::min(MOST, (cache.K - k0) / LANES);
                float* to = out + h * cache.K + k0;
                const float* w = weights + h * length + start;
                auto add_up = [&](auto fixed) {
                    constexpr long n = decltype(fixed)::value;
                    Floats sum[n];
                    for (long i = 0; i < n; ++i) sum[i] = load(to + i * LANES);
                    for (long p = 0; p < count; ++p)
                        for (long i = 0; i < n; ++i) sum[i] = multiply_add(all(w[p]), load(values + p * cache.G * cache.K + k0 + i * LANES), sum[i]);
                    for (long i = 0; i < n; ++i) store(to + i * LANES, sum[i]);
                };
                if (parts == 8) add_up(std::integral_constant<long, 8>());
                else if (parts == 4) add_up(std::integral_constant<long, 4>());
                else
                    for (long i = 0; i < parts; ++i, to += LANES) {
                        Floats sum = load(to);
                        for (long p = 0; p < count; ++p)
                            sum = multiply_add(all(w[p]), load(values + p * cache.G * cache.K + k0 + i * LANES), sum);
                        store(to, sum);
                    }
            }
    }
}

// c (R rows, two registers wide) += a (R, depth) b (depth, two registers).
template <int R> static INLINE void add_product(const float* a, long a_stride, const float* b, long b_stride, long depth, float* c, long c_stride) {
    Floats sum[R][2];
    each<R>([&](auto r) INLINED { each<2>([&](auto h) INLINED { sum[r][h] = load(c + r * c_stride + h * LANES); }); });
    for (long k = 0; k < depth; ++k) {
        const Floats low = load(b + k * b_stride), high = load(b + k * b_stride + LANES);
        each<R>([&](auto r) INLINED {
            const Floats value = all(a[r * a_stride + k]);
            sum[r][0] = multiply_add(value, low, sum[r][0]);
            sum[r][1] = multiply_add(value, high, sum[r][1]);
        });
    }
    each<R>([&](auto r) INLINED { each<2>([&](auto h) INLINED { store(c + r * c_stride + h * LANES, sum[r][h]); }); });
}

static void multiply_tile(const float* a, long a_stride, const float* b, long b_stride, long depth, float* c, long c_stride, long rows, long width) {
    for (long row = 0; row < rows; row += MOST_ROWS)
        with_rows(std::min(long(MOST_ROWS), rows - row), [&](auto some) {
            for (long x = 0; x < width; x += 2 * LANES)
                add_product<some.value>(a + row * a_stride, a_stride, b + x, b_stride, depth, c + row * c_stride + x, c_stride);
        });
}

constexpr long CHUNK = 64;      // positions taken at once, counted from a sequence's first: tiles change no bit of a result
constexpr long TILE_ROWS = 96;  // queries of all heads that share keys and values

// What a thread holds of a tile: everything contiguous, keys turned so that positions lie side by side.
struct Tile {
    std::vector<float> q, keys, values, scores, out, most, sums;
    long width;  // K filled up to two registers

    Tile(long rows, long K) : width((K + 2 * LANES - 1) / (2 * LANES) * (2 * LANES)) {
        q.resize(rows * K); keys.resize(K * CHUNK); values.resize(CHUNK * width); scores.resize(rows * CHUNK);
        out.resize(rows * width); most.assign(rows, -INFINITY); sums.resize(rows);
    }

    void take(const Cache& cache, long kv, const int32_t* blocks, long start, long count) {  // zeros behind the last position
        for (long p = 0; p < CHUNK; ++p) {
            float* to = &values[p * width];
            if (p >= count) {
                for (long k = 0; k < cache.K; ++k) keys[k * CHUNK + p] = to[k] = 0;
                continue;
            }
            const long block = (start + p) / cache.block_tokens, at = ((start + p) % cache.block_tokens * cache.G + kv) * cache.K;
            const float* key = cache.at(cache.keys, blocks, block) + at;
            for (long k = 0; k < cache.K; ++k) keys[k * CHUNK + p] = key[k];
            memcpy(to, cache.at(cache.values, blocks, block) + at, sizeof(float) * cache.K);
        }
    }

    // The scores of a row become weights relative to the highest score so far; the first `visible` count.
    void weigh(long row, long visible) {
        float* s = &scores[row * CHUNK];
        if (visible <= 0) {
            memset(s, 0, sizeof(float) * CHUNK);
            return;
        }
        float poison = 0;  // exponential() loses NaN
        for (long i = 0; i < visible; ++i) poison += s[i] * 0;
        for (long i = visible; i < CHUNK; ++i) s[i] = -INFINITY;
        Floats highest_each = load(s);
        for (long i = LANES; i < CHUNK; i += LANES) highest_each = highest(highest_each, load(s + i));
        const float before = most[row], now = std::max(before, highest_of(highest_each));
        Floats total = zeros();
        for (long i = 0; i < CHUNK; i += LANES) store(s + i, exponential(add(load(s + i), all(-now))));
        for (long i = visible; i < CHUNK; ++i) s[i] = 0;
        for (long i = 0; i < CHUNK; i += LANES) total = add(total, load(s + i));
        const float kept = before == now ? 1 : std::exp(before - now);
        sums[row] = sums[row] * kept + sum_of(total) + poison;
        most[row] = now;
        if (kept != 1)
            for (long k = 0; k < width; k += LANES) store(&out[row * width + k], multiply(load(&out[row * width + k]), all(kept)));
    }
};

// `tokens` new tokens from position `first` on, the query heads of one KV head. q and out are (tokens, H, K).
static void attend_tile(const Cache& cache, const Heads& heads, const float* q, const int32_t* blocks, long first, long tokens, long H, float* out) {
    const long K = cache.K, rows = tokens * heads.count, end = first + tokens;
    const float scale = 1 / std::sqrt(float(K));
    Tile tile(rows, K);
    for (long row = 0; row < rows; ++row) {
        const float* from = q + (row / heads.count * H + heads.first + row % heads.count) * K;
        for (long k = 0; k < K; ++k) tile.q[row * K + k] = from[k] * scale;
    }
    for (long start = 0; start < end; start += CHUNK) {
        const long count = std::min(CHUNK, end - start);
        tile.take(cache, heads.kv, blocks, start, count);
        std::fill(tile.scores.begin(), tile.scores.end(), 0.0f);
        multiply_tile(tile.q.data(), K, tile.keys.data(), CHUNK, K, tile.scores.data(), CHUNK, rows, CHUNK);
        for (long row = 0; row < rows; ++row) tile.weigh(row, std::min(CHUNK, first + row / heads.count + 1 - start));
        multiply_tile(tile.scores.data(), CHUNK, tile.values.data(), tile.width, CHUNK, tile.out.data(), tile.width, rows, tile.width);
    }
    for (long row = 0; row < rows; ++row) {
        float* to = out + (row / heads.count * H + heads.first + row % heads.count) * K;
        for (long k = 0; k < K; ++k) to[k] = tile.out[row * tile.width + k] / tile.sums[row];
    }
}

extern "C" {

// out (T, H, K): tokens starts[s] .. starts[s + 1] of q are the last of lengths[s] positions of tables (S, M), each seeing itself and
// what lies before it. heads: G triples (first, count, kv).
void manta_prefill(const float* q, const float* keys, const float* values, const int32_t* tables, const int64_t* starts, const int64_t* lengths,
                   const int64_t* heads, float* out, long S, long H, long G, long K, long M, long block_tokens, int threads) {
    const Cache cache{keys, values, block_tokens, G, K};
    struct Part { long sequence, first, tokens; Heads heads; };
    std::vector<Part> parts;
    for (long s = 0; s < S; ++s)
        for (long g = 0; g < G; ++g) {
            const Heads mine{long(heads[3 * g]), long(heads[3 * g + 1]), long(heads[3 * g + 2])};
            const long step = std::max(1L, TILE_ROWS / mine.count), tokens = starts[s + 1] - starts[s];
            for (long first = 0; first < tokens; first += step) parts.push_back({s, first, std::min(step, tokens - first), mine});
        }
    share_out(parts.size(), threads, [&](long task) {
        const Part& part = parts[parts.size() - 1 - task];  // the longest contexts first
        const long s = part.sequence, at = (starts[s] + part.first) * H * K;
        const long position = lengths[s] - (starts[s + 1] - starts[s]) + part.first;
        attend_tile(cache, part.heads, q + at, tables + s * M, position, part.tokens, H, out + at);
    });
}

// k, v (T rows of kv_stride, G heads of K) go to their slots of the cache.
void manta_write_kv(const float* k, const float* v, long k_stride, long v_stride, const int64_t* slots, float* keys, float* values, long T, long width,
                    int threads) {
    share_out(T, T * width > 32768 ? threads : 1, [&](long t) {
        memcpy(keys + slots[t] * width, k + t * k_stride, sizeof(float) * width);
        memcpy(values + slots[t] * width, v + t * v_stride, sizeof(float) * width);
    });
}

// out (S, H, K): q (S, H, K) over the first lengths[s] positions of tables (S, M). heads: G triples (first, count, kv).
void manta_decode(const float* q, const float* keys, const float* values, const int32_t* tables, const int64_t* lengths, const int64_t* heads,
                  float* out, long S, long H, long G, long K, long M, long block_tokens, int threads) {
    const Cache cache{keys, values, block_tokens, G, K};
    long longest = 0;
    for (long s = 0; s < S; ++s) longest = std::max(longest, long(lengths[s]));
    share_out(S * G, S * longest * H * K > 65536 ? threads : 1, [&](long task) {
        static thread_local std::vector<float> scores;
        const long s = task / G, g = task % G;
        const Heads mine{long(heads[3 * g]), long(heads[3 * g + 1]), long(heads[3 * g + 2])};
        const long length = lengths[s];
        scores.resize(std::max(scores.size(), size_t(mine.count * length)));
        const long at = (s * H + mine.first) * K;
        scores_of(cache, mine, q + at, tables + s * M, length, scores.data());
        for (long h = 0; h < mine.count; ++h) softmax(scores.data() + h * length, length);
        weigh_values(cache, mine, scores.data(), tables + s * M, length, out + at);
    });
}
}
