// Matrix products y = x W^T with packed weights W.
//
// Outputs are stored in panels of PANEL = 2 * LANES. A tile keeps the sums of a few rows and panels in registers. Every output is one chain of
// multiply-adds over increasing k (with AMX of steps of 32 inputs), so the result of a row does not depend on the other rows of the batch.
#pragma once
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>
#include "simd.h"
#include "small.h"
#include "tasks.h"
#include "tiles.h"

constexpr int PANEL = 2 * LANES;
constexpr int CHUNK = 4;        // panels per task with few rows
constexpr int WIDE_CHUNK = 8;   // and with many rows, which are then read less often
constexpr long K_BLOCK = LANES == 16 ? 1024 : 512;  // the most inputs at a time: a panel's slice stays in a near cache while all rows are multiplied
#if defined(__AMX_TILE__)
constexpr long ROW_BLOCK = 256;  // tiles multiply so fast that rereading weights shows
#else
constexpr long ROW_BLOCK = 96;
#endif
constexpr long MIN_TASKS_PER_THREAD = 8;  // with fewer, chunks are made smaller so that the threads finish together
constexpr long SMALL_TASK = 1 << 18;      // size of such a chunk: rows * inputs * panels
constexpr long FILL_WIDTH = 128;          // a row is filled so many numbers at a time
constexpr long SUMS_WIDTH = std::max(2 * FILL_WIDTH, long(WIDE_CHUNK * PANEL)) + PANEL;

// Of this thread: sums of a block of rows, up to SUMS_WIDTH of each. (One function for all kinds of weights, as each instance has memory of its own.)
inline float* block_sums() {
    alignas(64) static thread_local float sums[ROW_BLOCK * SUMS_WIDTH];
    return sums;
}

// Uninitialised memory, aligned to cache lines. (A vector would be filled with zeros first.)
template <class T> class AlignedBuffer {
    struct Free {
        void operator()(T* at) const { ::operator delete[](at, std::align_val_t(64)); }
    };
    std::unique_ptr<T[], Free> first;

public:
    explicit AlignedBuffer(size_t count) : first((T*)::operator new[](count * sizeof(T), std::align_val_t(64))) {}
    T& operator[](size_t i) { return first[i]; }
};

// Initial values of a tile's sums: a bias or zeros, the same for all rows (stride 0), or the sums of earlier inputs. (So `sums`
// is never cleared beforehand.)
struct InitialSums {
    const float* at;  // panel p starts at at + p * PANEL
    long stride;

    INLINE Floats load(int r, int p, int h) const { return ::load(at + r * stride + p * PANEL + h * LANES); }
};
alignas(64) static const float NO_BIAS[4 * PANEL] = {};  // the most panels that a tile has

// What a tile prefetches while it reads weights: those that lie `inputs` input features (counted through adjacent panels) behind, or if `IS_CLOSE`
// those that follow at once. With 0 tiles prefetch nothing: their weights are in a near cache, or another part of the rows prefetches.
struct Ahead {
    long inputs;
#if defined(__AMX_TILE__)
    // On Intel's processors, what is prefetched follows closely, which helps their own prefetching. At the distance of a panel, memory was read at
    // three quarters of this speed (measured).
    static constexpr bool IS_CLOSE = true;
#else
    static constexpr bool IS_CLOSE = false;
#endif

    static constexpr long CLOSE = 2048;      // bytes; 1024 to 8192 are much the same
    static constexpr long NOT_AS_CLOSE = 8192;  // for tiles of 8 bits, which read 4 KiB between two waits

    // The address to prefetch while the weights at `now` are read.
    INLINE const char* from(const void* now, long bytes_per_input, long close = CLOSE) const {
        return (const char*)now + (IS_CLOSE ? close : inputs * bytes_per_input);
    }
    // The same for `bytes` of weights, if anything is to be prefetched.
    INLINE void prefetch(const void* now, long bytes_per_input, long bytes) const { prefetch_part(now, bytes_per_input, bytes, 0, 1, CLOSE); }
    // The same for one of some equal parts of them: if many lines are prefetched at once, what follows waits for them.
    INLINE void prefetch_part(const void* now, long bytes_per_input, long bytes, int part, int parts, long close) const {
        if (!inputs) return;
        const char* at = from(now, bytes_per_input, close);
        for (long line = bytes * part / parts; line < bytes * (part + 1) / parts; line += 64) prefetch_l2(at + line);
    }
};

// Interface of weight kinds (FloatProduct, Bf16Dot, and those of integers.h):
// - `Row` is a row of x in the form that is multiplied. A class of rows is constructed with (count, K, padded K, group) and filled FILL_WIDTH numbers
//   of a row at a time.
// - `tile` writes initial values plus the products of up to MAX_ROWS rows with some panels over inputs k0..k1 to `sums`, and
//   prefetches what lies `ahead` as far as that pays.
// - `tile_bytes`, of kinds that use tiles: the bytes of inputs that products of so many rows take at a time; 0: these rows are multiplied by vectors.
// - `SLICE`: see Slice.
// - More than MAX_ROWS rows are split into parts of up to PART_ROWS. With up to PANEL_MAJOR_PARTS parts, each panel is multiplied with all rows while
//   what follows in it, or the next panel, is prefetched (Ahead); with more parts, each part is multiplied with all panels.

// R rows at equal distances. Few base addresses serve many rows; one address per row would not fit into registers.
template <int R, class Number> class StridedRows {
    const Number* first[(R + 3) / 4];
    long once, thrice;

public:
    template <class Row> INLINE StridedRows(const Row* rows, long k) {
        once = R > 1 ? rows[R > 1 ? 1 : 0].x - rows[0].x : 0;
        thrice = 3 * once;
        unrolled<(R + 3) / 4>([&](auto i) INLINED { first[i] = rows[0].x + 4 * i * once + k; });
    }
    template <int r> INLINE Ints at() const {  // 32 bits of row r, broadcast
        int32_t number;
        memcpy(&number, first[r / 4] + (r % 4 == 3 ? thrice : r % 4 * once), 4);
        return broadcast_int(number);
    }
    INLINE void advance(long numbers) {
        unrolled<(R + 3) / 4>([&](auto i) INLINED {
            first[i] += numbers;
            keep_in_register(first[i]);
        });
    }
};

// Numbers from one row to the next: at least `padded`, and for tiles an odd number of cache lines. The 16 rows of a tile are loaded at once, and
// lie in different sets of the caches then (measured: products from the L2 cache are 15 to 20 % faster than with an even number).
template <class Number> static inline long row_distance(long padded) {
#if defined(__AMX_TILE__)
    constexpr long LINE = 64 / sizeof(Number);
    return ((padded + LINE - 1) / LINE | 1) * LINE;
#else
    return padded;
#endif
}

// Rows that were selected from others. Kinds that need rows at equal distances get copies of them, `padded` numbers each.
template <class Row> class SelectedRows {
    std::unique_ptr<AlignedBuffer<char>> copies;

public:
    std::vector<Row> rows;

    explicit SelectedRows(std::vector<Row> at_equal_distances) : rows(std::move(at_equal_distances)) {}
    SelectedRows(std::vector<Row> anywhere, long padded, int threads) : rows(std::move(anywhere)) {
        if constexpr (Row::STRIDED) {
            using Number = std::remove_const_t<std::remove_pointer_t<decltype(Row::x)>>;
            const long count = rows.size(), distance = row_distance<Number>(padded) * sizeof(Number);
            if (count <= 1) return;
            copies = std::make_unique<AlignedBuffer<char>>(count * distance);
            parallel_for_rows(count, count * padded > SERIAL_NUMBERS ? threads : 1, [&](long r) {
                char* to = &(*copies)[r * distance];
                memcpy(to, rows[r].x, padded * sizeof(Number));
                rows[r].x = (const Number*)to;
            });
        }
    }
};

struct FloatRow {
    static constexpr bool STRIDED = false;
    const float* x;
};

class FloatRows {
    AlignedBuffer<float> numbers;
    long K;

public:
    std::vector<FloatRow> rows;

    FloatRows(long count, long K, long, long) : numbers(count * K), K(K), rows(count) {
        for (long r = 0; r < count; ++r) rows[r].x = &numbers[r * K];
    }
    void fill(long r, long first, const float* x, long width) { memcpy(&numbers[r * K + first], x, sizeof(float) * width); }
};

struct PairedBf16 {  // [panel][k][lane](low half: output lane, high half: output LANES + lane)
    using Number = uint16_t;
    static INLINE void load_panel(const uint16_t* at, Floats& low, Floats& high) {
        const Ints pair = load_ints(at);
        low = as_floats(shift_left<16>(pair));
        high = as_floats(bit_and(pair, broadcast_int(int32_t(0xffff0000))));
    }
};

struct PlainFp32 {  // [panel][k][output]
    using Number = float;
    static INLINE void load_panel(const float* at, Floats& low, Floats& high) {
        low = load(at);
        high = load(at + LANES);
    }
};

template <class Stored> struct FloatProduct {
    using Number = typename Stored::Number;
    const Number* weights;
    long K;
    using Row = FloatRow;
    static constexpr int MAX_ROWS = MAX_TILE_ROWS, PART_ROWS = MAX_ROWS;
    static constexpr long PANEL_MAJOR_PARTS = 0;

    static constexpr int panels_at_once(int rows) {  // enough chains to hide the latency of a multiply-add, within the number of registers
        return LANES == 16 ? (rows <= 2 ? 4 : rows <= 6 ? 2 : 1) : (rows == 1 ? 4 : rows <= 3 ? 2 : 1);
    }

    template <int R, int P>
    void tile(const Row* rows, long panel, long k0, long k1, InitialSums initial, float* sums, long stride, Ahead) const {
        Floats sum[R][P][2];
        const Number* w[P];
        const float* x[R];
        for (int p = 0; p < P; ++p) w[p] = weights + ((panel + p) * K) * PANEL;
        for (int r = 0; r < R; ++r) x[r] = rows[r].x;
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < P; ++p)
                for (int h = 0; h < 2; ++h) sum[r][p][h] = initial.load(r, p, h);
        for (long k = k0; k < k1; ++k) {
            Floats low[P], high[P];
            for (int p = 0; p < P; ++p) {
                const Number* at = w[p] + k * PANEL;
                if (R <= 2) _mm_prefetch((const char*)(at + 16 * PANEL), _MM_HINT_T0);
                Stored::load_panel(at, low[p], high[p]);
            }
            for (int r = 0; r < R; ++r) {
                Floats value = broadcast(x[r][k]);
                for (int p = 0; p < P; ++p) {
                    sum[r][p][0] = multiply_add(value, low[p], sum[r][p][0]);
                    sum[r][p][1] = multiply_add(value, high[p], sum[r][p][1]);
                }
            }
        }
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < P; ++p)
                for (int h = 0; h < 2; ++h) store(sums + r * stride + p * PANEL + h * LANES, sum[r][p][h]);
    }
};

using Bf16Product = FloatProduct<PairedBf16>;
using Fp32Product = FloatProduct<PlainFp32>;

#if defined(__AVX512BF16__)
// Rows rounded to bfloat16, multiplied two input features at a time (VDPBF16PS) and summed in float32.
struct Bf16Row {
    static constexpr bool STRIDED = true;
    const uint16_t* x;
};

#if defined(__AMX_TILE__)
struct Bf16Dot {
    const uint16_t* weights;  // [panel][k / 2][output][2]
    long K;                   // even: padded with a zero
    using Row = Bf16Row;
    static constexpr int tile_bytes(int) { return TILE_BYTES; }
    static constexpr int MAX_ROWS = 2 * TILE_SIDE, PART_ROWS = MAX_ROWS;
    static constexpr long PANEL_MAJOR_PARTS = ROW_BLOCK / PART_ROWS;
    static constexpr long STEP = 32;  // inputs of a product of tiles
    static constexpr long SLICE = K_BLOCK / 2;  // 32 KiB of a panel, which stay in the nearest cache
    static_assert(SLICE % STEP == 0, "only the last step may be short, however the inputs are divided");

    static constexpr int panels_at_once(int rows) { return rows <= TILE_SIDE ? 2 : 1; }

    // All numbers of rows are multiplied by tiles, however few rows there are: these sum in another order than vectors do.
    template <int R, int P>
    void tile(const Row* rows, long panel, long k0, long k1, InitialSums initial, float* sums, long stride, Ahead ahead) const {
        static_assert(P == 1 || R <= TILE_SIDE);
        constexpr bool HAS_SECOND = R > TILE_SIDE;  // rows from 16 on are in tiles of their own
        const long x_stride = R > 1 ? (rows[R > 1 ? 1 : 0].x - rows[0].x) * long(sizeof(*rows[0].x)) : 0;
        const uint16_t* w = weights + panel * K * PANEL;
        const auto each_sum = [&](auto run) INLINED {
            unrolled<2 * P>([&](auto c) INLINED { run(c, 0, c * TILE_SIDE); });
            if constexpr (HAS_SECOND)
                unrolled<2>([&](auto c) INLINED { run(std::integral_constant<int, 2 + c>(), TILE_SIDE, c * TILE_SIDE); });
        };
        each_sum([&](auto tile, int row, int column) INLINED {
            load_tile<tile>(initial.at + row * initial.stride + column, initial.stride * sizeof(float));
        });
        const auto step = [&](const uint16_t* x, long x_stride, const uint16_t* at, long panel_stride) INLINED {
            load_tile_of_rows<4>(x, x_stride);
            if constexpr (HAS_SECOND) load_tile_of_rows<5>((const char*)x + TILE_SIDE * x_stride, x_stride);
            unrolled<P>([&](auto p) INLINED {
                load_tile<6>(at + p * panel_stride, 2 * TILE_BYTES);
                multiply_bf16_tiles<2 * p, 4, 6>();
                load_tile<7>(at + p * panel_stride + 2 * LANES, 2 * TILE_BYTES);
                if constexpr (HAS_SECOND) multiply_bf16_tiles<2, 5, 6>();
                multiply_bf16_tiles<2 * p + 1, 4, 7>();
                if constexpr (HAS_SECOND) multiply_bf16_tiles<3, 5, 7>();
            });
        };
        long k = k0;
        for (; k + STEP <= k1; k += STEP) {
            unrolled<P>([&](auto p) INLINED { ahead.prefetch(w + (p * K + k) * PANEL, PANEL * sizeof(*w), STEP * PANEL * sizeof(*w)); });
            step(rows[0].x + k, x_stride, w + k * PANEL, K * PANEL);
        }
        if (k < k1) {  // fewer than STEP inputs are left: both sides are filled up with zeros
            alignas(64) uint16_t x[R][STEP] = {}, rest[P][STEP * PANEL] = {};
            for (int r = 0; r < R; ++r) memcpy(x[r], rows[r].x + k, (k1 - k) * sizeof(uint16_t));
            for (int p = 0; p < P; ++p) memcpy(rest[p], w + (p * K + k) * PANEL, (k1 - k) * PANEL * sizeof(uint16_t));
            step(x[0], sizeof(x[0]), rest[0], STEP * PANEL);
        }
        each_sum([&](auto tile, int row, int column) INLINED { store_tile<tile>(sums + row * stride + column, stride * sizeof(float)); });
    }
};
#else
struct Bf16Dot {
    const uint16_t* weights;  // [panel][k / 2][output][2]
    long K;                   // even: padded with a zero
    using Row = Bf16Row;
    static constexpr int MAX_ROWS = MAX_TILE_ROWS, PART_ROWS = MAX_ROWS;
    static constexpr long PANEL_MAJOR_PARTS = 2;

    static constexpr int panels_at_once(int rows) { return rows <= 2 ? 4 : rows <= 6 ? 2 : 1; }

    template <int R, int P>
    void tile(const Row* rows, long panel, long k0, long k1, InitialSums initial, float* sums, long stride, Ahead ahead) const {
        Floats sum[R][P][2];
        const uint16_t* w[P];
        StridedRows<R, uint16_t> x(rows, k0);
        unrolled<P>([&](auto p) INLINED { w[p] = weights + (panel + p) * K * PANEL; });
        unrolled<R>([&](auto r) INLINED {
            unrolled<P>([&](auto p) INLINED { unrolled<2>([&](auto h) INLINED { sum[r][p][h] = initial.load(r, p, h); }); });
        });
        for (long k = k0; k < k1; k += 2) {
            Ints pairs[P][2];
            unrolled<P>([&](auto p) INLINED {
                const uint16_t* at = w[p] + k * PANEL;
                if (R <= 2 || R == 7 || R == 8) {  // for other numbers of rows prefetching costs more than it saves (measured)
                    prefetch_l2(at + ahead.inputs * PANEL);
                    prefetch_l2(at + (ahead.inputs + 1) * PANEL);
                }
                unrolled<2>([&](auto h) INLINED { pairs[p][h] = load_ints(at + h * 2 * LANES); });
            });
            unrolled<R>([&](auto r) INLINED {
                const Ints value = x.template at<r>();
                unrolled<P>([&](auto p) INLINED {
                    unrolled<2>([&](auto h) INLINED { sum[r][p][h] = _mm512_dpbf16_ps(sum[r][p][h], (__m512bh)value, (__m512bh)pairs[p][h]); });
                });
            });
            x.advance(2);
        }
        unrolled<R>([&](auto r) INLINED {
            unrolled<P>([&](auto p) INLINED { unrolled<2>([&](auto h) INLINED { store(sums + r * stride + p * PANEL + h * LANES, sum[r][p][h]); }); });
        });
    }
};
#endif

class Bf16Rows {
    long distance;
    AlignedBuffer<uint16_t> numbers;

public:
    std::vector<Bf16Row> rows;

    Bf16Rows(long count, long K, long padded, long) : distance(row_distance<uint16_t>(padded)), numbers(count * distance), rows(count) {
        for (long r = 0; r < count; ++r) rows[r].x = &numbers[r * distance];
        if (K < padded) for (long r = 0; r < count; ++r) numbers[r * distance + K] = 0;
    }

    void fill(long r, long first, const float* x, long width) {
        uint16_t* to = &numbers[r * distance + first];
        long k = 0;
        for (; k + LANES <= width; k += LANES) _mm256_storeu_si256((__m256i*)(to + k), (__m256i)_mm512_cvtneps_pbh(load(x + k)));
        if (k == width) return;
        const __mmask16 rest = (1u << (width - k)) - 1;
        _mm256_mask_storeu_epi16(to + k, rest, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(rest, x + k)));
    }
};
#endif

constexpr long ADJACENT = INT64_MIN;

// The tiles of this thread while products of W use them, configured for their number of rows. Nothing for a W that is multiplied by vectors.
template <class W, class = void> struct TilesFor {
    static constexpr bool ARE_USED = false;
    void configure(int) {}
};
#if defined(__AMX_TILE__)
template <class W> class TilesFor<W, std::void_t<decltype(W::tile_bytes(1))>> {
    int rows = 0;

public:
    static constexpr bool ARE_USED = true;
    void configure(int wanted) {
        if (wanted != rows && W::tile_bytes(wanted)) configure_tiles(rows = wanted, W::tile_bytes(wanted));
    }
    ~TilesFor() {
        if (rows) release_tiles();
    }
};
#endif

// Inputs of a panel that are multiplied with all rows before the next ones: K_BLOCK, or a kind's own SLICE.
template <class W, class = void> struct Slice {
    static constexpr long INPUTS = K_BLOCK;
};
template <class W> struct Slice<W, std::void_t<decltype(W::SLICE)>> {
    static constexpr long INPUTS = W::SLICE;
};

// sums = bias (may be null) + the products of `count` rows, split into parts, with `panels` panels. With few rows the panel after the last one is
// prefetched: the adjacent one, or the one at a distance of `next` panels (not if what is prefetched `IS_CLOSE`).
template <class W>
static void multiply_panels(const W& w, const typename W::Row* rows, long count, long panel, long panels, const float* bias, float* sums,
                            long stride, long next = ADJACENT) {
    TilesFor<W> tiles;
    const long row_parts = count <= W::MAX_ROWS ? 1 : (count + W::PART_ROWS - 1) / W::PART_ROWS;
    const auto initial_of = [&](long p) { return InitialSums{bias ? bias + p * PANEL : NO_BIAS, 0}; };
    if (w.K == 0)  // no products
        for (long r = 0; r < count; ++r)
            for (long p = 0; p < panels; ++p) memcpy(sums + r * stride + p * PANEL, initial_of(p).at, sizeof(float) * PANEL);
    if (row_parts == 1) {
        dispatch_rows<W::MAX_ROWS>(count, [&](auto num_rows) {
            constexpr int R = num_rows.value, P = W::panels_at_once(R);
            tiles.configure(R);
            const auto pass = [&](auto wide, long p) {
                const bool is_last = p + wide.value == panels;
                const Ahead ahead{(is_last && next != ADJACENT ? next : long(wide.value)) * w.K};
                w.template tile<R, wide.value>(rows, panel + p, 0, w.K, initial_of(p), sums + p * PANEL, stride, ahead);
            };
            long p = 0;
            for (; p + P <= panels; p += P) pass(std::integral_constant<int, P>(), p);
            if constexpr (P > 2)
                for (; p + 2 <= panels; p += 2) pass(std::integral_constant<int, 2>(), p);
            if (P > 1)
                for (; p < panels; ++p) pass(std::integral_constant<int, 1>(), p);
        });
        return;
    }
    // Tiles multiply a few rows in the time of many, so all parts but the last are full. For vectors they are of nearly equal size.
    const auto rows_at = [&](long part) { return TilesFor<W>::ARE_USED ? std::min(count, part * W::PART_ROWS) : part * count / row_parts; };
    const auto pass = [&](long part, long p, long k0, long k1, Ahead ahead) {
        const long first = rows_at(part);
        float* to = sums + first * stride + p * PANEL;
        dispatch_rows<W::PART_ROWS>(rows_at(part + 1) - first, [&](auto num_rows) {
            tiles.configure(num_rows.value);
            w.template tile<num_rows.value, 1>(rows + first, panel + p, k0, k1, k0 ? InitialSums{to, stride} : initial_of(p), to, stride, ahead);
        });
    };
    for (long k0 = 0; k0 < w.K; k0 += Slice<W>::INPUTS) {
        const long k1 = std::min(w.K, k0 + Slice<W>::INPUTS);
        if (row_parts <= W::PANEL_MAJOR_PARTS)
            for (long p = 0; p < panels; ++p) {
                const long next = p + 1 < panels || k1 == w.K ? w.K : k1 - k0 - p * w.K;
                const long prefetching = Ahead::IS_CLOSE ? 0 : row_parts - 1;  // the part that reads the panel first, or the one before the next panel
                for (long part = 0; part < row_parts; ++part) pass(part, p, k0, k1, {part == prefetching ? next : 0});
            }
        else
            for (long part = 0; part < row_parts; ++part)
                for (long p = 0; p < panels; ++p) pass(part, p, k0, k1, {0});
    }
}

// Rows (num_rows, D) that weighted results are added to.
struct RowSums {
    float* at;
    const float* scales;  // (num_rows): what a row contains before is multiplied by its scale; null: rows begin with zeros
    long num_rows, D;

    void begin(long n, long column, long width) const {
        float* row = at + n * D + column;
        long i = 0;
        for (; i + LANES <= width; i += LANES) store(row + i, scales ? multiply(load(row + i), broadcast(scales[n])) : zeros());
        for (; i < width; ++i) row[i] = scales ? row[i] * scales[n] : 0;
    }
    void add(long n, long column, long width, const float* result, float weight) const {
        float* row = at + n * D + column;
        long i = 0;
        for (; i + LANES <= width; i += LANES) store(row + i, multiply_add(broadcast(weight), load(result + i), load(row + i)));
        for (; i < width; ++i) row[i] = std::fma(weight, result[i], row[i]);
    }
};

// y (count, N) = rows W^T + bias; bias may be null.
template <class W> struct Gemm {
    W w;
    const typename W::Row* rows;
    long count;
    const float* bias;
    float* y;
    long N;
    int threads;

    long panels() const { return (N + PANEL - 1) / PANEL; }
    long blocks() const { return (count + ROW_BLOCK - 1) / ROW_BLOCK; }
    long chunks() const {
        const long most = count <= 4 * MAX_TILE_ROWS ? CHUNK : WIDE_CHUNK, found = (panels() + most - 1) / most;
        if (found * blocks() >= MIN_TASKS_PER_THREAD * threads) return found;
        const long smaller = std::min(most, std::max(1L, SMALL_TASK / std::max(1L, count * w.K))), more = (panels() + smaller - 1) / smaller;
        return std::min(panels(), (more + threads - 1) / threads * threads);
    }
    long tasks() const { return chunks() * blocks(); }

    struct TaskBounds {
        long first, last, panel, panels;  // rows first .. last - 1; the first panel and their number
    };
    TaskBounds bounds(long task) const {
        // Consecutive tasks share panels, as the rows are smaller than the weights.
        const long c = task / blocks(), b = task % blocks(), panel = c * panels() / chunks();
        return {b * count / blocks(), (b + 1) * count / blocks(), panel, (c + 1) * panels() / chunks() - panel};
    }

    void run(long task) const {
        const auto [first, last, panel, num_panels] = bounds(task);
        const long column = panel * PANEL, width = std::min(num_panels * PANEL, N - column);
        const long whole = width / PANEL;  // panels whose sums are written directly to y
        if (whole) multiply_panels(w, rows + first, last - first, panel, whole, bias ? bias + column : nullptr, y + first * N + column, N);
        if (whole == num_panels) return;
        float* const sums = block_sums();
        multiply_panels(w, rows + first, last - first, panel + whole, 1, nullptr, sums, PANEL);
        for (long r = first; r < last; ++r)
            for (long i = whole * PANEL; i < width; ++i)
                y[r * N + column + i] = (bias ? bias[column + i] : 0) + sums[(r - first) * PANEL + i - whole * PANEL];
    }
};

// middle (count rows from `first` on, I) = silu(rows gate^T) * rows up^T. The first I outputs of the weights are the gate's, the others are up's.
template <class W, class Middle> struct GatedGemm {
    W w;
    const typename W::Row* rows;
    bool are_selected;  // from others: each task copies its own
    long count;
    Middle* middle;
    long first, I;
    long columns;  // of `middle` per task, a multiple of FILL_WIDTH

    static long blocks_of(long count) { return (count + ROW_BLOCK - 1) / ROW_BLOCK; }
    long blocks() const { return blocks_of(count); }
    long tasks() const { return (I + columns - 1) / columns * blocks(); }

    void run(long task) const {
        const long column = task / blocks() * columns, b = task % blocks();
        const long begin = b * count / blocks(), end = (b + 1) * count / blocks();
        if (!are_selected) return run(rows + begin, first + begin, end - begin, column);
        const SelectedRows<typename W::Row> selected({rows + begin, rows + end}, w.K, 1);
        run(selected.rows.data(), first + begin, end - begin, column);
    }

private:
    void run(const typename W::Row* block, long to, long num_rows, long from_column) const {
        float* const sums = block_sums();
        for (long column = from_column; column < std::min(I, from_column + columns); column += FILL_WIDTH) {
            const long width = std::min(FILL_WIDTH, I - column);
            const long panel = (I + column) / PANEL, apart = (I + column) % PANEL;  // where up's outputs begin
            multiply_panels(w, block, num_rows, column / PANEL, (width + PANEL - 1) / PANEL, nullptr, sums, SUMS_WIDTH);
            multiply_panels(w, block, num_rows, panel, (apart + width + PANEL - 1) / PANEL, nullptr, sums + FILL_WIDTH, SUMS_WIDTH);
            for (long r = 0; r < num_rows; ++r) {
                float* at = sums + r * SUMS_WIDTH;
                gate(at, at + FILL_WIDTH + apart, at, width);
                middle->fill(to + r, column, at, width);
            }
        }
    }
};

// Experts' results, each multiplied by its weight, are added to rows of `out` in the order of experts. A task computes some columns of all rows, so
// that these sums stay in a near cache; results are not written anywhere else.
template <class W> struct SummedGemms {
    struct Expert {
        W w;
        const typename W::Row* rows;
        long count;
    };
    std::vector<Expert> experts;
    const int64_t* row_of_out;  // of each expert's rows, one expert's after the other
    const float* weights;       // likewise
    RowSums out;
    int threads;

    static constexpr long NEAR_CACHE = 1 << 20;  // bytes of it for `out`

    long panels() const { return (out.D + PANEL - 1) / PANEL; }
    long tasks() const {
        const long most = out.num_rows * WIDE_CHUNK * PANEL * long(sizeof(float)) <= NEAR_CACHE ? WIDE_CHUNK : CHUNK;
        const long found = (panels() + most - 1) / most;
        return (found + threads - 1) / threads * threads;
    }
    bool is_possible() const { return panels() >= CHUNK * tasks(); }  // with less per task, rows would be read too often

    void run(long task) const {
        const long panel = task * panels() / tasks(), num_panels = (task + 1) * panels() / tasks() - panel;
        const long column = panel * PANEL, width = std::min(num_panels * PANEL, out.D - column);
        float* const sums = block_sums();
        for (long n = 0; n < out.num_rows; ++n) out.begin(n, column, width);
        const int64_t* row = row_of_out;
        const float* weight = weights;
        for (const auto& [w, rows, count] : experts) {
            const long blocks = (count + ROW_BLOCK - 1) / ROW_BLOCK;
            for (long b = 0; b < blocks; ++b) {
                const long first = b * count / blocks, num_rows = (b + 1) * count / blocks - first;
                multiply_panels(w, rows + first, num_rows, panel, num_panels, nullptr, sums, SUMS_WIDTH);
                for (long r = 0; r < num_rows; ++r) out.add(*row++, column, width, sums + r * SUMS_WIDTH, *weight++);
            }
        }
    }
};

template <class Gemm> static void run_gemms(const std::vector<Gemm>& jobs, int threads) {
    std::vector<long> ends;
    long total = 0;
    for (const auto& job : jobs) ends.push_back(total += job.tasks());
    parallel_for(total, threads, [&](long task) {
        const size_t i = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
        jobs[i].run(task - (i ? ends[i - 1] : 0));
    });
}
