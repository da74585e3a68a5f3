// AMX: eight registers ("tiles") of up to 16 rows of 64 bytes, and products of whole tiles. The library's user must have asked the kernel for
// permission (parallel/native/tiles.py); without it, the first instruction ends the process.
#pragma once
#include "simd.h"

#if defined(__AMX_TILE__)
constexpr int TILE_SIDE = 16;   // rows of a tile, and 32-bit columns of one
constexpr int TILE_BYTES = 64;  // of a tile's row

// C += A B with C in tiles 0 to 3, A in 4 and 5, B in 6 and 7. B has its numbers in groups of 32 bits: two or four inputs of one output.
template <int T> static INLINE void load_tile(const void* at, long stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(stride), "i"(T) : "memory");
}
// For rows, which are read once per panel: they do not displace the panel from the nearest cache. (Measured with 32 KiB of each: 2,000 GFLOP/s by
// `load_tile`, 2,470 by this.)
template <int T> static INLINE void load_tile_of_rows(const void* at, long stride) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(stride), "i"(T) : "memory");
}
template <int T> static INLINE void store_tile(void* at, long stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(stride), "i"(T) : "memory");
}
template <int T> static INLINE void zero_tile() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
// Bfloat16 numbers, summed in float32.
template <int C, int A, int B> static INLINE void multiply_bf16_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// Signed bytes in A, unsigned ones in B, summed exactly.
template <int C, int A, int B> static INLINE void multiply_byte_tiles() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Configures the tiles of this thread for up to 32 rows and so many bytes of inputs at a time. The content of tiles is lost.
static inline void configure_tiles(int rows, int bytes) {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } shape;
    const uint8_t upper = rows < TILE_SIDE ? rows : TILE_SIDE, lower = rows > TILE_SIDE ? rows - TILE_SIDE : upper;
    const uint8_t of_tile[8] = {upper, upper, lower, lower, upper, lower, uint8_t(bytes / 4), uint8_t(bytes / 4)};
    for (int t = 0; t < 8; ++t) {
        shape.rows[t] = of_tile[t];
        shape.row_bytes[t] = t == 4 || t == 5 ? bytes : TILE_BYTES;
    }
    asm volatile("ldtilecfg %0" ::"m"(shape));
}

// Gives the tiles back: a context switch then need not save them.
static inline void release_tiles() { asm volatile("tilerelease"); }
#endif
