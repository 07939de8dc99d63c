// Matrices of the trunk, for code that holds the context's lock.
#ifndef POCKETMOE_LINEAR_H
#define POCKETMOE_LINEAR_H

#include "context.h"

namespace pm {

bool is_valid(const pm_matrix& matrix);

// y [tokens, rows] = x [tokens, cols] W^T + bias. Throws std::bad_alloc.
void linear(pm_context& context, const pm_matrix& matrix, const float* x, int64_t tokens, float* y);

}  // namespace pm
#endif
