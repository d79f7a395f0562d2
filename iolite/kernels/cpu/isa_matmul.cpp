// Products of activations with packed weights; with float ones: -> floats.h.
//
// Few tokens (up to kFew) are bound by memory: sixteen rows are one stream through it, unpacked in registers, where
// they meet up to eight tokens at a time; with more tokens they are gone through again, by then in the cache. For one
// or two tokens a thread follows two streams side by side, half of all rows apart. Many tokens are bound by arithmetic:
// -> panel.h.
#include "blocks.h"
#include "floats.h"
#include "gelu.h"
#include "kernels.h"
#include "panel.h"
#include "share.h"

namespace {

constexpr int64_t kFew = 48;

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

// Sixteen rows of a matrix.
struct Rows {
    const Product* product;
    int64_t row_tile;

    const uint8_t* data() const { return product->data + row_tile * product->row_bytes; }
};

AddTiles add_few(int32_t format, int64_t T, bool pair) {
    if (format == 4) return pair ? add_pairs_of<Int4>(T) : add_tiles_of<Int4, true>(T);
    if (format == 5) return pair ? add_pairs_of<Int4m>(T) : add_tiles_of<Int4m, true>(T);
    return pair ? add_pairs_of<Int8>(T) : add_tiles_of<Int8, true>(T);
}

// Sixteen rows times all tokens.
void few_rows(const Rows& rows, const Activations& a) {
    alignas(64) float sums[kMost * kTileRows];
    const uint8_t* const place = rows.data();
    for (int64_t group = 0; group < a.groups; group++) {
        const int64_t T = a.size(group);
        for (int64_t i = 0; i < T * kTileRows; i++) sums[i] = 0.0f;
        add_few(rows.product->format, T, false)(&place, a.blocks / 2, a.of(group), sums, kTileRows);
        put(*rows.product, rows.row_tile * kTileRows, kTileRows, a.first(group), T, sums);
    }
}

// Two times sixteen rows of the same format, at most kPairs tokens.
void few_pair(const Rows& one, const Rows& other, const Activations& a) {
    alignas(64) float sums[2 * kPairs * kTileRows] = {};
    const uint8_t* const places[2] = {one.data(), other.data()};
    add_few(one.product->format, a.n, true)(places, a.blocks / 2, a.of(0), sums, kTileRows);
    put(*one.product, one.row_tile * kTileRows, kTileRows, 0, a.n, sums);
    put(*other.product, other.row_tile * kTileRows, kTileRows, 0, a.n, sums + a.n * kTileRows);
}

// Row tile `unit` of all products and the one `half` behind it, if there is one, times all tokens.
void few_unit(const Product* products, int64_t unit, int64_t half, int64_t units, const Activations& a) {
    const auto at = [products](int64_t tile) {
        const Product* p = products;
        for (; tile >= p->row_tiles(); p++) tile -= p->row_tiles();
        return Rows{p, tile};
    };
    const Rows one = at(unit);
    if (unit + half >= units) return few_rows(one, a);
    const Rows other = at(unit + half);
    if (one.product->format == other.product->format) return few_pair(one, other, a);
    few_rows(one, a), few_rows(other, a);
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

// All products of one input and few tokens, in one loop over the pool.
void multiply_few(iol_pool* pool, const Product* products, int64_t count, const Activations& a) {
    int64_t units = 0, bytes = 0;
    for (int64_t i = 0; i < count; i++) {
        units += products[i].row_tiles();
        bytes += products[i].row_tiles() * products[i].row_bytes;
    }
    const int64_t half = a.n <= kPairs ? ceil_div(units, 2) : units;
    const int64_t chunk = kChunkBytes * half / max(bytes, (int64_t)1);
    share(pool, half, max((int64_t)1, chunk), [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; unit++) few_unit(products, unit, half, units, a);
    });
}

// A product, or the two of a gated pair (up is null otherwise), and many tokens.
void multiply_many(iol_pool* pool, const Product& p, const Product* up, const Activations& a) {
    const int64_t chunk = kChunkProducts / (kPanelRows * a.cols * a.n);
    share(pool, ceil_div(p.row_tiles(), kPanelTiles), max((int64_t)1, chunk), [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; unit++) many_unit(p, up, unit * kPanelTiles, a);
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
    if (n > kFew) {
        for (int64_t i = 0; i < count; i++) multiply_many(pool, product(w[i], out[i], out_stride[i]), nullptr, a);
        return;
    }
    Product products[kProducts];
    for (int64_t i = 0; i < count; i += kProducts) {
        const int64_t some = min(count - i, kProducts);
        for (int64_t j = 0; j < some; j++) products[j] = product(w[i + j], out[i + j], out_stride[i + j]);
        multiply_few(pool, products, some, a);
    }
}

void gated(iol_pool* pool, const float* x, int64_t x_stride, int64_t n, const iol_matrix* gate, const iol_matrix* up,
           float* out, int64_t out_stride) {
    const int64_t rows = gate->rows;
    // Few tokens: each is read in long stretches, and the two are joined afterwards.
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
            return multiply_many(pool, first, &second, a);
        }
        other = (float*)iol_scratch(IOL_SCRATCH_GATED, (size_t)(n * rows) * sizeof(float));
        const Product both[2] = {product(*gate, out, out_stride), product(*up, other, rows)};
        multiply_few(pool, both, 2, a);
    }
    for (int64_t t = 0; t < n; t++) {
        float* row = out + t * out_stride;
        geglu(pool, row, other + t * rows, rows, row);
    }
}

}  // namespace IOL_ISA
}  // namespace iol
