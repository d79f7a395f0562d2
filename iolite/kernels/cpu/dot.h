// Integer dot products of packed weights with int8 activations, one section for each instruction set.
//
// A block is 32 columns of the 16 rows of a tile (layout: iolite/quant/formats.py). Rows go W at a time, one in each
// lane; group g is rows g * W to g * W + W - 1. What each section gives:
//
//   from_halves(p)                    W fp16 numbers as floats
//   round(v)                          to the nearest integer, ties to even
//   dot4<T>(w, g, x, sums8, acc)      acc[t] = sum over the block of (nibble - 8) * x[t], for T tokens
//   dot4m<T>(w, g, x, acc)            the same with nibble instead of nibble - 8
//   dot8<T>(w, g, x, sums8, acc)      the same with signed bytes
//
// w points at the block's quants, x at int8 [T][32], sums8 at int32 [T]: -8 times the sum of each token's 32 numbers.
// Sums are exact: |nibble| <= 15, |x| <= 127, so 32 products stay below 2^16, and those of bytes below 2^20.
#pragma once

#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#define IOL_UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr int kTileRows = 16, kBlock = 32;
constexpr int G = kTileRows / W;  // groups of rows in a tile

struct Sum {
    static IOL_INLINE vi of(vi a, vi b) { return a + b; }
};
struct Largest {
    static IOL_INLINE vi of(vi a, vi b) { return a > b ? a : b; }
};

// The sum or the largest of all lanes, in every lane.
template <class Op, int h = W / 2>
IOL_INLINE vi across(vi v) {
    v = Op::of(v, (vi)swap_lanes<h>((vf)v, AllLanes{}));
    if constexpr (h > 1) return across<Op, h / 2>(v);
    return v;
}

IOL_INLINE int32_t four_bytes(const void* p) {
    int32_t v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

#if defined(__AVX512VNNI__)

IOL_INLINE vf from_halves(const uint8_t* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
IOL_INLINE vi round(vf v) { return (vi)_mm512_cvtps_epi32((__m512)v); }

IOL_INLINE __m512i bytes_at(const uint8_t* p) { return _mm512_loadu_si512(p); }
IOL_INLINE __m512i low_nibbles(__m512i w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
IOL_INLINE __m512i high_nibbles(__m512i w) { return low_nibbles(_mm512_srli_epi16(w, 4)); }
// The instruction wants one operand without a sign: bytes become byte + 128, and 128 times x's sum comes off.
IOL_INLINE __m512i without_sign(__m512i w) { return _mm512_xor_si512(w, _mm512_set1_epi8(-128)); }
IOL_INLINE vi dot(vi acc, __m512i w, const int8_t* x) {
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, w, _mm512_set1_epi32(four_bytes(x)));
}

// Columns outside, tokens inside: T chains of dependent products, and x comes as a broadcast memory operand.
template <int T>
IOL_INLINE void add_nibbles(const uint8_t* w, const int8_t* x, vi* acc) {
    IOL_UNROLL for (int v = 0; v < 4; v++) {
        const __m512i both = bytes_at(w + 64 * v), low = low_nibbles(both), high = high_nibbles(both);
        IOL_UNROLL for (int t = 0; t < T; t++) acc[t] = dot(acc[t], low, x + 32 * t + 4 * v);
        IOL_UNROLL for (int t = 0; t < T; t++) acc[t] = dot(acc[t], high, x + 32 * t + 16 + 4 * v);
    }
}

template <int T>
IOL_INLINE void dot4(const uint8_t* w, int, const int8_t* x, const int32_t* sums8, vi* acc) {
    IOL_UNROLL for (int t = 0; t < T; t++) acc[t] = all(sums8[t]);
    add_nibbles<T>(w, x, acc);
}

template <int T>
IOL_INLINE void dot4m(const uint8_t* w, int, const int8_t* x, vi* acc) {
    IOL_UNROLL for (int t = 0; t < T; t++) acc[t] = vi{};
    add_nibbles<T>(w, x, acc);
}

template <int T>
IOL_INLINE void dot8(const uint8_t* w, int, const int8_t* x, const int32_t* sums8, vi* acc) {
    IOL_UNROLL for (int t = 0; t < T; t++) acc[t] = all(sums8[t]) << 4;
    IOL_UNROLL for (int v = 0; v < 8; v++) {
        const __m512i bytes = without_sign(bytes_at(w + 64 * v));
        IOL_UNROLL for (int t = 0; t < T; t++) acc[t] = dot(acc[t], bytes, x + 32 * t + 4 * v);
    }
}

#elif defined(__AVX2__)

IOL_INLINE vf from_halves(const uint8_t* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
IOL_INLINE vi round(vf v) { return (vi)_mm256_cvtps_epi32((__m256)v); }

IOL_INLINE __m256i bytes_at(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
IOL_INLINE __m256i low_nibbles(__m256i w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
IOL_INLINE __m256i high_nibbles(__m256i w) { return low_nibbles(_mm256_srli_epi16(w, 4)); }
IOL_INLINE __m256i broadcast(const int8_t* x) { return _mm256_set1_epi32(four_bytes(x)); }
IOL_INLINE vi pairs(__m256i sums) { return (vi)_mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

// Left to itself, the compiler keeps the broadcast activations of a whole block for the next rows, in memory for want
// of registers, and re-orders sums so that all their terms are alive at once.
IOL_INLINE void keep_order() { asm volatile("" ::: "memory"); }
IOL_INLINE void keep_order(__m256i& sum) { asm volatile("" : "+x"(sum)); }

// Sums of two products in 16 bits: 2 * 15 * 127 eight times over is 30480, so a whole block fits.
template <int T>
IOL_INLINE void sum_nibbles(const uint8_t* w, const int8_t* x, __m256i* acc) {
    IOL_UNROLL for (int v = 0; v < 4; v++) {
        const __m256i both = bytes_at(w + 64 * v), low = low_nibbles(both), high = high_nibbles(both);
        IOL_UNROLL for (int t = 0; t < T; t++) {
            const __m256i products = _mm256_maddubs_epi16(low, broadcast(x + 32 * t + 4 * v));
            acc[t] = v ? _mm256_add_epi16(acc[t], products) : products;
            keep_order(acc[t]);
        }
        IOL_UNROLL for (int t = 0; t < T; t++) {
            const __m256i products = _mm256_maddubs_epi16(high, broadcast(x + 32 * t + 16 + 4 * v));
            acc[t] = _mm256_add_epi16(acc[t], products);
            keep_order(acc[t]);
        }
        keep_order();
    }
}

template <int T>
IOL_INLINE void dot4(const uint8_t* w, int g, const int8_t* x, const int32_t* sums8, vi* acc) {
    __m256i sums[T];
    sum_nibbles<T>(w + 32 * g, x, sums);
    IOL_UNROLL for (int t = 0; t < T; t++) acc[t] = pairs(sums[t]) + sums8[t];
}

template <int T>
IOL_INLINE void dot4m(const uint8_t* w, int g, const int8_t* x, vi* acc) {
    __m256i sums[T];
    sum_nibbles<T>(w + 32 * g, x, sums);
    IOL_UNROLL for (int t = 0; t < T; t++) acc[t] = pairs(sums[t]);
}

// |w| times x with w's sign: 2 * 128 * 127 just fits in 16 bits.
template <int T>
IOL_INLINE void dot8(const uint8_t* w, int g, const int8_t* x, const int32_t*, vi* acc) {
    IOL_UNROLL for (int t = 0; t < T; t++) acc[t] = vi{};
    IOL_UNROLL for (int v = 0; v < 8; v++) {
        const __m256i signs = bytes_at(w + 64 * v + 32 * g), sizes = _mm256_abs_epi8(signs);
        IOL_UNROLL for (int t = 0; t < T; t++) {
            const __m256i turned = _mm256_sign_epi8(broadcast(x + 32 * t + 4 * v), signs);
            acc[t] += pairs(_mm256_maddubs_epi16(sizes, turned));
        }
        keep_order();
    }
}

#elif defined(__ARM_FEATURE_DOTPROD)

IOL_INLINE vf from_halves(const uint8_t* p) { return (vf)vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
IOL_INLINE vi round(vf v) { return (vi)vcvtnq_s32_f32((float32x4_t)v); }

// Eight registers of weights meet the T tokens one after the other; x's four bytes are picked by lane.
template <int T>
IOL_INLINE void add_bytes(const int8x16_t* w, const int8_t* x, vi* acc) {
    IOL_UNROLL for (int t = 0; t < T; t++) {
        asm volatile("" ::: "memory");  // x is read again for the next rows, and not kept in memory for want of registers
        const int8x16_t low = vld1q_s8(x + 32 * t), high = vld1q_s8(x + 32 * t + 16);
        int32x4_t a = (int32x4_t)acc[t], b = vdupq_n_s32(0);
        a = vdotq_laneq_s32(a, w[0], low, 0);
        b = vdotq_laneq_s32(b, w[4], high, 0);
        a = vdotq_laneq_s32(a, w[1], low, 1);
        b = vdotq_laneq_s32(b, w[5], high, 1);
        a = vdotq_laneq_s32(a, w[2], low, 2);
        b = vdotq_laneq_s32(b, w[6], high, 2);
        a = vdotq_laneq_s32(a, w[3], low, 3);
        b = vdotq_laneq_s32(b, w[7], high, 3);
        acc[t] = (vi)vaddq_s32(a, b);
    }
}

template <int T>
IOL_INLINE void add_nibbles(const uint8_t* w, const int8_t* x, vi* acc) {
    int8x16_t bytes[8];
    IOL_UNROLL for (int v = 0; v < 4; v++) {
        const uint8x16_t both = vld1q_u8(w + 64 * v);
        bytes[v] = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
        bytes[v + 4] = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
    }
    add_bytes<T>(bytes, x, acc);
}

template <int T>
IOL_INLINE void dot4(const uint8_t* w, int g, const int8_t* x, const int32_t* sums8, vi* acc) {
    IOL_UNROLL for (int t = 0; t < T; t++) acc[t] = all(sums8[t]);
    add_nibbles<T>(w + 16 * g, x, acc);
}

template <int T>
IOL_INLINE void dot4m(const uint8_t* w, int g, const int8_t* x, vi* acc) {
    IOL_UNROLL for (int t = 0; t < T; t++) acc[t] = vi{};
    add_nibbles<T>(w + 16 * g, x, acc);
}

template <int T>
IOL_INLINE void dot8(const uint8_t* w, int g, const int8_t* x, const int32_t*, vi* acc) {
    int8x16_t bytes[8];
    IOL_UNROLL for (int v = 0; v < 8; v++) bytes[v] = vld1q_s8((const int8_t*)w + 64 * v + 16 * g);
    IOL_UNROLL for (int t = 0; t < T; t++) acc[t] = vi{};
    add_bytes<T>(bytes, x, acc);
}

#else

// Exponent and fraction moved into place, then the difference of the biases, 127 - 15, by a product, which is right
// for denormals too; infinities and NaN keep a full exponent.
IOL_INLINE vf from_halves(const uint8_t* p) {
    vh halves;
    __builtin_memcpy(&halves, p, sizeof halves);
    const vu bits = __builtin_convertvector(halves, vu), rest = bits & 0x7fffu;
    const vu scaled = (vu)((vf)(rest << 13) * 0x1p112f);
    return (vf)(scaled | (bits & 0x8000u) << 16 | ((vu)(rest > 0x7bffu) & 0x7f800000u));
}

IOL_INLINE vi round(vf v) {
    vi out;
    for (int i = 0; i < W; i++) out[i] = (int32_t)__builtin_rintf(v[i]);
    return out;
}

typedef int16_t vs __attribute__((vector_size(8 * W)));  // 4 columns of W rows
typedef int8_t vsb __attribute__((vector_size(4 * W)));
typedef uint8_t vub __attribute__((vector_size(4 * W)));

IOL_INLINE vub bytes_at(const uint8_t* p) {
    vub v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

// Four numbers, again for each row.
IOL_INLINE vs broadcast(const int8_t* x) { return __builtin_convertvector((vsb)all(four_bytes(x)), vs); }

// The sums of four columns each.
IOL_INLINE vi by_row(vs sums) {
    vi out;
    for (int i = 0; i < W; i++) out[i] = sums[4 * i] + sums[4 * i + 1] + sums[4 * i + 2] + sums[4 * i + 3];
    return out;
}

// Eight products of a nibble and a byte stay below 2^15.
template <int T>
IOL_INLINE void dot4m(const uint8_t* w, int g, const int8_t* x, vi* acc) {
    vs sums[T] = {};
    for (int v = 0; v < 4; v++) {
        const vub both = bytes_at(w + 64 * v + 4 * W * g);
        const vs low = __builtin_convertvector(both & 15, vs), high = __builtin_convertvector(both >> 4, vs);
        for (int t = 0; t < T; t++) {
            sums[t] += low * broadcast(x + 32 * t + 4 * v) + high * broadcast(x + 32 * t + 16 + 4 * v);
        }
    }
    for (int t = 0; t < T; t++) acc[t] = by_row(sums[t]);
}

template <int T>
IOL_INLINE void dot4(const uint8_t* w, int g, const int8_t* x, const int32_t* sums8, vi* acc) {
    dot4m<T>(w, g, x, acc);
    for (int t = 0; t < T; t++) acc[t] += sums8[t];
}

// Two products of bytes are 2 * 128 * 127 at most, which just fits.
template <int T>
IOL_INLINE void dot8(const uint8_t* w, int g, const int8_t* x, const int32_t*, vi* acc) {
    for (int t = 0; t < T; t++) acc[t] = vi{};
    for (int v = 0; v < 8; v += 2) {
        const uint8_t* p = w + 64 * v + 4 * W * g;
        const vs a = __builtin_convertvector((vsb)bytes_at(p), vs);
        const vs b = __builtin_convertvector((vsb)bytes_at(p + 64), vs);
        for (int t = 0; t < T; t++) {
            const int8_t* xs = x + 32 * t + 4 * v;
            acc[t] += by_row(a * broadcast(xs) + b * broadcast(xs + 4));
        }
    }
}

#endif

}  // namespace
