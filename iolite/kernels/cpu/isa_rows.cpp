// Work on rows and on single numbers: norms, rope, gated gelu, softcap. Formulas: iolite/kernels/reference.py.
#include "gelu.h"
#include "simd.h"
#include "tasks.h"

namespace {

// 1 / sqrt(mean(x²) + eps)
float inverse_rms(const float* x, int64_t size, float eps) {
    vf s[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= size; i += 4 * W) {
        for (int j = 0; j < 4; j++) {
            const vf v = load(x + i + j * W);
            s[j] += v * v;
        }
    }
    for (; i < size; i += W) {
        const vf v = i + W <= size ? load(x + i) : load_first(x + i, size - i);
        s[0] += v * v;
    }
    return 1.0f / __builtin_sqrtf(sum((s[0] + s[1]) + (s[2] + s[3])) / (float)size + eps);
}

// out[i] = f(whole vectors at i) over size numbers; the tail goes through f with zeros behind it.
template <class F>
IOL_INLINE void map(float* out, int64_t size, const F& f) {
    int64_t i = 0;
    for (; i + W <= size; i += W) store(out + i, f([=](const float* p) { return load(p + i); }));
    if (i < size) store_first(out + i, f([=](const float* p) { return load_first(p + i, size - i); }), size - i);
}

void norm_row(const float* x, const float* weight, float eps, int64_t size, float* out) {
    const float scale = inverse_rms(x, size, eps);
    if (weight) {
        map(out, size, [=](auto at) { return at(x) * scale * at(weight); });
    } else {
        map(out, size, [=](auto at) { return at(x) * scale; });
    }
}

// Pair j is (x[j], x[j + half]).
void turn(float* x, const float* cos, const float* sin, int64_t half) {
    float* y = x + half;
    int64_t j = 0;
    for (; j + W <= half; j += W) {
        const vf a = load(x + j), b = load(y + j), c = load(cos + j), s = load(sin + j);
        store(x + j, a * c - b * s);
        store(y + j, b * c + a * s);
    }
    for (; j < half; j++) {
        const float a = x[j], b = y[j];
        x[j] = a * cos[j] - b * sin[j];
        y[j] = b * cos[j] + a * sin[j];
    }
}

}  // namespace

namespace iol {
namespace IOL_ISA {

void rms_norm(iol_pool* pool, const float* x, const float* weight, float eps, int64_t n, int64_t size, float* out) {
    for_ranges(pool, n, 2 * size, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) norm_row(x + i * size, weight, eps, size, out + i * size);
    });
}

void add_rms_norm(iol_pool* pool, const float* residual, const float* x, const float* weight, float eps, float scale,
                  int64_t n, int64_t size, float* out) {
    for_ranges(pool, n, 3 * size, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin * size; i < end * size; i += size) {
            const float *xi = x + i, *ri = residual + i;
            const float inverse = inverse_rms(xi, size, eps);
            map(out + i, size, [=](auto at) { return (at(ri) + at(xi) * inverse * at(weight)) * scale; });
        }
    });
}

void norm_rope(iol_pool* pool, const float* x, int64_t x_stride, const float* weight, float eps, const float* cos,
               const float* sin, int64_t n, int64_t heads, int64_t D, float* out) {
    for_ranges(pool, n, 3 * heads * D, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            for (int64_t h = 0; h < heads; h++) {
                float* head = out + (i * heads + h) * D;
                norm_row(x + i * x_stride + h * D, weight, eps, D, head);
                if (cos) turn(head, cos + i * (D / 2), sin + i * (D / 2), D / 2);
            }
        }
    });
}

// The ranges of the next two are whole vectors, so that only the last has a tail.
void geglu(iol_pool* pool, const float* gate, const float* up, int64_t count, float* out) {
    for_ranges(pool, ceil_div(count, W), 8 * W, [=](int64_t begin, int64_t end) {
        const int64_t first = begin * W, size = min(end * W, count) - first;
        const float *g = gate + first, *u = up + first;
        map(out + first, size, [=](auto at) { return gelu(at(g)) * at(u); });
    });
}

void softcap(iol_pool* pool, const float* x, float cap, int64_t count, float* out) {
    for_ranges(pool, ceil_div(count, W), 8 * W, [=](int64_t begin, int64_t end) {
        const int64_t first = begin * W, size = min(end * W, count) - first;
        const float* xs = x + first;
        map(out + first, size, [=](auto at) { return cap * tanh(at(xs) / cap); });
    });
}

}  // namespace IOL_ISA
}  // namespace iol
