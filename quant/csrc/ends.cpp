#include "ends.h"

#include <algorithm>

#include "linear.h"
#include "router.h"

namespace pm {
namespace {

void route(pm_context& context, const pm_router& router, int64_t hidden, const float* x, float* scratch,
           int32_t* experts, float* weights) {
    const pm_matrix matrix = {router.weight, router.bias, router.experts, static_cast<int32_t>(hidden), PM_FLOAT32, 0};
    linear(context, matrix, x, 1, scratch);
    choose_experts(router, scratch, scratch + router.experts, experts, weights);
}

}  // namespace

int64_t ends_floats(const pm_ends& ends, int64_t hidden) {
    const int32_t here = ends.router ? ends.router->experts : 0;
    const int32_t next = ends.next_router ? ends.next_router->experts : 0;
    return hidden + 2 * std::max(here, next);
}

void begin(pm_context& context, const pm_ends& ends, int64_t hidden, const pm_token& token) {
    if (token.delta) context.isa->add(token.delta, hidden, token.x);
    context.isa->rms_norm(token.x, ends.input_norm, hidden, ends.input_epsilon, token.normed);
}

void finish(pm_context& context, const pm_ends& ends, const float* attended, float* scratch, const pm_token& token) {
    const int64_t hidden = ends.output.rows;
    float* const projected = scratch;
    float* const logits = scratch + hidden;
    linear(context, ends.output, attended, 1, projected);
    context.isa->add(projected, hidden, token.x);
    if (ends.next_router && token.guess) {
        context.isa->rms_norm(token.x, ends.next_norm, hidden, ends.next_epsilon, projected);
        route(context, *ends.next_router, hidden, projected, logits, token.guess, nullptr);
    }
    context.isa->rms_norm(token.x, ends.output_norm, hidden, ends.output_epsilon, token.normed);
    if (ends.router) route(context, *ends.router, hidden, token.normed, logits, token.experts, token.weights);
}

}  // namespace pm
