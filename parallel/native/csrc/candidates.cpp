#include "candidates.h"

// Top-k: x (R, N), rows `stride` apart; values and indices (R, count).
extern "C" void manta_candidates(const float* x, long stride, float* values, int64_t* indices, long R, long N, long count, long stretch, int threads) {
    parallel_for(R, threads, [&](long r) {
        std::vector<float> most((N + stretch - 1) / stretch);
        stretch_maxima(x + r * stride, N, stretch, most.data());
        candidates(x + r * stride, N, count, stretch, most, values + r * count, indices + r * count);
    });
}
