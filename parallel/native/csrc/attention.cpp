// One new token of each sequence against the blocks of its context, in place.
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

extern "C" {

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
