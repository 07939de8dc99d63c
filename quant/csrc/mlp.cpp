// pm_mlp: a feed-forward block of the trunk for one token.
#include <algorithm>
#include <cmath>

#include "layers.h"
#include "linear.h"

namespace pm {

bool fits(const pm_mlp_spec& s) {
    return is_valid(s.gate) && is_valid(s.up) && is_valid(s.down) && s.gate.rows == s.up.rows &&
           s.down.cols == s.gate.rows && s.activation != PM_RELU2;
}

void mlp(pm_context& context, const pm_mlp_spec& s, const float* x, bool add, float* y) {
    const Isa& isa = *context.isa;
    float* const gate = context.floats.get<float>(2 * s.gate.rows + s.down.rows);
    float* const up = gate + s.gate.rows;
    float* const out = up + s.gate.rows;
    linear(context, s.gate, x, 1, gate);
    linear(context, s.up, x, 1, up);
    isa.gate({s.activation, s.alpha, s.limit, gate, up, s.gate.rows, gate});
    linear(context, s.down, gate, 1, out);
    if (s.share) {
        float logit;
        isa.matvec(s.share, 1, s.gate.cols, nullptr, x, &logit);
        const float share = 1.0f / (1.0f + std::exp(-logit));
        for (int64_t i = 0; i < s.down.rows; i++) out[i] *= share;
    }
    if (add) isa.add(out, s.down.rows, y);
    else std::copy_n(out, s.down.rows, y);
}

}  // namespace pm

extern "C" int32_t pm_mlp(pm_context* context, const pm_mlp_spec* spec, const float* x, int32_t add, float* y) try {
    if (!pm::fits(*spec)) return PM_BAD_ARGUMENT;
    const std::lock_guard<std::mutex> lock(context->mutex);
    pm::mlp(*context, *spec, x, add != 0, y);
    return PM_OK;
} catch (const std::bad_alloc&) {
    return PM_OUT_OF_MEMORY;
}
