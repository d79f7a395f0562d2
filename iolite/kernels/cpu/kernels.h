// The table of kernels that is made once for every instruction set, and the choice among the tables.
//
// Files named isa_*.cpp are compiled for each set, with IOL_ISA as its name and the compiler's flags for it; they put
// their kernels into namespace iol::IOL_ISA. A new kernel takes a line in IOL_ENTRIES, a declaration in iolite.h and
// its code; the table, its filling (isa_table.cpp) and the C function iol_NAME (dispatch.cpp) follow from the line.
#pragma once

#include "iolite.h"

// X(name, parameters, arguments)
#define IOL_ENTRIES(X)                                                                                             \
    X(linear,                                                                                                      \
      (iol_pool * pool, const float* x, int64_t x_stride, int64_t n, int64_t count, const iol_matrix* w,           \
       float* const* out, const int64_t* out_stride),                                                              \
      (pool, x, x_stride, n, count, w, out, out_stride))                                                           \
    X(gated,                                                                                                       \
      (iol_pool * pool, const float* x, int64_t x_stride, int64_t n, const iol_matrix* gate, const iol_matrix* up, \
       float* out, int64_t out_stride),                                                                            \
      (pool, x, x_stride, n, gate, up, out, out_stride))                                                           \
    X(embed, (iol_pool * pool, const iol_matrix* w, const int64_t* ids, int64_t n, float scale, float* out),       \
      (pool, w, ids, n, scale, out))                                                                               \
    X(rms_norm, (iol_pool * pool, const float* x, const float* w, float eps, int64_t n, int64_t size, float* out), \
      (pool, x, w, eps, n, size, out))                                                                             \
    X(add_rms_norm,                                                                                                \
      (iol_pool * pool, const float* residual, const float* x, const float* w, float eps, float scale, int64_t n,  \
       int64_t size, float* out),                                                                                  \
      (pool, residual, x, w, eps, scale, n, size, out))                                                            \
    X(norm_rope,                                                                                                   \
      (iol_pool * pool, const float* x, int64_t x_stride, const float* w, float eps, const float* cos,             \
       const float* sin, int64_t n, int64_t heads, int64_t D, float* out),                                         \
      (pool, x, x_stride, w, eps, cos, sin, n, heads, D, out))                                                     \
    X(geglu, (iol_pool * pool, const float* gate, const float* up, int64_t count, float* out),                     \
      (pool, gate, up, count, out))                                                                                \
    X(softcap, (iol_pool * pool, const float* x, float cap, int64_t count, float* out), (pool, x, cap, count, out)) \
    X(attention, (iol_pool * pool, const iol_attention_args* args), (pool, args))                                  \
    X(block_begin,                                                                                                 \
      (iol_pool * pool, const iol_block* block, const float* x, int64_t n, const float* cos, const float* sin,     \
       float* q, float* k, float* v),                                                                              \
      (pool, block, x, n, cos, sin, q, k, v))                                                                      \
    X(block_end,                                                                                                   \
      (iol_pool * pool, const iol_block* block, const float* x, const float* attended, int64_t n, float* out),     \
      (pool, block, x, attended, n, out))                                                                          \
    X(stack,                                                                                                       \
      (iol_pool * pool, const iol_block* blocks, int64_t layers, const iol_segment* segments, int64_t count,       \
       float* x, const float* const* cos, const float* const* sin),                                                \
      (pool, blocks, layers, segments, count, x, cos, sin))

struct iol_kernels {
    // Reads `bytes` bytes (a multiple of 4096) in one of IOL_READ_WAYS ways; the result depends on all of them.
    uint64_t (*read_memory)(const uint8_t* p, int64_t bytes, int way);
    // `rounds` rounds of int8 dot products in registers. Returns how many multiply-adds that was; their sum is in sink.
    int64_t (*multiply_int8)(int64_t rounds, int32_t* sink);
#define IOL_FIELD(name, parameters, arguments) void(*name) parameters;
    IOL_ENTRIES(IOL_FIELD)
#undef IOL_FIELD
};

constexpr int IOL_READ_WAYS = 3;

// The table in use.
const iol_kernels& iol_active();

#ifdef IOL_ISA
namespace iol {
namespace IOL_ISA {
extern const iol_kernels kernels;
uint64_t read_memory(const uint8_t* p, int64_t bytes, int way);
int64_t multiply_int8(int64_t rounds, int32_t* sink);
#define IOL_DECLARE(name, parameters, arguments) void name parameters;
IOL_ENTRIES(IOL_DECLARE)
#undef IOL_DECLARE
}  // namespace IOL_ISA
}  // namespace iol
#endif
