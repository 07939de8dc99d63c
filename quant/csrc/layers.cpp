// pm_layers: one token through decoder layers for as long as all that they read is in memory.
#include "layers.h"

#include <algorithm>
#include <chrono>

#include "ends.h"
#include "layout.h"

namespace pm {
namespace {

const pm_ends& ends_of(const pm_layer& layer) { return layer.attention ? layer.attention->ends : layer.latent->ends; }

bool is_valid(const pm_layer& layer) {
    if (layer.attention ? !fits(*layer.attention) : !layer.latent || !fits(*layer.latent)) return false;
    const int64_t hidden = ends_of(layer).output.rows;
    return (!layer.experts || (fits(*layer.experts) && layer.experts->hidden == hidden)) &&
           (!layer.mlp || (fits(*layer.mlp) && layer.mlp->down.rows == hidden));
}

bool all_in_memory(const int64_t* records, const int32_t* experts, int32_t count) {
    return records && std::all_of(experts, experts + count, [&](int32_t expert) { return records[expert] != 0; });
}

// Whether nothing is missing of what the router has chosen or guessed.
bool can_go_on(const pm_layer& layer, const pm_token& token) {
    const pm_ends& ends = ends_of(layer);
    const bool guessed = ends.next_router && token.guess;
    return layer.experts && all_in_memory(layer.records, token.experts, ends.router->top_k) &&
           (!guessed || all_in_memory(layer.next_records, token.guess, ends.next_router->top_k));
}

// delta = the weighted sum of the chosen experts, in ascending order.
void chosen_experts(pm_context& context, const pm_layer& layer, const pm_token& token, float* delta) {
    const int64_t k = ends_of(layer).router->top_k, hidden = layer.experts->hidden;
    pm_job* const jobs = context.parts.get<pm_job>(k + ceil_div(k * (hidden * 4 + 8), sizeof(pm_job)));
    float* const out = reinterpret_cast<float*>(jobs + k);
    int32_t* const rows = reinterpret_cast<int32_t*>(out + k * hidden);
    int32_t* const places = rows + k;
    for (int64_t j = 0; j < k; j++) {
        jobs[j] = {reinterpret_cast<const uint8_t*>(layer.records[token.experts[j]]), j, 1};
        rows[j] = 0;
        places[j] = static_cast<int32_t>(j);
    }
    experts(context, *layer.experts, token.normed, 1, rows, k, jobs, k, out);
    context.isa->combine(out, hidden, places, token.weights, k, hidden, delta);
}

int64_t run(pm_context& context, const pm_layer* layers, const pm_token* tokens, int64_t first, int64_t count,
            bool alone, float* delta, double* seconds) {
    using Clock = std::chrono::steady_clock;
    for (int64_t i = first; i < count; i++) {
        const pm_layer& layer = layers[i];
        const pm_token& token = tokens[i];
        if (layer.attention) attention(context, *layer.attention, token);
        else latent_attention(context, *layer.latent, token);
        const bool routes = ends_of(layer).router != nullptr;
        if (routes) {
            if (!alone || !can_go_on(layer, token)) return i;
            const Clock::time_point begin = Clock::now();
            chosen_experts(context, layer, token, delta);
            seconds[i] = std::chrono::duration<double>(Clock::now() - begin).count();
        }
        if (layer.mlp) mlp(context, *layer.mlp, token.normed, routes, delta);
    }
    return count;
}

}  // namespace
}  // namespace pm

extern "C" int32_t pm_layers(pm_context* context, const pm_layer* layers, const pm_token* tokens, int64_t first,
                             int64_t count, int32_t alone, float* delta, double* seconds, int64_t* reached) try {
    for (int64_t i = first; i < count; i++)
        if (!pm::is_valid(layers[i]) || !pm::has_room(tokens[i])) return PM_BAD_ARGUMENT;
    const std::lock_guard<std::mutex> lock(context->mutex);
    *reached = pm::run(*context, layers, tokens, first, count, alone != 0, delta, seconds);
    return PM_OK;
} catch (const std::bad_alloc&) {
    return PM_OUT_OF_MEMORY;
}
