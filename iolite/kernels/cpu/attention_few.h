// Attention for a few rows, where reading the cache is what takes time: one new token, or some, of a sliding layer.
// Keys and values are read where they lie, bfloat16 widened in registers, the lanes along the head; D is a multiple of
// 64. All is asked for ahead: a block's values while its scores are computed, the next block's keys after that.
#pragma once

#include "attention_parts.h"

namespace {

constexpr int64_t kFewRows = 3 * W / 4 > 4 ? 3 * W / 4 : 4;  // with more, lanes along the rows waste less

// scores[i][j] = q[i] · k[j] for MR rows and MK keys; `keys` of them exist. `ahead` is the distance to the values.
template <int MR, int MK, class T>
void few_scores(const float* const* q, const T* k, int64_t k_row, int64_t keys, int64_t D, ptrdiff_t ahead,
                float* scores) {
    constexpr int64_t kLine = 64 / sizeof(T);
    const T* key[MK];
    for (int j = 0; j < MK; j++) key[j] = k + min(j, keys - 1) * k_row;
    vf acc[MR * MK] = {};
    for (int64_t line = 0; line < D; line += kLine) {
        for (int j = 0; j < MK; j++) __builtin_prefetch((const char*)(key[j] + line) + ahead, 0, 2);
        for (int64_t d = line; d < line + kLine; d += W) {
            vf x[MR];
            for (int i = 0; i < MR; i++) x[i] = load(q[i] + d);
#pragma GCC unroll 16
            for (int j = 0; j < MK; j++) {
                const vf y = load(key[j] + d);
#pragma GCC unroll 4
                for (int i = 0; i < MR; i++) acc[i * MK + j] += x[i] * y;
            }
        }
    }
    float flat[MR * MK];
    if constexpr (MR * MK % W == 0) {
        for (int j = 0; j < MR * MK; j += W) store(flat + j, sums(acc + j));
    } else {
        for (int j = 0; j < MR * MK; j++) flat[j] = sum(acc[j]);
    }
    for (int i = 0; i < MR; i++) __builtin_memcpy(scores + i * kKeys, flat + i * MK, sizeof(float) * MK);
}

// mean[i] = mean[i] * carry[i] + weights[i] · v for MR rows. `ahead` is the distance to the next block's keys.
template <int MR, class T>
void few_means(const float* weights, const T* v, int64_t v_row, int64_t keys, int64_t D, ptrdiff_t ahead,
               const float* carry, float* mean, int64_t stride) {
    constexpr int NV = 4;
    for (int64_t d = 0; d < D; d += NV * W) {
        vf acc[MR][NV];
        for (int i = 0; i < MR; i++) {
            for (int j = 0; j < NV; j++) acc[i][j] = load(mean + i * stride + d + j * W) * carry[i];
        }
        const T* value = v + d;
        for (int64_t key = 0; key < keys; key++, value += v_row) {
            for (size_t byte = 0; byte < NV * W * sizeof(T); byte += 64) {
                __builtin_prefetch((const char*)value + ahead + byte, 0, 2);
            }
            vf y[NV];
            for (int j = 0; j < NV; j++) y[j] = load(value + j * W);
#pragma GCC unroll 4
            for (int i = 0; i < MR; i++) {
                const vf p = all(weights[i * kKeys + key]);
                for (int j = 0; j < NV; j++) acc[i][j] += p * y[j];
            }
        }
        for (int i = 0; i < MR; i++) {
            for (int j = 0; j < NV; j++) store(mean + i * stride + d + j * W, acc[i][j]);
        }
    }
}

// f(Number<rows>, first row) for groups of 4, 2 and 1 rows.
template <class F>
IOL_INLINE void in_groups(int64_t rows, const F& f) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) f(Number<4>{}, r);
    if (r + 2 <= rows) f(Number<2>{}, r), r += 2;
    if (r < rows) f(Number<1>{}, r);
}

inline void few_mask(const iol_attention_args& a, const Looks& looks, int64_t rows, int64_t key, int64_t n,
                     float* scores) {
    for (int64_t j = 0; j < n; j++) {
        const int64_t s = key + j, block = key_block(a, s);
        for (int64_t r = 0; r < rows; r++) {
            const bool seen = s >= looks.from[r] && (s < looks.causal[r] || looks.block[r] == block);
            if (!seen) scores[r * kKeys + j] = kNone;
        }
    }
}

// Scores or weights [rows] of n keys, each times its key's scale.
inline void few_scale(const float* scales, int64_t stride, int64_t rows, int64_t n, float* scores) {
    for (int64_t j = 0; j < n; j++) {
        for (int64_t r = 0; r < rows; r++) scores[r * kKeys + j] *= scales[j * stride];
    }
}

// Scores of n keys to weights e^(score - most), in place.
inline void few_softmax(const Sums& sums, int64_t rows, int64_t n, float* scores, float* carry) {
    const int64_t padded = round_up(n, W);
    for (int64_t r = 0; r < rows; r++, scores += kKeys) {
        for (int64_t j = n; j < padded; j++) scores[j] = kNone;
        vf top = all(sums.most[r]);
        for (int64_t j = 0; j < padded; j += W) top = max(load(scores + j), top);
        const float most = largest(top), base = most == kNone ? 0.0f : most;  // no key yet: e^(kNone - 0) = 0
        vf mass{};
        for (int64_t j = 0; j < padded; j += W) {
            const vf p = exp(load(scores + j) - base);
            store(scores + j, p);
            mass += p;
        }
        carry[r] = exp(sums.most[r] - base);
        sums.mass[r] = sums.mass[r] * carry[r] + sum(mass);
        sums.most[r] = most;
    }
}

template <class T>
void attend_few(const Task<T>& t, const Looks& looks) {
    const iol_attention_args& a = *t.args;
    constexpr int kKeysAtOnce[5] = {0, 8, 8, 0, 4};  // by rows: 8 to 16 sums at a time
    alignas(64) float scores[kFewRows * kKeys], carry[kFewRows];
    const float* q[kFewRows];
    for (int64_t r = 0; r < t.rows; r++) q[r] = t.query(r);
    clear(t.sums, t.rows);
    KeyBlock<T> at = block_at(t, t.key_begin);
    while (at.n > 0) {
        const KeyBlock<T> next = block_at(t, at.key + at.n);
        const ptrdiff_t values = a.k_row == a.v_row ? (const char*)at.v - (const char*)at.k : 0;
        const ptrdiff_t keys = a.k_row == a.v_row && next.n > 0 ? (const char*)next.k - (const char*)at.v : 0;
        in_groups(t.rows, [&](auto rows, int64_t r) {
            constexpr int MK = kManyRegisters || rows.value == 1 ? kKeysAtOnce[rows.value] : 8 / rows.value;
            for (int64_t j = 0; j < at.n; j += MK) {
                few_scores<rows.value, MK>(q + r, at.k + j * a.k_row, a.k_row, at.n - j, a.D, r ? 0 : values,
                                           scores + r * kKeys + j);
            }
        });
        if (a.k_scale) few_scale(a.k_scale + at.scales, a.scale_row, t.rows, at.n, scores);
        if (at.key < looks.inner_begin || at.key + at.n > looks.inner_end) {
            few_mask(a, looks, t.rows, at.key, at.n, scores);
        }
        few_softmax(t.sums, t.rows, at.n, scores, carry);
        if (a.v_scale) few_scale(a.v_scale + at.scales, a.scale_row, t.rows, at.n, scores);
        in_groups(t.rows, [&](auto rows, int64_t r) {
            few_means<rows.value>(scores + r * kKeys, at.v, a.v_row, at.n, a.D, r ? 0 : keys, carry + r,
                                  t.sums.mean + r * t.sums.stride, t.sums.stride);
        });
        at = next;
    }
}

}  // namespace
