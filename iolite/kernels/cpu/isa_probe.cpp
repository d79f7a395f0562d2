// What the processor can do at best: reading memory, and int8 dot products in registers.
#include "kernels.h"
#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace {

typedef uint64_t vq __attribute__((vector_size(4 * W)));
constexpr int kStreams = 8;  // vectors added up side by side, so that no addition waits for the one before

template <int ahead, int locality>
uint64_t sum_of(const uint8_t* p, int64_t bytes) {
    vq sums[kStreams] = {};
    constexpr int64_t step = kStreams * (int64_t)sizeof(vq);
    for (int64_t at = 0; at < bytes; at += step) {
        if (ahead) {
            for (int64_t line = 0; line < step; line += 64) __builtin_prefetch(p + at + ahead + line, 0, locality);
        }
        for (int i = 0; i < kStreams; i++) {
            vq v;
            __builtin_memcpy(&v, p + at + i * (int64_t)sizeof v, sizeof v);
            sums[i] += v;
        }
    }
    uint64_t total = 0;
    for (const vq& sum : sums) {
        for (size_t i = 0; i < sizeof(vq) / 8; i++) total += sum[i];
    }
    return total;
}

constexpr int kChains = 12;  // of dependent products: more than latency times products at a time

#if defined(__AVX512VNNI__)
typedef __m512i Register;
IOL_INLINE Register filled(int8_t x) { return _mm512_set1_epi8(x); }
IOL_INLINE Register dot(Register sum, Register a, Register b) { return _mm512_dpbusd_epi32(sum, a, b); }
IOL_INLINE void hide(Register& r) { asm volatile("" : "+v"(r)); }
#elif defined(__AVX2__)
typedef __m256i Register;
IOL_INLINE Register filled(int8_t x) { return _mm256_set1_epi8(x); }
IOL_INLINE Register dot(Register sum, Register a, Register b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
IOL_INLINE void hide(Register& r) { asm volatile("" : "+x"(r)); }
#elif defined(__ARM_FEATURE_DOTPROD)
typedef int32x4_t Register;
IOL_INLINE Register filled(int8_t x) { return vreinterpretq_s32_s8(vdupq_n_s8(x)); }
IOL_INLINE Register dot(Register sum, Register a, Register b) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
}
IOL_INLINE void hide(Register& r) { asm volatile("" : "+w"(r)); }
#else
struct Register {
    int32_t sum[4];
    int8_t bytes[16];
};
IOL_INLINE Register filled(int8_t x) {
    Register r{};
    for (int8_t& byte : r.bytes) byte = x;
    return r;
}
IOL_INLINE Register dot(Register sum, const Register& a, const Register& b) {
    for (int i = 0; i < 16; i++) sum.sum[i / 4] += a.bytes[i] * b.bytes[i];
    return sum;
}
IOL_INLINE void hide(Register& r) { asm volatile("" : "+m"(r)); }
#endif

}  // namespace

namespace iol {
namespace IOL_ISA {

uint64_t read_memory(const uint8_t* p, int64_t bytes, int way) {
    if (way == 0) return sum_of<0, 3>(p, bytes);  // left to the processor's own prefetching
    return way == 1 ? sum_of<2304, 3>(p, bytes) : sum_of<1024, 0>(p, bytes);
}

int64_t multiply_int8(int64_t rounds, int32_t* sink) {
    Register sums[kChains], a = filled(3), b = filled(5);
    for (Register& sum : sums) sum = filled(0);
    for (int64_t i = 0; i < rounds; i++) {
        hide(a);  // the compiler must not know that every round is the same
        hide(b);
        for (Register& sum : sums) sum = dot(sum, a, b);
    }
    for (Register& sum : sums) hide(sum);
    __builtin_memcpy(sink, &sums[0], sizeof *sink);
#if defined(__AVX2__)
    return rounds * kChains * (int64_t)sizeof(Register);
#else
    return rounds * kChains * 16;
#endif
}

}  // namespace IOL_ISA
}  // namespace iol
