// Calls kernels on behalf of a test: reads calls from stdin, writes what they put out to stdout. So a library for another
// processor is tested under an emulator, from the same Python.
//
// A call is its name and its arguments in order; a number is 8 bytes (int64 or double), an array its size in bytes (-1
// for null) and the bytes. The reply is one array.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "iolite.h"

namespace {

void read_bytes(void* to, size_t size) {
    if (std::fread(to, 1, size, stdin) != size) std::exit(0);
}

template <class T>
T number() {
    T value;
    read_bytes(&value, sizeof value);
    return value;
}

int64_t size() { return number<int64_t>(); }
float real() { return (float)number<double>(); }

struct Array {
    std::vector<char> bytes;
    bool null;

    Array() : null(false) {
        const int64_t count = size();
        null = count < 0;
        bytes.resize(null ? 0 : count);
        read_bytes(bytes.data(), bytes.size());
    }
    template <class T>
    const T* as() const {
        return null ? nullptr : (const T*)bytes.data();
    }
};

void reply(const void* data, int64_t bytes) {
    std::fwrite(&bytes, sizeof bytes, 1, stdout);
    std::fwrite(data, 1, bytes, stdout);
    std::fflush(stdout);
}

void reply(const std::vector<float>& out) { reply(out.data(), out.size() * sizeof(float)); }

struct Matrix {
    Array data;
    iol_matrix w;

    Matrix() : w{data.as<char>(), size(), 0, 0} { w.cols = size(), w.format = (int32_t)size(); }
};

// x, its tokens, how many matrices, and each of those. The results follow one another.
void linear(iol_pool* pool) {
    const Array x;
    const int64_t n = size(), count = size();
    const std::vector<Matrix> matrices(count);
    std::vector<iol_matrix> w;
    std::vector<int64_t> strides;
    int64_t total = 0;
    for (const Matrix& matrix : matrices) {
        w.push_back(matrix.w);
        strides.push_back(matrix.w.rows);
        total += n * matrix.w.rows;
    }
    std::vector<float> out(total);
    std::vector<float*> outs;
    float* at = out.data();
    for (const iol_matrix& matrix : w) {
        outs.push_back(at);
        at += n * matrix.rows;
    }
    iol_linear(pool, x.as<float>(), w[0].cols, n, count, w.data(), outs.data(), strides.data());
    reply(out);
}

void gated(iol_pool* pool) {
    const Array x;
    const int64_t n = size();
    const Matrix gate, up;
    std::vector<float> out(n * gate.w.rows);
    iol_gated(pool, x.as<float>(), gate.w.cols, n, &gate.w, &up.w, out.data(), gate.w.rows);
    reply(out);
}

void attention(iol_pool* pool) {
    const Array q, k, v, blocks, k_scale, v_scale;
    iol_attention_args a{};
    a.k_scale = k_scale.as<float>(), a.v_scale = v_scale.as<float>();
    a.q = q.as<float>(), a.k = k.as<char>(), a.v = v.as<char>(), a.blocks = blocks.as<int64_t>();
    a.kv_type = (int32_t)size();
    for (int64_t* field : {&a.k_row, &a.k_head, &a.v_row, &a.v_head, &a.scale_row, &a.scale_head, &a.N, &a.H, &a.K, &a.D,
                           &a.keys, &a.first, &a.room, &a.past, &a.window}) {
        *field = size();
    }
    std::vector<float> out(a.N * a.H * a.D);
    a.out = out.data();
    iol_attention(pool, &a);
    reply(out);
}

void call(const std::string& name, iol_pool*& pool) {
    if (name == "use") {
        const Array isa;
        const int64_t threads = size(), status = iol_use_isa(std::string(isa.as<char>(), isa.bytes.size()).c_str());
        iol_pool_destroy(pool);
        pool = iol_pool_create((int)threads);
        reply(&status, sizeof status);
    } else if (name == "linear") {
        linear(pool);
    } else if (name == "gated") {
        gated(pool);
    } else if (name == "rms_norm") {
        const Array x, w;
        const float eps = real();
        const int64_t n = size(), row = size();
        std::vector<float> out(n * row);
        iol_rms_norm(pool, x.as<float>(), w.as<float>(), eps, n, row, out.data());
        reply(out);
    } else if (name == "add_rms_norm") {
        const Array residual, x, w;
        const float eps = real(), scale = real();
        const int64_t n = size(), row = size();
        std::vector<float> out(n * row);
        iol_add_rms_norm(pool, residual.as<float>(), x.as<float>(), w.as<float>(), eps, scale, n, row, out.data());
        reply(out);
    } else if (name == "norm_rope") {
        const Array x, w, cos, sin;
        const float eps = real();
        const int64_t stride = size(), n = size(), heads = size(), D = size();
        std::vector<float> out(n * heads * D);
        iol_norm_rope(pool, x.as<float>(), stride, w.as<float>(), eps, cos.as<float>(), sin.as<float>(), n, heads, D,
                      out.data());
        reply(out);
    } else if (name == "geglu") {
        const Array gate, up;
        std::vector<float> out(gate.bytes.size() / sizeof(float));
        iol_geglu(pool, gate.as<float>(), up.as<float>(), out.size(), out.data());
        reply(out);
    } else if (name == "softcap") {
        const Array x;
        std::vector<float> out(x.bytes.size() / sizeof(float));
        iol_softcap(pool, x.as<float>(), real(), out.size(), out.data());
        reply(out);
    } else if (name == "embed") {
        const Array data, ids;
        const int64_t rows = size(), cols = size(), format = size(), n = ids.bytes.size() / sizeof(int64_t);
        const iol_matrix w{data.as<char>(), rows, cols, (int32_t)format};
        std::vector<float> out(n * cols);
        iol_embed(pool, &w, ids.as<int64_t>(), n, real(), out.data());
        reply(out);
    } else if (name == "attention") {
        attention(pool);
    } else {
        std::fprintf(stderr, "no kernel %s\n", name.c_str());
        std::exit(1);
    }
}

}  // namespace

int main() {
    iol_pool* pool = iol_pool_create(1);
    for (;;) {
        const Array name;
        call(std::string(name.as<char>(), name.bytes.size()), pool);
    }
}
