// Activations rounded to int8, one scale for each 32 of a row: what the products of isa_matmul.cpp read.
//
// Tokens stand in groups. In a group of T, block by block, the four activations that meet one load of weights lie
// together for all its tokens: quants [block][8][T][4]. Scale, sum and start values are [block][T].
#pragma once

#include <cstdint>

#include "dot.h"
#include "scratch.h"
#include "simd.h"
#include "tasks.h"

namespace {

constexpr int64_t kBlock = 32, kTileRows = 16, kTileCols = 64;

struct Activations {
    int64_t n, blocks, group;  // tokens, blocks of a row (padded to whole tiles), tokens of a group (the last has fewer)
    int8_t* quants;
    float* scales;
    float* sums;      // scale * sum of the block's quants: what a minimum is multiplied with
    int32_t* starts;  // where the integer sum begins for weights that lie 8 too high: -8 * sum of the block's quants
    int32_t* starts8; // and for those of dot8

    int64_t groups() const { return ceil_div(n, group); }
    int64_t size(int64_t g) const { return min(group, n - g * group); }
    int64_t offset(int64_t g) const { return g * group * blocks; }  // into scales, sums and starts; quants: times 32
};

// Where a call's activations go: the caller's shared scratch.
IOL_INLINE Activations make_room(int64_t n, int64_t cols, int64_t group) {
    const int64_t blocks = ceil_div(cols, kTileCols) * 2, all = round_up(n * blocks, 16);
    char* at = (char*)iol_scratch(IOL_SCRATCH_SHARED, (size_t)all * (32 + 16));
    return {n, blocks, group, (int8_t*)at, (float*)(at + all * 32), (float*)(at + all * 36), (int32_t*)(at + all * 40),
            (int32_t*)(at + all * 44)};
}

// One block of one token. x has 32 numbers, fewer at the end of a row.
IOL_INLINE void round_block(const float* x, int64_t size, int8_t* quants, int64_t step, float* scale, float* sum,
                            int32_t* start, int32_t* start8) {
    float padded[32];
    if (size < 32) {
        for (int64_t i = 0; i < 32; i++) padded[i] = i < size ? x[i] : 0.0f;
        x = padded;
    }
    vf biggest{};
    for (int i = 0; i < 32; i += W) {
        const vf v = load(x + i);
        biggest = max(biggest, v < 0.0f ? -v : v);
    }
    const float most = largest(biggest);
    const bool zero = most < 0x1p-120f;  // 127 / most would be infinite, or nearly
    const float inverse = zero ? 0.0f : 127.0f / most, d = zero ? 0.0f : most / 127.0f;
    const vf magic = all(12582912.0f);  // rounds to an integer, half to even, left in the low bits
    vi count{};
    int32_t rounded[32];
    for (int i = 0; i < 32; i += W) {
        const vi q = (vi)(load(x + i) * inverse + magic) - (vi)magic;
        count += q;
        __builtin_memcpy(rounded + i, &q, sizeof q);
    }
    for (int quad = 0; quad < 8; quad++) {
        int8_t* out = quants + quad * step;
        for (int j = 0; j < 4; j++) out[j] = (int8_t)rounded[4 * quad + j];
    }
    int32_t sum_of_quants = 0;
    for (int i = 0; i < W; i++) sum_of_quants += count[i];
    *scale = d;
    *start = -8 * sum_of_quants;
    *start8 = kStart8 * sum_of_quants;
    *sum = d * (float)sum_of_quants;
}

IOL_INLINE void round_token(const Activations& a, int64_t token, const float* x, int64_t cols) {
    const int64_t g = token / a.group, t = token % a.group, T = a.size(g), at = a.offset(g);
    for (int64_t block = 0; block < a.blocks; block++) {
        const int64_t begin = block * kBlock, i = at + block * T + t;
        round_block(x + begin, max((int64_t)0, min(kBlock, cols - begin)), a.quants + (at + block * T) * 32 + t * 4,
                    T * 4, a.scales + i, a.sums + i, a.starts + i, a.starts8 + i);
    }
}

IOL_INLINE void round_all(iol_pool* pool, const Activations& a, const float* x, int64_t stride, int64_t cols) {
    for_ranges(pool, a.n, 2 * cols, [=](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; token++) round_token(a, token, x + token * stride, cols);
    });
}

}  // namespace
