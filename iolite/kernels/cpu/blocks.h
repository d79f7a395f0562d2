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

// Adds the products of 16 rows and `tiles` tiles of columns with T tokens to sums; a token's 16 sums lie `stride`
// floats after those of the token before. ahead: whether the weights come from memory.
template <class F, int T, bool ahead>
void add_tiles(const uint8_t* tile, int64_t tiles, const uint8_t* tokens, float* sums, int64_t stride) {
    const Tokens<T>* x = (const Tokens<T>*)tokens;
    vf total[G][T];
    IOL_UNROLL for (int t = 0; t < T; t++) {
        IOL_UNROLL for (int g = 0; g < G; g++) total[g][t] = load(sums + t * stride + g * W);
    }
    for (int64_t i = 0; i < tiles; i++, tile += F::kBytes, x += 2) {
        if (ahead) {
            IOL_UNROLL for (int64_t line = 0; line < F::kBytes; line += 64) {
                __builtin_prefetch(tile + F::kAhead + line, 0, 0);  // read once: not for the outer caches
            }
        }
        IOL_UNROLL for (int b = 0; b < 2; b++) {
            IOL_UNROLL for (int g = 0; g < G; g++) add_block<F, T>(tile, b, g, x[b], total[g]);
        }
    }
    IOL_UNROLL for (int t = 0; t < T; t++) {
        IOL_UNROLL for (int g = 0; g < G; g++) store(sums + t * stride + g * W, total[g][t]);
    }
}

using AddTiles = void (*)(const uint8_t* tile, int64_t tiles, const uint8_t* tokens, float* sums, int64_t stride);

constexpr int64_t kMost = 8;  // tokens of a group

template <class F, bool ahead>
AddTiles add_tiles_of(int64_t T) {
    static constexpr AddTiles functions[kMost] = {
        add_tiles<F, 1, ahead>, add_tiles<F, 2, ahead>, add_tiles<F, 3, ahead>, add_tiles<F, 4, ahead>,
        add_tiles<F, 5, ahead>, add_tiles<F, 6, ahead>, add_tiles<F, 7, ahead>, add_tiles<F, 8, ahead>,
    };
    return functions[T - 1];
}

}  // namespace
