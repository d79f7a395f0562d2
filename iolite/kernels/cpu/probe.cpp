// The machine's rates, measured by all threads of a pool.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "share.h"

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

double median(std::vector<double> values) {
    std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
    return values[values.size() / 2];
}

constexpr int64_t kPiece = 128 << 10;  // what a thread claims at a time, as in a product

struct Memory {
    const uint8_t* data;
    int64_t bytes;
};

volatile uint64_t sink;

}  // namespace

namespace {

// GB/s of one reading of all pieces.
double read_all(iol_pool* pool, const Memory& memory, int way) {
    const iol_kernels& kernels = iol_active();
    const auto start = Clock::now();
    share(pool, memory.bytes / kPiece, 1, [&](int64_t first, int64_t last) {
        sink = kernels.read_memory(memory.data + first * kPiece, (last - first) * kPiece, way);
    });
    return (double)memory.bytes / seconds_since(start) / 1e9;
}

// The way to read that is fastest here, found once: the best of several at every call would be the luckiest.
int best_way(iol_pool* pool, const Memory& memory) {
    static std::atomic<int> found{-1};
    if (found.load() >= 0) return found.load();
    std::vector<double> rates[IOL_READ_WAYS];
    for (int round = 0; round < 5; round++) {
        for (int way = 0; way < IOL_READ_WAYS; way++) rates[way].push_back(read_all(pool, memory, way));
    }
    int best = 0;
    for (int way = 1; way < IOL_READ_WAYS; way++) {
        if (median(rates[way]) > median(rates[best])) best = way;
    }
    found.store(best);
    return best;
}

}  // namespace

double iol_probe_bandwidth(iol_pool* pool, const void* data, int64_t bytes, double seconds) {
    const Memory memory{(const uint8_t*)data, bytes / kPiece * kPiece};
    const int way = best_way(pool, memory);
    std::vector<double> rates;
    const auto begin = Clock::now();
    do rates.push_back(read_all(pool, memory, way));
    while (seconds_since(begin) < seconds);
    return median(rates);
}

double iol_probe_int8(iol_pool* pool, double seconds) {
    const iol_kernels& kernels = iol_active();
    const int64_t tasks = 4 * iol_pool_threads(pool);
    int64_t rounds = 1 << 10;
    std::vector<double> rates;
    const auto begin = Clock::now();
    do {
        int64_t products = 0;
        const auto start = Clock::now();
        share(pool, tasks, 1, [&](int64_t, int64_t) {
            int32_t sum;
            const int64_t made = kernels.multiply_int8(rounds, &sum);
            sink = (uint64_t)sum;
            __atomic_fetch_add(&products, made, __ATOMIC_RELAXED);
        });
        const double took = seconds_since(start);
        if (took < seconds / 32) {
            rounds *= 2;  // too short to be a measurement
        } else {
            rates.push_back((double)products / took / 1e9);
        }
    } while (seconds_since(begin) < seconds || rates.empty());
    return median(rates);
}
