// y = x W^T for a packed W, the same sum in the same order for every number of rows.
//
// Outputs lie in panels of PANEL = 2 * LANES. A tile is some rows by some panels in registers; each output is one
// chain of multiply-adds over rising k, so a row's result does not depend on which rows are computed beside it.
#pragma once
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>
#include "simd.h"
#include "small.h"
#include "tasks.h"

constexpr int PANEL = 2 * LANES;
constexpr int CHUNK = 4;        // panels that one task computes where there are few rows
constexpr int WIDE_CHUNK = 8;   // and where there are many: the rows are then read less often
constexpr long K_BLOCK = LANES == 16 ? 1024 : 512;  // so that a panel's part stays in a near cache while all rows pass
constexpr long ROW_BLOCK = 96;
constexpr long FEW_TASKS = 8;   // per thread: so few are cut to come out even
constexpr long TASK_NUMBERS = 1 << 18;  // rows times inputs times panels of one of few tasks, as threads wait for the last one


// Memory that is written before it is read (a vector would fill it with zeros first), in whole lines of a cache.
template <class T> class Room {
    struct Free {
        void operator()(T* at) const { ::operator delete[](at, std::align_val_t(64)); }
    };
    std::unique_ptr<T[], Free> first;

public:
    explicit Room(size_t count) : first((T*)::operator new[](count * sizeof(T), std::align_val_t(64))) {}
    T& operator[](size_t i) { return first[i]; }
};

// What a tile's sums begin with: a bias or nothing, the same for all rows (stride 0), or what was summed up before. So nobody fills results with
// zeros before they are computed.
struct Begin {
    const float* at;  // of panel p: at + p * PANEL
    long stride;

    INLINE Floats load(int r, int p, int h) const { return ::load(at + r * stride + p * PANEL + h * LANES); }
};
alignas(64) static const float NOTHING[4 * PANEL] = {};  // as many panels as a tile has at most

// What kinds of weights have in common: `Row` is what a row of x has become, `tile` writes to sums what they begin with and up to MOST rows x
// panels over k0..k1, and may fetch what lies `ahead` input features, of one panel after the other, behind what it reads. More rows than MOST are
// cut into parts of up to OF_MANY. Up to PARTS_BY_PANEL of them one panel meets all rows before the next one, which is fetched meanwhile; with more
// the same rows meet all panels. What becomes of rows is a class of its own: made for (count, K, padded K, group), and filled, PIECE numbers of a
// row at a time.
constexpr long PIECE = 128;

// R rows of numbers that lie equally far apart: few addresses for many rows, which else would not stay in registers.
template <int R, class Number> class Apart {
    const Number* first[(R + 3) / 4];
    long once, thrice;

public:
    template <class Row> INLINE Apart(const Row* rows, long k) {
        once = R > 1 ? rows[R > 1].x - rows[0].x : 0;
        thrice = 3 * once;
        each<(R + 3) / 4>([&](auto i) INLINED { first[i] = rows[0].x + 4 * i * once + k; });
    }
    template <int r> INLINE Words at() const {  // 32 bits of row r, in all lanes
        int32_t number;
        memcpy(&number, first[r / 4] + (r % 4 == 3 ? thrice : r % 4 * once), 4);
        return all_words(number);
    }
    INLINE void advance(long numbers) {
        each<(R + 3) / 4>([&](auto i) INLINED {
            first[i] += numbers;
            hold(first[i]);
        });
    }
};

// Rows chosen from others become such again: they are copied to `room`, `padded` numbers each. Other kinds take any rows.
template <class Row> static inline void lay_apart(std::vector<Row>& rows, long padded, std::vector<char>& room) {
    if constexpr (Row::APART) {
        const size_t bytes = padded * sizeof(*rows[0].x);
        room.resize(rows.size() * bytes);
        for (size_t r = 0; r < rows.size(); ++r) {
            memcpy(&room[r * bytes], rows[r].x, bytes);
            rows[r].x = (decltype(rows[r].x))&room[r * bytes];
        }
    }
}

struct FloatRow {
    static constexpr bool APART = false;
    const float* x;
};

class FloatRows {
    Room<float> numbers;
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
    static INLINE void load_both(const uint16_t* at, Floats& low, Floats& high) {
        const Words pair = load_words(at);
        low = as_floats(left<16>(pair));
        high = as_floats(both(pair, all_words(int32_t(0xffff0000))));
    }
};

struct PlainFp32 {  // [panel][k][output]
    using Number = float;
    static INLINE void load_both(const float* at, Floats& low, Floats& high) {
        low = load(at);
        high = load(at + LANES);
    }
};

template <class Stored> struct Exact {
    using Number = typename Stored::Number;
    const Number* weights;
    long K;
    using Row = FloatRow;
    static constexpr int MOST = MOST_ROWS, OF_MANY = MOST;
    static constexpr long PARTS_BY_PANEL = 0;

    static constexpr int panels_at_once(int rows) {  // enough chains to hide the latency of a multiply-add, no more than there are registers
        return LANES == 16 ? (rows <= 2 ? 4 : rows <= 6 ? 2 : 1) : (rows == 1 ? 4 : rows <= 3 ? 2 : 1);
    }

    template <int R, int P> void tile(const Row* rows, long panel, long k0, long k1, Begin begin, float* sums, long stride, long) const {
        Floats sum[R][P][2];
        const Number* w[P];
        const float* x[R];
        for (int p = 0; p < P; ++p) w[p] = weights + ((panel + p) * K) * PANEL;
        for (int r = 0; r < R; ++r) x[r] = rows[r].x;
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < P; ++p)
                for (int h = 0; h < 2; ++h) sum[r][p][h] = begin.load(r, p, h);
        for (long k = k0; k < k1; ++k) {
            Floats low[P], high[P];
            for (int p = 0; p < P; ++p) {
                const Number* at = w[p] + k * PANEL;
                if (R <= 2) _mm_prefetch((const char*)(at + 16 * PANEL), _MM_HINT_T0);
                Stored::load_both(at, low[p], high[p]);
            }
            for (int r = 0; r < R; ++r) {
                Floats value = all(x[r][k]);
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

using Bf16 = Exact<PairedBf16>;
using Fp32 = Exact<PlainFp32>;

#if defined(__AVX512BF16__)
// Rows rounded to bfloat16, multiplied two input features at a time (VDPBF16PS), summed in float32.
struct Bf16Row {
    static constexpr bool APART = true;
    const uint16_t* x;
};

struct Bf16Dot {
    const uint16_t* weights;  // [panel][k / 2][output][2]
    long K;                   // even: filled up with a zero
    using Row = Bf16Row;
    static constexpr int MOST = MOST_ROWS, OF_MANY = MOST;
    static constexpr long PARTS_BY_PANEL = 2;

    static constexpr int panels_at_once(int rows) { return rows <= 2 ? 4 : rows <= 6 ? 2 : 1; }

    template <int R, int P> void tile(const Row* rows, long panel, long k0, long k1, Begin begin, float* sums, long stride, long ahead) const {
        Floats sum[R][P][2];
        const uint16_t* w[P];
        Apart<R, uint16_t> x(rows, k0);
        each<P>([&](auto p) INLINED { w[p] = weights + (panel + p) * K * PANEL; });
        each<R>([&](auto r) INLINED {
            each<P>([&](auto p) INLINED { each<2>([&](auto h) INLINED { sum[r][p][h] = begin.load(r, p, h); }); });
        });
        for (long k = k0; k < k1; k += 2) {
            Words pairs[P][2];
            each<P>([&](auto p) INLINED {
                const uint16_t* at = w[p] + k * PANEL;
                if (R <= 2 || R == 7 || R == 8) {  // with other numbers of rows it costs more than it gives
                    fetch(at + ahead * PANEL);
                    fetch(at + (ahead + 1) * PANEL);
                }
                each<2>([&](auto h) INLINED { pairs[p][h] = load_words(at + h * 2 * LANES); });
            });
            each<R>([&](auto r) INLINED {
                const Words value = x.template at<r>();
                each<P>([&](auto p) INLINED {
                    each<2>([&](auto h) INLINED { sum[r][p][h] = _mm512_dpbf16_ps(sum[r][p][h], (__m512bh)value, (__m512bh)pairs[p][h]); });
                });
            });
            x.advance(2);
        }
        each<R>([&](auto r) INLINED {
            each<P>([&](auto p) INLINED { each<2>([&](auto h) INLINED { store(sums + r * stride + p * PANEL + h * LANES, sum[r][p][h]); }); });
        });
    }
};

class Bf16Rows {
    Room<uint16_t> numbers;
    long padded;

public:
    std::vector<Bf16Row> rows;

    Bf16Rows(long count, long K, long padded, long) : numbers(count * padded), padded(padded), rows(count) {
        for (long r = 0; r < count; ++r) rows[r].x = &numbers[r * padded];
        if (K < padded) for (long r = 0; r < count; ++r) numbers[r * padded + K] = 0;
    }

    void fill(long r, long first, const float* x, long width) {
        uint16_t* to = &numbers[r * padded + first];
        long k = 0;
        for (; k + LANES <= width; k += LANES) _mm256_storeu_si256((__m256i*)(to + k), (__m256i)_mm512_cvtneps_pbh(load(x + k)));
        if (k == width) return;
        const __mmask16 rest = (1u << (width - k)) - 1;
        _mm256_mask_storeu_epi16(to + k, rest, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(rest, x + k)));
    }
};
#endif

constexpr long ADJACENT = INT64_MIN;

// sums = bias (null: none) and the products of `count` rows (in parts as near to equal as they go) with `panels` panels. Few rows prefetch the
// panel that comes after the last: the adjacent one, or the one `next` panels further.
template <class W>
static void block(const W& w, const typename W::Row* rows, long count, long panel, long panels, const float* bias, float* sums, long stride,
                  long next = ADJACENT) {
    const long parts = count <= W::MOST ? 1 : (count + W::OF_MANY - 1) / W::OF_MANY;
    const auto beginning = [&](long p) { return Begin{bias ? bias + p * PANEL : NOTHING, 0}; };
    if (w.K == 0)  // nothing to add up
        for (long r = 0; r < count; ++r)
            for (long p = 0; p < panels; ++p) memcpy(sums + r * stride + p * PANEL, beginning(p).at, sizeof(float) * PANEL);
    if (parts == 1) {
        with_rows<W::MOST>(count, [&](auto some) {
            constexpr int R = some.value, P = W::panels_at_once(R);
            const auto pass = [&](auto wide, long p) {
                const bool is_last = p + wide.value == panels;
                const long ahead = (is_last && next != ADJACENT ? next : long(wide.value)) * w.K;
                w.template tile<R, wide.value>(rows, panel + p, 0, w.K, beginning(p), sums + p * PANEL, stride, ahead);
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
    const auto rows_at = [&](long part) { return part * count / parts; };
    const auto pass = [&](long part, long p, long k0, long k1, long ahead) {
        const long first = rows_at(part);
        float* to = sums + first * stride + p * PANEL;
        with_rows<W::OF_MANY>(rows_at(part + 1) - first, [&](auto some) {
            w.template tile<some.value, 1>(rows + first, panel + p, k0, k1, k0 ? Begin{to, stride} : beginning(p), to, stride, ahead);
        });
    };
    for (long k0 = 0; k0 < w.K; k0 += K_BLOCK) {
        const long k1 = std::min(w.K, k0 + K_BLOCK);
        if (parts <= W::PARTS_BY_PANEL)
            for (long p = 0; p < panels; ++p) {
                const long next = p + 1 < panels || k1 == w.K ? w.K : k1 - k0 - p * w.K;
                for (long part = 0; part < parts; ++part) pass(part, p, k0, k1, part + 1 < parts ? 0 : next);
            }
        else
            for (long part = 0; part < parts; ++part)
                for (long p = 0; p < panels; ++p) pass(part, p, k0, k1, 0);
    }
}

// y (count, N) = rows W^T + bias; bias may be null.
template <class W> struct Job {
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
        const long most = count <= 4 * MOST_ROWS ? CHUNK : WIDE_CHUNK, found = (panels() + most - 1) / most;
        if (found * blocks() >= FEW_TASKS * threads) return found;
        const long smaller = std::min(most, std::max(1L, TASK_NUMBERS / std::max(1L, count * w.K))), more = (panels() + smaller - 1) / smaller;
        return std::min(panels(), (more + threads - 1) / threads * threads);
    }
    long tasks() const { return chunks() * blocks(); }

    struct Part {
        long first, last, panel, panels;  // rows first .. last - 1, and so many panels
    };
    Part part(long task) const {
        // Neighbouring tasks have the same panels: the rows are smaller than the weights.
        const long c = task / blocks(), b = task % blocks(), panel = c * panels() / chunks();
        return {b * count / blocks(), (b + 1) * count / blocks(), panel, (c + 1) * panels() / chunks() - panel};
    }

    void run(long task) const {
        const auto [first, last, panel, some] = part(task);
        const long column = panel * PANEL, width = std::min(some * PANEL, N - column);
        const long whole = width / PANEL;  // panels that are summed up where they are wanted
        if (whole) block(w, rows + first, last - first, panel, whole, bias ? bias + column : nullptr, y + first * N + column, N);
        if (whole == some) return;
        alignas(64) static thread_local float sums[ROW_BLOCK * PANEL];
        block(w, rows + first, last - first, panel + whole, 1, nullptr, sums, PANEL);
        for (long r = first; r < last; ++r)
            for (long i = whole * PANEL; i < width; ++i)
                y[r * N + column + i] = (bias ? bias[column + i] : 0) + sums[(r - first) * PANEL + i - whole * PANEL];
    }
};

// middle (count rows from `first` on, I) = silu(rows gate^T) * rows up^T, for weights whose first I outputs are the gate's and the others up's.
template <class W, class Middle> struct GatedJob {
    W w;
    const typename W::Row* rows;
    long count;
    Middle* middle;
    long first, I;

    static constexpr long STRIDE = 2 * PIECE + PANEL;

    long blocks() const { return (count + ROW_BLOCK - 1) / ROW_BLOCK; }
    long tasks() const { return (I + PIECE - 1) / PIECE * blocks(); }

    void run(long task) const {
        const long column = task / blocks() * PIECE, b = task % blocks(), width = std::min(PIECE, I - column);
        const long begin = b * count / blocks(), end = (b + 1) * count / blocks();
        const long panel = (I + column) / PANEL, apart = (I + column) % PANEL;  // of up's outputs
        alignas(64) static thread_local float sums[ROW_BLOCK * STRIDE];
        block(w, rows + begin, end - begin, column / PANEL, (width + PANEL - 1) / PANEL, nullptr, sums, STRIDE);
        block(w, rows + begin, end - begin, panel, (apart + width + PANEL - 1) / PANEL, nullptr, sums + PIECE, STRIDE);
        for (long r = begin; r < end; ++r) {
            float* at = sums + (r - begin) * STRIDE;
            gate(at, at + PIECE + apart, at, width);
            middle->fill(first + r, column, at, width);
        }
    }
};

template <class Job> static void run_jobs(const std::vector<Job>& jobs, int threads) {
    std::vector<long> ends;
    long total = 0;
    for (const auto& job : jobs) ends.push_back(total += job.tasks());
    share_out(total, threads, [&](long task) {
        const size_t i = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
        jobs[i].run(task - (i ? ends[i - 1] : 0));
    });
}
