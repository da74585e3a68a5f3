// Top-k values of a row, found through the maximum of each stretch of it: see engine/run/sampling/top_k.py.
#pragma once
#include <functional>
#include <limits>
#include <vector>
#include "small.h"

constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// most[s] is the maximum of the values s * stretch .. of N, ignoring NaN; LOWEST if all are NaN. Returns whether there are NaN.
static inline bool stretch_maxima(const float* x, long N, long stretch, float* most) {
    unsigned not_numbers = 0;
    for (long start = 0, s = 0; start < N; start += stretch, ++s) {
        const long stop = std::min(N, start + stretch);
        Floats highest = broadcast(LOWEST);
        long i = start;
        for (; i + LANES <= stop; i += LANES) {
            const Floats some = load(x + i);
            highest = maximum(some, highest);  // if either operand is NaN, the instruction returns the second
            not_numbers |= nan_mask(some);
        }
        most[s] = reduce_max(highest);
        for (; i < stop; ++i) most[s] = x[i] > most[s] ? x[i] : most[s], not_numbers |= x[i] != x[i];
    }
    return not_numbers;
}

// The `count` highest of N values and their indices, in ascending order of index; ties at the threshold go to the lower indices. NaN is skipped;
// if fewer than `count` values remain, the rest is filled with NaN at index 0. `most`: see stretch_maxima.
static inline void candidates(const float* x, long N, long count, long stretch, const std::vector<float>& most, float* values, int64_t* indices) {
    const long stretches = most.size();
    std::vector<float> sorted;
    const auto nth = [&](std::vector<float>& some) {  // the `count`-th highest, or the lowest if there are fewer
        const auto at = some.begin() + std::min<long>(count, some.size()) - 1;
        std::nth_element(some.begin(), at, some.end(), std::greater<float>());
        return *at;
    };
    sorted = most;
    const float least = count <= stretches ? nth(sorted) : LOWEST;  // at least `count` stretches hold a value this high
    std::vector<int32_t> found;
    for (long s = 0; s < stretches; ++s) {
        if (most[s] < least) continue;
        for (long i = s * stretch; i < std::min(N, (s + 1) * stretch); ++i)
            if (x[i] >= least) found.push_back(i);
    }
    long filled = 0;
    if (!found.empty()) {
        sorted.clear();
        for (int32_t i : found) sorted.push_back(x[i]);
        const float last = nth(sorted);
        long ties = count;  // how many values equal to `last` are still to be taken
        for (int32_t i : found) ties -= x[i] > last;
        for (int32_t i : found) {
            if (x[i] < last || (x[i] == last && ties-- <= 0)) continue;
            values[filled] = x[i], indices[filled++] = i;
        }
    }
    for (; filled < count; ++filled) values[filled] = std::numeric_limits<float>::quiet_NaN(), indices[filled] = 0;
}
