// Memory for a kernel's intermediate results: kept for each thread from call to call, grown when a call wants more.
#pragma once

#include <cstddef>

enum iol_scratch_use {
    IOL_SCRATCH_TASK,    // of the task that a thread is at
    IOL_SCRATCH_SHARED,  // of a call as a whole: asked for by the caller, read and written by all threads
    IOL_SCRATCH_GATED,   // of a gated pair: the second matrix's products
    IOL_SCRATCH_BLOCK,   // of a decoder block between the kernels that it calls
    IOL_SCRATCH_STACK,   // of all decoder blocks: what is on its way into a cache, and attention's output
    IOL_SCRATCH_USES
};

// At least `bytes` bytes at a multiple of 64, with nothing in particular in them, valid until this thread asks again
// for the same use. Ends the process with a message when there is no memory: nothing sensible could follow.
void* iol_scratch(iol_scratch_use use, size_t bytes);
