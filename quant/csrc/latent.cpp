// pm_latent_attention: the attention half of a layer with multi-head latent attention, for one token.
//
// A head's key is key_up x latent, so that its product with a query is that of the latent with key_up^T x query, which
// does not depend on the cached token: the query is moved to the latent space once, and all heads attend to the latents
// themselves. Values come back from the latent space after they have been summed.
#include <algorithm>

#include "ends.h"
#include "layers.h"
#include "layout.h"
#include "linear.h"

namespace pm {
namespace {

// A matrix of one head.
struct HeadMatrix {
    const pm_matrix* first;
    int64_t stride;

    int64_t groups() const { return first->format == PM_FLOAT32 ? 0 : Matrix(*first).activation_groups(); }

    // y [rows] = matrix of `head` x [cols]; `codes` [groups()] is scratch.
    void multiply(const Isa& isa, int64_t head, const float* x, Group* codes, float* y) const {
        const uint8_t* const data = static_cast<const uint8_t*>(first->data) + head * stride;
        if (first->format == PM_FLOAT32) {
            isa.matvec(reinterpret_cast<const float*>(data), first->rows, first->cols, nullptr, x, y);
            return;
        }
        const Matrix matrix(*first);
        isa.quantize(x, matrix.cols, matrix.activation_groups(), matrix.zero(), codes);
        DotArgs args = matrix.block_args(data, 0, matrix.blocks(), nullptr);
        args.x = codes;
        args.x_stride = matrix.activation_groups();
        args.count = 1;
        args.out = y;
        args.out_stride = matrix.rows;
        isa.dot(args);
    }
};

struct Sizes {
    int64_t hidden, latent, plain, turned, value_dim, tokens;

    Sizes(const pm_latent_spec& s, const pm_token& token)
        : hidden(s.ends.output.rows), latent(s.value_up.cols), plain(s.key_up.cols), turned(2 * s.rotary_pairs),
          value_dim(s.value_up.rows), tokens(token.position + 1 - token.first) {}

    // Scratch of one item: latent queries and sums, the turned part of queries, scores.
    int64_t item_floats() const { return HEADS_PER_ITEM * (2 * latent + turned) + 2 * tokens; }
};

struct LatentRegion {
    const Isa* isa;
    const pm_latent_spec* spec;
    const pm_token* token;
    Sizes sizes;
    HeadMatrix key_up, value_up;
    float* query;    // [heads, plain + turned]
    float* scratch;  // per item
    Group* codes;    // per item
    int64_t groups;
    float* out;      // [heads, value_dim]
};

void latent_body(void* region, int, int64_t item, int) {
    const LatentRegion& r = *static_cast<LatentRegion*>(region);
    const pm_latent_spec& s = *r.spec;
    const Sizes& n = r.sizes;
    const int64_t head = item * HEADS_PER_ITEM, heads = std::min<int64_t>(HEADS_PER_ITEM, s.heads - head);
    float* const queries = r.scratch + item * n.item_floats();
    float* const turned = queries + HEADS_PER_ITEM * n.latent;
    float* const sums = turned + HEADS_PER_ITEM * n.turned;
    Group* const codes = r.codes + item * r.groups;
    for (int64_t h = 0; h < heads; h++) {
        float* const query = r.query + (head + h) * (n.plain + n.turned);
        r.key_up.multiply(*r.isa, head + h, query, codes, queries + h * n.latent);
        r.isa->rotate(query + n.plain, r.token->cosine, r.token->sine, s.rotary_pairs, s.rotation);
        std::copy_n(query + n.plain, n.turned, turned + h * n.turned);
    }
    AttendArgs a = {};
    a.query = queries;
    a.heads = heads;
    a.keys = a.values = cached(*r.token, r.token->keys, r.token->first * n.latent);
    a.half = r.token->half;
    a.extra_query = turned;
    a.extra_keys = cached(*r.token, r.token->values, r.token->first * n.turned);
    a.tokens = n.tokens;
    a.key_dim = a.value_dim = n.latent;
    a.extra_dim = n.turned;
    a.scaling = s.scaling;
    a.scores = sums + HEADS_PER_ITEM * n.latent;
    a.out = sums;
    r.isa->attend(a);
    for (int64_t h = 0; h < heads; h++)
        r.value_up.multiply(*r.isa, head + h, sums + h * n.latent, codes, r.out + (head + h) * n.value_dim);
}

}  // namespace

bool fits(const pm_latent_spec& s) {
    const int64_t turned = 2 * s.rotary_pairs;
    const bool has_latent_query = s.query_down.rows > 0;
    return is_valid(s.query) && is_valid(s.latent_down) && is_valid(s.key_up) && is_valid(s.value_up) &&
           is_valid(s.ends.output) && s.heads > 0 && s.query.rows == s.heads * (s.key_up.cols + turned) &&
           s.latent_down.rows == s.key_up.rows + turned && s.value_up.cols == s.key_up.rows &&
           s.ends.output.cols == s.heads * s.value_up.rows && s.ends.output.rows == s.latent_down.cols &&
           (has_latent_query ? is_valid(s.query_down) && s.query_down.rows == s.query.cols
                             : s.query.cols == s.ends.output.rows);
}

void latent_attention(pm_context& context, const pm_latent_spec& s, const pm_token& token) {
    const Isa& isa = *context.isa;
    const Sizes n(s, token);
    const int64_t items = ceil_div(s.heads, HEADS_PER_ITEM), at_ends = ends_floats(s.ends, n.hidden);
    float* const query = context.floats.get<float>(s.query.rows + s.query_down.rows + s.latent_down.rows +
                                                   s.ends.output.cols + at_ends + items * n.item_floats());
    float* const latent_query = query + s.query.rows;
    float* const latent = latent_query + s.query_down.rows;
    float* const attended = latent + s.latent_down.rows;
    float* const scratch = attended + s.ends.output.cols;

    begin(context, s.ends, n.hidden, token);
    if (s.query_down.rows > 0) {
        linear(context, s.query_down, token.normed, 1, latent_query);
        isa.rms_norm(latent_query, s.query_norm, s.query_down.rows, s.query_epsilon, latent_query);
    }
    linear(context, s.query, s.query_down.rows > 0 ? latent_query : token.normed, 1, query);
    linear(context, s.latent_down, token.normed, 1, latent);
    isa.rms_norm(latent, s.latent_norm, n.latent, s.latent_epsilon, latent);
    isa.store(latent, n.latent, token.half, cached(token, token.keys, token.position * n.latent));
    isa.rotate(latent + n.latent, token.cosine, token.sine, s.rotary_pairs, s.rotation);
    isa.store(latent + n.latent, n.turned, token.half, cached(token, token.values, token.position * n.turned));

    const HeadMatrix key_up = {&s.key_up, s.key_up_stride}, value_up = {&s.value_up, s.value_up_stride};
    const int64_t groups = std::max(key_up.groups(), value_up.groups());
    Group* const codes = context.tokens.get<Group>(items * groups);
    LatentRegion r = {&isa, &s, &token, n, key_up, value_up, query, scratch + at_ends, codes, groups, attended};
    const int64_t counts[MAX_PHASES] = {items, 0, 0};
    context.pool->run(latent_body, &r, counts, s.heads * n.latent * (2 * n.tokens + n.plain + n.value_dim));
    finish(context, s.ends, attended, scratch, token);
}

}  // namespace pm

extern "C" int32_t pm_latent_attention(pm_context* context, const pm_latent_spec* spec, const pm_token* token) try {
    if (!pm::fits(*spec) || !pm::has_room(*token)) return PM_BAD_ARGUMENT;
    const std::lock_guard<std::mutex> lock(context->mutex);
    pm::latent_attention(*context, *spec, *token);
    return PM_OK;
} catch (const std::bad_alloc&) {
    return PM_OUT_OF_MEMORY;
}
