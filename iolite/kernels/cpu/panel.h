// Products with many tokens: 64 rows by 256 columns of weights at a time meet all tokens while they are in the
// first-level cache, so that memory and the second-level cache have next to nothing to do.
//
// With 32 registers of 16 lanes the weights are unpacked into a buffer first and meet three tokens at a time: 4 x 3
// integer sums, 4 x 3 totals and the operands fill the registers. Elsewhere they are unpacked in registers each time.
#pragma once

#include "blocks.h"

namespace {

constexpr int64_t kPanelTiles = 4;                          // of 16 rows
constexpr int64_t kPanelRows = kPanelTiles * kTileRows;     // 64
constexpr int64_t kPanelSteps = 4;                          // tiles along the columns
constexpr int64_t kPanelBlocks = 2 * kPanelSteps;           // of 32 columns

#if defined(__AVX512VNNI__)

constexpr int64_t kPanelTokens = 3;

// bytes without a sign: nibbles, or bytes + 128.
struct Panel {
    alignas(64) uint8_t bytes[kPanelBlocks][8][kPanelTiles][64];  // [.][v]: columns 4v to 4v + 3 of each row
    alignas(64) float scales[kPanelBlocks][kPanelRows];
    alignas(64) float minima[kPanelBlocks][kPanelRows];
};

template <class F>
IOL_INLINE void unpack_block(const uint8_t* tile, int64_t b, uint8_t (*out)[kPanelTiles][64], int64_t r) {
    const uint8_t* w = tile + b * F::kBlockBytes;
    if (F::kBlockBytes == 256) {
        IOL_UNROLL for (int v = 0; v < 4; v++) {
            const __m512i both = bytes_at(w + 64 * v);
            _mm512_store_si512(out[v][r], low_nibbles(both));
            _mm512_store_si512(out[v + 4][r], high_nibbles(both));
        }
    } else {
        IOL_UNROLL for (int v = 0; v < 8; v++) _mm512_store_si512(out[v][r], without_sign(bytes_at(w + 64 * v)));
    }
}

// The panel whose first tile is `tile`: row_tiles of them below each other, `step` bytes apart, and `tiles` along the
// columns. Row tiles that are missing stay what they were: nobody reads their sums.
template <class F>
void unpack(const uint8_t* tile, int64_t step, int64_t row_tiles, int64_t tiles, Panel* panel) {
    for (int64_t r = 0; r < row_tiles; r++, tile += step) {
        for (int64_t i = 0; i < 2 * tiles; i++) {
            const uint8_t* at = tile + i / 2 * F::kBytes;
            unpack_block<F>(at, i % 2, panel->bytes[i], r);
            store(panel->scales[i] + r * 16, from_halves(at + F::kScales + i % 2 * 32));
            if (F::kMinima) store(panel->minima[i] + r * 16, from_halves(at + F::kMinima + i % 2 * 32));
        }
        for (int64_t line = 0; line < tiles * F::kBytes; line += 64) {
            __builtin_prefetch(tile + tiles * F::kBytes + line, 0, 2);  // the next panel, while this one is at work
        }
    }
}

// One block of the panel with T tokens.
template <class F, int T>
IOL_INLINE void add_panel_block(const Panel& panel, int64_t i, const Tokens<T>& x, vf (*total)[kPanelTiles]) {
    vi acc[T][kPanelTiles];
    IOL_UNROLL for (int t = 0; t < T; t++) {
        const vi start = F::kMinima ? vi{} : F::kBlockBytes == 256 ? all(x.sums8[t]) : all(x.sums8[t]) << 4;
        IOL_UNROLL for (int r = 0; r < kPanelTiles; r++) acc[t][r] = start;
    }
    IOL_UNROLL for (int v = 0; v < 8; v++) {
        __m512i w[kPanelTiles];
        IOL_UNROLL for (int r = 0; r < kPanelTiles; r++) {
            w[r] = _mm512_load_si512(panel.bytes[i][v][r]);
            asm volatile("" : "+v"(w[r]));
        }
        IOL_UNROLL for (int t = 0; t < T; t++) {
            IOL_UNROLL for (int r = 0; r < kPanelTiles; r++) acc[t][r] = dot(acc[t][r], w[r], x.q[t] + 4 * v);
        }
    }
    IOL_UNROLL for (int r = 0; r < kPanelTiles; r++) {
        const vf scale = load(panel.scales[i] + r * 16);
        IOL_UNROLL for (int t = 0; t < T; t++) total[t][r] += to_float(acc[t][r]) * (scale * x.scale[t]);
        if (F::kMinima) {
            const vf minimum = load(panel.minima[i] + r * 16);
            IOL_UNROLL for (int t = 0; t < T; t++) total[t][r] += minimum * x.sum[t];
        }
    }
}

// Adds 64 rows times T tokens to sums [T][64].
template <class F, int T>
void add_panel(const Panel& panel, int64_t blocks, const uint8_t* tokens, float* sums) {
    const Tokens<T>* x = (const Tokens<T>*)tokens;
    vf total[T][kPanelTiles];
    IOL_UNROLL for (int t = 0; t < T; t++) {
        IOL_UNROLL for (int r = 0; r < kPanelTiles; r++) total[t][r] = load(sums + t * kPanelRows + r * 16);
    }
    for (int64_t i = 0; i < blocks; i++) add_panel_block<F, T>(panel, i, x[i], total);
    IOL_UNROLL for (int t = 0; t < T; t++) {
        IOL_UNROLL for (int r = 0; r < kPanelTiles; r++) store(sums + t * kPanelRows + r * 16, total[t][r]);
    }
}

// Adds the panel at `tile` times groups [first, last) to sums [tokens][64]; block: the number of its first block.
template <class F>
void panel_times(const uint8_t* tile, int64_t step, int64_t row_tiles, int64_t tiles, int64_t block,
                 const Activations& a, int64_t first, int64_t last, float* sums) {
    static thread_local Panel panel;
    unpack<F>(tile, step, row_tiles, tiles, &panel);
    for (int64_t group = first; group < last; group++) {
        const int64_t T = a.size(group);
        const uint8_t* tokens = a.of(group) + block * T * kTokenBytes;
        const auto add = T == 1 ? add_panel<F, 1> : T == 2 ? add_panel<F, 2> : add_panel<F, 3>;
        add(panel, 2 * tiles, tokens, sums);
        sums += T * kPanelRows;
    }
}

#else

constexpr int64_t kPanelTokens = kMost;

template <class F>
void panel_times(const uint8_t* tile, int64_t step, int64_t row_tiles, int64_t tiles, int64_t block,
                 const Activations& a, int64_t first, int64_t last, float* sums) {
    for (int64_t group = first; group < last; group++) {
        const int64_t T = a.size(group);
        const AddTiles add = add_tiles_of<F, false>(T);
        const uint8_t* tokens = a.of(group) + block * T * kTokenBytes;
        for (int64_t r = 0; r < row_tiles; r++) {
            const uint8_t* place = tile + r * step;
            add(&place, tiles, tokens, sums + r * kTileRows, kPanelRows);
        }
        sums += T * kPanelRows;
    }
}

#endif

// Sums [tokens][64] of up to 64 rows, whose tiles begin at `tile`, with the tokens of groups [first, last).
template <class F>
void panel_rows(const uint8_t* tile, int64_t row_tiles, const Activations& a, int64_t first, int64_t last,
                float* sums) {
    const int64_t tokens = a.first(last - 1) + a.size(last - 1) - a.first(first), tiles = a.blocks / 2;
    __builtin_memset(sums, 0, (size_t)(tokens * kPanelRows) * sizeof(float));
    for (int64_t at = 0; at < tiles; at += kPanelSteps) {
        panel_times<F>(tile + at * F::kBytes, tiles * F::kBytes, row_tiles, min(kPanelSteps, tiles - at), 2 * at, a,
                       first, last, sums);
    }
}

}  // namespace
