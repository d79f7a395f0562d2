// A pool whose workers wait for the next job in a short spin, since the jobs of a model's step follow each other within
// microseconds, and sleep when none comes.
//
// A job is announced by one atomic number: its generation, and the next task to be taken. A worker takes a task by
// raising that number in a compare-and-swap, which fails when the job has changed meanwhile. So a worker that wakes up
// late neither delays the job it missed nor takes part in the next one by mistake, and the caller waits for finished
// tasks, not for threads.
#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <set>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

// How long a worker spins before it sleeps. Waking it again costs some 30 µs, as much as a small kernel takes.
constexpr auto kSpin = std::chrono::microseconds(2000);

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");  // a few tens of cycles; `yield` is nothing at all on most cores
#endif
}

#if defined(__linux__)

std::string first_line(const std::string& path) {
    std::string text;
    if (FILE* file = std::fopen(path.c_str(), "r")) {
        char line[256];
        if (std::fgets(line, sizeof line, file)) text = line;
        std::fclose(file);
    }
    return text;
}

// Processors that a container's quota leaves, rounded up, or 0 when there is no quota.
int quota() {
    long long most = 0, period = 0;
    const std::string v2 = first_line("/sys/fs/cgroup/cpu.max");  // "max 100000" or "150000 100000"
    if (std::sscanf(v2.c_str(), "%lld %lld", &most, &period) != 2) {
        std::sscanf(first_line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").c_str(), "%lld", &most);
        std::sscanf(first_line("/sys/fs/cgroup/cpu/cpu.cfs_period_us").c_str(), "%lld", &period);
    }
    return most > 0 && period > 0 ? (int)((most + period - 1) / period) : 0;
}

// Cores that this process may run on, those that share their arithmetic counted once.
int physical_cores() {
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed)) return (int)std::thread::hardware_concurrency();
    std::set<std::string> cores;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &allowed)) continue;
        const std::string folder = "/sys/devices/system/cpu/cpu" + std::to_string(cpu);
        const std::string siblings = first_line(folder + "/topology/thread_siblings_list");
        cores.insert(siblings.empty() ? std::to_string(cpu) : siblings);
    }
    const int limit = quota();
    return limit && limit < (int)cores.size() ? limit : (int)cores.size();
}

#elif defined(__APPLE__)

int physical_cores() {
    int count = 0;
    size_t size = sizeof count;
    // The fast cores only: with chunks taken as threads come free the slow ones would help little and heat much.
    if (sysctlbyname("hw.perflevel0.physicalcpu", &count, &size, nullptr, 0)) {
        size = sizeof count;
        if (sysctlbyname("hw.physicalcpu", &count, &size, nullptr, 0)) count = 0;
    }
    return count;
}

#else

int physical_cores() { return (int)std::thread::hardware_concurrency(); }

#endif

}  // namespace

struct iol_pool {
    explicit iol_pool(int threads) {
        try {
            for (int i = 1; i < threads; i++) workers.emplace_back([this, i] { live(i); });
        } catch (const std::system_error&) {
            // The system gives no more threads; those that are there do the work.
        }
    }

    ~iol_pool() {
        {
            std::lock_guard<std::mutex> guard(sleep);
            stop.store(true);
        }
        wake.notify_all();
        for (std::thread& worker : workers) worker.join();
    }

    void run(int64_t count, iol_task function, void* argument) {
        std::lock_guard<std::mutex> guard(turn);
        const uint64_t generation = (ticket.load(std::memory_order_relaxed) >> 32) + 1;
        // While the next task is kClosed nobody takes one, and nobody's compare-and-swap for the old job succeeds. The
        // fence and the one in take(): who sees a field of this job no longer sees the ticket of the old one.
        ticket.store(generation << 32 | kClosed, std::memory_order_relaxed);
        std::atomic_thread_fence(std::memory_order_release);
        work.store(function, std::memory_order_relaxed);
        context.store(argument, std::memory_order_relaxed);
        tasks.store((uint32_t)count, std::memory_order_relaxed);
        finished.store(0, std::memory_order_relaxed);
        ticket.store(generation << 32, std::memory_order_seq_cst);
        if (sleeping.load(std::memory_order_seq_cst)) {
            { std::lock_guard<std::mutex> asleep(sleep); }
            wake.notify_all();
        }
        while (take(0)) {
        }
        const auto begin = Clock::now();
        for (int i = 0; finished.load(std::memory_order_acquire) != count; i++) {
            relax();
            if (i % 64 == 63 && Clock::now() - begin > kSpin) std::this_thread::yield();
        }
    }

    int threads() const { return (int)workers.size() + 1; }

   private:
    static constexpr uint64_t kClosed = 0xffffffff;

    // Does one task of the current job, if any is left.
    bool take(int thread) {
        uint64_t seen = ticket.load(std::memory_order_acquire);
        for (;;) {
            const iol_task function = work.load(std::memory_order_relaxed);
            void* const argument = context.load(std::memory_order_relaxed);
            if ((seen & kClosed) >= tasks.load(std::memory_order_relaxed)) return false;
            // Success says that the job was still this one after its fields had been read.
            std::atomic_thread_fence(std::memory_order_acquire);
            if (ticket.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
                function(argument, (int64_t)(seen & kClosed), thread);
                finished.fetch_add(1, std::memory_order_release);
                return true;
            }
        }
    }

    // A worker's life. Generations tell a job from the one before: what it has looked at needs no second look. A job
    // that is only being announced has not been looked at, or the worker would wait for the next one and miss it.
    void live(int thread) {
        uint64_t looked_at = 0;
        while (!stop.load(std::memory_order_relaxed)) {
            const uint64_t now = ticket.load(std::memory_order_acquire);
            if (is_open(now)) looked_at = now >> 32;
            while (take(thread)) {
            }
            await(looked_at);
        }
    }

    static bool is_open(uint64_t ticket) { return (ticket & kClosed) != kClosed; }

    void await(uint64_t looked_at) {
        const auto changed = [&] {
            const uint64_t now = ticket.load(std::memory_order_seq_cst);
            return (is_open(now) && now >> 32 != looked_at) || stop.load();
        };
        const auto begin = Clock::now();
        for (int i = 0; !changed(); i++) {
            relax();
            if (i % 64 == 63 && Clock::now() - begin > kSpin) {
                std::unique_lock<std::mutex> guard(sleep);
                sleeping.fetch_add(1, std::memory_order_seq_cst);
                wake.wait(guard, changed);
                sleeping.fetch_sub(1, std::memory_order_seq_cst);
                return;
            }
        }
    }

    alignas(64) std::atomic<uint64_t> ticket{kClosed};  // generation << 32 | next task
    alignas(64) std::atomic<int64_t> finished{0};
    alignas(64) std::atomic<iol_task> work{nullptr};
    std::atomic<void*> context{nullptr};
    std::atomic<uint32_t> tasks{0};
    std::atomic<bool> stop{false};
    std::atomic<int> sleeping{0};
    std::mutex turn;   // held by the caller whose job it is
    std::mutex sleep;  // of the condition below
    std::condition_variable wake;
    std::vector<std::thread> workers;
};

void iol_parallel(iol_pool* pool, int64_t tasks, iol_task work, void* context) {
    if (tasks < 2 || pool->threads() == 1) {
        for (int64_t task = 0; task < tasks; task++) work(context, task, 0);
        return;
    }
    pool->run(tasks, work, context);
}

iol_pool* iol_pool_create(int threads) {
    const int count = threads > 0 ? threads : physical_cores();
    return new iol_pool(count > 0 ? count : 1);
}

void iol_pool_destroy(iol_pool* pool) { delete pool; }

int iol_pool_threads(const iol_pool* pool) { return pool->threads(); }
