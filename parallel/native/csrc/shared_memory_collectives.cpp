// Collectives between the ranks of one host through a shared memory mapping.
//
// Every rank has a line of state and two buffers. A message is sent in pieces: a rank copies its piece into a buffer, increments its
// `arrived` counter, waits for the others' counters and reads their buffers. Pieces alternate between the two buffers, and a rank
// increments its counter for a piece only after it has read the piece before; so no buffer is overwritten before everyone has read it.
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
constexpr int YIELDS = 50;         // after spinning, before sleeping: lets other threads have this core
constexpr long SLICE_NS = 20'000'000;  // of a sleep; between slices the waiter checks whether the peer is alive
constexpr long ALONE_BYTES = 16384;    // up to this size, each of three or more ranks sums the whole piece itself
constexpr long BLOCK = 1024;

enum Outcome : int { DONE = 0, PEER_LEFT = 1, PEER_DIED = 2, PEER_LATE = 3, SIZES_DIFFER = 4 };

struct alignas(128) Line {
    std::atomic<uint32_t> arrived, num_waiters, left;
};

struct SharedMemoryCollectives {  // same layout as in parallel/native/shared_memory_collectives.py
    char* memory;
    const int32_t* pidfds;  // of each rank's process; -1: none
    int64_t rank, size, buffer_bytes;
    double timeout_s;
    int64_t arrived, pieces, spins, failed_rank;

    Line& line(long r) const { return ((Line*)memory)[r]; }
    int64_t* offsets(long r) const {  // size + 1 numbers per buffer: where each receiver's part of the rank's message begins
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

void signal_arrival(SharedMemoryCollectives& e) {
    Line& mine = e.line(e.rank);
    mine.arrived.store(uint32_t(++e.arrived), std::memory_order_seq_cst);
    if (mine.num_waiters.load(std::memory_order_seq_cst)) futex(mine.arrived, FUTEX_WAKE, INT_MAX, nullptr);
}

bool has_arrived(const SharedMemoryCollectives& e, long peer) {  // counts wrap around
    return int32_t(e.line(peer).arrived.load(std::memory_order_acquire) - uint32_t(e.arrived)) >= 0;
}

bool has_died(const SharedMemoryCollectives& e, long peer) {
    pollfd end{e.pidfds[peer], POLLIN, 0};
    return end.fd >= 0 && poll(&end, 1, 0) == 1;
}

Outcome block_until_arrived(SharedMemoryCollectives& e, long peer) {
    Line& line = e.line(peer);
    const double deadline = now_s() + e.timeout_s;
    for (;;) {
        const uint32_t seen = line.arrived.load(std::memory_order_seq_cst);
        if (has_arrived(e, peer)) return DONE;
        if (line.left.load()) return PEER_LEFT;
        line.num_waiters.fetch_add(1, std::memory_order_seq_cst);
        const timespec slice{0, SLICE_NS};
        futex(line.arrived, FUTEX_WAIT, seen, &slice);  // returns at once where the count has changed
        line.num_waiters.fetch_sub(1, std::memory_order_seq_cst);
        const Outcome outcome = has_died(e, peer) ? PEER_DIED : now_s() > deadline ? PEER_LATE : DONE;
        if (outcome && !has_arrived(e, peer)) return outcome;
    }
}

Outcome await(SharedMemoryCollectives& e, long peer) {
    for (long i = 0; i < e.spins; ++i) {
        if (has_arrived(e, peer)) return DONE;
        _mm_pause();
    }
    for (int i = 0; i < YIELDS; ++i) {
        if (has_arrived(e, peer)) return DONE;
        sched_yield();
    }
    const Outcome outcome = block_until_arrived(e, peer);
    if (outcome) e.failed_rank = peer;
    return outcome;
}

Outcome await_all(SharedMemoryCollectives& e) {
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
    static uint16_t write(float x) {  // round to nearest even
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

// out = the sum over all ranks, in rank order, of elements first .. last of the piece. This rank's own are in `mine`.
template <class T>
void sum(const SharedMemoryCollectives& e, const typename T::Number* mine, long first, long last, typename T::Number* out) {
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

template <class T> Outcome all_reduce(SharedMemoryCollectives& e, typename T::Number* x, long count) {
    using Number = typename T::Number;
    const long most = e.buffer_bytes / sizeof(Number);
    for (; count > 0; x += most, count -= most, ++e.pieces) {
        const long piece = std::min(count, most);
        auto* mine = (Number*)e.buffer(e.rank);
        memcpy(mine, x, piece * sizeof(Number));
        signal_arrival(e);
        if (Outcome outcome = await_all(e)) return outcome;
        if (e.size == 2 || piece * long(sizeof(Number)) <= ALONE_BYTES) {
            sum<T>(e, x, 0, piece, x);
            continue;
        }
        // Each rank sums one part. No other rank reads that part of this rank's buffer, so the sum can be stored there.
        auto part = [&](long r) { return r * piece / e.size; };
        sum<T>(e, x, part(e.rank), part(e.rank + 1), mine + part(e.rank));
        signal_arrival(e);
        if (Outcome outcome = await_all(e)) return outcome;
        for (long r = 0; r < e.size; ++r)
            memcpy(x + part(r), (const Number*)e.buffer(r) + part(r), (part(r + 1) - part(r)) * sizeof(Number));
    }
    return DONE;
}
}  // namespace

extern "C" {

int manta_all_reduce_float32(SharedMemoryCollectives* e, float* x, long count) { return all_reduce<Float32>(*e, x, count); }
int manta_all_reduce_bfloat16(SharedMemoryCollectives* e, uint16_t* x, long count) { return all_reduce<Bfloat16>(*e, x, count); }
int manta_all_reduce_float16(SharedMemoryCollectives* e, uint16_t* x, long count) { return all_reduce<Float16>(*e, x, count); }

// Each rank r contributes `rows` rows of widths[r] bytes; a row of `out` is all ranks' rows side by side.
int manta_all_gather(SharedMemoryCollectives* e, const char* x, char* out, long rows, const int64_t* widths) {
    long whole = 0, longest = 0;
    for (long r = 0; r < e->size; ++r) whole += widths[r], longest = std::max(longest, rows * long(widths[r]));
    for (long start = 0; start < longest; start += e->buffer_bytes, ++e->pieces) {
        auto count = [&](long r) { return std::max(0L, std::min(rows * long(widths[r]) - start, long(e->buffer_bytes))); };
        memcpy(e->buffer(e->rank), x + start, count(e->rank));
        signal_arrival(*e);
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

// Sends sends[r] bytes of x to rank r and receives receives[r] bytes of out from it, both in rank order.
int manta_all_to_all(SharedMemoryCollectives* e, const char* x, char* out, const int64_t* sends, const int64_t* receives) {
    const long size = e->size, room = e->buffer_bytes;
    std::vector<int64_t> mine(size + 1);
    for (long r = 0; r < size; ++r) mine[r + 1] = mine[r] + sends[r];
    const long total = mine[size];
    long longest = 1;  // not known yet: each rank announces its sizes with its first piece
    for (long start = 0; start < longest; start += room, ++e->pieces) {
        if (start < total) memcpy(e->buffer(e->rank), x + start, std::min(room, total - start));
        std::copy(mine.begin(), mine.end(), e->offsets(e->rank));
        signal_arrival(*e);
        char* to = out;
        for (long r = 0; r < size; to += receives[r++]) {
            if (r != e->rank)
                if (Outcome outcome = await(*e, r)) return outcome;
            const int64_t* theirs = e->offsets(r);
            if (theirs[e->rank + 1] - theirs[e->rank] != receives[r]) {
                e->failed_rank = r;
                return SIZES_DIFFER;
            }
            longest = std::max(longest, long(theirs[size]));
            const long first = std::max(start, long(theirs[e->rank])), last = std::min(start + room, long(theirs[e->rank + 1]));
            if (first < last) memcpy(to + (first - theirs[e->rank]), e->buffer(r) + (first - start), last - first);
        }
    }
    return DONE;
}

// Marks this rank as gone: peers that wait for it, now or later, get PEER_LEFT.
void manta_leave(SharedMemoryCollectives* e) {
    Line& mine = e->line(e->rank);
    mine.left.store(1);
    futex(mine.arrived, FUTEX_WAKE, INT_MAX, nullptr);
}
}
