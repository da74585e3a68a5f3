// Work for the threads of torch's own OpenMP pool (its library is loaded before this one, so there is one pool, and it spins).
#pragma once
#include <atomic>

// Calls run(task) for 0 .. tasks-1, each once. Whoever is free takes the next: another process on a core then delays little.
template <class Run> static inline void share_out(long tasks, int threads, Run run) {
    if (threads <= 1 || tasks <= 1) {
        for (long task = 0; task < tasks; ++task) run(task);
        return;
    }
    std::atomic<long> next{0};
#pragma omp parallel num_threads(threads)
    for (long task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) run(task);
}

// The same, run(task, next) where whoever computes a task knows which one is its next (`tasks` or more: none), and can have it come near.
template <class Run> static inline void share_out_ahead(long tasks, int threads, Run run) {
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
