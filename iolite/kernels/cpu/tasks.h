// Loops over the pool, written as lambdas. Internal linkage, as in simd.h.
#pragma once

#include <cstdint>

#include "iolite.h"
#include "pool.h"

namespace {

// Work for one thread below which sharing it costs more than it gains: about 10 µs of arithmetic on numbers in cache.
constexpr int64_t kTask = 32768;

// f(task) for every task, by all threads of the pool or, when alone, by the caller.
template <class F>
void for_tasks(iol_pool* pool, int64_t tasks, bool alone, const F& f) {
    if (alone || tasks < 2) {
        for (int64_t task = 0; task < tasks; task++) f(task);
        return;
    }
    auto call = [](void* context, int64_t task, int) { (*(const F*)context)(task); };
    iol_parallel(pool, tasks, call, (void*)&f);
}

// f(begin, end) for ranges that make up 0..n; cost is that of one of the n, in floats read and written.
template <class F>
void for_ranges(iol_pool* pool, int64_t n, int64_t cost, const F& f) {
    int64_t tasks = n * cost / kTask;
    tasks = tasks < 1 ? 1 : tasks > n ? n : tasks;
    const int64_t each = (n + tasks - 1) / tasks;
    for_tasks(pool, tasks, false, [&](int64_t task) {
        const int64_t begin = task * each, end = begin + each < n ? begin + each : n;
        if (begin < end) f(begin, end);
    });
}

}  // namespace
