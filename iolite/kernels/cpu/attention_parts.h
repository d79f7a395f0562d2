// What both ways of computing attention share: a task, which keys its rows may look at, and the sums that it keeps.
//
// The query heads of one key-value head stand together: row r of key-value head k is query r / G, head k G + r % G,
// where G = H / K. A task takes some rows of one key-value head over a range of keys, block by block, and keeps for
// each row the largest score so far (`most`), the sum of e^(score - most) (`mass`) and the same sum weighted with the
// values (`mean`, not yet divided by mass). A key block with a larger score scales the sums down (`carry`).
#pragma once

#include "iolite.h"
#include "simd.h"

namespace {

constexpr int64_t kRows = 96;  // of a task: 2 panels of 3 vectors with AVX-512; divides by 6, the rows of a product
constexpr int64_t kKeys = 64;  // keys of a block
constexpr float kNone = -__builtin_inff();

// For each row the keys from..causal, and those after it of the same two-way block.
struct Looks {
    alignas(64) int32_t from[kRows], causal[kRows], block[kRows];
    int64_t begin, end;                // no row looks outside
    int64_t inner_begin, inner_end;    // all rows look at all of these
};

// A number that a kernel is compiled for, handed to a lambda.
template <int N>
struct Number {
    static constexpr int value = N;
};

struct Sums {
    float* mean;  // [rows, stride]
    float* most;  // [rows]
    float* mass;  // [rows]
    int64_t stride;
};

template <class T>
struct Task {
    const iol_attention_args* args;
    int64_t head;              // key-value head
    int64_t row, rows;         // first and number
    int64_t key_begin, key_end;
    Sums sums;

    int64_t group() const { return args->H / args->K; }
    const float* query(int64_t r) const {
        const int64_t at = row + r, G = group();
        return args->q + (at / G * args->H + head * G + at % G) * args->D;
    }
};

// One past the last key of query i's two-way block, or `causal` where it ends no later.
inline int64_t block_end(const iol_attention_args& a, int64_t i, int64_t causal) {
    for (int64_t j = a.N - 1; j > i; j--) {
        if (a.blocks[j] == a.blocks[i]) return max(causal, min(a.keys, a.past + j + 1));
    }
    return causal;
}

inline void find_looks(const iol_attention_args& a, int64_t row, int64_t rows, Looks& looks) {
    const int64_t G = a.H / a.K;
    looks.begin = looks.inner_end = a.keys;
    looks.end = looks.inner_begin = 0;
    int64_t end = 0;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t i = (row + r) / G;
        const bool same = r > 0 && i == (row + r - 1) / G;
        const int64_t from = a.window ? max(0, a.past + i - a.window + 1) : 0;
        const int64_t causal = max(0, min(a.keys, a.past + i + 1));
        const bool block = a.window && a.blocks && a.blocks[i] > 0;
        if (!same) end = block ? block_end(a, i, causal) : causal;
        looks.from[r] = (int32_t)from;
        looks.causal[r] = (int32_t)causal;
        looks.block[r] = block ? (int32_t)a.blocks[i] : -1;
        looks.begin = min(looks.begin, from);
        looks.end = max(looks.end, end);
        looks.inner_begin = max(looks.inner_begin, from);
        looks.inner_end = min(looks.inner_end, causal);
    }
    for (int64_t r = rows; r < kRows; r++) looks.from[r] = looks.causal[r] = looks.block[r] = -1;
}

// The two-way block of a key: 0 for none, which no row has.
inline int32_t key_block(const iol_attention_args& a, int64_t key) {
    const int64_t j = key - a.past;
    return a.window && a.blocks && j >= 0 && j < a.N && a.blocks[j] > 0 ? (int32_t)a.blocks[j] : 0;
}

// A run of keys that lie one after another in the cache.
template <class T>
struct KeyBlock {
    const T *k, *v;
    int64_t key, n;
    int64_t scales;  // of the first key among all scales
};

template <class T>
inline KeyBlock<T> block_at(const Task<T>& t, int64_t key) {
    const iol_attention_args& a = *t.args;
    if (key >= t.key_end) return {nullptr, nullptr, key, 0, 0};
    const int64_t row = (a.first + key) % a.room;
    return {(const T*)a.k + row * a.k_row + t.head * a.k_head, (const T*)a.v + row * a.v_row + t.head * a.v_head, key,
            min(min(kKeys, t.key_end - key), a.room - row), row * a.scale_row + t.head * a.scale_head};
}

inline void clear(const Sums& sums, int64_t rows) {
    __builtin_memset(sums.mean, 0, sizeof(float) * (size_t)(rows * sums.stride));
    for (int64_t r = 0; r < rows; r++) sums.most[r] = kNone, sums.mass[r] = 0;
}

}  // namespace
