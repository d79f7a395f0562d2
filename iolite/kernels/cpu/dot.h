// Sixteen rows at a time: the integer dot products of packed weights, written once for each instruction set.
//
//   Ints    16 int32, one for each row of a tile
//   Floats  16 floats
//   Bytes   64 bytes: 4 columns for each of 16 rows, as they lie in a tile
//
// dot4 adds to each row the product of its 4 columns with 4 activations. It takes unsigned nibbles; dot8 takes what
// prepare8 makes of signed bytes, and its result is to be read with kStart8 * (sum of the activations) added.
// Internal linkage throughout, for the reason in simd.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "half.h"
#include "simd.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Before a loop over registers. The portable code has arrays in their place, and compilers unroll those badly.
#if defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
#define IOL_UNROLL _Pragma("GCC unroll 24")
#else
#define IOL_UNROLL
#endif

namespace {

IOL_INLINE int32_t four(const int8_t* a) {
    int32_t bits;
    std::memcpy(&bits, a, 4);
    return bits;
}

#if defined(__AVX512VNNI__)

struct Ints { __m512i v; };
struct Floats { __m512 v; };
struct Bytes { __m512i v; };
constexpr int32_t kStart8 = -128;  // the instruction wants unsigned weights: 128 is added to them

IOL_INLINE Ints ints(int32_t x) { return {_mm512_set1_epi32(x)}; }
IOL_INLINE Bytes load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
IOL_INLINE void store_bytes(void* p, Bytes b) { _mm512_storeu_si512(p, b.v); }
IOL_INLINE Bytes low(Bytes b) { return {_mm512_and_si512(b.v, _mm512_set1_epi8(15))}; }
IOL_INLINE Bytes high(Bytes b) { return {_mm512_and_si512(_mm512_srli_epi16(b.v, 4), _mm512_set1_epi8(15))}; }
IOL_INLINE Bytes prepare8(Bytes b) { return {_mm512_xor_si512(b.v, _mm512_set1_epi8(-128))}; }
IOL_INLINE Ints dot4(Ints s, Bytes w, const int8_t* a) {
    return {_mm512_dpbusd_epi32(s.v, w.v, _mm512_set1_epi32(four(a)))};
}
IOL_INLINE Ints dot8(Ints s, Bytes w, const int8_t* a) { return dot4(s, w, a); }
IOL_INLINE Floats load16(const float* p) { return {_mm512_loadu_ps(p)}; }
IOL_INLINE void store16(float* p, Floats f) { _mm512_storeu_ps(p, f.v); }
IOL_INLINE Floats halves(const uint8_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
IOL_INLINE Floats times(Floats a, float b) { return {_mm512_mul_ps(a.v, _mm512_set1_ps(b))}; }
IOL_INLINE Floats add_product(Floats s, Floats a, float b) {
    return {_mm512_fmadd_ps(a.v, _mm512_set1_ps(b), s.v)};
}
IOL_INLINE Floats add_product(Floats s, Ints a, Floats b) {
    return {_mm512_fmadd_ps(_mm512_cvtepi32_ps(a.v), b.v, s.v)};
}

#elif defined(__AVX2__)

struct Ints { __m256i v[2]; };
struct Floats { __m256 v[2]; };
struct Bytes { __m256i v[2]; };
constexpr int32_t kStart8 = 0;

IOL_INLINE Ints ints(int32_t x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
IOL_INLINE Bytes load_bytes(const void* p) {
    const __m256i* q = (const __m256i*)p;
    return {{_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)}};
}
IOL_INLINE void store_bytes(void* p, Bytes b) {
    for (int i = 0; i < 2; i++) _mm256_storeu_si256((__m256i*)p + i, b.v[i]);
}
IOL_INLINE Bytes low(Bytes b) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {{_mm256_and_si256(b.v[0], mask), _mm256_and_si256(b.v[1], mask)}};
}
IOL_INLINE Bytes high(Bytes b) {
    return low({{_mm256_srli_epi16(b.v[0], 4), _mm256_srli_epi16(b.v[1], 4)}});
}
IOL_INLINE Bytes prepare8(Bytes b) { return b; }
// Pairs of products are summed in 16 bits: 2 * 15 * 127 fits, and so does 2 * 128 * 127 of dot8.
IOL_INLINE Ints dot4(Ints s, Bytes w, const int8_t* a) {
    const __m256i as = _mm256_set1_epi32(four(a)), ones = _mm256_set1_epi16(1);
    for (int i = 0; i < 2; i++) {
        s.v[i] = _mm256_add_epi32(s.v[i], _mm256_madd_epi16(_mm256_maddubs_epi16(w.v[i], as), ones));
    }
    return s;
}
IOL_INLINE Ints dot8(Ints s, Bytes w, const int8_t* a) {
    const __m256i as = _mm256_set1_epi32(four(a)), ones = _mm256_set1_epi16(1);
    for (int i = 0; i < 2; i++) {  // |w| unsigned, the sign moved to the activation, which is never -128
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w.v[i]), _mm256_sign_epi8(as, w.v[i]));
        s.v[i] = _mm256_add_epi32(s.v[i], _mm256_madd_epi16(pairs, ones));
    }
    return s;
}
IOL_INLINE Floats load16(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
IOL_INLINE void store16(float* p, Floats f) {
    for (int i = 0; i < 2; i++) _mm256_storeu_ps(p + 8 * i, f.v[i]);
}
IOL_INLINE Floats halves(const uint8_t* p) {
    const __m128i* q = (const __m128i*)p;
    return {{_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))}};
}
IOL_INLINE Floats times(Floats a, float b) {
    for (int i = 0; i < 2; i++) a.v[i] = _mm256_mul_ps(a.v[i], _mm256_set1_ps(b));
    return a;
}
IOL_INLINE Floats add_product(Floats s, Floats a, float b) {
    for (int i = 0; i < 2; i++) s.v[i] = _mm256_fmadd_ps(a.v[i], _mm256_set1_ps(b), s.v[i]);
    return s;
}
IOL_INLINE Floats add_product(Floats s, Ints a, Floats b) {
    for (int i = 0; i < 2; i++) s.v[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(a.v[i]), b.v[i], s.v[i]);
    return s;
}

#elif defined(__ARM_FEATURE_DOTPROD)

struct Ints { int32x4_t v[4]; };
struct Floats { float32x4_t v[4]; };
struct Bytes { int8x16_t v[4]; };
constexpr int32_t kStart8 = 0;

IOL_INLINE Ints ints(int32_t x) {
    const int32x4_t v = vdupq_n_s32(x);
    return {{v, v, v, v}};
}
IOL_INLINE Bytes load_bytes(const void* p) {
    const int8_t* q = (const int8_t*)p;
    return {{vld1q_s8(q), vld1q_s8(q + 16), vld1q_s8(q + 32), vld1q_s8(q + 48)}};
}
IOL_INLINE void store_bytes(void* p, Bytes b) {
    for (int i = 0; i < 4; i++) vst1q_s8((int8_t*)p + 16 * i, b.v[i]);
}
IOL_INLINE Bytes low(Bytes b) {
    for (int i = 0; i < 4; i++) b.v[i] = vandq_s8(b.v[i], vdupq_n_s8(15));
    return b;
}
IOL_INLINE Bytes high(Bytes b) {
    for (int i = 0; i < 4; i++) b.v[i] = vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(b.v[i]), 4));
    return b;
}
IOL_INLINE Bytes prepare8(Bytes b) { return b; }
IOL_INLINE Ints dot4(Ints s, Bytes w, const int8_t* a) {
    const int8x16_t as = vreinterpretq_s8_s32(vdupq_n_s32(four(a)));
    for (int i = 0; i < 4; i++) s.v[i] = vdotq_s32(s.v[i], w.v[i], as);
    return s;
}
IOL_INLINE Ints dot8(Ints s, Bytes w, const int8_t* a) { return dot4(s, w, a); }
IOL_INLINE Floats load16(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
IOL_INLINE void store16(float* p, Floats f) {
    for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, f.v[i]);
}
IOL_INLINE Floats halves(const uint8_t* p) {
    Floats f;
    for (int i = 0; i < 4; i++) f.v[i] = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p + 8 * i)));
    return f;
}
IOL_INLINE Floats times(Floats a, float b) {
    for (int i = 0; i < 4; i++) a.v[i] = vmulq_n_f32(a.v[i], b);
    return a;
}
IOL_INLINE Floats add_product(Floats s, Floats a, float b) {
    for (int i = 0; i < 4; i++) s.v[i] = vfmaq_n_f32(s.v[i], a.v[i], b);
    return s;
}
IOL_INLINE Floats add_product(Floats s, Ints a, Floats b) {
    for (int i = 0; i < 4; i++) s.v[i] = vfmaq_f32(s.v[i], vcvtq_f32_s32(a.v[i]), b.v[i]);
    return s;
}

#else  // any processor: plain loops, which compilers turn into what there is

struct Ints { int32_t v[16]; };
struct Floats { float v[16]; };
struct Bytes { uint8_t v[64]; };
constexpr int32_t kStart8 = 0;

IOL_INLINE Ints ints(int32_t x) {
    Ints s;
    for (int32_t& v : s.v) v = x;
    return s;
}
IOL_INLINE Bytes load_bytes(const void* p) {
    Bytes b;
    std::memcpy(b.v, p, 64);
    return b;
}
IOL_INLINE void store_bytes(void* p, Bytes b) { std::memcpy(p, b.v, 64); }
IOL_INLINE Bytes low(Bytes b) {
    for (uint8_t& v : b.v) v &= 15;
    return b;
}
IOL_INLINE Bytes high(Bytes b) {
    for (uint8_t& v : b.v) v >>= 4;
    return b;
}
IOL_INLINE Bytes prepare8(Bytes b) { return b; }
IOL_INLINE Ints dot4(Ints s, Bytes w, const int8_t* a) {
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 4; j++) s.v[i] += (int8_t)w.v[4 * i + j] * a[j];
    }
    return s;
}
IOL_INLINE Ints dot8(Ints s, Bytes w, const int8_t* a) { return dot4(s, w, a); }
IOL_INLINE Floats load16(const float* p) {
    Floats f;
    std::memcpy(f.v, p, 64);
    return f;
}
IOL_INLINE void store16(float* p, Floats f) { std::memcpy(p, f.v, 64); }
IOL_INLINE Floats halves(const uint8_t* p) {
    Floats f;
    for (int i = 0; i < 16; i++) f.v[i] = from_half(p + 2 * i);
    return f;
}
IOL_INLINE Floats times(Floats a, float b) {
    for (float& v : a.v) v *= b;
    return a;
}
IOL_INLINE Floats add_product(Floats s, Floats a, float b) {
    for (int i = 0; i < 16; i++) s.v[i] += a.v[i] * b;
    return s;
}
IOL_INLINE Floats add_product(Floats s, Ints a, Floats b) {
    for (int i = 0; i < 16; i++) s.v[i] += (float)a.v[i] * b.v[i];
    return s;
}

#endif

}  // namespace
