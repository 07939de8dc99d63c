// The choice of experts from a router's logits.
#ifndef POCKETMOE_ROUTER_H
#define POCKETMOE_ROUTER_H

#include <cstdint>

#include "pocketmoe_cpu.h"

namespace pm {

// logits [experts] are used up; `scratch` [experts] too. Of equal scores the lower index wins. Chosen experts ascend;
// without weights (a guess), the best comes first.
void choose_experts(const pm_router& router, float* logits, float* scratch, int32_t* experts, float* weights);

}  // namespace pm
#endif
