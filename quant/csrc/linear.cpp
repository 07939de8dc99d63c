// pm_linear, pm_combine and pm_stream.
#include <algorithm>
#include <atomic>

#include "context.h"
#include "layout.h"
#include "linear.h"

namespace pm {
namespace {

constexpr int64_t TOKENS_PER_ITEM = 8;
constexpr int64_t SERIAL_TOKENS = 4;
constexpr int64_t ITEM_BYTES = 48 * 1024;
constexpr int64_t ITEM_ROWS = 128;
constexpr int64_t STREAM_BYTES = 64 * 1024;
constexpr int64_t FLOAT_ROWS = 8;

struct LinearRegion {
    const Isa* isa;
    Matrix matrix;
    const uint8_t* packed;
    const float* bias;
    const float* x;
    int64_t tokens;
    float* y;
    Group* quantized;
    int64_t blocks;      // of one item
    int64_t row_chunks;  // items per chunk of weights
    int64_t token_items;
    std::atomic<int64_t> finished{0};
};

void quantize_tokens(LinearRegion& r, int64_t begin, int64_t end) {
    const int64_t groups = r.matrix.activation_groups();
    for (int64_t t = begin; t < end; t++)
        r.isa->quantize(r.x + t * r.matrix.cols, r.matrix.cols, groups, r.matrix.zero(), r.quantized + t * groups);
}

void linear_body(void* region, int phase, int64_t item, int) {
    LinearRegion& r = *static_cast<LinearRegion*>(region);
    if (phase == 0) {
        quantize_tokens(r, item * TOKENS_PER_ITEM, std::min((item + 1) * TOKENS_PER_ITEM, r.tokens));
        r.finished.fetch_add(1, std::memory_order_release);
        return;
    }
    Pool::wait_for(r.finished, r.token_items);
    const int64_t row = item % r.row_chunks * ITEM_ROWS, groups = r.matrix.activation_groups();
    const int64_t first = item / r.row_chunks * r.blocks, last = std::min(first + r.blocks, r.matrix.blocks());
    DotArgs args = r.matrix.block_args(r.packed, first, last, r.bias);
    args.x = r.quantized + row * groups;
    args.x_stride = groups;
    args.count = std::min(ITEM_ROWS, r.tokens - row);
    args.out = r.y + row * r.matrix.rows + first * ROW_BLOCK;
    args.out_stride = r.matrix.rows;
    r.isa->dot(args);
}

struct FloatRegion {
    const Isa* isa;
    const pm_matrix* matrix;
    const float* x;
    float* y;
};

void float_body(void* region, int, int64_t item, int) {
    const FloatRegion& r = *static_cast<FloatRegion*>(region);
    const int64_t cols = r.matrix->cols, first = item * FLOAT_ROWS;
    const int64_t rows = std::min(FLOAT_ROWS, r.matrix->rows - first);
    r.isa->matvec(static_cast<const float*>(r.matrix->data) + first * cols, rows, cols,
                  r.matrix->bias ? r.matrix->bias + first : nullptr, r.x, r.y + first);
}

void linear_floats(pm_context& context, const pm_matrix& matrix, const float* x, int64_t tokens, float* y) {
    const int64_t items[MAX_PHASES] = {ceil_div(matrix.rows, FLOAT_ROWS), 0, 0};
    for (int64_t t = 0; t < tokens; t++) {
        FloatRegion r = {context.isa, &matrix, x + t * matrix.cols, y + t * matrix.rows};
        context.pool->run(float_body, &r, items, int64_t{4} * matrix.rows * matrix.cols);
    }
}

void linear_packed(pm_context& context, const pm_matrix& matrix, const float* x, int64_t tokens, float* y) {
    LinearRegion r = {};
    r.matrix = Matrix(matrix);
    r.packed = static_cast<const uint8_t*>(matrix.data);
    r.bias = matrix.bias;
    r.x = x;
    r.tokens = tokens;
    r.y = y;
    r.isa = context.isa;
    r.quantized = context.tokens.get<Group>(tokens * r.matrix.activation_groups());
    r.blocks = std::max<int64_t>(2, ITEM_BYTES / r.matrix.block_bytes() & ~1);  // kernels may take pairs
    r.row_chunks = ceil_div(tokens, ITEM_ROWS);
    int64_t items[MAX_PHASES] = {0, ceil_div(r.matrix.blocks(), r.blocks) * r.row_chunks, 0};
    if (tokens > SERIAL_TOKENS) r.token_items = items[0] = ceil_div(tokens, TOKENS_PER_ITEM);
    else quantize_tokens(r, 0, tokens);
    context.pool->run(linear_body, &r, items, tokens * r.matrix.blocks() * r.matrix.block_bytes());
}

struct CombineRegion {
    const Isa* isa;
    const float* parts;
    const int32_t* index;
    const float* weights;
    int64_t k, hidden;
    float* out;
};

void combine_body(void* region, int, int64_t token, int) {
    const CombineRegion& r = *static_cast<CombineRegion*>(region);
    r.isa->combine(r.parts, r.hidden, r.index + token * r.k, r.weights + token * r.k, r.k, r.hidden,
                   r.out + token * r.hidden);
}

struct StreamRegion {
    const Isa* isa;
    const uint8_t* const* buffers;
    const int64_t* nbytes;
    int64_t n;
    std::atomic<uint64_t> total{0};
};

void stream_body(void* region, int, int64_t item, int) {
    StreamRegion& r = *static_cast<StreamRegion*>(region);
    for (int64_t b = 0; b < r.n; b++) {
        const int64_t pieces = ceil_div(r.nbytes[b], STREAM_BYTES);
        if (item < pieces) {
            const int64_t begin = item * STREAM_BYTES;
            r.total.fetch_xor(r.isa->read(r.buffers[b] + begin, std::min(STREAM_BYTES, r.nbytes[b] - begin)),
                              std::memory_order_relaxed);
            return;
        }
        item -= pieces;
    }
}

}  // namespace

bool is_valid(const pm_matrix& m) {
    return m.format == PM_FLOAT32 ? m.rows > 0 && m.cols > 0 : Matrix(m).valid();
}

void linear(pm_context& context, const pm_matrix& matrix, const float* x, int64_t tokens, float* y) {
    if (matrix.format == PM_FLOAT32) linear_floats(context, matrix, x, tokens, y);
    else linear_packed(context, matrix, x, tokens, y);
}

}  // namespace pm

extern "C" {

int32_t pm_linear(pm_context* context, const pm_matrix* matrix, const float* x, int64_t tokens, float* y) try {
    if (!pm::is_valid(*matrix)) return PM_BAD_ARGUMENT;
    const std::lock_guard<std::mutex> lock(context->mutex);
    pm::linear(*context, *matrix, x, tokens, y);
    return PM_OK;
} catch (const std::bad_alloc&) {
    return PM_OUT_OF_MEMORY;
}

int32_t pm_combine(pm_context* context, const float* parts, const int32_t* index, const float* weights,
                   int64_t tokens, int64_t k, int64_t hidden, float* out) {
    const std::lock_guard<std::mutex> lock(context->mutex);
    pm::CombineRegion r = {context->isa, parts, index, weights, k, hidden, out};
    const int64_t items[pm::MAX_PHASES] = {tokens, 0, 0};
    context->pool->run(pm::combine_body, &r, items, tokens * k * hidden * 4);
    return PM_OK;
}

uint64_t pm_stream(pm_context* context, const uint8_t* const* buffers, const int64_t* nbytes, int64_t n) {
    const std::lock_guard<std::mutex> lock(context->mutex);
    pm::StreamRegion r = {context->isa, buffers, nbytes, n};
    int64_t items[pm::MAX_PHASES] = {};
    int64_t total = 0;
    for (int64_t b = 0; b < n; b++) {
        items[0] += pm::ceil_div(nbytes[b], pm::STREAM_BYTES);
        total += nbytes[b];
    }
    context->pool->run(pm::stream_body, &r, items, total);
    return r.total.load();
}

}  // extern "C"
