// Top-k values of a row, found through the maximum of each stretch of it: see engine/run/sampling/top_k.py.
#include <functional>
#include <limits>
#include <vector>
#include "small.h"

constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// The maximum of `count` values, ignoring NaN; LOWEST if all are NaN.
static inline float highest_number(const float* x, long count) {
    Floats most = broadcast(LOWEST);
    long i = 0;
    for (; i + LANES <= count; i += LANES) most = maximum(load(x + i), most);  // if either operand is NaN, the instruction returns the second
    float found = reduce_max(most);
    for (; i < count; ++i) found = x[i] > found ? x[i] : found;
    return found;
}

// The `count` highest of N values and their indices, in ascending order of index; ties at the threshold go to the lower indices. NaN is skipped;
// if fewer than `count` values remain, the rest is filled with NaN at index 0.
static void candidates(const float* x, long N, long count, long stretch, float* values, int64_t* indices) {
    const long stretches = (N + stretch - 1) / stretch;
    std::vector<float> most(stretches), sorted;
    for (long s = 0; s < stretches; ++s) most[s] = highest_number(x + s * stretch, std::min(stretch, N - s * stretch));
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

// x (R, N), rows `stride` apart; values and indices (R, count).
extern "C" void manta_candidates(const float* x, long stride, float* values, int64_t* indices, long R, long N, long count, long stretch, int threads) {
    parallel_for(R, threads, [&](long r) { candidates(x + r * stride, N, count, stretch, values + r * count, indices + r * count); });
}
