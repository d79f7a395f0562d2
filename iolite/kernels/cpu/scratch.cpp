#include "scratch.h"

#include <cstdio>
#include <cstdlib>

namespace {

struct Buffers {
    void* data[IOL_SCRATCH_USES] = {};
    size_t size[IOL_SCRATCH_USES] = {};

    ~Buffers() {
        for (void* block : data) std::free(block);
    }
};

thread_local Buffers buffers;

}  // namespace

void* iol_scratch(iol_scratch_use use, size_t bytes) {
    void*& data = buffers.data[use];
    size_t& size = buffers.size[use];
    if (bytes <= size) return data;
    std::free(data);
    size = (bytes + 4095) / 4096 * 4096;  // also what aligned_alloc asks for: a multiple of the alignment
    data = std::aligned_alloc(64, size);
    if (!data) {
        std::fprintf(stderr, "iolite: no memory for %zu bytes of intermediate results\n", size);
        std::abort();
    }
    return data;
}
