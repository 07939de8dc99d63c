// The parts of a decoder layer for one token, for code that holds the context's lock. All may throw std::bad_alloc.
#ifndef POCKETMOE_LAYERS_H
#define POCKETMOE_LAYERS_H

#include "context.h"

namespace pm {

// Whether the sizes of a part agree with each other.
bool fits(const pm_attention_spec& spec);
bool fits(const pm_latent_spec& spec);
bool fits(const pm_expert_spec& spec);
bool fits(const pm_mlp_spec& spec);

void attention(pm_context& context, const pm_attention_spec& spec, const pm_token& token);
void latent_attention(pm_context& context, const pm_latent_spec& spec, const pm_token& token);

// See pm_experts; the arguments are valid.
void experts(pm_context& context, const pm_expert_spec& spec, const float* hidden, int64_t tokens, const int32_t* rows,
             int64_t n_rows, const pm_job* jobs, int64_t n_jobs, float* out);

// y = the block of x, or y += it.
void mlp(pm_context& context, const pm_mlp_spec& spec, const float* x, bool add, float* y);

}  // namespace pm
#endif
