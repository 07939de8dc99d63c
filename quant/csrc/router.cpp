#include "router.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace pm {
namespace {

constexpr float NEVER = -std::numeric_limits<float>::infinity();

// The index of the largest of n values; the lowest of equals.
int32_t largest(const float* values, int32_t n) {
    return static_cast<int32_t>(std::max_element(values, values + n) - values);
}

void score(const pm_router& router, float* logits) {
    const int32_t n = router.experts;
    if (router.scoring == PM_SIGMOID) {
        for (int32_t i = 0; i < n; i++) logits[i] = 1.0f / (1.0f + std::exp(-logits[i]));
        return;
    }
    const float top = *std::max_element(logits, logits + n);
    float sum = 0.0f;
    for (int32_t i = 0; i < n; i++) sum += logits[i] = std::exp(logits[i] - top);
    for (int32_t i = 0; i < n; i++) logits[i] /= sum;
}

// Rules out the experts of all groups but the best.
void keep_best_groups(const pm_router& router, float* values) {
    const int32_t size = router.experts / router.groups;
    const auto worth = [&](int32_t group) {
        float first = NEVER, second = NEVER;
        for (int32_t i = group * size; i < (group + 1) * size; i++) {
            if (values[i] > first) second = first, first = values[i];
            else if (values[i] > second) second = values[i];
        }
        return router.group_best > 1 ? first + second : first;
    };
    for (int32_t surplus = router.groups - router.top_groups; surplus > 0; surplus--) {
        int32_t worst = -1;
        float least = 0.0f;
        for (int32_t g = router.groups - 1; g >= 0; g--) {  // of equal groups the last goes first
            if (values[g * size] == NEVER) continue;
            const float sum = worth(g);
            if (worst < 0 || sum < least) worst = g, least = sum;
        }
        if (worst < 0) break;
        std::fill_n(values + worst * size, size, NEVER);
    }
}

}  // namespace

void choose_experts(const pm_router& router, float* logits, float* scratch, int32_t* experts, float* weights) {
    const int32_t n = router.experts, k = router.top_k;
    score(router, logits);
    for (int32_t i = 0; i < n; i++) scratch[i] = logits[i] + (router.correction ? router.correction[i] : 0.0f);
    if (router.groups > 1) keep_best_groups(router, scratch);
    for (int32_t j = 0; j < k; j++) {
        experts[j] = largest(scratch, n);
        scratch[experts[j]] = NEVER;
    }
    if (!weights) return;
    std::sort(experts, experts + k);
    float sum = 0.0f;
    for (int32_t j = 0; j < k; j++) sum += weights[j] = logits[experts[j]];
    const float factor = router.scale / (router.normalize ? sum + std::numeric_limits<float>::min() : 1.0f);
    for (int32_t j = 0; j < k; j++) weights[j] *= factor;
}

}  // namespace pm
