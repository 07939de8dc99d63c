// pm_attention: the attention half of a layer for one token.
#include <algorithm>

#include "ends.h"
#include "layers.h"
#include "layout.h"
#include "linear.h"

namespace pm {
namespace {

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
    const int64_t first = (kv * r.token->capacity + r.token->first) * s.head_dim;
    AttendArgs a = {};
    a.query = r.query + head * s.head_dim;
    a.heads = std::min(HEADS_PER_ITEM, group - begin);
    a.keys = cached(*r.token, r.token->keys, first);
    a.values = cached(*r.token, r.token->values, first);
    a.half = r.token->half;
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
        isa.rotate(head, token.cosine, token.sine, s.rotary_pairs, PM_HALVES);
    }
}

// The heads' vectors of this token to their places in the cache.
void append(const Isa& isa, const pm_attention_spec& s, const pm_token& token, const float* heads, void* cache) {
    for (int64_t h = 0; h < s.kv_heads; h++)
        isa.store(heads + h * s.head_dim, s.head_dim, token.half,
                  cached(token, cache, (h * token.capacity + token.position) * s.head_dim));
}

}  // namespace

bool fits(const pm_attention_spec& s) {
    return is_valid(s.query) && is_valid(s.key) && is_valid(s.value) && is_valid(s.ends.output) && s.kv_heads > 0 &&
           s.heads % s.kv_heads == 0 && s.query.rows == s.heads * s.head_dim &&
           s.key.rows == s.kv_heads * s.head_dim && s.value.rows == s.key.rows && s.ends.output.cols == s.query.rows &&
           s.ends.output.rows == s.query.cols && 2 * s.rotary_pairs <= s.head_dim;
}

void attention(pm_context& context, const pm_attention_spec& s, const pm_token& token) {
    const Isa& isa = *context.isa;
    const int64_t hidden = s.query.cols, tokens = token.position + 1 - token.first;
    const int64_t group = s.heads / s.kv_heads, parts = ceil_div(group, HEADS_PER_ITEM), items = s.kv_heads * parts;
    const int64_t at_ends = ends_floats(s.ends, hidden);
    float* const query = context.floats.get<float>(2 * s.query.rows + 2 * s.key.rows + at_ends + items * 2 * tokens);
    float* const key = query + s.query.rows;
    float* const value = key + s.key.rows;
    float* const attended = value + s.key.rows;
    float* const scratch = attended + s.query.rows;

    begin(context, s.ends, hidden, token);
    linear(context, s.query, token.normed, 1, query);
    linear(context, s.key, token.normed, 1, key);
    linear(context, s.value, token.normed, 1, value);
    prepare_heads(isa, s, token, s.query_norm, s.heads, query);
    prepare_heads(isa, s, token, s.key_norm, s.kv_heads, key);
    if (s.clip > 0.0f)
        for (int64_t i = 0; i < s.value.rows; i++) value[i] = std::min(s.clip, std::max(-s.clip, value[i]));
    append(isa, s, token, key, token.keys);
    append(isa, s, token, value, token.values);
    AttendRegion region = {&isa, &s, &token, query, scratch + at_ends, attended, parts, tokens};
    const int64_t counts[MAX_PHASES] = {items, 0, 0};
    context.pool->run(attend_body, &region, counts, 8 * tokens * s.query.rows);
    finish(context, s.ends, attended, scratch, token);
}

}  // namespace pm

extern "C" int32_t pm_attention(pm_context* context, const pm_attention_spec* spec, const pm_token* token) try {
    if (!pm::fits(*spec) || !pm::has_room(*token)) return PM_BAD_ARGUMENT;
    const std::lock_guard<std::mutex> lock(context->mutex);
    pm::attention(*context, *spec, *token);
    return PM_OK;
} catch (const std::bad_alloc&) {
    return PM_OUT_OF_MEMORY;
}
