// The highest numbers of a row, by way of the highest of each stretch: see engine/run/sampling/top_k.py.
#include <functional>
#include <limits>
#include <vector>
#include "small.h"

constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// The highest of `count` numbers that is a number; LOWEST where none is.
static inline float highest_number(const float* x, long count) {
    Floats most = all(LOWEST);
    long i = 0;
    for (; i + LANES <= count; i += LANES) most = highest(load(x + i), most);  // of what is no number and another it takes the second
    float found = highest_of(most);
    for (; i < count; ++i) found = x[i] > found ? x[i] : found;
    return found;
}

// The `count` highest of N numbers and their places, by rising place; of those that are equal at the end the first. What is no number is left
// out, and where too few are left the rest is NaN at place 0.
static void candidates(const float* x, long N, long count, long stretch, float* values, int64_t* places) {
    const long stretches = (N + stretch - 1) / stretch;
    std::vector<float> most(stretches), sorted;
    for (long s = 0; s < stretches; ++s) most[s] = highest_number(x + s * stretch, std::min(stretch, N - s * stretch));
    const auto nth = [&](std::vector<float>& some) {  // the `count`-th highest, the lowest where they are fewer
        const auto at = some.begin() + std::min<long>(count, some.size()) - 1;
        std::nth_element(some.begin(), at, some.end(), std::greater<float>());
        return *at;
    };
    sorted = most;
    const float least = count <= stretches ? nth(sorted) : LOWEST;  // `count` stretches have one at least as high
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
        long ties = count;  // that still have room
        for (int32_t i : found) ties -= x[i] > last;
        for (int32_t i : found) {
            if (x[i] < last || (x[i] == last && ties-- <= 0)) continue;
            values[filled] = x[i], places[filled++] = i;
        }
    }
    for (; filled < count; ++filled) values[filled] = std::numeric_limits<float>::quiet_NaN(), places[filled] = 0;
}

// x (R, N) with rows `stride` apart; values, places (R, count).
extern "C" void manta_candidates(const float* x, long stride, float* values, int64_t* places, long R, long N, long count, long stretch, int threads) {
    share_out(R, threads, [&](long r) { candidates(x + r * stride, N, count, stretch, values + r * count, places + r * count); });
}
