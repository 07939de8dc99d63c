// pm_attention and pm_mlp: what one token needs of a layer beside its experts, in one call each.
#include <algorithm>
#include <cmath>

#include "context.h"
#include "layout.h"
#include "linear.h"
#include "router.h"

namespace pm {
namespace {

constexpr int64_t HEADS_PER_ITEM = 4;  // that share keys and values; few enough that many cores find work

struct AttendRegion {
    const Isa* isa;
    const pm_attention_spec* spec;
    const pm_token* token;
    const float* query;
    float* scores;  // per item
    float* out;
    int64_t parts;  // items per key and value head
    int64_t tokens;
};

void attend_body(void* region, int, int64_t item, int) {
    const AttendRegion& r = *static_cast<AttendRegion*>(region);
    const pm_attention_spec& s = *r.spec;
    const int64_t group = s.heads / s.kv_heads, kv = item / r.parts;
    const int64_t begin = item % r.parts * HEADS_PER_ITEM, head = kv * group + begin;
    const int64_t cached = (kv * r.token->capacity + r.token->first) * s.head_dim;
    AttendArgs a = {};
    a.query = r.query + head * s.head_dim;
    a.heads = std::min(HEADS_PER_ITEM, group - begin);
    a.keys = r.token->keys + cached;
    a.values = r.token->values + cached;
    a.tokens = r.tokens;
    a.key_dim = a.value_dim = s.head_dim;
    a.scaling = s.scaling;
    a.sinks = s.sinks ? s.sinks + head : nullptr;
    a.scores = r.scores + item * 2 * r.tokens;
    a.out = r.out + head * s.head_dim;
    r.isa->attend(a);
}

// Norm, clip and rotation of the heads of a projection.
void prepare_heads(const Isa& isa, const pm_attention_spec& s, const pm_token& token, const float* norm, int64_t heads,
                   float* x) {
    if (norm && s.whole_norms) isa.rms_norm(x, norm, heads * s.head_dim, s.qk_epsilon, x);
    for (int64_t h = 0; h < heads; h++) {
        float* const head = x + h * s.head_dim;
        if (norm && !s.whole_norms) isa.rms_norm(head, norm, s.head_dim, s.qk_epsilon, head);
        if (s.clip > 0.0f)
            for (int64_t i = 0; i < s.head_dim; i++) head[i] = std::min(s.clip, std::max(-s.clip, head[i]));
        isa.rotate(head, token.cosine, token.sine, s.rotary_pairs, false);
    }
}

// One head's vector of this token to its place in the cache.
void append(const pm_attention_spec& s, const pm_token& token, const float* heads, float* cache) {
    for (int64_t h = 0; h < s.kv_heads; h++)
        std::copy_n(heads + h * s.head_dim, s.head_dim, cache + (h * token.capacity + token.position) * s.head_dim);
}

void route(pm_context& context, const pm_router& router, int64_t hidden, const float* x, float* scratch,
           int32_t* experts, float* weights) {
    pm_matrix matrix = {router.weight, router.bias, router.experts, static_cast<int32_t>(hidden), PM_FLOAT32, 0};
    linear(context, matrix, x, 1, scratch);
    choose_experts(router, scratch, scratch + router.experts, experts, weights);
}

bool fits(const pm_attention_spec& s) {
    return is_valid(s.query) && is_valid(s.key) && is_valid(s.value) && is_valid(s.output) &&
           s.kv_heads > 0 && s.heads % s.kv_heads == 0 && s.query.rows == s.heads * s.head_dim &&
           s.key.rows == s.kv_heads * s.head_dim && s.value.rows == s.key.rows && s.output.cols == s.query.rows &&
           s.output.rows == s.query.cols && 2 * s.rotary_pairs <= s.head_dim;
}

void attention(pm_context& context, const pm_attention_spec& s, const pm_token& token) {
    const Isa& isa = *context.isa;
    const int64_t hidden = s.query.cols, tokens = token.position + 1 - token.first;
    const int64_t group = s.heads / s.kv_heads, parts = ceil_div(group, HEADS_PER_ITEM), items = s.kv_heads * parts;
    const int64_t routed = 2 * std::max(s.router ? s.router->experts : 0, s.next_router ? s.next_router->experts : 0);
    float* const query = context.floats.get<float>(2 * s.query.rows + 2 * s.key.rows + hidden + routed +
                                                   items * 2 * tokens);
    float* const key = query + s.query.rows;
    float* const value = key + s.key.rows;
    float* const attended = value + s.key.rows;
    float* const projected = attended + s.query.rows;
    float* const logits = projected + hidden;

    if (token.delta) isa.add(token.delta, hidden, token.x);
    isa.rms_norm(token.x, s.input_norm, hidden, s.input_epsilon, token.normed);
    linear(context, s.query, token.normed, 1, query);
    linear(context, s.key, token.normed, 1, key);
    linear(context, s.value, token.normed, 1, value);
    prepare_heads(isa, s, token, s.query_norm, s.heads, query);
    prepare_heads(isa, s, token, s.key_norm, s.kv_heads, key);
    if (s.clip > 0.0f)
        for (int64_t i = 0; i < s.value.rows; i++) value[i] = std::min(s.clip, std::max(-s.clip, value[i]));
    append(s, token, key, token.keys);
    append(s, token, value, token.values);

    AttendRegion region = {&isa, &s, &token, query, logits + routed, attended, parts, tokens};
    const int64_t counts[MAX_PHASES] = {items, 0, 0};
    context.pool->run(attend_body, &region, counts, 8 * tokens * s.query.rows);

    linear(context, s.output, attended, 1, projected);
    isa.add(projected, hidden, token.x);
    if (s.next_router) {
        isa.rms_norm(token.x, s.next_norm, hidden, s.next_epsilon, projected);
        route(context, *s.next_router, hidden, projected, logits, token.guess, nullptr);
    }
    isa.rms_norm(token.x, s.output_norm, hidden, s.output_epsilon, token.normed);
    if (s.router) route(context, *s.router, hidden, token.normed, logits, token.experts, token.weights);
}

void mlp(pm_context& context, const pm_mlp_spec& s, const float* x, bool add, float* y) {
    const Isa& isa = *context.isa;
    float* const gate = context.floats.get<float>(2 * s.gate.rows + s.down.rows);
    float* const up = gate + s.gate.rows;
    float* const out = up + s.gate.rows;
    linear(context, s.gate, x, 1, gate);
    linear(context, s.up, x, 1, up);
    isa.gate({s.activation, s.alpha, s.limit, gate, up, s.gate.rows, gate});
    linear(context, s.down, gate, 1, add || s.share ? out : y);
    if (s.share) {
        float logit;
        isa.matvec(s.share, 1, s.gate.cols, nullptr, x, &logit);
        const float share = 1.0f / (1.0f + std::exp(-logit));
        for (int64_t i = 0; i < s.down.rows; i++) out[i] *= share;
        if (!add) std::copy_n(out, s.down.rows, y);
    }
    if (add) isa.add(out, s.down.rows, y);
}

}  // namespace
}  // namespace pm

extern "C" {

int32_t pm_attention(pm_context* context, const pm_attention_spec* spec, const pm_token* token) try {
    if (!pm::fits(*spec) || token->first < 0 || token->position < token->first ||
        token->position >= token->capacity)
        return PM_BAD_ARGUMENT;
    const std::lock_guard<std::mutex> lock(context->mutex);
    pm::attention(*context, *spec, *token);
    return PM_OK;
} catch (const std::bad_alloc&) {
    return PM_OUT_OF_MEMORY;
}

int32_t pm_mlp(pm_context* context, const pm_mlp_spec* spec, const float* x, int32_t add, float* y) try {
    using pm::is_valid;
    if (!is_valid(spec->gate) || !is_valid(spec->up) || !is_valid(spec->down) || spec->gate.rows != spec->up.rows ||
        spec->down.cols != spec->gate.rows || spec->activation == PM_RELU2)
        return PM_BAD_ARGUMENT;
    const std::lock_guard<std::mutex> lock(context->mutex);
    pm::mlp(*context, *spec, x, add != 0, y);
    return PM_OK;
} catch (const std::bad_alloc&) {
    return PM_OUT_OF_MEMORY;
}

}  // extern "C"
