// Sharing a long run of units so that every thread reads one unbroken stretch of memory.
#pragma once

#include "pool.h"
#include "simd.h"

namespace {

constexpr int64_t kMostThreads = 256;

// A thread's stretch: what it takes next, and its end. A cache line of its own.
struct alignas(64) Stretch {
    int64_t next, end;
};

// f(begin, end) for ranges of at most `chunk` units that make up 0..units. Each thread has a stretch of its own and
// goes through it in order; done with that, it helps with the others', so a slow core does not hold up the rest.
template <class F>
void share(iol_pool* pool, int64_t units, int64_t chunk, const F& f) {
    Stretch stretches[kMostThreads];
    const int64_t count = min(min(iol_pool_threads(pool), kMostThreads), ceil_div(units, chunk));
    for (int64_t i = 0; i < count; i++) stretches[i] = {units * i / count, units * (i + 1) / count};
    struct Job {
        Stretch* stretches;
        int64_t count, chunk;
        const F* f;
    } job{stretches, count, chunk, &f};
    const iol_task work = [](void* context, int64_t task, int) {
        const Job& job = *(const Job*)context;
        for (int64_t i = 0; i < job.count; i++) {
            Stretch& s = job.stretches[(task + i) % job.count];
            for (;;) {
                const int64_t begin = __atomic_fetch_add(&s.next, job.chunk, __ATOMIC_RELAXED);
                if (begin >= s.end) break;
                (*job.f)(begin, min(begin + job.chunk, s.end));
            }
        }
    };
    iol_parallel(pool, count, work, &job);
}

}  // namespace
