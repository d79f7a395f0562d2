// The threads that kernels share their work among.
#pragma once

#include <cstdint>

#include "iolite.h"

// What a kernel does with task number `task`, on thread `thread` (0 is the caller).
typedef void (*iol_task)(void* context, int64_t task, int thread);

// Calls work(context, task, thread) for task 0 .. tasks-1 (fewer than 2^31), each once, taken in order by whichever
// thread is free, and returns when all are done. One task, or a pool of one thread: the caller alone, with no
// synchronisation. Calls from several threads wait for each other. Not to be called from within a task.
void iol_parallel(iol_pool* pool, int64_t tasks, iol_task work, void* context);
