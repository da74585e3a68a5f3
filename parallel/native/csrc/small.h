// Elementwise and row-wise operations between matrix products, each in one pass over its rows.
#pragma once
#include <algorithm>
#include <cmath>
#include "simd.h"
#include "tasks.h"

constexpr long SERIAL_NUMBERS = 32768;  // with fewer elements, waking a second thread costs more than it saves

static inline void gate(const float* left, const float* right, float* out, long I) {  // silu(left) * right
    long i = 0;
    for (; i + LANES <= I; i += LANES) {
        Floats g = load(left + i);
        Floats sigmoid = divide(broadcast(1), add(broadcast(1), exponential(multiply(g, broadcast(-1)))));
        store(out + i, multiply(multiply(g, sigmoid), load(right + i)));
    }
    for (; i < I; ++i) out[i] = left[i] / (1 + std::exp(-left[i])) * right[i];
}

static inline void norm(const float* x, const float* weight, float* out, long D, float eps) {
    Floats squares = zeros();
    long i = 0;
    for (; i + LANES <= D; i += LANES) squares = multiply_add(load(x + i), load(x + i), squares);
    float sum = reduce_add(squares);
    for (; i < D; ++i) sum += x[i] * x[i];
    const float scale = 1 / std::sqrt(sum / D + eps);
    for (i = 0; i + LANES <= D; i += LANES) store(out + i, multiply(load(weight + i), multiply(load(x + i), broadcast(scale))));
    for (; i < D; ++i) out[i] = weight[i] * (x[i] * scale);
}

// The highest of N values and its first index; if any value is NaN, NaN and an arbitrary index.
static inline float highest_at(const float* x, long N, int64_t* index) {
    constexpr long STRETCH = 64 * LANES;
    float best = x[0];
    long stretch = 0;
    for (long start = 0; start < N; start += STRETCH) {
        const long stop = std::min(N, start + STRETCH);
        Floats most[4] = {broadcast(x[start]), broadcast(x[start]), broadcast(x[start]), broadcast(x[start])};
        unsigned not_numbers = 0;
        long i = start;
        for (; i + 4 * LANES <= stop; i += 4 * LANES)
            unrolled<4>([&](auto n) INLINED {
                const Floats some = load(x + i + n * LANES);
                most[n] = maximum(most[n], some);
                not_numbers |= nan_mask(some);
            });
        float found = reduce_max(maximum(maximum(most[0], most[1]), maximum(most[2], most[3])));
        for (; i < stop; ++i) found = std::max(found, x[i]), not_numbers |= x[i] != x[i];
        if (not_numbers) {
            *index = start;
            return NAN;
        }
        if (found > best) best = found, stretch = start;
    }
    for (*index = stretch; x[*index] != best;) ++*index;
    return best;
}
