// Products of activations with packed weights. The layout of a tile: iolite/quant/formats.py.
//
// Few tokens are bound by memory: a row of tiles is unpacked in registers and meets up to eight tokens on the way. Many
// tokens are bound by arithmetic: 64 rows by 256 columns are unpacked into a buffer that stays in the first-level cache,
// and all tokens meet it there, three at a time.
//
// A block of 32 columns is multiplied in integers, then scaled by (scale of the weights) * (scale of the activations).
#include "activations.h"
#include "dot.h"

namespace {

constexpr int kFew = 24;             // up to so many tokens, weights are unpacked in registers
constexpr int kTogether = 8;         // tokens of one group then
constexpr int kTokens = 3;           // and of one group otherwise: 4 x 3 accumulators, twice, and operands in 32 registers
constexpr int kPanelTiles = 4;       // 16 rows each, unpacked together
constexpr int kPanelRows = kPanelTiles * 16;
constexpr int kPanelBlocks = 8;      // of 32 columns
constexpr int64_t kPass = 510;       // tokens whose sums of a panel are held at a time: 130 KB
constexpr int64_t kAhead = 2304;     // bytes of prefetch: four tiles of int4

struct Int4 {
    static constexpr int64_t kBytes = 576;
    static constexpr int kLoads = 4;
    static constexpr int64_t kScales = 512, kMinima = 0;
    static constexpr bool kStarts = true;
};
struct Int4m : Int4 {
    static constexpr int64_t kBytes = 640, kMinima = 576;
    static constexpr bool kStarts = false;
};
struct Int8 {
    static constexpr int64_t kBytes = 1088;
    static constexpr int kLoads = 8;
    static constexpr int64_t kScales = 1024, kMinima = 0;
    static constexpr bool kStarts = kStart8 != 0;
};

// A group of T tokens at some block.
struct Group {
    const int8_t* quants;
    const float* scales;
    const float* sums;
    const int32_t* starts;  // of the format's kind, see Activations
};

template <class Format>
IOL_INLINE Group group_at(const Activations& a, int64_t g, int64_t block) {
    const int64_t i = a.offset(g) + block * a.size(g);
    return {a.quants + i * 32, a.scales + i, a.sums + i, (Format::kLoads == 4 ? a.starts : a.starts8) + i};
}

IOL_INLINE void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 3); }

// Sixteen rows times T tokens over all columns, weights straight from memory. out [T][16].
template <class Format, int T>
void row_of_tiles(const uint8_t* tile, int64_t tiles, Group a, float* out) {
    Floats total[T];
    IOL_UNROLL
    for (int t = 0; t < T; t++) total[t] = Floats{};
    for (int64_t i = 0; i < tiles; i++, tile += Format::kBytes) {
    IOL_UNROLL
        for (int64_t line = 0; line < Format::kBytes; line += 64) prefetch(tile + kAhead + line);
    IOL_UNROLL
        for (int b = 0; b < 2; b++) {
            const uint8_t* bytes = tile + b * Format::kLoads * 64;
            Ints sum[T];
    IOL_UNROLL
            for (int t = 0; t < T; t++) sum[t] = ints(Format::kStarts ? a.starts[t] : 0);
    IOL_UNROLL
            for (int v = 0; v < Format::kLoads; v++) {
                const Bytes w = load_bytes(bytes + v * 64);
                if constexpr (Format::kLoads == 4) {
                    const Bytes lo = low(w), hi = high(w);
    IOL_UNROLL
                    for (int t = 0; t < T; t++) sum[t] = dot4(sum[t], lo, a.quants + (v * T + t) * 4);
    IOL_UNROLL
                    for (int t = 0; t < T; t++) sum[t] = dot4(sum[t], hi, a.quants + ((v + 4) * T + t) * 4);
                } else {
                    const Bytes w8 = prepare8(w);
    IOL_UNROLL
                    for (int t = 0; t < T; t++) sum[t] = dot8(sum[t], w8, a.quants + (v * T + t) * 4);
                }
            }
            const Floats scale = halves(tile + Format::kScales + b * 32);
    IOL_UNROLL
            for (int t = 0; t < T; t++) total[t] = add_product(total[t], sum[t], times(scale, a.scales[t]));
            if constexpr (Format::kMinima != 0) {
                const Floats minimum = halves(tile + Format::kMinima + b * 32);
    IOL_UNROLL
                for (int t = 0; t < T; t++) total[t] = add_product(total[t], minimum, a.sums[t]);
            }
            a.quants += T * 32;
            a.scales += T;
            a.sums += T;
            a.starts += T;
        }
    }
    IOL_UNROLL
    for (int t = 0; t < T; t++) store16(out + t * 16, total[t]);
}

template <class Format>
void row_of_tiles(const uint8_t* tile, int64_t tiles, Group a, int64_t T, float* out) {
    switch (T) {
        case 1: return row_of_tiles<Format, 1>(tile, tiles, a, out);
        case 2: return row_of_tiles<Format, 2>(tile, tiles, a, out);
        case 3: return row_of_tiles<Format, 3>(tile, tiles, a, out);
        case 4: return row_of_tiles<Format, 4>(tile, tiles, a, out);
        case 5: return row_of_tiles<Format, 5>(tile, tiles, a, out);
        case 6: return row_of_tiles<Format, 6>(tile, tiles, a, out);
        case 7: return row_of_tiles<Format, 7>(tile, tiles, a, out);
        default: return row_of_tiles<Format, 8>(tile, tiles, a, out);
    }
}

// What one thread unpacks: 64 rows by up to 8 blocks of 32 columns, bytes [block][8][4 tiles][64].
struct Panel {
    alignas(64) uint8_t bytes[kPanelBlocks * 8 * kPanelTiles * 64];
    alignas(64) float scales[kPanelBlocks * kPanelRows];  // [block][64]
    alignas(64) float minima[kPanelBlocks * kPanelRows];
};

// Tiles [first_row_tile, + row_tiles) x [block / 2, + blocks / 2) of the matrix; row tiles that are not there are zero.
template <class Format>
void unpack(const uint8_t* data, int64_t tiles, int64_t row_tiles, int64_t block, int64_t blocks, Panel* panel) {
    for (int64_t r = 0; r < kPanelTiles; r++) {
        for (int64_t i = 0; i < blocks; i++) {
            uint8_t* out = panel->bytes + (i * 8 * kPanelTiles + r) * 64;
            const int64_t at = i * kPanelRows + r * 16;
            if (r >= row_tiles) {
                for (int v = 0; v < 8; v++) std::memset(out + v * kPanelTiles * 64, 0, 64);
                std::memset(panel->scales + at, 0, 64);
                std::memset(panel->minima + at, 0, 64);
                continue;
            }
            const uint8_t* tile = data + (r * tiles + (block + i) / 2) * Format::kBytes;
            const int64_t b = (block + i) % 2;
            for (int v = 0; v < Format::kLoads; v++) {
                const Bytes w = load_bytes(tile + (b * Format::kLoads + v) * 64);
                if constexpr (Format::kLoads == 4) {
                    store_bytes(out + v * kPanelTiles * 64, low(w));
                    store_bytes(out + (v + 4) * kPanelTiles * 64, high(w));
                } else {
                    store_bytes(out + v * kPanelTiles * 64, prepare8(w));
                }
            }
            store16(panel->scales + at, halves(tile + Format::kScales + b * 32));
            if constexpr (Format::kMinima != 0) store16(panel->minima + at, halves(tile + Format::kMinima + b * 32));
        }
    }
}

// Adds 64 rows times T tokens over the panel's columns to sums [T][64].
template <class Format, int T>
void panel_tokens(const Panel* panel, int64_t blocks, Group a, float* sums) {
    Floats total[T][kPanelTiles];
    IOL_UNROLL
    for (int t = 0; t < T; t++) {
    IOL_UNROLL
        for (int r = 0; r < kPanelTiles; r++) total[t][r] = load16(sums + t * kPanelRows + r * 16);
    }
    for (int64_t i = 0; i < blocks; i++) {
        const uint8_t* bytes = panel->bytes + i * 8 * kPanelTiles * 64;
        Ints sum[T][kPanelTiles];
    IOL_UNROLL
        for (int t = 0; t < T; t++) {
    IOL_UNROLL
            for (int r = 0; r < kPanelTiles; r++) sum[t][r] = ints(Format::kStarts ? a.starts[t] : 0);
        }
    IOL_UNROLL
        for (int v = 0; v < 8; v++) {
            Bytes w[kPanelTiles];
    IOL_UNROLL
            for (int r = 0; r < kPanelTiles; r++) w[r] = load_bytes(bytes + (v * kPanelTiles + r) * 64);
    IOL_UNROLL
            for (int t = 0; t < T; t++) {
                const int8_t* four_of = a.quants + (v * T + t) * 4;
    IOL_UNROLL
                for (int r = 0; r < kPanelTiles; r++) {
                    sum[t][r] = Format::kLoads == 4 ? dot4(sum[t][r], w[r], four_of) : dot8(sum[t][r], w[r], four_of);
                }
            }
        }
    IOL_UNROLL
        for (int r = 0; r < kPanelTiles; r++) {
            const Floats scale = load16(panel->scales + i * kPanelRows + r * 16);
    IOL_UNROLL
            for (int t = 0; t < T; t++) total[t][r] = add_product(total[t][r], sum[t][r], times(scale, a.scales[t]));
            if constexpr (Format::kMinima != 0) {
                const Floats minimum = load16(panel->minima + i * kPanelRows + r * 16);
    IOL_UNROLL
                for (int t = 0; t < T; t++) total[t][r] = add_product(total[t][r], minimum, a.sums[t]);
            }
        }
        a.quants += T * 32;
        a.scales += T;
        a.sums += T;
        a.starts += T;
    }
    IOL_UNROLL
    for (int t = 0; t < T; t++) {
    IOL_UNROLL
        for (int r = 0; r < kPanelTiles; r++) store16(sums + t * kPanelRows + r * 16, total[t][r]);
    }
}

// sums [tokens][64]: 64 rows of a matrix (row_tiles of them there) times the groups [first, last).
template <class Format>
void panel_rows(const uint8_t* data, int64_t tiles, int64_t row_tiles, const Activations& a, int64_t first,
                int64_t last, float* sums) {
    alignas(64) Panel panel;
    std::memset(sums, 0, (size_t)(min(a.n, last * a.group) - first * a.group) * kPanelRows * 4);
    for (int64_t block = 0; block < a.blocks; block += kPanelBlocks) {
        const int64_t blocks = min(kPanelBlocks, a.blocks - block);
        unpack<Format>(data, tiles, row_tiles, block, blocks, &panel);
        for (int64_t g = first; g < last; g++) {
            float* out = sums + (g - first) * a.group * kPanelRows;
            const Group at = group_at<Format>(a, g, block);
            switch (a.size(g)) {
                case 1: panel_tokens<Format, 1>(&panel, blocks, at, out); break;
                case 2: panel_tokens<Format, 2>(&panel, blocks, at, out); break;
                default: panel_tokens<Format, kTokens>(&panel, blocks, at, out);
            }
        }
    }
}

// By format, rows [16 * row_tile, ...) of a matrix times tokens of the groups [first, last): sums [token][width].
void tiles_times_groups(const iol_matrix& w, int64_t row_tile, int64_t row_tiles, const Activations& a, int64_t first,
                        int64_t last, float* sums) {
    const int64_t tiles = a.blocks / 2;
    const auto go = [&](auto format) {
        using Format = decltype(format);
        const uint8_t* data = (const uint8_t*)w.data + row_tile * tiles * Format::kBytes;
        if (a.group == kTokens && a.n > kFew) return panel_rows<Format>(data, tiles, row_tiles, a, first, last, sums);
        row_of_tiles<Format>(data, tiles, group_at<Format>(a, first, 0), a.size(first), sums);
    };
    if (w.format == 4) return go(Int4{});
    if (w.format == 5) return go(Int4m{});
    go(Int8{});
}

// gelu(g) = g (1 + tanh u) / 2 with u = sqrt(2/pi) (g + 0.044715 g³), which is g / (1 + e^-2u).
IOL_INLINE void gate(float* g, const float* up, int64_t count) {
    for (int64_t i = 0; i < count; i += W) {
        const vf x = load(g + i), u = 0.7978845608028654f * (x + 0.044715f * (x * x * x));
        store(g + i, x / (1.0f + exp(-2.0f * u)) * load(up + i));
    }
}

// sums [tokens][width], of which `rows` are wanted, to out.
IOL_INLINE void write(const float* sums, int64_t tokens, int64_t width, int64_t rows, float* out, int64_t stride) {
    for (int64_t t = 0; t < tokens; t++) std::memcpy(out + t * stride, sums + t * width, (size_t)rows * 4);
}

// One matrix, or a gate and its up, and where the result goes.
struct Product {
    iol_matrix w;
    const iol_matrix* up;  // or NULL
    float* out;
    int64_t stride;
};

// `units` of 16 or 64 rows beginning with number `unit`, all tokens.
void run_units(const Product& p, int64_t unit, int64_t units, const Activations& a) {
    const bool many = a.n > kFew;
    const int64_t width = many ? kPanelRows : 16, row_tiles = ceil_div(p.w.rows, 16), each = width / 16;
    const int64_t step = many ? kPass / a.group : 1, tokens = step * a.group;
    float* sums = (float*)iol_scratch(IOL_SCRATCH_TASK, (size_t)(2 * tokens * width) * 4);
    float* up = sums + tokens * width;
    for (int64_t i = unit; i < unit + units; i++) {
        const int64_t tile = i * each, rows = min(width, p.w.rows - tile * 16), there = min(each, row_tiles - tile);
        for (int64_t g = 0; g < a.groups(); g += step) {
            const int64_t last = min(g + step, a.groups()), first_token = g * a.group;
            const int64_t count = min(a.n, last * a.group) - first_token;
            tiles_times_groups(p.w, tile, there, a, g, last, sums);
            if (p.up) {
                tiles_times_groups(*p.up, tile, there, a, g, last, up);
                gate(sums, up, count * width);
            }
            write(sums, count, width, rows, p.out + first_token * p.stride + tile * 16, p.stride);
        }
    }
}

constexpr int kMostProducts = 8;

// All products of one input in one loop over the pool.
void run_products(iol_pool* pool, const float* x, int64_t x_stride, int64_t n, const Product* products, int count) {
    const int64_t cols = products[0].w.cols;
    const bool many = n > kFew;
    const int64_t group = many ? kTokens : ceil_div(n, ceil_div(n, kTogether));
    const Activations a = make_room(n, cols, group);
    round_all(pool, a, x, x_stride, cols);
    const int64_t each = many ? 1 : 4;  // a task is long enough to be one stream, short enough to share evenly
    int64_t first[kMostProducts + 1] = {};
    for (int i = 0; i < count; i++) {
        first[i + 1] = first[i] + ceil_div(ceil_div(products[i].w.rows, many ? kPanelRows : 16), each);
    }
    for_tasks(pool, first[count], false, [&](int64_t task) {
        int i = 0;
        while (task >= first[i + 1]) i++;
        const int64_t unit = (task - first[i]) * each;
        const int64_t units = ceil_div(products[i].w.rows, many ? kPanelRows : 16);
        run_units(products[i], unit, min(each, units - unit), a);
    });
}

}  // namespace

namespace iol {
namespace IOL_ISA {

void linear(iol_pool* pool, const float* x, int64_t x_stride, int64_t n, int64_t count, const iol_matrix* w,
            float* const* out, const int64_t* out_stride) {
    for (int64_t begin = 0; begin < count; begin += kMostProducts) {
        Product products[kMostProducts];
        const int some = (int)min(count - begin, (int64_t)kMostProducts);
        for (int i = 0; i < some; i++) products[i] = {w[begin + i], nullptr, out[begin + i], out_stride[begin + i]};
        run_products(pool, x, x_stride, n, products, some);
    }
}

void gated(iol_pool* pool, const float* x, int64_t x_stride, int64_t n, const iol_matrix* gate_matrix,
           const iol_matrix* up, float* out, int64_t out_stride) {
    const Product product{*gate_matrix, up, out, out_stride};
    run_products(pool, x, x_stride, n, &product, 1);
}

}  // namespace IOL_ISA
}  // namespace iol
