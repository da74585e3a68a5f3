// Shared by attention in float32 and in bfloat16: how a batch is split into tiles of queries and heads. A decode computes one new token with
// the same code as a prefill computes many, so a token's keys and values are bit-identical whether it was decoded or recomputed with a
// prompt: a stream that is resumed on another replica reports the same log-probabilities.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>
#include "simd.h"
#include "tasks.h"

constexpr long CHUNK = 64;      // positions computed at a time, aligned to the sequence's start, so that tiling does not change a bit of the result
constexpr long TILE_ROWS = 96;  // queries of all heads that share one KV head

using Bf16 = uint16_t;

// The query heads of one KV head; its keys and values are read once for all of them.
struct Heads {
    long first, count, kv;
};

template <class Number> struct Cache {
    const Number *keys, *values;  // (N, B, G, K)
    long block_tokens, G, K;

    // Calls run(p, offset of its K elements in keys and values) for positions start + p, p < count, of one KV head.
    template <class Run> INLINE void each_row(long kv, const int32_t* blocks, long start, long count, Run run) const {
        long block = start / block_tokens, within = start % block_tokens;
        for (long p = 0; p < count; ++block, within = 0) {
            long offset = ((long(blocks[block]) * block_tokens + within) * G + kv) * K;
            for (; within < block_tokens && p < count; ++within, ++p, offset += G * K) run(p, offset);
        }
    }
};

// One task: some new tokens of one sequence, from position `first` on, with the query heads of one KV head. q and out are (tokens, H, K).
struct Part {
    Heads heads;
    const float* q;
    const int32_t* blocks;
    long first, tokens, H;
    float* out;

    long rows() const { return tokens * heads.count; }
    long offset(long row, long K) const { return (row / heads.count * H + heads.first + row % heads.count) * K; }  // in q and out
    long visible(long row, long start) const { return first + row / heads.count + 1 - start; }  // how many positions from `start` on a row attends to
};

// Prefetches positions `first` to `last` of a part into the L2 cache.
template <class Number> static inline void prefetch(const Cache<Number>& cache, const Part& part, long first, long last) {
    cache.each_row(part.heads.kv, part.blocks, first, last - first, [&](long, long offset) {
        for (long k = 0; k < cache.K; k += 64 / sizeof(Number)) {
            prefetch_l2(cache.keys + offset + k);
            prefetch_l2(cache.values + offset + k);
            asm volatile("");  // else the compiler removes the loop as having no effect
        }
    });
}

static inline Heads heads_of(const int64_t* heads, long g) { return {long(heads[3 * g]), long(heads[3 * g + 1]), long(heads[3 * g + 2])}; }

// Causal attention: tokens starts[s] .. starts[s + 1] of q (T, H, K) are the last of the lengths[s] positions of block table s (S, M).
// heads: G triples (first, count, kv). Calls run(part) for every part.
template <class Run>
static inline void each_part(const float* q, const int32_t* tables, const int64_t* starts, const int64_t* lengths, const int64_t* heads, float* out,
                             long S, long H, long G, long K, long M, int threads, Run run, long rows_per_part = TILE_ROWS) {
    std::vector<Part> parts;
    for (long s = 0; s < S; ++s)
        for (long g = 0; g < G; ++g) {
            const Heads mine = heads_of(heads, g);
            const long step = std::max(1L, rows_per_part / mine.count), tokens = starts[s + 1] - starts[s];
            for (long done = 0; done < tokens; done += step) {
                const long at = (starts[s] + done) * H * K;
                parts.push_back({mine, q + at, tables + s * M, lengths[s] - tokens + done, std::min(step, tokens - done), H, out + at});
            }
        }
    parallel_for(parts.size(), threads, [&](long task) { run(parts[parts.size() - 1 - task]); });  // the longest contexts first
}

// The same where every sequence has one new token: q (S, H, K). Calls run(part, next); `next` is this thread's next part or null.
template <class Run>
static inline void each_decode(const float* q, const int32_t* tables, const int64_t* lengths, const int64_t* heads, float* out, long S, long H, long G,
                               long K, long M, int threads, Run run) {
    long longest = 0;
    for (long s = 0; s < S; ++s) longest = std::max(longest, long(lengths[s]));
    const auto part = [&](long task) {
        const long s = task / G;
        return Part{heads_of(heads, task % G), q + s * H * K, tables + s * M, lengths[s] - 1, 1, H, out + s * H * K};
    };
    parallel_for_prefetching(S * G, S * longest * H * K > 65536 ? threads : 1, [&](long task, long next) {
        const Part coming = part(std::min(next, S * G - 1));
        run(part(task), next < S * G ? &coming : nullptr);
    });
}
