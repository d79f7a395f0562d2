// The two halves of a decoder block around attention, so that a token is drawn by a hundred calls and not by six hundred:
// what Python does between two kernels is time in which nothing is read from memory.
#include "kernels.h"
#include "scratch.h"

namespace iol {
namespace IOL_ISA {

void block_begin(iol_pool* pool, const iol_block* block, const float* x, int64_t n, const float* cos, const float* sin,
                 float* q, float* k, float* v) {
    const iol_block& b = *block;
    const int64_t D = b.head_dim, q_rows = b.qkv[0].rows, kv_rows = b.qkv[1].rows, width = q_rows + 2 * kv_rows;
    float* normed = (float*)iol_scratch(IOL_SCRATCH_BLOCK, (size_t)(n * (b.size + width)) * sizeof(float));
    float* raw = normed + n * b.size;  // [n, width]: queries, keys, values side by side
    float* const out[3] = {raw, raw + q_rows, raw + q_rows + kv_rows};
    const int64_t strides[3] = {width, width, width};
    rms_norm(pool, x, b.input_norm, b.eps, n, b.size, normed);
    linear(pool, normed, b.size, n, b.projections, b.qkv, out, strides);
    norm_rope(pool, out[b.projections - 1], width, nullptr, b.eps, nullptr, nullptr, n, kv_rows / D, D, v);
    norm_rope(pool, out[0], width, b.q_norm, b.eps, cos, sin, n, q_rows / D, D, q);
    norm_rope(pool, out[1], width, b.k_norm, b.eps, cos, sin, n, kv_rows / D, D, k);
}

void block_end(iol_pool* pool, const iol_block* block, const float* x, const float* attended, int64_t n, float* out) {
    const iol_block& b = *block;
    const int64_t size = b.size, wide = b.gate.rows;
    float* h = (float*)iol_scratch(IOL_SCRATCH_BLOCK, (size_t)(n * (2 * size + wide)) * sizeof(float));
    float *middle = h + n * size, *hidden = middle + n * size;
    linear(pool, attended, b.o.cols, n, 1, &b.o, &h, &size);
    add_rms_norm(pool, x, h, b.post_attention_norm, b.eps, 1.0f, n, size, middle);
    rms_norm(pool, middle, b.pre_feedforward_norm, b.eps, n, size, h);
    gated(pool, h, size, n, &b.gate, &b.up, hidden, wide);
    linear(pool, hidden, wide, n, 1, &b.down, &h, &size);
    add_rms_norm(pool, middle, h, b.post_feedforward_norm, b.eps, *b.scalar, n, size, out);
}

}  // namespace IOL_ISA
}  // namespace iol
