// Attention for many rows, where arithmetic is what takes time: prefill, and decoding with many heads for one key.
//
// A block of keys and values is widened to float32 once, into memory that stays in the second cache, and used by all
// rows of the task. Scores are computed with the lanes along the rows: a broadcast key element times a vector of
// queries. So no key is transposed, maxima and sums of the softmax run down the lanes without crossing them, and the
// weights come out as the value product wants them: the rows of one key side by side, each to be broadcast.
#pragma once

#include "attention_parts.h"

namespace {

constexpr int64_t kDepth = 128;  // of the head at a time: 48 rows of queries are 24 KiB then, and stay in the L1 cache
constexpr int kPanel = 3;        // vectors of rows
constexpr int kValueRows = 6, kValueVectors = kManyRegisters ? 4 : 2;  // 24 or 12 accumulators
constexpr int64_t kStrip = kValueVectors * W;

struct Tile {
    int64_t lanes;   // rows, rounded up to whole vectors
    float* queries;  // by panel of `width` rows: [D][width]
    float* keys;     // [D / kDepth][kKeys][kDepth]
    float* values;   // [D / kStrip][kKeys][kStrip]
    float* scores;   // [kKeys][lanes]
    float* carry;    // [lanes]
};

// Floats of memory that a task wants besides its sums.
inline int64_t tile_floats(int64_t lanes, int64_t D) {
    return lanes * D + kKeys * (round_up(D, kDepth) + round_up(D, kStrip) + lanes) + lanes + 4 * 16;
}

inline Tile tile_in(float* memory, int64_t lanes, int64_t D) {
    Tile t{};
    t.lanes = lanes;
    float** const parts[] = {&t.queries, &t.keys, &t.values, &t.scores, &t.carry};
    const int64_t sizes[] = {lanes * D, kKeys * round_up(D, kDepth), kKeys * round_up(D, kStrip), kKeys * lanes, lanes};
    for (int i = 0; i < 5; i++) {
        *parts[i] = memory;
        memory += round_up(sizes[i], 16);
    }
    return t;
}

// f(Number of vectors, first lane) for the panels of the lanes.
template <class F>
IOL_INLINE void in_panels(int64_t lanes, const F& f) {
    int64_t at = 0;
    for (; at + 3 * W <= lanes; at += 3 * W) f(Number<3>{}, at);
    if (at + 2 * W <= lanes) f(Number<2>{}, at), at += 2 * W;
    if (at < lanes) f(Number<1>{}, at);
}

template <class T>
void pack_queries(const Task<T>& t, const Tile& tile) {
    const int64_t D = t.args->D;
    in_panels(tile.lanes, [&](auto vectors, int64_t first) {
        constexpr int64_t width = vectors.value * W;
        float* out = tile.queries + first * D;
        for (int64_t i = 0; i < width; i++) {
            const float* q = first + i < t.rows ? t.query(first + i) : nullptr;
            for (int64_t d = 0; d < D; d++) out[d * width + i] = q ? q[d] : 0.0f;
        }
    });
}

// out[d] = in[d] for d < n, zeros up to the next multiple of W.
template <class T>
IOL_INLINE void widen(const T* in, int64_t n, float* out) {
    int64_t d = 0;
    for (; d + W <= n; d += W) store(out + d, load(in + d));
    if (d == n) return;
    store(out + d, vf{});
    for (; d < n; d++) out[d] = load_one(in + d);
}

// Cuts n rows [D] into strips: out [D / strip][kKeys][strip]. What lies behind D in the last strip is zero.
template <class T>
void pack_strips(const T* in, int64_t in_row, int64_t n, int64_t D, int64_t strip, float* out) {
    for (int64_t key = 0; key < n; key++, in += in_row) {
        for (int64_t d = 0; d < D; d += strip) {
            float* to = out + (d * kKeys + key * strip);
            const int64_t size = min(strip, D - d);
            widen(in + d, size, to);
            for (int64_t i = round_up(size, W); i < strip; i += W) store(to + i, vf{});
        }
    }
}

// Asks for the next block's rows, some cache lines at a time, between the products of this one.
struct Ahead {
    const char* row[2];
    int64_t stride[2], bytes, keys;
    int64_t which, key, byte;

    int64_t lines() const { return ((2 - which) * keys - key) * ceil_div(bytes, 64); }  // that are left

    void ask(int64_t lines) {
        for (; lines > 0 && which < 2; lines--) {
            __builtin_prefetch(row[which] + byte, 0, 2);
            byte += 64;
            if (byte < bytes) continue;
            byte = 0, row[which] += stride[which], key++;
            if (key == keys) key = 0, which++;
        }
    }
};

template <class T>
Ahead ahead_of(const Task<T>& t, const KeyBlock<T>& next) {
    constexpr int64_t size = sizeof(T);
    const iol_attention_args& a = *t.args;
    Ahead ahead{};
    ahead.row[0] = (const char*)next.k, ahead.row[1] = (const char*)next.v;
    ahead.stride[0] = a.k_row * size, ahead.stride[1] = a.v_row * size;
    ahead.bytes = a.D * size, ahead.keys = next.n;
    ahead.which = next.n > 0 ? 0 : 2;
    // A key and a value that overlap are one stretch of memory.
    const ptrdiff_t apart = ahead.row[0] - ahead.row[1], distance = apart < 0 ? -apart : apart;
    if (next.n > 0 && a.k_row == a.v_row && distance < ahead.bytes) {
        ahead.row[1] = apart < 0 ? ahead.row[0] : ahead.row[1];
        ahead.bytes += distance, ahead.which = 1;
    }
    return ahead;
}

// scores[j][lane] (+)= sum over depth of k[j] q[lane], for MK keys and a panel of NV vectors.
template <int NV, int MK>
void tile_scores(const float* q, const float* k, int64_t depth, bool add, float* scores, int64_t lanes) {
    vf acc[MK][NV];
#pragma GCC unroll 16
    for (int j = 0; j < MK; j++) {
        for (int i = 0; i < NV; i++) acc[j][i] = add ? load(scores + j * lanes + i * W) : vf{};
    }
    for (int64_t d = 0; d < depth; d++, q += NV * W, k++) {
        vf x[NV];
        for (int i = 0; i < NV; i++) x[i] = load(q + i * W);
#pragma GCC unroll 16
        for (int j = 0; j < MK; j++) {
            const vf y = all(k[j * kDepth]);
            for (int i = 0; i < NV; i++) acc[j][i] += x[i] * y;
        }
    }
#pragma GCC unroll 16
    for (int j = 0; j < MK; j++) {
        for (int i = 0; i < NV; i++) store(scores + j * lanes + i * W, acc[j][i]);
    }
}

// mean[i] = mean[i] * carry[i] + sum over keys of weights[key][i] v[key], for MR rows and one strip.
template <int MR>
void tile_means(const float* weights, int64_t lanes, const float* v, int64_t keys, const float* carry, float* mean,
                int64_t stride) {
    constexpr int NV = kValueVectors;
    vf acc[MR][NV];
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
        for (int j = 0; j < NV; j++) acc[i][j] = load(mean + i * stride + j * W) * carry[i];
    }
    for (int64_t key = 0; key < keys; key++, weights += lanes, v += kStrip) {
        vf y[NV];
        for (int j = 0; j < NV; j++) y[j] = load(v + j * W);
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) {
            const vf p = all(weights[i]);
            for (int j = 0; j < NV; j++) acc[i][j] += p * y[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
        for (int j = 0; j < NV; j++) store(mean + i * stride + j * W, acc[i][j]);
    }
}

inline void some_means(int64_t rows, const float* weights, int64_t lanes, const float* v, int64_t keys,
                       const float* carry, float* mean, int64_t stride) {
    using Means = void (*)(const float*, int64_t, const float*, int64_t, const float*, float*, int64_t);
    static constexpr Means kMeans[kValueRows + 1] = {nullptr,       tile_means<1>, tile_means<2>, tile_means<3>,
                                                     tile_means<4>, tile_means<5>, tile_means<6>};
    kMeans[rows](weights, lanes, v, keys, carry, mean, stride);
}

inline void tile_mask(const iol_attention_args& a, const Looks& looks, int64_t lanes, int64_t key, int64_t n,
                      float* scores) {
    for (int64_t j = 0; j < n; j++, scores += lanes) {
        const vi s = all((int32_t)(key + j)), block = all(key_block(a, key + j));
        for (int64_t i = 0; i < lanes; i += W) {
            const vi seen = (s >= load_int(looks.from + i)) &
                            ((s < load_int(looks.causal + i)) | (block == load_int(looks.block + i)));
            store(scores + i, select(seen, load(scores + i), all(kNone)));
        }
    }
}

// Scores or weights of n keys, each times its key's scale.
inline void tile_scale(const float* scales, int64_t stride, const Tile& tile, int64_t n) {
    for (int64_t j = 0; j < n; j++) {
        float* const scores = tile.scores + j * tile.lanes;
        for (int64_t i = 0; i < tile.lanes; i += W) store(scores + i, load(scores + i) * scales[j * stride]);
    }
}

// Scores of n keys to weights e^(score - most), in place; a vector of rows at a time.
inline void tile_softmax(const Sums& sums, const Tile& tile, int64_t n) {
    for (int64_t i = 0; i < tile.lanes; i += W) {
        float* const scores = tile.scores + i;
        const vf before = load(sums.most + i);
        vf most = before;
        for (int64_t j = 0; j < n; j++) most = max(load(scores + j * tile.lanes), most);
        const vf base = select(most == kNone, vf{}, most);  // no key yet: e^(kNone - 0) = 0
        vf mass{};
        for (int64_t j = 0; j < n; j++) {
            const vf p = exp(load(scores + j * tile.lanes) - base);
            store(scores + j * tile.lanes, p);
            mass += p;
        }
        const vf carry = exp(before - base);
        store(tile.carry + i, carry);
        store(sums.mass + i, load(sums.mass + i) * carry + mass);
        store(sums.most + i, most);
    }
}

inline void all_scores(const Tile& tile, int64_t n, int64_t D, Ahead& ahead, int64_t lines) {
    for (int64_t d = 0; d < D; d += kDepth) {
        const float* const keys = tile.keys + d * kKeys;
        in_panels(tile.lanes, [&](auto vectors, int64_t first) {
            constexpr int MK = (vectors.value == 1 ? 16 : 8) / (kManyRegisters ? 1 : 2);
            const float* q = tile.queries + first * D + d * vectors.value * W;
            for (int64_t j = 0; j < n; j += MK) {
                tile_scores<vectors.value, MK>(q, keys + j * kDepth, min(kDepth, D - d), d > 0,
                                               tile.scores + j * tile.lanes + first, tile.lanes);
                ahead.ask(lines);
            }
        });
    }
}

inline void all_means(const Tile& tile, const Sums& sums, int64_t rows, int64_t n, int64_t D, Ahead& ahead,
                      int64_t lines) {
    for (int64_t d = 0; d < D; d += kStrip) {
        for (int64_t r = 0; r < rows; r += kValueRows) {
            some_means(min(kValueRows, rows - r), tile.scores + r, tile.lanes, tile.values + d * kKeys, n,
                       tile.carry + r, sums.mean + r * sums.stride + d, sums.stride);
            ahead.ask(lines);
        }
    }
}

template <class T>
void attend_tile(const Task<T>& t, const Looks& looks, float* memory) {
    const iol_attention_args& a = *t.args;
    const int64_t lanes = round_up(t.rows, W);
    const Tile tile = tile_in(memory, lanes, a.D);
    pack_queries(t, tile);
    clear(t.sums, lanes);
    // Calls of `ask` in a block, at least, and lines to ask for in each so that all are asked for.
    const int64_t calls = ceil_div(a.D, kStrip) * ceil_div(t.rows, kValueRows) + ceil_div(a.D, kDepth);
    KeyBlock<T> at = block_at(t, t.key_begin);
    while (at.n > 0) {
        const KeyBlock<T> next = block_at(t, at.key + at.n);
        Ahead ahead = ahead_of(t, next);
        const int64_t lines = ceil_div(ahead.lines(), calls);
        pack_strips(at.k, a.k_row, at.n, a.D, kDepth, tile.keys);
        pack_strips(at.v, a.v_row, at.n, a.D, kStrip, tile.values);
        all_scores(tile, at.n, a.D, ahead, lines);
        if (a.k_scale) tile_scale(a.k_scale + at.scales, a.scale_row, tile, at.n);
        if (at.key < looks.inner_begin || at.key + at.n > looks.inner_end) {
            tile_mask(a, looks, lanes, at.key, at.n, tile.scores);
        }
        tile_softmax(t.sums, tile, at.n);
        if (a.v_scale) tile_scale(a.v_scale + at.scales, a.scale_row, tile, at.n);
        all_means(tile, t.sums, t.rows, at.n, a.D, ahead, lines);
        at = next;
    }
}

}  // namespace
