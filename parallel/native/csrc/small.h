// The small operations between matrices, each in one pass over its rows.
#pragma once
#include <cmath>
#include "simd.h"
#include "tasks.h"

constexpr long SERIAL_NUMBERS = 32768;  // below, waking a second thread costs more than it saves

static inline void gate(const float* left, const float* right, float* out, long I) {  // silu(left) * right
    long i = 0;
    for (; i + LANES <= I; i += LANES) {
        Floats g = load(left + i);
        Floats sigmoid = divide(all(1), add(all(1), exponential(multiply(g, all(-1)))));
        store(out + i, multiply(multiply(g, sigmoid), load(right + i)));
    }
    for (; i < I; ++i) out[i] = left[i] / (1 + std::exp(-left[i])) * right[i];
}

static inline void norm(const float* x, const float* weight, float* out, long D, float eps) {
    Floats squares = zeros();
    long i = 0;
    for (; i + LANES <= D; i += LANES) squares = multiply_add(load(x + i), load(x + i), squares);
    float sum = sum_of(squares);
    for (; i < D; ++i) sum += x[i] * x[i];
    const float scale = 1 / std::sqrt(sum / D + eps);
    for (i = 0; i + LANES <= D; i += LANES) store(out + i, multiply(load(weight + i), multiply(load(x + i), all(scale))));
    for (; i < D; ++i) out[i] = weight[i] * (x[i] * scale);
}
