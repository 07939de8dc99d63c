// The choice of experts from a router's logits.
#ifndef POCKETMOE_ROUTER_H
#define POCKETMOE_ROUTER_H

#include <cstdint>

#include "pocketmoe_cpu.h"

namespace pm {

// logits [experts] are used up; `scratch` [experts] too. Chosen experts ascend; of equal scores the lower index wins.
// `weights` may be null.
void choose_experts(const pm_router& router, float* logits, float* scratch, int32_t* experts, float* weights);

}  // namespace pm
#endif
