// Parallel loops on torch's own OpenMP pool (its library is loaded before this one, so there is only one pool, and its threads spin).
#pragma once
#include <algorithm>
#include <atomic>

// Calls run(task) once for each of 0 .. tasks-1. Scheduling is dynamic, so another process on one of the cores delays the loop little.
template <class Run> static inline void parallel_for(long tasks, int threads, Run run) {
    if (threads <= 1 || tasks <= 1) {
        for (long task = 0; task < tasks; ++task) run(task);
        return;
    }
    std::atomic<long> next{0};
#pragma omp parallel num_threads(threads)
    for (long task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) run(task);
}

// The same for rows, of which a thread takes some neighbours at a time: the counter is touched less often, and memory is read and written in order.
template <class Run> static inline void parallel_for_rows(long rows, int threads, Run run) {
    constexpr long MOST = 16, TASKS_PER_THREAD = 8;
    const long at_once = std::max(1L, std::min(MOST, rows / (TASKS_PER_THREAD * std::max(threads, 1))));
    parallel_for((rows + at_once - 1) / at_once, threads, [&](long block) {
        for (long r = block * at_once; r < std::min(rows, (block + 1) * at_once); ++r) run(r);
    });
}

// parallel_for with run(task, next), where `next` is the task that the same thread will run next (`tasks` or more: none), so it can prefetch for it.
template <class Run> static inline void parallel_for_prefetching(long tasks, int threads, Run run) {
    std::atomic<long> first{0};
    const auto work = [&] {
        for (long task = first.fetch_add(1, std::memory_order_relaxed), next; task < tasks; task = next) {
            next = first.fetch_add(1, std::memory_order_relaxed);
            run(task, next);
        }
    };
    if (threads <= 1 || tasks <= 1) return work();
#pragma omp parallel num_threads(threads)
    work();
}
