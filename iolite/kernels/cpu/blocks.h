// The packed formats as the products read them. Layout: iolite/quant/formats.py.
#pragma once

#include "activations.h"

namespace {

constexpr int64_t kTileCols = 64;

struct Int4 {
    static constexpr int64_t kBytes = 576, kBlockBytes = 256, kScales = 512, kMinima = 0;
    static constexpr int64_t kAhead = 16 * kBytes;  // prefetch: at 20 GB/s for a core 9 KB are some 450 ns
    template <int T>
    static IOL_INLINE void dot(const uint8_t* w, int g, const Tokens<T>& x, vi* acc) {
        dot4<T>(w, g, x.q[0], x.sums8, acc);
    }
};

struct Int4m {
    static constexpr int64_t kBytes = 640, kBlockBytes = 256, kScales = 512, kMinima = 576;
    static constexpr int64_t kAhead = 16 * kBytes;
    template <int T>
    static IOL_INLINE void dot(const uint8_t* w, int g, const Tokens<T>& x, vi* acc) {
        dot4m<T>(w, g, x.q[0], acc);
    }
};

struct Int8 {
    static constexpr int64_t kBytes = 1088, kBlockBytes = 512, kScales = 1024, kMinima = 0;
    static constexpr int64_t kAhead = 8 * kBytes;
    template <int T>
    static IOL_INLINE void dot(const uint8_t* w, int g, const Tokens<T>& x, vi* acc) {
        dot8<T>(w, g, x.q[0], x.sums8, acc);
    }
};

IOL_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }

// Adds block b of a tile to the totals of the W rows of group g: total[t] += weights · x[t].
template <class F, int T>
IOL_INLINE void add_block(const uint8_t* tile, int b, int g, const Tokens<T>& x, vf* total) {
    vi acc[T];
    F::template dot<T>(tile + b * F::kBlockBytes, g, x, acc);
    const int64_t at = b * 2 * kTileRows + g * 2 * W;
    const vf scale = from_halves(tile + F::kScales + at);
    IOL_UNROLL for (int t = 0; t < T; t++) total[t] += to_float(acc[t]) * (scale * x.scale[t]);
    if (F::kMinima) {
        const vf minimum = from_halves(tile + F::kMinima + at);
        IOL_UNROLL for (int t = 0; t < T; t++) total[t] += minimum * x.sum[t];
    }
}

// Adds the products of `tiles` tiles of columns with T tokens to sums, for the 16 rows that begin at each of S places; a
// token's sums lie `stride` floats after those of the token before, those of the next place T times that far.
// ahead: whether the weights come from memory. It gives a core more of two streams that are far apart than of one.
template <class F, int T, int S, bool ahead>
void add_tiles(const uint8_t* const* places, int64_t tiles, const uint8_t* tokens, float* sums, int64_t stride) {
    const Tokens<T>* x = (const Tokens<T>*)tokens;
    const uint8_t* tile[S];
    vf total[S][G][T];
    IOL_UNROLL for (int s = 0; s < S; s++) {
        tile[s] = places[s];
        IOL_UNROLL for (int t = 0; t < T; t++) {
            IOL_UNROLL for (int g = 0; g < G; g++) total[s][g][t] = load(sums + (s * T + t) * stride + g * W);
        }
    }
    for (int64_t i = 0; i < tiles; i++, x += 2) {
        IOL_UNROLL for (int s = 0; s < S; s++) {
            IOL_UNROLL for (int64_t line = 0; ahead && line < F::kBytes; line += 64) {
                __builtin_prefetch(tile[s] + F::kAhead / S + line, 0, 0);  // read once: not for the outer caches
            }
            IOL_UNROLL for (int b = 0; b < 2; b++) {
                IOL_UNROLL for (int g = 0; g < G; g++) add_block<F, T>(tile[s], b, g, x[b], total[s][g]);
            }
            tile[s] += F::kBytes;
        }
    }
    IOL_UNROLL for (int s = 0; s < S; s++) {
        IOL_UNROLL for (int t = 0; t < T; t++) {
            IOL_UNROLL for (int g = 0; g < G; g++) store(sums + (s * T + t) * stride + g * W, total[s][g][t]);
        }
    }
}

using AddTiles = void (*)(const uint8_t* const* places, int64_t tiles, const uint8_t* tokens, float* sums,
                          int64_t stride);

constexpr int64_t kMost = 8;   // tokens of a group
constexpr int64_t kPairs = 2;  // tokens up to which two streams at a time are faster: with more, registers run short

template <class F, bool ahead>
AddTiles add_tiles_of(int64_t T) {
    static constexpr AddTiles functions[kMost] = {
        add_tiles<F, 1, 1, ahead>, add_tiles<F, 2, 1, ahead>, add_tiles<F, 3, 1, ahead>, add_tiles<F, 4, 1, ahead>,
        add_tiles<F, 5, 1, ahead>, add_tiles<F, 6, 1, ahead>, add_tiles<F, 7, 1, ahead>, add_tiles<F, 8, 1, ahead>,
    };
    return functions[T - 1];
}

template <class F>
AddTiles add_pairs_of(int64_t T) {
    static constexpr AddTiles functions[kPairs] = {add_tiles<F, 1, 2, true>, add_tiles<F, 2, 2, true>};
    return functions[T - 1];
}

}  // namespace
