// pm_embed and pm_head: how a token enters the layers, and how it leaves them.
#include <algorithm>

#include "half.h"
#include "layout.h"
#include "linear.h"

namespace pm {
namespace {

bool can_take_rows(const pm_matrix& m) {
    return is_valid(m) && m.format != PM_MXFP4 && m.format != PM_INT4_ZERO_POINT;
}

void take_row(const pm_matrix& m, int64_t row, float* x) {
    const int64_t cols = m.cols;
    if (m.format == PM_FLOAT32) {
        std::copy_n(static_cast<const float*>(m.data) + row * cols, cols, x);
        return;
    }
    const Matrix matrix(m);
    const int64_t lane = row % ROW_BLOCK, groups = matrix.weight_groups();
    const uint8_t* const block = static_cast<const uint8_t*>(m.data) + row / ROW_BLOCK * matrix.block_bytes();
    const uint8_t* const codes = block + matrix.head_bytes();
    const float zero = static_cast<float>(matrix.zero());
    for (int64_t c = 0; c < cols; c++) {
        const int64_t at = c / m.group * ROW_BLOCK + lane;
        float code;
        if (m.format == PM_INT8) {
            code = codes[(c / 4 * ROW_BLOCK + lane) * 4 + c % 4];
        } else {
            const uint8_t both = codes[(c / 8 * ROW_BLOCK + lane) * 4 + c % 4];
            code = static_cast<float>(c % 8 < 4 ? both & 15 : both >> 4);
        }
        x[c] = (code - zero) * half_float(block + 2 * at);
        if (m.format == PM_INT4_ASYMMETRIC) x[c] += half_float(block + 2 * (groups * ROW_BLOCK + at));
    }
}

}  // namespace
}  // namespace pm

extern "C" {

int32_t pm_embed(const pm_matrix* table, int64_t row, float* x) {
    if (!pm::can_take_rows(*table) || row < 0 || row >= table->rows) return PM_BAD_ARGUMENT;
    pm::take_row(*table, row, x);
    return PM_OK;
}

int32_t pm_head(pm_context* context, const pm_matrix* head, const float* norm, float epsilon, const float* delta,
                float* x, float* logits) try {
    if (!pm::is_valid(*head)) return PM_BAD_ARGUMENT;
    const std::lock_guard<std::mutex> lock(context->mutex);
    float* const normed = context->floats.get<float>(head->cols);
    context->isa->add(delta, head->cols, x);
    context->isa->rms_norm(x, norm, head->cols, epsilon, normed);
    pm::linear(*context, *head, normed, 1, logits);
    return PM_OK;
} catch (const std::bad_alloc&) {
    return PM_OUT_OF_MEMORY;
}

}  // extern "C"
