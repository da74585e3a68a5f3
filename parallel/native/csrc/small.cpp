#include "small.h"

extern "C" {

// RMS norm: x (T, D) += delta; out (T, D) = weight * x / rms(x). delta may be null.
void manta_add_norm(float* x, const float* delta, const float* weight, float* out, long T, long D, float eps, int threads) {
    parallel_for_rows(T, T * D > SERIAL_NUMBERS ? threads : 1, [&](long t) {
        float* row = x + t * D;
        if (delta) for (long i = 0; i < D; ++i) row[i] += delta[t * D + i];
        norm(row, weight, out + t * D, D, eps);
    });
}

// SwiGLU: out (T, I) = silu(x[:, :I]) * x[:, I:]
void manta_gate(const float* x, float* out, long T, long I, int threads) {
    parallel_for_rows(T, T * I > SERIAL_NUMBERS ? threads : 1, [&](long t) { gate(x + 2 * t * I, x + (2 * t + 1) * I, out + t * I, I); });
}

// Rotary embedding: out (T, X, K) = each head of x (T rows, `stride` apart, of X heads of K) rotated by cos, sin (T, K / 2).
void manta_rotate(const float* x, long stride, const float* cos, const float* sin, float* out, long T, long X, long K, int threads) {
    const long half = K / 2;
    parallel_for_rows(T, T * X * K > SERIAL_NUMBERS ? threads : 1, [&](long t) {
        const float *c = cos + t * half, *s = sin + t * half;
        for (long h = 0; h < X; ++h) {
            const float* from = x + t * stride + h * K;
            float* to = out + (t * X + h) * K;
            for (long i = 0; i < half; ++i) {
                to[i] = from[i] * c[i] - from[half + i] * s[i];
                to[half + i] = from[half + i] * c[i] + from[i] * s[i];
            }
        }
    });
}

// Argmax: the highest value and its index in each of R rows of N values, `stride` apart.
void manta_highest(const float* x, long stride, float* values, int64_t* indices, long R, long N, int threads) {
    parallel_for(R, threads, [&](long r) { values[r] = highest_at(x + r * stride, N, indices + r); });
}
}
