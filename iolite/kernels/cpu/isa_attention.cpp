// Attention over a cache: how a call is cut into tasks, and how their sums are put together.
//
// The mask is the one of `may_look` in iolite/kernels/reference.py. Key blocks that no row of a task looks at are never
// read. With few tasks, as when one token is decoded, the keys are cut into ranges as well, and what each range found
// is merged: sums about different maxima, scaled to the largest.
#include "attention_few.h"
#include "attention_pairs.h"
#include "attention_parts.h"
#include "attention_tile.h"
#include "scratch.h"
#include "tasks.h"

namespace {

constexpr int64_t kLeastRange = 128;  // keys

// Ways to compute attention. -> the files attention_*.h
enum class Way { kFew, kPairs, kTile };

struct Plan {
    const iol_attention_args* args;
    Way way;
    int64_t rows, row_blocks;  // of a key-value head: rows in a task, and how many tasks make up all rows
    int64_t ranges;            // of the keys
    int64_t stride;            // of a row of sums
    int64_t sums;              // floats that a task's sums take
    float* shared;             // sums of all tasks, when there are several ranges

    int64_t head_rows() const { return args->N * (args->H / args->K); }
    Sums sums_at(float* memory) const { return {memory, memory + rows * stride, memory + rows * (stride + 1), stride}; }
    Sums sums_of(int64_t block, int64_t head, int64_t range) const {
        return sums_at(shared + ((block * args->K + head) * ranges + range) * sums);
    }
};

Way way_of(const iol_attention_args& a, int64_t rows) {
    if (a.D % 64 != 0) return Way::kTile;
    if (rows <= kFewRows) return Way::kFew;
    return a.N <= kPairTokens && a.kv_type != 0 && has_pairs() ? Way::kPairs : Way::kTile;
}

Plan make_plan(const iol_attention_args& a, int64_t threads, bool alone) {
    Plan plan{};
    plan.args = &a;
    const int64_t rows = plan.head_rows();
    plan.way = way_of(a, rows);
    plan.rows = round_up(ceil_div(rows, ceil_div(rows, kRows)), W);
    plan.row_blocks = ceil_div(rows, plan.rows);
    plan.stride = round_up(a.D, kStrip);
    plan.sums = round_up(plan.rows * (plan.stride + 2), 16);
    const int64_t tasks = plan.row_blocks * a.K, span = a.window ? min(a.keys, a.window + a.N) : a.keys;
    const bool split = !alone && threads > 1 && tasks < 2 * threads;
    plan.ranges = split ? max(1, min(ceil_div(2 * threads, tasks), span / kLeastRange)) : 1;
    return plan;
}

// out[i] = mean[i] / mass. A row that may look at nothing gets zeros.
void divide(const float* mean, float mass, int64_t D, float* out) {
    const float scale = mass > 0 ? 1.0f / mass : mass == 0 ? 0.0f : mass;
    for (int64_t d = 0; d < D; d++) out[d] = mean[d] * scale;
}

// Floats of memory that a task wants besides its sums.
int64_t task_floats(const Plan& plan) {
    if (plan.way == Way::kFew) return 0;
#ifdef IOL_HAS_PAIRS
    if (plan.way == Way::kPairs) return pair_floats(plan.rows, plan.args->D);
#endif
    return tile_floats(plan.rows, plan.args->D);
}

template <class T>
void attend(Way way, const Task<T>& task, const Looks& looks, float* memory) {
    if (way == Way::kFew) return attend_few(task, looks);
#ifdef IOL_HAS_PAIRS
    if constexpr (sizeof(T) < sizeof(float)) {
        if (way == Way::kPairs) return attend_pairs(task, looks, memory);
    }
#endif
    attend_tile(task, looks, memory);
}

template <class T>
void run_task(const Plan& plan, int64_t block, int64_t head, int64_t range) {
    const iol_attention_args& a = *plan.args;
    Task<T> task{};
    task.args = &a, task.head = head;
    task.row = block * plan.rows, task.rows = min(plan.rows, plan.head_rows() - task.row);
    Looks looks;
    find_looks(a, task.row, task.rows, looks);
    const int64_t each = round_up(ceil_div(max(0, looks.end - looks.begin), plan.ranges), 16);
    task.key_begin = looks.begin + range * each;
    task.key_end = min(looks.end, task.key_begin + each);
    const int64_t own = plan.ranges == 1 ? plan.sums : 0;
    float* memory = (float*)iol_scratch(IOL_SCRATCH_TASK, sizeof(float) * (size_t)(own + task_floats(plan)));
    task.sums = own ? plan.sums_at(memory) : plan.sums_of(block, head, range);
    attend(plan.way, task, looks, memory + own);
    if (plan.ranges > 1) return;
    for (int64_t r = 0; r < task.rows; r++) {
        float* out = a.out + (task.query(r) - a.q);
        divide(task.sums.mean + r * plan.stride, task.sums.mass[r], a.D, out);
    }
}

// The output of query i, head h, from the sums of all ranges.
void merge(const Plan& plan, int64_t i, int64_t h) {
    const iol_attention_args& a = *plan.args;
    const int64_t G = a.H / a.K, row = i * G + h % G, block = row / plan.rows, r = row % plan.rows;
    float most = kNone, mass = 0;
    for (int64_t range = 0; range < plan.ranges; range++) most = max(plan.sums_of(block, h / G, range).most[r], most);
    const float base = most == kNone ? 0.0f : most;
    float* out = a.out + (i * a.H + h) * a.D;
    __builtin_memset(out, 0, sizeof(float) * (size_t)a.D);
    for (int64_t range = 0; range < plan.ranges; range++) {
        const Sums sums = plan.sums_of(block, h / G, range);
        const float scale = exp(sums.most[r] - base), *mean = sums.mean + r * plan.stride;
        mass += sums.mass[r] * scale;
        for (int64_t d = 0; d < a.D; d++) out[d] += mean[d] * scale;
    }
    divide(out, mass, a.D, out);
}

template <class T>
void run(iol_pool* pool, const iol_attention_args& a) {
    const int64_t span = a.window ? min(a.keys, a.window + a.N) : a.keys;
    const bool alone = a.N * a.H * a.D * span < 8 * kTask;  // products with keys and as many with values
    Plan plan = make_plan(a, iol_pool_threads(pool), alone);
    const int64_t tasks = plan.row_blocks * a.K * plan.ranges;
    if (plan.ranges > 1) {
        plan.shared = (float*)iol_scratch(IOL_SCRATCH_SHARED, sizeof(float) * (size_t)(tasks * plan.sums));
    }
    for_tasks(pool, tasks, alone, [&](int64_t task) {
        const int64_t group = task / plan.ranges;
        const int64_t block = plan.row_blocks - 1 - group / a.K;  // the longest first: the last rows see the most keys
        run_task<T>(plan, block, group % a.K, task % plan.ranges);
    });
    if (plan.ranges == 1) return;
    for_ranges(pool, a.N * a.H, plan.ranges * a.D, [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; at++) merge(plan, at / a.H, at % a.H);
    });
}

}  // namespace

namespace iol {
namespace IOL_ISA {

void attention(iol_pool* pool, const iol_attention_args* args) {
    if (args->N == 0 || args->H == 0 || args->D == 0) return;
    if (args->kv_type == 0) {
        run<float>(pool, *args);
    } else if (args->kv_type == 1) {
        run<bf16>(pool, *args);
    } else {
        run<int8_t>(pool, *args);
    }
}

}  // namespace IOL_ISA
}  // namespace iol
