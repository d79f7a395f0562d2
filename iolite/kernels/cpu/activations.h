// Activations as the products read them: int8 with a scale for each 32 columns, interleaved by token.
//
// Tokens go in groups of about the same size, at most `most`. A group of T tokens is a sequence of blocks, one for each
// 32 columns (as many as the weights have, padded to whole tiles), of 44 * T bytes:
//
//   int8  q[T][32]      x = scale * q
//   float scale[T]
//   int32 sums8[T]      -8 * (sum of the 32 q): what a sum starts with when the weights are nibble - 8
//   float sum[T]        scale * (sum of the 32 q): what a block's minimum is multiplied with
#pragma once

#include "dot.h"
#include "scratch.h"
#include "tasks.h"

namespace {

constexpr int64_t kTokenBytes = kBlock + 12;

template <int T>
struct Tokens {
    int8_t q[T][kBlock];
    float scale[T];
    int32_t sums8[T];
    float sum[T];
};

struct Activations {
    const float* x;
    int64_t stride, n, cols;  // of x [n, cols]
    int64_t blocks;           // of a token, those of padding included
    int64_t groups;
    uint8_t* data;

    int64_t first(int64_t group) const { return group * (n / groups) + min(group, n % groups); }
    int64_t size(int64_t group) const { return n / groups + (group < n % groups); }
    uint8_t* of(int64_t group) const { return data + first(group) * blocks * kTokenBytes; }
};

// The largest magnitude of 32 numbers, NaN if one is NaN: without their sign bits floats are ordered as integers are.
IOL_INLINE float largest_magnitude(const float* x) {
    vi most{};
    IOL_UNROLL for (int i = 0; i < kBlock; i += W) {
        const vi bits = (vi)load(x + i) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    most = across<Largest>(most);
    return ((vf)most)[0];
}

typedef int8_t vb __attribute__((vector_size(W)));

// The 32 numbers at x as token t of T in a block.
IOL_INLINE void quantise_block(const float* x, uint8_t* block, int64_t t, int64_t T) {
    const float most = largest_magnitude(x);
    const bool zero = most < 0x1p-120f;  // 127 / most would not be finite
    const float scale = zero ? 0.0f : most / 127.0f, inverse = zero ? 0.0f : 127.0f / most;
    vi sums{};
    IOL_UNROLL for (int i = 0; i < kBlock; i += W) {
        const vi q = round(load(x + i) * inverse);
        const vb bytes = __builtin_convertvector(q, vb);
        __builtin_memcpy(block + t * kBlock + i, &bytes, sizeof bytes);
        sums += q;
    }
    const int32_t sum = across<Sum>(sums)[0], sums8 = -8 * sum;
    const float scaled = scale * (float)sum;
    uint8_t* numbers = block + T * kBlock + 4 * t;
    __builtin_memcpy(numbers, &scale, 4);
    __builtin_memcpy(numbers + 4 * T, &sums8, 4);
    __builtin_memcpy(numbers + 8 * T, &scaled, 4);
}

// Blocks [begin, end) of every token of a group.
void quantise_group(const Activations& a, int64_t group, int64_t begin, int64_t end) {
    const int64_t T = a.size(group);
    for (int64_t t = 0; t < T; t++) {
        const float* x = a.x + (a.first(group) + t) * a.stride;
        uint8_t* block = a.of(group) + begin * T * kTokenBytes;
        for (int64_t col = begin * kBlock; col < end * kBlock; col += kBlock, block += T * kTokenBytes) {
            if (col + kBlock <= a.cols) {
                quantise_block(x + col, block, t, T);
            } else {
                float padded[kBlock] = {};
                for (int64_t i = col; i < a.cols; i++) padded[i - col] = x[i];
                quantise_block(padded, block, t, T);
            }
        }
    }
}

constexpr int64_t kQuantiseTask = 32768;  // numbers, about 10 µs: less is not worth waking a thread

// All tokens, by the caller alone unless there are many; kept in the caller's shared scratch memory.
Activations quantise(iol_pool* pool, const float* x, int64_t stride, int64_t n, int64_t cols, int64_t most) {
    Activations a{x, stride, n, cols, ceil_div(cols, 2 * kBlock) * 2, ceil_div(n, most), nullptr};
    a.data = (uint8_t*)iol_scratch(IOL_SCRATCH_SHARED, (size_t)(n * a.blocks * kTokenBytes));
    // Pieces of columns, so that a single group is shared too.
    const int64_t pieces = max((int64_t)1, min(a.blocks, n * cols / a.groups / kQuantiseTask));
    const int64_t each = ceil_div(a.blocks, pieces);
    for_tasks(pool, a.groups * pieces, n * cols < 2 * kQuantiseTask, [&](int64_t task) {
        const int64_t begin = task % pieces * each;
        quantise_group(a, task / pieces, begin, min(begin + each, a.blocks));
    });
    return a;
}

}  // namespace
