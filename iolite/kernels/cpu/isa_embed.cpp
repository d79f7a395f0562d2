// Rows of a packed table as floats. The layout of a tile: iolite/quant/formats.py.
#include "half.h"
#include "simd.h"
#include "tasks.h"

namespace {

constexpr int64_t kTileRows = 16, kTileCols = 64, kBlock = 32;

// The 32 numbers of row r in block b of a tile, each times its scale (and plus its minimum), as written in the file.
struct Int4 {
    static constexpr int64_t kBytes = 576;
    static void decode(const uint8_t* tile, int64_t b, int64_t r, float* out) {
        const float scale = from_half(tile + 512 + 2 * (b * kTileRows + r));
        nibbles(tile, b, r, [=](int64_t col, int q) { out[col] = scale * (float)(q - 8); });
    }
    template <class F>
    static IOL_INLINE void nibbles(const uint8_t* tile, int64_t b, int64_t r, const F& f) {
        const uint8_t* bytes = tile + b * 256 + 4 * r;
        for (int64_t i = 0; i < 16; i++) {
            const int byte = bytes[i / 4 * 64 + i % 4];
            f(i, byte & 15);
            f(i + 16, byte >> 4);
        }
    }
};

struct Int4m {
    static constexpr int64_t kBytes = 640;
    static void decode(const uint8_t* tile, int64_t b, int64_t r, float* out) {
        const float scale = from_half(tile + 512 + 2 * (b * kTileRows + r));
        const float minimum = from_half(tile + 576 + 2 * (b * kTileRows + r));
        Int4::nibbles(tile, b, r, [=](int64_t col, int q) { out[col] = scale * (float)q + minimum; });
    }
};

struct Int8 {
    static constexpr int64_t kBytes = 1088;
    static void decode(const uint8_t* tile, int64_t b, int64_t r, float* out) {
        const float scale = from_half(tile + 1024 + 2 * (b * kTileRows + r));
        const int8_t* bytes = (const int8_t*)tile + b * 512 + 4 * r;
        for (int64_t i = 0; i < kBlock; i++) out[i] = scale * (float)bytes[i / 4 * 64 + i % 4];
    }
};

template <class Format>
void decode_row(const iol_matrix& w, int64_t row, float scale, float* out) {
    const int64_t tiles = ceil_div(w.cols, kTileCols);
    const uint8_t* tile = (const uint8_t*)w.data + row / kTileRows * tiles * Format::kBytes;
    float block[kBlock];
    for (int64_t col = 0; col < w.cols; col += kBlock) {
        Format::decode(tile + col / kTileCols * Format::kBytes, col % kTileCols / kBlock, row % kTileRows, block);
        const int64_t size = min(kBlock, w.cols - col);
        for (int64_t i = 0; i < size; i++) out[col + i] = block[i] * scale;
    }
}

}  // namespace

namespace iol {
namespace IOL_ISA {

void embed(iol_pool* pool, const iol_matrix* w, const int64_t* ids, int64_t n, float scale, float* out) {
    auto decode = w->format == 4 ? decode_row<Int4> : w->format == 5 ? decode_row<Int4m> : decode_row<Int8>;
    const iol_matrix matrix = *w;
    for_ranges(pool, n, 4 * matrix.cols, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) decode(matrix, ids[i], scale, out + i * matrix.cols);
    });
}

}  // namespace IOL_ISA
}  // namespace iol
