// All decoder blocks for few tokens of some sequences in one call: between two blocks nothing but arithmetic happens.
#include "dot.h"
#include "kernels.h"
#include "scratch.h"

namespace {

uint16_t to_bf16(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 64);  // NaN stays one
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);                // to nearest, ties to even
}

// size numbers into a row of a cache, in its format; `scale` takes the scale of int8.
void keep(const float* x, int64_t size, int32_t kv_type, void* row, float* scale) {
    if (kv_type == 0) {
        __builtin_memcpy(row, x, sizeof(float) * (size_t)size);
    } else if (kv_type == 1) {
        uint16_t* const out = (uint16_t*)row;
        for (int64_t i = 0; i < size; i++) out[i] = to_bf16(x[i]);
    } else {
        float most = 0.0f;
        for (int64_t i = 0; i < size; i++) most = max(most, __builtin_fabsf(x[i]));
        const float inverse = most > 0x1p-120f ? 127.0f / most : 0.0f;
        int8_t* const out = (int8_t*)row;
        for (int64_t i = 0; i < size; i++) out[i] = (int8_t)__builtin_rintf(x[i] * inverse);
        *scale = most / 127.0f;
    }
}

// The pieces that a head falls into: [0, A) and [D/2, D/2 + A) are turned, A = turned / 2, what follows each is not.
struct Pieces {
    int64_t turned, rest, half;  // of half a head each: A, D/2 - A, D/2
};

Pieces pieces(int64_t D, int64_t turned) { return {turned / 2, D / 2 - turned / 2, D / 2}; }

void copy(const float* from, int64_t count, float*& to) {
    __builtin_memcpy(to, from, sizeof(float) * (size_t)count);
    to += count;
}

// One head's key and value as one vector: value turned and rest, key turned. -> iolite/cache_layouts.py
void join(const float* k, const float* v, const Pieces& p, float unit, float* out) {
    copy(v, p.turned, out), copy(v + p.half, p.turned, out);
    copy(v + p.turned, p.rest, out), copy(v + p.half + p.turned, p.rest, out);
    for (int64_t i = 0; i < p.turned; i++) *out++ = k[i] / unit;
    for (int64_t i = 0; i < p.turned; i++) *out++ = k[p.half + i] / unit;
}

// A head of a query in the order of such keys: the rest, then what is turned.
void reorder_query(const float* q, const Pieces& p, const float* factor, float* out) {
    float* at = out;
    copy(q + p.turned, p.rest, at), copy(q + p.half + p.turned, p.rest, at);
    copy(q, p.turned, at), copy(q + p.half, p.turned, at);
    for (int64_t i = 0; i < 2 * p.half; i++) out[i] *= factor[i];
}

// What attention made of such values, in the model's order.
void restore_output(const float* from, const Pieces& p, float* out) {
    float *first = out, *second = out + p.half;
    copy(from, p.turned, first), copy(from + p.turned, p.turned, second);
    copy(from + 2 * p.turned, p.rest, first), copy(from + 2 * p.turned + p.rest, p.rest, second);
}

int64_t bytes_of(int32_t kv_type) { return kv_type == 0 ? 4 : kv_type == 1 ? 2 : 1; }

// Keys and values of n tokens from position `start` on, into their rows. joined: memory for 2 D floats.
void remember(const iol_cache& c, const float* k, const float* v, int64_t n, int64_t start, int64_t K, int64_t D,
              float* joined) {
    const int64_t size = bytes_of(c.kv_type);
    for (int64_t i = 0; i < n; i++) {
        const int64_t row = (start + i) % c.room;
        for (int64_t h = 0; h < K; h++, k += D, v += D) {
            char* const values = (char*)c.v + (row * c.v_row + h * c.v_head) * size;
            const int64_t at = row * c.scale_row + h * c.scale_head;
            if (c.turned) {
                join(k, v, pieces(D, c.turned), c.unit, joined);
                keep(joined, D + c.turned, c.kv_type, values, c.v_scale + at);
            } else {
                keep(v, D, c.kv_type, values, c.v_scale + at);
                keep(k, D, c.kv_type, (char*)c.k + (row * c.k_row + h * c.k_head) * size, c.k_scale + at);
            }
        }
    }
}

iol_attention_args over(const iol_cache& c, const float* q, int64_t n, int64_t start, int64_t H, int64_t K, int64_t D,
                        float* out) {
    const int64_t past = c.window ? min(start, c.window - 1) : start;
    iol_attention_args a{};
    a.q = q, a.k = c.k, a.v = c.v, a.kv_type = c.kv_type;
    a.k_row = c.k_row, a.k_head = c.k_head, a.v_row = c.v_row, a.v_head = c.v_head;
    a.k_scale = c.k_scale, a.v_scale = c.v_scale, a.scale_row = c.scale_row, a.scale_head = c.scale_head;
    a.N = n, a.H = H, a.K = K, a.D = D;
    a.keys = past + n, a.first = (start - past) % c.room, a.room = c.room, a.past = past, a.window = c.window;
    a.out = out;
    return a;
}

// Attention of n tokens of one sequence over its cache: q [n, H, D], overwritten, to out, the keys and values of these
// tokens k and v [n, K, D]. memory: for queries and for 2 D floats.
void attend(iol_pool* pool, const iol_cache& c, float* q, const float* k, const float* v, int64_t n, int64_t start,
            int64_t H, int64_t K, int64_t D, float* memory, float* out) {
    const int64_t queries = n * H * D;
    remember(c, k, v, n, start, K, D, memory + queries);
    if (!c.turned) {
        const iol_attention_args args = over(c, q, n, start, H, K, D, out);
        return iol::IOL_ISA::attention(pool, &args);
    }
    const Pieces p = pieces(D, c.turned);
    for (int64_t i = 0; i < queries; i += D) reorder_query(q + i, p, c.factor, memory + i);
    const iol_attention_args args = over(c, memory, n, start, H, K, D, q);
    iol::IOL_ISA::attention(pool, &args);
    for (int64_t i = 0; i < queries; i += D) restore_output(q + i, p, out + i);
}

}  // namespace

namespace iol {
namespace IOL_ISA {

void stack(iol_pool* pool, const iol_block* blocks, int64_t layers, const iol_segment* segments, int64_t count,
           float* x, const float* const* cos, const float* const* sin) {
    int64_t n = 0, most = 0;
    for (int64_t i = 0; i < count; i++) n += segments[i].n, most = max(most, segments[i].n);
    for (int64_t layer = 0; layer < layers; layer++) {
        const iol_block& b = blocks[layer];
        const int64_t D = b.head_dim, H = b.qkv[0].rows / D, K = b.qkv[1].rows / D;
        const int64_t floats = 2 * n * (H + K) * D + most * H * D + 2 * D;
        float* const q = (float*)iol_scratch(IOL_SCRATCH_STACK, (size_t)floats * sizeof(float));
        float *const out = q + n * H * D, *const k = out + n * H * D, *const v = k + n * K * D;
        float* const memory = v + n * K * D;
        const int full = segments[0].caches[layer].window ? 0 : 1;
        block_begin(pool, &b, x, n, cos[full], sin[full], q, k, v);
        for (int64_t i = 0, at = 0; i < count; at += segments[i++].n) {
            const iol_segment& s = segments[i];
            const int64_t to_q = at * H * D, to_k = at * K * D;
            attend(pool, s.caches[layer], q + to_q, k + to_k, v + to_k, s.n, s.start, H, K, D, memory, out + to_q);
        }
        block_end(pool, &b, x, out, n, x);
    }
}

}  // namespace IOL_ISA
}  // namespace iol
