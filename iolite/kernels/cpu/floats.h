// Products with float weights that lie as torch keeps them: rows of `cols` numbers, one after the other.
//
// A product is summed in W lanes along its columns and then across the lanes, whatever else is computed with it: a
// token's numbers do not depend on the others of its pass.
#pragma once

#include "share.h"

namespace {

constexpr int32_t kFloat = 32;  // iol_matrix::format
constexpr int64_t kFloatRows = 16;              // of a unit of work
constexpr int kSums = kManyRegisters ? 16 : 8;  // products of a row and a token at a time: their sums fill registers
constexpr int64_t kFloatAhead = 32 << 10;       // bytes: what is fetched ahead still stays in the first-level cache

// What a thread claims at a time, some 30 µs: of weights in the last-level cache, and of multiply-adds. Products that are
// less are the caller's alone, and the other cores are left to who else wants them.
constexpr int64_t kFloatChunkBytes = 1 << 20, kFloatChunkProducts = 1 << 21;

// R rows times T tokens: out[t * out_stride + r].
template <int R, int T>
IOL_INLINE void dots(const float* w, int64_t cols, const float* x, int64_t x_stride, float* out, int64_t out_stride) {
    const int64_t next = R * cols * (int64_t)sizeof(float), ahead = next <= kFloatAhead ? R * cols : 16 * W;
    vf total[R * T] = {};
    int64_t i = 0;
    for (; i + W <= cols; i += W) {
        vf tokens[T];
        IOL_UNROLL for (int t = 0; t < T; t++) tokens[t] = load(x + t * x_stride + i);
        IOL_UNROLL for (int r = 0; r < R; r++) {
            const float* const at = w + r * cols + i;
            __builtin_prefetch(at + ahead, 0, 3);
            const vf weights = load(at);
            IOL_UNROLL for (int t = 0; t < T; t++) total[t * R + r] += weights * tokens[t];
        }
    }
    if (i < cols) {
        IOL_UNROLL for (int t = 0; t < T; t++) {
            const vf token = load_first(x + t * x_stride + i, cols - i);
            IOL_UNROLL for (int r = 0; r < R; r++) total[t * R + r] += load_first(w + r * cols + i, cols - i) * token;
        }
    }
    if constexpr (R * T % W == 0) {  // the same sums, W at a time
        float found[R * T];
        IOL_UNROLL for (int k = 0; k < R * T; k += W) store(found + k, sums(total + k));
        IOL_UNROLL for (int t = 0; t < T; t++) __builtin_memcpy(out + t * out_stride, found + t * R, sizeof(float) * R);
    } else {
        for (int t = 0; t < T; t++) {
            for (int r = 0; r < R; r++) out[t * out_stride + r] = sum(total[t * R + r]);
        }
    }
}

template <int T>
void rows_times(const float* w, int64_t rows, int64_t cols, const float* x, int64_t x_stride, float* out,
                int64_t out_stride) {
    constexpr int R = kSums / T;
    int64_t r = 0;
    for (; r + R <= rows; r += R) dots<R, T>(w + r * cols, cols, x, x_stride, out + r, out_stride);
    for (; r < rows; r++) dots<1, T>(w + r * cols, cols, x, x_stride, out + r, out_stride);
}

// Rows [first, last) of a matrix times n tokens.
void float_rows(const iol_matrix& m, int64_t first, int64_t last, const float* x, int64_t x_stride, int64_t n,
                float* out, int64_t out_stride) {
    const float* const w = (const float*)m.data + first * m.cols;
    const int64_t rows = last - first;
    out += first;
    int64_t t = 0;
    for (; t + 4 <= n; t += 4) {
        rows_times<4>(w, rows, m.cols, x + t * x_stride, x_stride, out + t * out_stride, out_stride);
    }
    for (; t + 2 <= n; t += 2) {
        rows_times<2>(w, rows, m.cols, x + t * x_stride, x_stride, out + t * out_stride, out_stride);
    }
    if (t < n) rows_times<1>(w, rows, m.cols, x + t * x_stride, x_stride, out + t * out_stride, out_stride);
}

// As iol_linear.
void float_linear(iol_pool* pool, const float* x, int64_t x_stride, int64_t n, int64_t count, const iol_matrix* w,
                  float* const* out, const int64_t* out_stride) {
    const int64_t unit = kFloatRows * w[0].cols;
    int64_t units = 0;
    for (int64_t i = 0; i < count; i++) units += ceil_div(w[i].rows, kFloatRows);
    const int64_t chunk = min(kFloatChunkBytes / (unit * (int64_t)sizeof(float)), kFloatChunkProducts / (unit * n));
    share(pool, units, max((int64_t)1, chunk), [&](int64_t begin, int64_t end) {
        int64_t i = 0;
        for (int64_t at = begin, before = 0; at < end; at++) {
            // Units are counted through all matrices.
            for (int64_t own; at >= before + (own = ceil_div(w[i].rows, kFloatRows)); i++) before += own;
            const int64_t first = (at - before) * kFloatRows, last = min(first + kFloatRows, w[i].rows);
            float_rows(w[i], first, last, x, x_stride, n, out[i], out_stride[i]);
        }
    });
}

}  // namespace
