// Collectives of the ranks of one host through memory that all of them have mapped.
//
// Every rank has a line of state and two buffers. A message passes in pieces: a rank copies its piece into a buffer, counts its
// `arrived` up, waits for the others' counts and reads their buffers. Pieces alternate between the buffers, and who counts a
// piece has finished reading the one before it; so a buffer is written again only after everyone has read it.
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <cstring>
#include <vector>
#include "simd.h"

namespace {
constexpr int SPINS = 4000;        // about 100 us of pauses: longer than equal ranks differ within a layer
constexpr int YIELDS = 50;         // then whoever else wants this core may have it
constexpr long SLICE_NS = 20'000'000;  // asleep; between slices it is looked whether the peer lives
constexpr long ALONE_BYTES = 16384;    // of a piece that every one of three or more ranks sums whole by itself
constexpr long BLOCK = 1024;

enum Outcome : int { DONE = 0, PEER_LEFT = 1, PEER_DIED = 2, PEER_LATE = 3, SIZES_DIFFER = 4 };

struct alignas(128) Line {
    std::atomic<uint32_t> arrived, sleepers, left;
};

struct Exchange {  // as parallel/native/shared_memory_collectives.py lays it out
    char* memory;
    const int32_t* lifelines;  // a pidfd of each rank's process; -1: there is none
    int64_t rank, size, buffer_bytes;
    double timeout_s;
    int64_t arrived, pieces, spins, culprit;

    Line& line(long r) const { return ((Line*)memory)[r]; }
    int64_t* offsets(long r) const {  // size + 1 numbers for each buffer: where in a rank's message each receiver's part begins
        return (int64_t*)(memory + sizeof(Line) * size) + (2 * r + pieces % 2) * (size + 1);
    }
    char* buffer(long r) const {
        const long heads = sizeof(Line) * size + 8 * 2 * size * (size + 1);
        return memory + (heads + 4095) / 4096 * 4096 + (2 * r + pieces % 2) * buffer_bytes;
    }
};

long futex(std::atomic<uint32_t>& word, int operation, uint32_t value, const timespec* limit) {
    return syscall(SYS_futex, (uint32_t*)&word, operation, value, limit, nullptr, 0);
}

double now_s() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

void arrive(Exchange& e) {
    Line& mine = e.line(e.rank);
    mine.arrived.store(uint32_t(++e.arrived), std::memory_order_seq_cst);
    if (mine.sleepers.load(std::memory_order_seq_cst)) futex(mine.arrived, FUTEX_WAKE, INT_MAX, nullptr);
}

bool has_arrived(const Exchange& e, long peer) {  // counts wrap around
    return int32_t(e.line(peer).arrived.load(std::memory_order_acquire) - uint32_t(e.arrived)) >= 0;
}

bool has_died(const Exchange& e, long peer) {
    pollfd end{e.lifelines[peer], POLLIN, 0};
    return end.fd >= 0 && poll(&end, 1, 0) == 1;
}

Outcome sleep_until_arrived(Exchange& e, long peer) {
    Line& line = e.line(peer);
    const double deadline = now_s() + e.timeout_s;
    for (;;) {
        const uint32_t seen = line.arrived.load(std::memory_order_seq_cst);
        if (has_arrived(e, peer)) return DONE;
        if (line.left.load()) return PEER_LEFT;
        line.sleepers.fetch_add(1, std::memory_order_seq_cst);
        const timespec slice{0, SLICE_NS};
        futex(line.arrived, FUTEX_WAIT, seen, &slice);  // returns at once where the count has changed
        line.sleepers.fetch_sub(1, std::memory_order_seq_cst);
        const Outcome outcome = has_died(e, peer) ? PEER_DIED : now_s() > deadline ? PEER_LATE : DONE;
        if (outcome && !has_arrived(e, peer)) return outcome;
    }
}

Outcome await(Exchange& e, long peer) {
    for (long i = 0; i < e.spins; ++i) {
        if (has_arrived(e, peer)) return DONE;
        _mm_pause();
    }
    for (int i = 0; i < YIELDS; ++i) {
        if (has_arrived(e, peer)) return DONE;
        sched_yield();
    }
    const Outcome outcome = sleep_until_arrived(e, peer);
    if (outcome) e.culprit = peer;
    return outcome;
}

Outcome await_all(Exchange& e) {
    for (long i = 1; i < e.size; ++i)
        if (Outcome outcome = await(e, (e.rank + i) % e.size)) return outcome;
    return DONE;
}

struct Float32 {
    using Number = float;
    static float read(float x) { return x; }
    static float write(float x) { return x; }
};
struct Bfloat16 {
    using Number = uint16_t;
    static float read(uint16_t x) {
        const uint32_t bits = uint32_t(x) << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
    static uint16_t write(float x) {  // to the nearest, of two the even one
        uint32_t bits;
        memcpy(&bits, &x, 4);
        return x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
};
struct Float16 {
    using Number = uint16_t;
    static float read(uint16_t x) { return _cvtsh_ss(x); }
    static uint16_t write(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
};

// out = the sum over all ranks of numbers first .. last of the piece, in rank order. This rank's own are in `mine`.
template <class T>
void sum(const Exchange& e, const typename T::Number* mine, long first, long last, typename T::Number* out) {
    float total[BLOCK];
    for (long start = first; start < last; start += BLOCK) {
        const long count = std::min(BLOCK, last - start);
        for (long r = 0; r < e.size; ++r) {
            const auto* from = (r == e.rank ? mine : (const typename T::Number*)e.buffer(r)) + start;
            if (r == 0)
                for (long i = 0; i < count; ++i) total[i] = T::read(from[i]);
            else
                for (long i = 0; i < count; ++i) total[i] += T::read(from[i]);
        }
        for (long i = 0; i < count; ++i) out[start - first + i] = T::write(total[i]);
    }
}

template <class T> Outcome all_reduce(Exchange& e, typename T::Number* x, long count) {
    using Number = typename T::Number;
    const long most = e.buffer_bytes / sizeof(Number);
    for (; count > 0; x += most, count -= most, ++e.pieces) {
        const long piece = std::min(count, most);
        auto* mine = (Number*)e.buffer(e.rank);
        memcpy(mine, x, piece * sizeof(Number));
        arrive(e);
        if (Outcome outcome = await_all(e)) return outcome;
        if (e.size == 2 || piece * long(sizeof(Number)) <= ALONE_BYTES) {
            sum<T>(e, x, 0, piece, x);
            continue;
        }
        // Everyone sums a part; nobody else reads that part of this rank's buffer, so the sum may lie there.
        auto part = [&](long r) { return r * piece / e.size; };
        sum<T>(e, x, part(e.rank), part(e.rank + 1), mine + part(e.rank));
        arrive(e);
        if (Outcome outcome = await_all(e)) return outcome;
        for (long r = 0; r < e.size; ++r)
            memcpy(x + part(r), (const Number*)e.buffer(r) + part(r), (part(r + 1) - part(r)) * sizeof(Number));
    }
    return DONE;
}
}  // namespace

extern "C" {

int manta_all_reduce_float32(Exchange* e, float* x, long count) { return all_reduce<Float32>(*e, x, count); }
int manta_all_reduce_bfloat16(Exchange* e, uint16_t* x, long count) { return all_reduce<Bfloat16>(*e, x, count); }
int manta_all_reduce_float16(Exchange* e, uint16_t* x, long count) { return all_reduce<Float16>(*e, x, count); }

// Of each rank r `rows` stretches of widths[r] bytes, into out: rows of all ranks' stretches side by side.
int manta_all_gather(Exchange* e, const char* x, char* out, long rows, const int64_t* widths) {
    long whole = 0, longest = 0;
    for (long r = 0; r < e->size; ++r) whole += widths[r], longest = std::max(longest, rows * long(widths[r]));
    for (long start = 0; start < longest; start += e->buffer_bytes, ++e->pieces) {
        auto count = [&](long r) { return std::max(0L, std::min(rows * long(widths[r]) - start, long(e->buffer_bytes))); };
        memcpy(e->buffer(e->rank), x + start, count(e->rank));
        arrive(*e);
        long column = 0;
        for (long r = 0; r < e->size; column += widths[r++]) {
            if (r != e->rank)
                if (Outcome outcome = await(*e, r)) return outcome;
            const char* from = r == e->rank ? x + start : e->buffer(r);
            const long width = widths[r];
            for (long at = 0, some; at < count(r); at += some) {
                const long row = (start + at) / width, within = (start + at) % width;
                some = std::min(width - within, count(r) - at);
                memcpy(out + row * whole + column + within, from + at, some);
            }
        }
    }
    return DONE;
}

// sends[r] bytes of x go to rank r, receives[r] bytes of out come from it, both in rank order.
int manta_all_to_all(Exchange* e, const char* x, char* out, const int64_t* sends, const int64_t* receives) {
    const long size = e->size, room = e->buffer_bytes;
    std::vector<int64_t> mine(size + 1);
    for (long r = 0; r < size; ++r) mine[r + 1] = mine[r] + sends[r];
    const long total = mine[size];
    long longest = 1;  // nobody knows yet what the others send: all say it with their first piece
    for (long start = 0; start < longest; start += room, ++e->pieces) {
        if (start < total) memcpy(e->buffer(e->rank), x + start, std::min(room, total - start));
        std::copy(mine.begin(), mine.end(), e->offsets(e->rank));
        arrive(*e);
        char* to = out;
        for (long r = 0; r < size; to += receives[r++]) {
            if (r != e->rank)
                if (Outcome outcome = await(*e, r)) return outcome;
            const int64_t* theirs = e->offsets(r);
            if (theirs[e->rank + 1] - theirs[e->rank] != receives[r]) {
                e->culprit = r;
                return SIZES_DIFFER;
            }
            longest = std::max(longest, long(theirs[size]));
            const long first = std::max(start, long(theirs[e->rank])), last = std::min(start + room, long(theirs[e->rank + 1]));
            if (first < last) memcpy(to + (first - theirs[e->rank]), e->buffer(r) + (first - start), last - first);
        }
    }
    return DONE;
}

// Whoever waits for this rank, or will, learns that it takes no further part.
void manta_leave(Exchange* e) {
    Line& mine = e->line(e->rank);
    mine.left.store(1);
    futex(mine.arrived, FUTEX_WAKE, INT_MAX, nullptr);
}
}
