// pm_experts: all chosen experts of one MoE layer in one region of three phases.
//
//   0  quantise the tokens' rows                                  (by the caller beforehand, if they are few)
//   1  32 hidden units of one expert: gate and up rows, activation, quantised: one group of the down projection's input
//   2  some blocks of rows of one expert's down projection
//
// An item of phase 2 waits for its own expert's items of phase 1 only, so threads flow from one phase into the next.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "layers.h"
#include "layout.h"

namespace pm {
namespace {

constexpr int64_t TILE_ROWS = 64;         // rows of activations whose gate and up values are kept in the L1 cache
constexpr int64_t ITEM_ROWS = 128;        // rows of activations of one item
constexpr int64_t TOKENS_PER_ITEM = 8;
constexpr int64_t SERIAL_TOKENS = 4;
constexpr int64_t DOWN_ITEM_BYTES = 48 * 1024;

struct JobState {
    std::atomic<int64_t> finished;  // items of phase 1
    int64_t first[2];               // number of the job's first item in phases 1 and 2
    int64_t row_chunks;             // items per chunk of weights
    int64_t gate_up_items;
};

struct Region {
    const Isa* isa;
    const pm_expert_spec* spec;
    Matrix inner, outer;  // gate and up; down
    const float* hidden;
    int64_t tokens;
    const int32_t* rows;
    const pm_job* jobs;
    int64_t n_jobs;
    float* out;
    Group* x;             // [tokens, inner.activation_groups()]
    Group* h;             // [R, outer.activation_groups()]
    JobState* state;
    int64_t down_blocks;  // blocks of one item of phase 2
    int64_t token_items;
    std::atomic<int64_t> quantized{0};
};

const float* bias_at(const uint8_t* record, int64_t offset) {
    return offset < 0 ? nullptr : reinterpret_cast<const float*>(record + offset);
}

// The job that an item of phase 1 or 2 belongs to.
int64_t job_of(const Region& r, int phase, int64_t item) {
    int64_t low = 0, high = r.n_jobs - 1;
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (r.state[middle].first[phase - 1] <= item) low = middle;
        else high = middle - 1;
    }
    return low;
}

void quantize_tokens(Region& r, int64_t begin, int64_t end) {
    const int64_t groups = r.inner.activation_groups();
    for (int64_t t = begin; t < end; t++)
        r.isa->quantize(r.hidden + t * r.inner.cols, r.inner.cols, groups, r.inner.zero(), r.x + t * groups);
}

// One group of 32 hidden units for rows [begin, end) of a job.
void gate_up(const Region& r, const pm_job& job, int64_t unit, int64_t begin, int64_t end) {
    const pm_expert_spec& spec = *r.spec;
    const int64_t groups = r.outer.activation_groups();
    float gate[TILE_ROWS * COLUMNS], up[TILE_ROWS * COLUMNS];
    if ((unit + 1) * COLUMNS > r.inner.rows) {  // hidden units that do not exist are zero
        std::memset(gate, 0, sizeof gate);
        std::memset(up, 0, sizeof up);
    }
    const int64_t first_block = unit * 2;
    const int64_t last_block = std::max(first_block, std::min(first_block + 2, r.inner.blocks()));
    for (int64_t row = begin; row < end; row += TILE_ROWS) {
        const int64_t count = std::min(TILE_ROWS, end - row);
        for (int which = spec.gate < 0 ? 1 : 0; which < 2; which++) {
            const uint8_t* packed = job.record + (which ? spec.up : spec.gate);
            const float* bias = bias_at(job.record, which ? spec.up_bias : spec.gate_bias);
            DotArgs args = r.inner.block_args(packed, first_block, last_block, bias);
            args.x = r.x;
            args.x_stride = r.inner.activation_groups();
            args.index = r.rows + job.start + row;
            args.count = count;
            args.out = which ? up : gate;
            args.out_stride = COLUMNS;
            r.isa->dot(args);
        }
        ActivateArgs args = {};
        args.activation = spec.activation;
        args.alpha = spec.alpha;
        args.limit = spec.limit;
        args.zero = r.outer.zero();
        args.gate = spec.gate < 0 ? nullptr : gate;
        args.up = up;
        args.count = count;
        args.out = r.h + (job.start + row) * groups + unit;
        args.out_stride = groups;
        r.isa->activate(args);
    }
}

void down(const Region& r, const pm_job& job, int64_t first_block, int64_t begin, int64_t end) {
    const pm_expert_spec& spec = *r.spec;
    const int64_t groups = r.outer.activation_groups();
    const int64_t last_block = std::min(first_block + r.down_blocks, r.outer.blocks());
    const float* bias = bias_at(job.record, spec.down_bias);
    DotArgs args = r.outer.block_args(job.record + spec.down, first_block, last_block, bias);
    args.x = r.h + (job.start + begin) * groups;
    args.x_stride = groups;
    args.count = end - begin;
    args.out = r.out + (job.start + begin) * r.outer.rows + first_block * ROW_BLOCK;
    args.out_stride = r.outer.rows;
    r.isa->dot(args);
}

void body(void* region, int phase, int64_t item, int) {
    Region& r = *static_cast<Region*>(region);
    if (phase == 0) {
        const int64_t begin = item * TOKENS_PER_ITEM, end = std::min(begin + TOKENS_PER_ITEM, r.tokens);
        quantize_tokens(r, begin, end);
        r.quantized.fetch_add(1, std::memory_order_release);
        return;
    }
    const int64_t number = job_of(r, phase, item);
    const pm_job& job = r.jobs[number];
    JobState& state = r.state[number];
    const int64_t index = item - state.first[phase - 1];
    const int64_t begin = index % state.row_chunks * ITEM_ROWS, end = std::min(begin + ITEM_ROWS, job.count);
    if (phase == 1) {
        Pool::wait_for(r.quantized, r.token_items);
        gate_up(r, job, index / state.row_chunks, begin, end);
        state.finished.fetch_add(1, std::memory_order_release);
    } else {
        Pool::wait_for(state.finished, state.gate_up_items);
        down(r, job, index / state.row_chunks * r.down_blocks, begin, end);
    }
}

}  // namespace

bool fits(const pm_expert_spec& s) {
    const bool gated = s.activation != PM_RELU2;
    return Matrix(s.intermediate, s.hidden, s.format, s.group).valid() &&
           Matrix(s.hidden, s.intermediate, s.format, s.group).valid() && s.activation >= PM_SILU &&
           s.activation <= PM_RELU2 && gated == (s.gate >= 0) && s.up >= 0 && s.down >= 0;
}

void experts(pm_context& context, const pm_expert_spec& spec, const float* hidden, int64_t tokens, const int32_t* rows,
             int64_t n_rows, const pm_job* jobs, int64_t n_jobs, float* out) {
    Region r = {};
    r.isa = context.isa;
    r.spec = &spec;
    r.inner = Matrix{spec.intermediate, spec.hidden, spec.format, spec.group};
    r.outer = Matrix{spec.hidden, spec.intermediate, spec.format, spec.group};
    r.hidden = hidden;
    r.tokens = tokens;
    r.rows = rows;
    r.jobs = jobs;
    r.n_jobs = n_jobs;
    r.out = out;
    r.state = context.progress.get<JobState>(n_jobs);
    r.down_blocks = std::max<int64_t>(2, DOWN_ITEM_BYTES / r.outer.block_bytes() & ~1);  // kernels may take pairs
    const int64_t units = r.outer.activation_groups(), chunks = ceil_div(r.outer.blocks(), r.down_blocks);
    int64_t items[MAX_PHASES] = {}, work = 0;
    for (int64_t j = 0; j < n_jobs; j++) {
        JobState* state = new (r.state + j) JobState{};
        state->row_chunks = ceil_div(jobs[j].count, ITEM_ROWS);
        state->gate_up_items = units * state->row_chunks;
        state->first[0] = items[1];
        state->first[1] = items[2];
        items[1] += state->gate_up_items;
        items[2] += chunks * state->row_chunks;
        work += jobs[j].count * r.inner.blocks() * r.inner.block_bytes();
    }
    r.x = context.tokens.get<Group>(tokens * r.inner.activation_groups());
    r.h = context.hidden.get<Group>(n_rows * units);
    if (tokens > SERIAL_TOKENS) r.token_items = items[0] = ceil_div(tokens, TOKENS_PER_ITEM);
    else quantize_tokens(r, 0, tokens);
    context.pool->run(body, &r, items, work);
}

}  // namespace pm

extern "C" int32_t pm_experts(pm_context* context, const pm_expert_spec* spec, const float* hidden, int64_t tokens,
                              const int32_t* rows, int64_t n_rows, const pm_job* jobs, int64_t n_jobs,
                              float* out) try {
    if (!pm::fits(*spec)) return PM_BAD_ARGUMENT;
    for (int64_t i = 0; i < n_rows; i++)
        if (rows[i] < 0 || rows[i] >= tokens) return PM_BAD_ARGUMENT;
    for (int64_t j = 0; j < n_jobs; j++)
        if (jobs[j].count < 0 || jobs[j].start < 0 || jobs[j].start + jobs[j].count > n_rows) return PM_BAD_ARGUMENT;
    const std::lock_guard<std::mutex> lock(context->mutex);
    pm::experts(*context, *spec, hidden, tokens, rows, n_rows, jobs, n_jobs, out);
    return PM_OK;
} catch (const std::bad_alloc&) {
    return PM_OUT_OF_MEMORY;
}
