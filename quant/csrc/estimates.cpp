// pm_estimates_*: what the policy `analog` asks for while a model runs.
#include "estimates.h"

#include <new>

#include "pocketmoe_cpu.h"

struct pm_estimates {
    pm::Estimates estimates;
};

extern "C" {

pm_estimates* pm_estimates_create(int32_t layers, const int32_t* experts, int64_t cycle, double* ranks) try {
    return new pm_estimates{pm::Estimates(std::vector<int32_t>(experts, experts + layers), cycle, ranks)};
} catch (const std::bad_alloc&) {
    return nullptr;
}

void pm_estimates_destroy(pm_estimates* estimates) { delete estimates; }

int32_t pm_estimates_use(pm_estimates* estimates, int32_t layer, const int32_t* experts, int64_t count) try {
    for (int64_t i = 0; i < count; i++)
        if (!estimates->estimates.has(layer, experts[i])) return -PM_BAD_ARGUMENT;
    return estimates->estimates.use(layer, experts, count);
} catch (const std::bad_alloc&) {
    return -PM_OUT_OF_MEMORY;
}

int32_t pm_estimates_after(const pm_estimates* estimates, int32_t layer, int32_t expert) {
    const bool exists = estimates->estimates.has(layer, std::max(expert, 0));
    return exists ? estimates->estimates.after(layer, expert) : -1;
}

int32_t pm_estimates_tick(pm_estimates* estimates) try {
    estimates->estimates.tick();
    return PM_OK;
} catch (const std::bad_alloc&) {
    return PM_OUT_OF_MEMORY;
}

}  // extern "C"
