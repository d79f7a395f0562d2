// Vectors of floats: one page of operations over the compiler's own vector types, so that a kernel is written once and
// compiled for 16 lanes (AVX-512), 8 (AVX2) or 4 (NEON, and the portable build) by the flags alone.
//
// Everything here has internal linkage. An inline function that the linker may share between files could be taken from
// the file compiled for AVX-512 and run on a machine without it. For the same reason files named isa_*.cpp use no
// templates of the standard library.
#pragma once

#include <cstddef>
#include <cstdint>

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

// Accumulators that fit in the registers beside the operands of a product: 24 of 32, or 12 of 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kManyRegisters = true;
#else
constexpr bool kManyRegisters = false;
#endif

#define IOL_INLINE inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef int8_t vb __attribute__((vector_size(W)));
typedef int16_t vw __attribute__((vector_size(2 * W)));

// A bfloat16: the upper half of a float.
struct bf16 {
    uint16_t bits;
};

template <int... I>
struct Lanes {};
template <int N, int... I>
struct MakeLanes : MakeLanes<N - 1, N - 1, I...> {};
template <int... I>
struct MakeLanes<0, I...> {
    using type = Lanes<I...>;
};
using AllLanes = MakeLanes<W>::type;

IOL_INLINE vf load(const float* p) {
    vf v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

IOL_INLINE vf load(const bf16* p) {
    vh half;
    __builtin_memcpy(&half, p, sizeof half);
    return (vf)(__builtin_convertvector(half, vu) << 16);
}

IOL_INLINE vf load(const int8_t* p) {
    vb bytes;
    __builtin_memcpy(&bytes, p, sizeof bytes);
    // By way of int16: straight to 32 bits GCC 12 goes byte by byte.
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(bytes, vw), vi), vf);
}

IOL_INLINE float load_one(const float* p) { return *p; }
IOL_INLINE float load_one(const int8_t* p) { return (float)*p; }

IOL_INLINE float load_one(const bf16* p) {
    uint32_t bits = (uint32_t)p->bits << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

IOL_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

// x - 0 and not x + 0, which would turn -0 into 0 and so could not be folded away.
IOL_INLINE vf all(float x) { return x - vf{}; }
IOL_INLINE vi all(int32_t x) { return x - vi{}; }

template <int... I>
IOL_INLINE vi iota(Lanes<I...>) {
    return vi{I...};
}
IOL_INLINE vi iota() { return iota(AllLanes{}); }

IOL_INLINE vi load_int(const int32_t* p) {
    vi v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

// In lane i the first operand unless mask is zero there.
IOL_INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }

IOL_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
IOL_INLINE float max(float a, float b) { return a > b ? a : b; }
IOL_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
IOL_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
IOL_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
IOL_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Lane i of the result is lane index(i) of a followed by b.
#ifdef __clang__
#define IOL_PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define IOL_PICK(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif

// Lanes whose number has bit h come from b, the others from a; each is added to the same vector's lane without (with)
// that bit. One of the log2(W) steps of a sum across lanes that sums W vectors at once.
template <int h, int... I>
IOL_INLINE vf fold(vf a, vf b, Lanes<I...>) {
    return IOL_PICK(a, b, ((I & h) ? W + (I ^ h) : I)...) + IOL_PICK(a, b, ((I & h) ? W + I : (I ^ h))...);
}

template <int h>
IOL_INLINE void fold_all(vf* v) {
    if constexpr (h > 0) {
        for (int j = 0; j < h; j++) v[j] = fold<h>(v[j], v[j + h], AllLanes{});
        fold_all<h / 2>(v);
    }
}

// Lane i of the result is the sum of the lanes of v[i], i < W. Destroys v.
IOL_INLINE vf sums(vf* v) {
    fold_all<W / 2>(v);
    return v[0];
}

template <int h, int... I>
IOL_INLINE vf swap_lanes(vf v, Lanes<I...>) {
    return IOL_PICK(v, v, (I ^ h)...);
}

template <int h = W / 2>
IOL_INLINE float sum(vf v) {
    v += swap_lanes<h>(v, AllLanes{});
    if constexpr (h > 1) return sum<h / 2>(v);
    return v[0];
}

template <int h = W / 2>
IOL_INLINE float largest(vf v) {
    v = max(v, swap_lanes<h>(v, AllLanes{}));
    if constexpr (h > 1) return largest<h / 2>(v);
    return v[0];
}

// e^x within 1.2e-7 of it relatively, for x up to 88; 0 below -87.3 (where e^x leaves the normal floats), NaN for NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by the polynomial of Cephes' expf, 2^n put together from its bits.
IOL_INLINE vf exp(vf x) {
    const vf magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
    vf clamped = x > 88.0f ? all(88.0f) : x;
    clamped = clamped < -87.3f ? all(-87.3f) : clamped;
    vf shifted = clamped * 1.44269504088896341f + magic;
    vf n = shifted - magic;
    vf r = clamped - n * 0.693359375f;  // ln 2 in two parts, the first of few bits, so that this product is exact
    r = r + n * 2.12194440e-4f;
    vf p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r;
    p = p + 1.0f;
    vi exponent = ((vi)shifted - (vi)magic + 127) << 23;
    return select(x < -87.3f, vf{}, p * (vf)exponent);
}

IOL_INLINE float exp(float x) { return exp(all(x))[0]; }

// tanh x within 3e-7 of it relatively: a polynomial near 0, where the other form would cancel.
IOL_INLINE vf tanh(vf x) {
    vf size = x < 0.0f ? -x : x;
    vf far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
    far = x < 0.0f ? -far : far;
    vf z = x * x;
    vf p = all(-5.70498872745e-3f);  // Cephes' tanhf, |x| < 0.625
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    return select(size < 0.625f, x + x * (z * p), far);
}

// The first n lanes of memory, n < W, the others zero; and their counterpart.
IOL_INLINE vf load_first(const float* p, int64_t n) {
    vf v{};
    for (int64_t i = 0; i < n; i++) v[i] = p[i];
    return v;
}

IOL_INLINE void store_first(float* p, vf v, int64_t n) {
    for (int64_t i = 0; i < n; i++) p[i] = v[i];
}

}  // namespace
