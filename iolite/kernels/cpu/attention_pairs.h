// Attention for a few new tokens where many heads share a key, as when one token is drawn behind a long context.
//
// Products are taken by the instruction that adds those of two pairs of bfloat16 to a float32: twice as many as float32
// arithmetic does in the same time. Keys and values in bfloat16 or int8 enter as they are. A query enters as the sum of
// two bfloat16, which leaves out 2^-17 of it; a weight as one, within 2^-8 of it, about what the rounding of the values
// that it weighs has cost before. All else is as in attention_tile.h: the lanes along the rows, and keys by the block.
//
// A row of the cache that holds no key may hold NaN, and is not even multiplied with zero.
#pragma once

#include "attention_tile.h"

#if defined(__AVX512BW__) && __has_include(<avx512bf16intrin.h>)
#define IOL_HAS_PAIRS
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kPairTokens = 8;  // a prompt's attention stays float32 arithmetic

#ifdef IOL_HAS_PAIRS

// Not every processor with AVX-512 has these instructions: each function that uses them says so, and has_pairs whether
// it may be called.
#define IOL_PAIRS __attribute__((target("avx512bf16")))

inline bool has_pairs() {
    static const bool has = __builtin_cpu_supports("avx512bf16");
    return has;
}

constexpr int kPairKeys = 16;  // sums at a time: two products a cycle, six cycles each, want 12

// Bfloat16 by twos, the first of two neighbours in the low half of each 32-bit number.
struct PairTile {
    Tile tile;          // its scores, carry and lanes
    uint32_t* queries;  // [lanes / W][D / 2][2][W]: neighbouring dimensions of the first and the second part
    uint32_t* weights;  // [kKeys / 2][lanes]: neighbouring keys
    uint32_t* values;   // [kKeys / 2][kStrip]: neighbouring keys
    bf16* keys;         // [kKeys][key_row], for caches in int8
    int64_t key_row;
};

// Floats of memory that a task wants besides its sums.
inline int64_t pair_floats(int64_t lanes, int64_t D) {
    return lanes * D + kKeys * lanes + kKeys / 2 * (lanes + kStrip + D + W) + lanes;
}

inline PairTile pair_tile_in(float* memory, int64_t lanes, int64_t D) {
    PairTile t{};
    t.tile.lanes = lanes;
    t.queries = (uint32_t*)memory, memory += lanes * D;
    t.tile.scores = memory, memory += kKeys * lanes;
    t.weights = (uint32_t*)memory, memory += kKeys / 2 * lanes;
    t.values = (uint32_t*)memory, memory += kKeys / 2 * kStrip;
    t.keys = (bf16*)memory, memory += kKeys / 2 * (D + W);
    t.key_row = D + 2 * W;  // not a power of two, which would put all keys into the same sets of the first cache
    t.tile.carry = memory;
    return t;
}

// a's lanes in the low halves, b's in the high ones, as bfloat16: to nearest, ties to even.
IOL_PAIRS inline __m512i pair_up(vf a, vf b) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    const __m512i order = (__m512i)((iota() + 16) << 16 | iota());
    return _mm512_permutexvar_epi16(order, halves);
}

// What a lower or an upper half is as a number.
IOL_INLINE vf low_half(__m512i pairs) { return (vf)((vu)pairs << 16); }
IOL_INLINE vf high_half(__m512i pairs) { return (vf)((vu)pairs & 0xffff0000u); }

template <class T>
IOL_PAIRS void pack_query_pairs(const Task<T>& t, const PairTile& tile) {
    const int64_t D = t.args->D;
    for (int64_t lane = 0; lane < tile.tile.lanes; lane++) {
        uint32_t* const out = tile.queries + lane / W * W * D + lane % W;
        const float* q = lane < t.rows ? t.query(lane) : nullptr;
        for (int64_t d = 0; d < D; d += 2 * W) {
            alignas(64) uint32_t pairs[2][W];
            vf even{}, odd{};
            for (int i = 0; q && i < W; i++) even[i] = q[d + 2 * i], odd[i] = q[d + 2 * i + 1];
            const __m512i high = pair_up(even, odd), low = pair_up(even - low_half(high), odd - high_half(high));
            _mm512_store_si512(pairs[0], high), _mm512_store_si512(pairs[1], low);
            for (int i = 0; i < W; i++) {
                for (int part = 0; part < 2; part++) out[(d / 2 + i) * 2 * W + part * W] = pairs[part][i];
            }
        }
    }
}

// scores[j][lane] = k[j] · q[lane] for MK keys and one vector of lanes.
template <int MK>
IOL_PAIRS void pair_scores(const uint32_t* q, const bf16* k, int64_t k_row, int64_t D, float* scores, int64_t lanes,
                           Ahead& asked) {
    Ahead ahead = asked;
    __m512 acc[MK];
    const char* key[MK];
#pragma GCC unroll 16
    for (int j = 0; j < MK; j++) acc[j] = _mm512_setzero_ps(), key[j] = (const char*)(k + j * k_row);
    for (int64_t d = 0; d < D; d += 2, q += 2 * W) {
        ahead.ask(1);
        const __m512bh high = (__m512bh)_mm512_load_si512(q), low = (__m512bh)_mm512_load_si512(q + W);
#pragma GCC unroll 16
        for (int j = 0; j < MK; j++) {
            int32_t pair;
            __builtin_memcpy(&pair, key[j] + 2 * d, sizeof pair);
            const __m512bh y = (__m512bh)_mm512_set1_epi32(pair);
            acc[j] = _mm512_dpbf16_ps(acc[j], high, y);
            acc[j] = _mm512_dpbf16_ps(acc[j], low, y);
        }
    }
#pragma GCC unroll 16
    for (int j = 0; j < MK; j++) _mm512_storeu_ps(scores + j * lanes, acc[j]);
    asked = ahead;
}

// The scores of n keys, for all lanes.
inline void all_pair_scores(const PairTile& t, const bf16* k, int64_t k_row, int64_t n, int64_t D, Ahead& ahead) {
    const int64_t lanes = t.tile.lanes;
    for (int64_t j = 0, keys; j < n; j += keys) {
        keys = n - j >= kPairKeys ? kPairKeys : n - j >= 4 ? 4 : 1;
        const auto scores = keys == kPairKeys ? pair_scores<kPairKeys> : keys == 4 ? pair_scores<4> : pair_scores<1>;
        for (int64_t lane = 0; lane < lanes; lane += W) {
            scores(t.queries + lane * D, k + j * k_row, k_row, D, t.tile.scores + j * lanes + lane, lanes, ahead);
        }
    }
}

// Rounds the weights of n keys, an odd last one beside a zero. `mass`, unless null, becomes the sum of rounded weights:
// an error that all of them share, as equal ones do, then leaves the mean alone.
IOL_PAIRS inline void pack_weights(const PairTile& t, int64_t n, float* mass) {
    const int64_t lanes = t.tile.lanes;
    for (int64_t i = 0; i < lanes; i += W) {
        vf change{};
        for (int64_t j = 0; j < n; j += 2) {
            const float* const scores = t.tile.scores + j * lanes + i;
            const vf a = load(scores), b = j + 1 < n ? load(scores + lanes) : vf{};
            const __m512i pairs = pair_up(a, b);
            _mm512_storeu_si512(t.weights + j / 2 * lanes + i, pairs);
            change += (low_half(pairs) - a) + (high_half(pairs) - b);
        }
        if (mass) store(mass + i, load(mass + i) + change);
    }
}

// 2 W numbers as bfloat16, which holds every byte.
IOL_PAIRS IOL_INLINE __m512i halves(const bf16* p) { return _mm512_loadu_si512(p); }
IOL_PAIRS IOL_INLINE __m512i halves(const int8_t* p) {
    const __m512i words = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(words)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(words, 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

template <class T>
IOL_PAIRS void widen_keys(const T* k, int64_t k_row, int64_t n, int64_t D, bf16* out, int64_t out_row) {
    for (int64_t j = 0; j < n; j++, k += k_row, out += out_row) {
        for (int64_t d = 0; d < D; d += 2 * W) _mm512_storeu_si512(out + d, halves(k + d));
    }
}

// One strip of the values of n keys, those of two neighbouring keys side by side, an odd last one beside zeros.
template <class T>
IOL_PAIRS void pack_values(const T* v, int64_t v_row, int64_t n, uint32_t* out) {
    const vi first = iota() | (iota() + 32) << 16, second = first + (16 << 16 | 16);
    for (int64_t j = 0; j < n; j += 2, v += 2 * v_row, out += kStrip) {
        for (int64_t d = 0; d < kStrip; d += 2 * W) {
            const __m512i a = halves(v + d), b = j + 1 < n ? halves(v + v_row + d) : _mm512_setzero_si512();
            _mm512_store_si512(out + d, _mm512_permutex2var_epi16(a, (__m512i)first, b));
            _mm512_store_si512(out + d + W, _mm512_permutex2var_epi16(a, (__m512i)second, b));
        }
    }
}

// mean[i] = mean[i] * carry[i] + sum over pairs of keys of weights[pair][i] · v[pair], for MR rows and one strip.
template <int MR>
IOL_PAIRS void pair_means(const uint32_t* weights, int64_t lanes, const uint32_t* v, int64_t pairs, const float* carry,
                          float* mean, int64_t stride) {
    constexpr int NV = kValueVectors;
    vf acc[MR][NV];
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
        for (int j = 0; j < NV; j++) acc[i][j] = load(mean + i * stride + j * W) * carry[i];
    }
    for (int64_t pair = 0; pair < pairs; pair++, weights += lanes, v += kStrip) {
        __m512bh y[NV];
        for (int j = 0; j < NV; j++) y[j] = (__m512bh)_mm512_load_si512(v + j * W);
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) {
            const __m512bh p = (__m512bh)_mm512_set1_epi32((int32_t)weights[i]);
            for (int j = 0; j < NV; j++) acc[i][j] = (vf)_mm512_dpbf16_ps((__m512)acc[i][j], p, y[j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
        for (int j = 0; j < NV; j++) store(mean + i * stride + j * W, acc[i][j]);
    }
}

inline void some_pair_means(int64_t rows, const uint32_t* weights, int64_t lanes, const uint32_t* v, int64_t pairs,
                            const float* carry, float* mean, int64_t stride) {
    using Means = void (*)(const uint32_t*, int64_t, const uint32_t*, int64_t, const float*, float*, int64_t);
    static constexpr Means kMeans[kValueRows + 1] = {nullptr,       pair_means<1>, pair_means<2>, pair_means<3>,
                                                     pair_means<4>, pair_means<5>, pair_means<6>};
    kMeans[rows](weights, lanes, v, pairs, carry, mean, stride);
}

template <class T>
void all_pair_means(const Task<T>& t, const PairTile& tile, const KeyBlock<T>& at, Ahead& ahead) {
    const Sums& sums = t.sums;
    const int64_t lines = ceil_div(ahead.lines(), t.args->D / kStrip * ceil_div(t.rows, kValueRows));
    for (int64_t d = 0; d < t.args->D; d += kStrip) {
        pack_values(at.v + d, t.args->v_row, at.n, tile.values);
        for (int64_t r = 0; r < t.rows; r += kValueRows) {
            some_pair_means(min(kValueRows, t.rows - r), tile.weights + r, tile.tile.lanes, tile.values,
                            ceil_div(at.n, 2), tile.tile.carry + r, sums.mean + r * sums.stride + d, sums.stride);
            ahead.ask(lines);
        }
    }
}

inline const bf16* keys_of(const KeyBlock<bf16>& at, const iol_attention_args&, const PairTile&) { return at.k; }
inline const bf16* keys_of(const KeyBlock<int8_t>& at, const iol_attention_args& a, const PairTile& tile) {
    widen_keys(at.k, a.k_row, at.n, a.D, tile.keys, tile.key_row);
    return tile.keys;
}

// For bfloat16 and bytes, and D a multiple of 64.
template <class T>
void attend_pairs(const Task<T>& t, const Looks& looks, float* memory) {
    const iol_attention_args& a = *t.args;
    const int64_t lanes = round_up(t.rows, W);
    const PairTile tile = pair_tile_in(memory, lanes, a.D);
    pack_query_pairs(t, tile);
    clear(t.sums, lanes);
    KeyBlock<T> at = block_at(t, t.key_begin);
    while (at.n > 0) {
        const KeyBlock<T> next = block_at(t, at.key + at.n);
        Ahead ahead = ahead_of(t, next);
        const bf16* const k = keys_of(at, a, tile);
        all_pair_scores(tile, k, sizeof(T) == 2 ? a.k_row : tile.key_row, at.n, a.D, ahead);
        if (a.k_scale) tile_scale(a.k_scale + at.scales, a.scale_row, tile.tile, at.n);
        if (at.key < looks.inner_begin || at.key + at.n > looks.inner_end) {
            tile_mask(a, looks, lanes, at.key, at.n, tile.tile.scores);
        }
        tile_softmax(t.sums, tile.tile, at.n);
        if (a.v_scale) tile_scale(a.v_scale + at.scales, a.scale_row, tile.tile, at.n);
        pack_weights(tile, at.n, a.v_scale ? nullptr : t.sums.mass);  // with a scale in them they do not sum to it
        all_pair_means(t, tile, at, ahead);
        at = next;
    }
}

#else

constexpr bool has_pairs() { return false; }

#endif

}  // namespace
