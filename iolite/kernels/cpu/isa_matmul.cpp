// Products of activations with packed weights; with float ones: -> floats.h.
//
// Few tokens (up to kFew) are bound by memory: sixteen rows are one stream through it, unpacked in registers, where
// they meet up to eight tokens at a time; with more tokens they are gone through again, by then in the cache. Many
// tokens are bound by arithmetic: -> panel.h.
#include "blocks.h"
#include "floats.h"
#include "gelu.h"
#include "kernels.h"
#include "panel.h"
#include "share.h"

namespace {

constexpr int64_t kFew = 24;

// What a thread claims of the weights at a time: much against the cost of claiming, little against a thread's share.
constexpr int64_t kChunkBytes = 256 << 10;

// Of products with many tokens, in multiply-adds: some 10 µs.
constexpr int64_t kChunkProducts = 1 << 21;

// Tokens whose sums of 64 rows, and of another 64 of a gated pair, stay in the second-level cache.
constexpr int64_t kPass = 384;

// A packed matrix, and where its products go.
struct Product {
    const uint8_t* data;
    int64_t rows, row_bytes;  // row_bytes: of sixteen rows
    int32_t format;
    float* out;
    int64_t stride;

    int64_t row_tiles() const { return ceil_div(rows, kTileRows); }
};

int64_t tile_bytes(int32_t format) { return format == 4 ? Int4::kBytes : format == 5 ? Int4m::kBytes : Int8::kBytes; }

Product product(const iol_matrix& w, float* out, int64_t stride) {
    return {(const uint8_t*)w.data, w.rows, ceil_div(w.cols, kTileCols) * tile_bytes(w.format), w.format, out, stride};
}

// 64 rows, or as many as there are, times groups [first, last) of tokens.
void many_tokens(const Product& p, int64_t row_tile, const Activations& a, int64_t first, int64_t last, float* sums) {
    const uint8_t* tile = p.data + row_tile * p.row_bytes;
    const int64_t row_tiles = min(kPanelTiles, p.row_tiles() - row_tile);
    const auto rows = p.format == 4 ? panel_rows<Int4> : p.format == 5 ? panel_rows<Int4m> : panel_rows<Int8>;
    rows(tile, row_tiles, a, first, last, sums);
}

// gate = gelu(gate) * up over count numbers, a multiple of W.
void join(float* gate, const float* up, int64_t count) {
    for (int64_t i = 0; i < count; i += W) store(gate + i, gelu(load(gate + i)) * load(up + i));
}

// Sums [tokens][width] of the rows from `row` on, as far as there are rows, to where they belong.
void put(const Product& p, int64_t row, int64_t width, int64_t token, int64_t tokens, const float* sums) {
    const int64_t size = min(width, p.rows - row);
    for (int64_t t = 0; t < tokens; t++) {
        float* out = p.out + (token + t) * p.stride + row;
        const float* from = sums + t * width;
        int64_t i = 0;
        for (; i + W <= size; i += W) store(out + i, load(from + i));
        if (i < size) store_first(out + i, load(from + i), size - i);
    }
}

// Sixteen rows of a matrix times all tokens.
void few_unit(const Product& p, int64_t row_tile, const Activations& a) {
    alignas(64) float sums[kMost * kTileRows];
    for (int64_t group = 0; group < a.groups; group++) {
        const int64_t T = a.size(group);
        const AddTiles add = p.format == 4   ? add_tiles_of<Int4, true>(T)
                             : p.format == 5 ? add_tiles_of<Int4m, true>(T)
                                             : add_tiles_of<Int8, true>(T);
        for (int64_t i = 0; i < T * kTileRows; i++) sums[i] = 0.0f;
        add(p.data + row_tile * p.row_bytes, a.blocks / 2, a.of(group), sums, kTileRows);
        put(p, row_tile * kTileRows, kTileRows, a.first(group), T, sums);
    }
}

// 64 rows of a matrix, or of the two of a gated pair (up is null otherwise), times all tokens.
void many_unit(const Product& p, const Product* up, int64_t row_tile, const Activations& a) {
    const int64_t step = kPass / kPanelTokens;  // groups
    float* sums = (float*)iol_scratch(IOL_SCRATCH_TASK, 2 * kPass * kPanelRows * sizeof(float));
    for (int64_t first = 0; first < a.groups; first += step) {
        const int64_t last = min(first + step, a.groups), begin = a.first(first);
        const int64_t tokens = a.first(last - 1) + a.size(last - 1) - begin;
        many_tokens(p, row_tile, a, first, last, sums);
        if (up) {
            float* more = sums + kPass * kPanelRows;
            many_tokens(*up, row_tile, a, first, last, more);
            join(sums, more, tokens * kPanelRows);
        }
        put(p, row_tile * kTileRows, kPanelRows, begin, tokens, sums);
    }
}

// All products of one input, in one loop over the pool. up: the second matrix of a gated pair of many tokens, or null.
void multiply(iol_pool* pool, const Product* products, int64_t count, const Product* up, const Activations& a) {
    const bool many = a.n > kFew;
    const int64_t tiles = many ? kPanelTiles : 1;
    int64_t units = 0, bytes = 0;
    for (int64_t i = 0; i < count; i++) {
        units += ceil_div(products[i].row_tiles(), tiles);
        bytes += products[i].row_tiles() * products[i].row_bytes * (up ? 2 : 1);
    }
    const int64_t chunk =
        many ? kChunkProducts / (kPanelRows * a.cols * a.n) : kChunkBytes * units / max(bytes, (int64_t)1);
    share(pool, units, max((int64_t)1, chunk), [&](int64_t begin, int64_t end) {
        const Product* p = products;
        for (int64_t unit = begin, before = 0; unit < end; unit++) {
            // Units are counted through all products.
            for (int64_t own; unit >= before + (own = ceil_div(p->row_tiles(), tiles)); p++) before += own;
            if (many) {
                many_unit(*p, up, (unit - before) * tiles, a);
            } else {
                few_unit(*p, unit - before, a);
            }
        }
    });
}

constexpr int64_t kProducts = 16;  // of one loop over the pool

Activations quantise(iol_pool* pool, const float* x, int64_t stride, int64_t n, int64_t cols) {
    return quantise(pool, x, stride, n, cols, n > kFew ? kPanelTokens : kMost);
}

}  // namespace

namespace iol {
namespace IOL_ISA {

void linear(iol_pool* pool, const float* x, int64_t x_stride, int64_t n, int64_t count, const iol_matrix* w,
            float* const* out, const int64_t* out_stride) {
    if (w[0].format == kFloat) return float_linear(pool, x, x_stride, n, count, w, out, out_stride);
    const Activations a = quantise(pool, x, x_stride, n, w[0].cols);
    Product products[kProducts];
    for (int64_t i = 0; i < count; i += kProducts) {
        const int64_t some = min(count - i, kProducts);
        for (int64_t j = 0; j < some; j++) products[j] = product(w[i + j], out[i + j], out_stride[i + j]);
        multiply(pool, products, some, nullptr, a);
    }
}

void gated(iol_pool* pool, const float* x, int64_t x_stride, int64_t n, const iol_matrix* gate, const iol_matrix* up,
           float* out, int64_t out_stride) {
    const int64_t rows = gate->rows;
    // Going back and forth between the two costs more than joining them afterwards: each thread reads one stretch.
    float* other = nullptr;
    if (gate->format == kFloat) {
        other = (float*)iol_scratch(IOL_SCRATCH_GATED, (size_t)(n * rows) * sizeof(float));
        const iol_matrix both[2] = {*gate, *up};
        float* const outs[2] = {out, other};
        const int64_t strides[2] = {out_stride, rows};
        float_linear(pool, x, x_stride, n, 2, both, outs, strides);
    } else {
        const Activations a = quantise(pool, x, x_stride, n, gate->cols);
        if (n > kFew) {
            const Product first = product(*gate, out, out_stride), second = product(*up, out, out_stride);
            return multiply(pool, &first, 1, &second, a);
        }
        other = (float*)iol_scratch(IOL_SCRATCH_GATED, (size_t)(n * rows) * sizeof(float));
        const Product both[2] = {product(*gate, out, out_stride), product(*up, other, rows)};
        multiply(pool, both, 2, nullptr, a);
    }
    for (int64_t t = 0; t < n; t++) {
        float* row = out + t * out_stride;
        geglu(pool, row, other + t * rows, rows, row);
    }
}

}  // namespace IOL_ISA
}  // namespace iol
