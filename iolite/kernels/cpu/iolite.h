/* iolite's CPU kernels: the C ABI that Python calls through ctypes.
 *
 * Sizes and strides are int64_t, floats are 32-bit, pointers to floats need no alignment beyond a float's. Every kernel
 * takes the pool of threads first, returns when its work is done, and may be called from several threads at a time:
 * what needs the pool waits for its turn. Nothing here checks its arguments; the Python wrappers do.
 *
 * The layout of packed weights is defined in iolite/quant/formats.py, the mathematics in iolite/kernels/reference.py.
 */
#ifndef IOLITE_H
#define IOLITE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define IOL_API __attribute__((visibility("default")))

/* ---- the library ---- */

/* A digest of this header, as it was when the library was built. */
IOL_API const char* iol_abi(void);

/* The code path in use: "avx512", "avx2", "neon" or "portable"; the best one unless iol_use_isa chose. */
IOL_API const char* iol_isa(void);

/* Code paths in this library, best first, each followed by a space; "-" before those that this processor lacks. */
IOL_API const char* iol_isas(void);

/* Makes `name` the code path in use. Returns 0, 1 when this library has none of that name, 2 when the processor lacks
 * what it needs. Not to be called while kernels run. */
IOL_API int iol_use_isa(const char* name);

/* ---- threads ---- */

typedef struct iol_pool iol_pool;

/* A pool of `threads` threads, the caller of a kernel being one of them; 0 for one on each physical core that this
 * process may use. There may be fewer when the system refuses some. */
IOL_API iol_pool* iol_pool_create(int threads);
IOL_API void iol_pool_destroy(iol_pool* pool);
IOL_API int iol_pool_threads(const iol_pool* pool);

/* ---- products with weights ---- */

/* A matrix [rows, cols]. format: 4 int4, 5 int4m, 8 int8, packed; or 32, floats, row after row without gaps. */
typedef struct {
    const void* data;
    int64_t rows, cols;
    int32_t format;
} iol_matrix;

/* out[i] [n, rows of w[i]] = x · w[i]ᵀ for `count` matrices of the same cols, all packed or all of floats. x [n, cols],
 * x_stride and out_stride[i] floats from one token to the next.
 *
 * For packed ones x is rounded to int8 first: q = x * (127 / m) to the nearest integer (ties to even), scale m / 127, m being the
 * largest magnitude of 32 neighbouring columns (q = 0 where m < 2^-120). Sums over 32 columns are exact. */
IOL_API void iol_linear(iol_pool* pool, const float* x, int64_t x_stride, int64_t n, int64_t count, const iol_matrix* w,
                        float* const* out, const int64_t* out_stride);

/* out [n, rows] = gelu(x · gateᵀ) * (x · upᵀ), with the tanh form of gelu. gate and up have the same rows and cols and
 * are both packed or both of floats. */
IOL_API void iol_gated(iol_pool* pool, const float* x, int64_t x_stride, int64_t n, const iol_matrix* gate,
                       const iol_matrix* up, float* out, int64_t out_stride);

/* out [n, cols] = rows ids [n] of a packed table, times scale. */
IOL_API void iol_embed(iol_pool* pool, const iol_matrix* w, const int64_t* ids, int64_t n, float scale, float* out);

/* ---- rows ---- */

/* out [n, size] = x / sqrt(mean(x²) + eps) * w; w null for none. */
IOL_API void iol_rms_norm(iol_pool* pool, const float* x, const float* w, float eps, int64_t n, int64_t size,
                          float* out);

/* out [n, size] = (residual + rms_norm(x, w)) * scale */
IOL_API void iol_add_rms_norm(iol_pool* pool, const float* residual, const float* x, const float* w, float eps,
                              float scale, int64_t n, int64_t size, float* out);

/* out [n, heads, D]: every head normalised with w [D], then turned by cos and sin [n, D/2] (null: not turned).
 * x_stride: floats between tokens. */
IOL_API void iol_norm_rope(iol_pool* pool, const float* x, int64_t x_stride, const float* w, float eps,
                           const float* cos, const float* sin, int64_t n, int64_t heads, int64_t D, float* out);

/* out = gelu(gate) * up over count numbers. */
IOL_API void iol_geglu(iol_pool* pool, const float* gate, const float* up, int64_t count, float* out);

/* out = cap * tanh(x / cap) over count numbers. */
IOL_API void iol_softcap(iol_pool* pool, const float* x, float cap, int64_t count, float* out);

/* ---- attention ---- */

typedef struct {
    const float* q; /* [N, H, D] */
    const void* k;
    const void* v;
    int32_t kv_type;                       /* 0 float, 1 bf16, 2 int8 */
    int64_t k_row, k_head, v_row, v_head;  /* strides in elements */
    const float *k_scale, *v_scale;        /* of int8: a number is its byte times the scale of its row and head */
    int64_t scale_row, scale_head;
    int64_t N, H, K, D;
    int64_t keys;         /* S */
    int64_t first, room;  /* key s lies in row (first + s) % room */
    int64_t past;         /* query i stands at key past + i */
    int64_t window;       /* 0: none */
    const int64_t* blocks; /* [N] or null */
    float* out;            /* [N, H, D] */
} iol_attention_args;

/* softmax(q · k) · v with scale 1. Key s is allowed for query i if s <= past + i, or if s >= past and blocks[s - past]
 * == blocks[i] > 0; and, with a window, if s > past + i - window. Without a window blocks count for nothing. */
IOL_API void iol_attention(iol_pool* pool, const iol_attention_args* args);

/* ---- a decoder block ---- */

/* The weights of one block. The projections of queries, keys and values take `size` columns each and lie side by side
 * here; projections is 2 where values are the raw keys. Vectors are float. */
typedef struct {
    iol_matrix qkv[3], o, gate, up, down;
    int64_t projections, size, head_dim;
    const float *input_norm, *q_norm, *k_norm, *post_attention_norm, *pre_feedforward_norm, *post_feedforward_norm;
    const float* scalar; /* [1] */
    float eps;
} iol_block;

/* How a block begins, for few tokens x [n, size]: q [n, H, D], k and v [n, K, D] of the normalised x, their heads
 * normalised, q and k turned by cos and sin [n, D/2]. As rms_norm, linear and norm_rope would compute them. */
IOL_API void iol_block_begin(iol_pool* pool, const iol_block* block, const float* x, int64_t n, const float* cos,
                             const float* sin, float* q, float* k, float* v);

/* How it ends: attention's output [n, H * D] projected and added to x [n, size], the feed-forward net added to that, all
 * times the scalar: out [n, size]. As linear, add_rms_norm, rms_norm and gated would compute it. */
IOL_API void iol_block_end(iol_pool* pool, const iol_block* block, const float* x, const float* attended, int64_t n,
                           float* out);

/* ---- all decoder blocks ---- */

/* The cache of one layer, as iolite/cache.py keeps it: the token at position p lies in row p % room. */
typedef struct {
    void *k, *v;            /* of row 0 and head 0; where turned is not 0 both lie in one vector, v first */
    float *k_scale, *v_scale;
    int32_t kv_type;
    int64_t k_row, k_head, v_row, v_head, scale_row, scale_head;
    int64_t room;
    int64_t window;         /* 0: a full layer */
    int64_t turned;         /* dimensions that rope turns, where keys and values share a vector (cache_layouts.py) */
    const float* factor;    /* [D]: what queries are multiplied with then, in the order of the kept keys */
    float unit;             /* what the turned part of a key is kept in */
} iol_cache;

/* n new tokens of one sequence, the first of them at position `start`, and the caches of all its layers. */
typedef struct {
    const iol_cache* caches;
    int64_t n, start;
} iol_segment;

/* The tokens x [all n, size] of `count` sequences, end to end, through `layers` blocks, in place: keys and values go
 * into the caches, whose rows are there, and attention reads them. cos and sin [all n, D/2] are those of sliding layers,
 * then those of full ones. The same as iol_block_begin, attention over each cache, and iol_block_end for each block. */
IOL_API void iol_stack(iol_pool* pool, const iol_block* blocks, int64_t layers, const iol_segment* segments,
                       int64_t count, float* x, const float* const* cos, const float* const* sin);

/* ---- what the machine can do ---- */

/* GB/s (10^9 bytes) that all threads together read of `bytes` of memory (whole multiples of 128 KiB of them), over and
 * over for about `seconds`: the median. The first call also finds out which of several ways to read is the fastest here. */
IOL_API double iol_probe_bandwidth(iol_pool* pool, const void* data, int64_t bytes, double seconds);

/* Billions of int8 multiply-adds a second, from registers, by all threads, with the code path in use. */
IOL_API double iol_probe_int8(iol_pool* pool, double seconds);

#ifdef __cplusplus
}
#endif

#endif
