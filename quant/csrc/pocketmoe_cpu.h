// The C interface of pocketmoe's CPU kernels. Plain C types, no Python, no torch.
//
// All matrices are packed as quant/int4.py, quant/int8.py and quant/mxfp4.py describe. All floats are float32, all sizes
// are counts of elements unless a name says bytes. Functions return PM_OK or an error code; they never throw and never
// print.
#ifndef POCKETMOE_CPU_H
#define POCKETMOE_CPU_H

#include <stdint.h>

#if defined(_WIN32)
#define PM_API __declspec(dllexport)
#else
#define PM_API __attribute__((visibility("default")))
#endif

// Raised whenever a structure or a signature below changes; quant/native_library.py refuses another number.
#define PM_ABI_VERSION 7

#ifdef __cplusplus
extern "C" {
#endif

enum pm_status { PM_OK = 0, PM_OUT_OF_MEMORY = 1, PM_BAD_ARGUMENT = 2 };
enum pm_format {
    PM_INT4 = 0,
    PM_INT4_ASYMMETRIC = 1,
    PM_INT8 = 2,
    PM_FLOAT32 = 3,
    PM_MXFP4 = 4,
    PM_INT4_ZERO_POINT = 5
};
enum pm_activation { PM_SILU = 0, PM_SILU_CLAMP = 1, PM_GPT_OSS = 2, PM_GELU_TANH = 3, PM_RELU2 = 4 };

// Worker threads, their scratch memory and the instruction set they use. Calls on one context are serialised by a
// mutex, so it may be shared between threads. After fork() the child has no workers: calls there still work, on the
// calling thread alone, unless another thread was inside a call at the moment of the fork.
typedef struct pm_context pm_context;

// Where the parts of an expert lie in its record, and what it computes. Offsets are in bytes, -1 = the part is absent.
typedef struct {
    int64_t gate, up, down;
    int64_t gate_bias, up_bias, down_bias;
    int32_t hidden, intermediate;
    int32_t format, group;
    int32_t activation;
    float alpha, limit;
} pm_expert_spec;

typedef struct {
    const uint8_t* record;
    int64_t start;  // first of the job's rows in `rows` and `out`
    int64_t count;
} pm_job;

// y = x W^T + bias
typedef struct {
    const void* data;   // packed; for PM_FLOAT32 plain [rows, cols]
    const float* bias;  // [rows] or NULL
    int32_t rows, cols;
    int32_t format, group;
} pm_matrix;

enum pm_scoring { PM_SOFTMAX = 0, PM_SIGMOID = 1 };

// Chooses experts: the top_k largest of scores + correction, weighted by their scores.
typedef struct {
    const float* weight;      // [experts, hidden]
    const float* bias;        // [experts] or NULL, part of the logits
    const float* correction;  // [experts] or NULL, counts for the choice but not for the weights
    int32_t experts, top_k;
    int32_t scoring;
    int32_t normalize;        // weights are divided by their sum
    // Choose only within the top_groups groups whose best group_best (1 or 2) experts are best; groups 0 = all.
    int32_t groups, top_groups, group_best;
    float scale;              // of the weights, at last
} pm_router;

// How a layer's attention half begins and ends: norm ... output projection, norm, router. NULL = the part is absent.
typedef struct {
    pm_matrix output;
    const float* input_norm;   // [hidden]
    const float* output_norm;  // [hidden], after attention
    const pm_router* router;
    const float* next_norm;    // [hidden], with next_router: the same of the next MoE layer, for a guess
    const pm_router* next_router;
    float input_epsilon, output_epsilon, next_epsilon;
} pm_ends;

// Which values of a head make a pair that is turned by one angle, and where the turned pair goes.
enum pm_rotation {
    PM_HALVES = 0,       // (i, i + pairs)
    PM_INTERLEAVED = 1,  // (2 i, 2 i + 1)
    PM_SORTED = 2        // from (2 i, 2 i + 1) to (i, i + pairs)
};

// Attention with its keys and values cached per head.
typedef struct {
    pm_ends ends;
    pm_matrix query, key, value;
    const float* query_norm;   // [head_dim], or of the whole projection if whole_norms
    const float* key_norm;
    const float* sinks;        // [heads]
    int32_t heads, kv_heads, head_dim;
    int32_t rotary_pairs;
    int32_t whole_norms;
    float qk_epsilon;
    float scaling;
    float clip;                // of queries, keys and values; 0 = none
} pm_attention_spec;

// Multi-head latent attention (DeepSeek-V2): all heads share one latent vector a token, which is what is cached. Keys
// and values are never made: queries go to the latent space, and what is attended to comes back from it.
typedef struct {
    pm_ends ends;
    pm_matrix query_down;      // to a latent query; rows 0 = absent
    const float* query_norm;   // [query_down.rows]
    pm_matrix query;           // [heads * (plain + 2 rotary_pairs), hidden or query_down.rows]
    pm_matrix latent_down;     // [latent + 2 rotary_pairs, hidden]
    const float* latent_norm;  // [latent]
    pm_matrix key_up;          // [latent, plain] of the first head, transposed
    pm_matrix value_up;        // [value_dim, latent] of the first head
    int64_t key_up_stride, value_up_stride;  // bytes from head to head
    int32_t heads;
    int32_t rotary_pairs;
    int32_t rotation;
    float query_epsilon, latent_epsilon;
    float scaling;
} pm_latent_spec;

// What changes from token to token. All arrays are contiguous.
typedef struct {
    float* x;             // [hidden] the residual, updated in place
    const float* delta;   // [hidden] or NULL: added to x first (what the layer before has computed)
    const float* cosine;  // [rotary_pairs]
    const float* sine;
    void* keys;           // [kv_heads, capacity, head_dim]; latent attention: [capacity, latent]
    void* values;         // the same; latent attention: [capacity, 2 rotary_pairs], the turned part of all keys
    int64_t half;         // keys and values are float16, else float32
    int64_t capacity;
    int64_t first;        // cached tokens first..position - 1 are attended to, and this one
    int64_t position;     // where this token's key and value go
    float* normed;        // out [hidden]: what the experts read
    int32_t* experts;     // out [top_k], ascending
    float* weights;       // out [top_k]
    int32_t* guess;       // out [top_k of next_router], best first; NULL = no guess
} pm_token;

// A feed-forward block of the trunk: y = down(activation(gate x) * up x), times sigmoid(share x) if there is a share.
typedef struct {
    pm_matrix gate, up, down;
    const float* share;  // [hidden] or NULL
    int32_t activation;
    float alpha, limit;
} pm_mlp_spec;

// A decoder layer. NULL = the part is absent; there is one kind of attention.
typedef struct {
    const pm_attention_spec* attention;
    const pm_latent_spec* latent;
    const pm_expert_spec* experts;
    const pm_mlp_spec* mlp;
    const int64_t* records;       // by expert: the address of its record, 0 = it is not in memory
    const int64_t* next_records;  // of the layer that the guess is for
} pm_layer;

// What the layers of a model have chosen for consecutive tokens.
typedef struct {
    const int32_t* chosen;  // [tokens, layers, top_k]: distinct experts of the layer, ascending; negative = none
    int64_t tokens;
    int32_t layers, top_k;
    int32_t experts;        // of each layer
} pm_requests;

PM_API int32_t pm_abi_version(void);

// Names the sources that the library was compiled from (quant/native_build.py).
PM_API const char* pm_source_hash(void);

// Instruction sets that this library was built with, best first; NULL past the end.
PM_API const char* pm_isa_name(int32_t index);
PM_API int32_t pm_isa_usable(int32_t index);

// `threads` counts the calling thread. `isa` NULL = the best usable one. NULL if there is no such instruction set here.
PM_API pm_context* pm_create(int32_t threads, const char* isa);
PM_API void pm_destroy(pm_context* context);
PM_API const char* pm_context_isa(const pm_context* context);
PM_API int32_t pm_set_threads(pm_context* context, int32_t threads);
PM_API int32_t pm_set_isa(pm_context* context, const char* isa);

// out[r] = expert(hidden[rows[r]]) for the rows r of every job. hidden [tokens, hidden], rows [n_rows],
// out [n_rows, hidden]. A job's result depends, bit for bit, only on its own record and rows.
PM_API int32_t pm_experts(pm_context* context, const pm_expert_spec* spec, const float* hidden, int64_t tokens,
                          const int32_t* rows, int64_t n_rows, const pm_job* jobs, int64_t n_jobs, float* out);

// x [tokens, cols], y [tokens, rows].
PM_API int32_t pm_linear(pm_context* context, const pm_matrix* matrix, const float* x, int64_t tokens, float* y);

// One token through the attention half of a layer.
PM_API int32_t pm_attention(pm_context* context, const pm_attention_spec* spec, const pm_token* token);

PM_API int32_t pm_latent_attention(pm_context* context, const pm_latent_spec* spec, const pm_token* token);

// One token through layers first..count - 1, `layers[i]` on `tokens[i]`; all have the same x and normed. `delta` [hidden]
// gets what the last layer's blocks add to x; where tokens[i].delta is not NULL, it is this array.
//
// Ends early after the attention half of a layer whose experts the caller has to compute, or whose guess it has to see:
// if not `alone`, of every layer with a router; else of those where a chosen or guessed expert has no address.
// `reached` gets that layer, or `count`; `seconds` [count] the time in each layer's experts.
PM_API int32_t pm_layers(pm_context* context, const pm_layer* layers, const pm_token* tokens, int64_t first,
                         int64_t count, int32_t alone, float* delta, double* seconds, int64_t* reached);

// x [table.cols] = a row of an embedding, which is not PM_MXFP4.
PM_API int32_t pm_embed(const pm_matrix* table, int64_t row, float* x);

// What follows the last layer: x += delta, then logits [head.rows] = head(norm(x)).
PM_API int32_t pm_head(pm_context* context, const pm_matrix* head, const float* norm, float epsilon, const float* delta,
                       float* x, float* logits);

// One token through a feed-forward block; adds to y if `add`, else writes it. x [hidden], y [hidden].
PM_API int32_t pm_mlp(pm_context* context, const pm_mlp_spec* spec, const float* x, int32_t add, float* y);

// out[t] = sum over j = 0..k-1, in that order, of weights[t, j] * parts[index[t, j]]; negative indices are skipped.
PM_API int32_t pm_combine(pm_context* context, const float* parts, const int32_t* index, const float* weights,
                          int64_t tokens, int64_t k, int64_t hidden, float* out);

// Reads every byte of the buffers once with all threads: the speed that no kernel can exceed. Returns their XOR.
PM_API uint64_t pm_stream(pm_context* context, const uint8_t* const* buffers, const int64_t* nbytes, int64_t n);

// Serves the requests with one pool of `slots` slots, empty at first, under an eviction policy of that name or "belady",
// as cache/replay.py describes: misses [tokens, layers] = how many experts were missing. Takes no context.
PM_API int32_t pm_replay(const pm_requests* requests, const char* policy, int64_t slots, int32_t* misses);

// depths [tokens, layers, top_k] = for each request of a step, in order, with how many slots and more it is a hit of
// least-recently-used eviction; then, and where it never is, 0. Experts that are chosen together count as used one after
// the other. Takes no context.
PM_API int32_t pm_lru_depths(const pm_requests* requests, int32_t* depths);

// The books of a tier, kept as cache/manager.py describes. Experts are numbered layer * experts + index of the layer.
// The arrays [layers * experts] are the caller's, and live as long as the cache, which empties them at first:
// slots: -1 for who is not resident; the caller writes those of residents that it moves, before pm_cache_resize.
// locks: how often each is locked; the caller's. arriving: set to 1 by an admission, to 0 by the caller.
typedef struct {
    int32_t layers, experts, floor;
    int64_t capacity, cycle;
    int32_t* slots;
    int32_t* locks;
    uint8_t* arriving;
} pm_cache_spec;
typedef struct pm_cache pm_cache;

// NULL: out of memory, or no policy of that name. One call at a time; none of these takes a context.
PM_API pm_cache* pm_cache_create(const char* policy, const pm_cache_spec* spec);
PM_API void pm_cache_destroy(pm_cache* cache);

// How many experts are resident.
PM_API int64_t pm_cache_count(const pm_cache* cache);

// Requests experts by index: `indices` becomes the hits, then the misses, each once. `promote`: whether transient ones
// join the policy. Returns the number of hits, or minus an error code.
PM_API int32_t pm_cache_lookup(pm_cache* cache, int32_t layer, int32_t* indices, int64_t count, int32_t promote,
                               int32_t* misses);

// The same for `steps` layers of one token, with counts[i] experts each, one after the other in `indices`, which are all
// hits and each given once. PM_BAD_ARGUMENT: they are not; some of them may have been requested by then.
PM_API int32_t pm_cache_use(pm_cache* cache, int32_t steps, const int32_t* layers, const int32_t* counts,
                            int32_t* indices);

// Gives experts a slot, one after the other, until one is resident already or nobody may leave. `evicted`: their numbers, -1
// where a slot was free. Returns how many were admitted, or minus an error code.
PM_API int32_t pm_cache_admit(pm_cache* cache, int32_t layer, const int32_t* indices, int64_t count, int32_t transient,
                              int32_t* slots, int32_t* evicted);

// Who would leave for an admission to the layer, -1 for nobody.
PM_API int32_t pm_cache_victim(pm_cache* cache, int32_t layer);

// A resident loses its slot, is the first to leave, or is so no more.
PM_API int32_t pm_cache_release(pm_cache* cache, int32_t expert);
PM_API int32_t pm_cache_demote(pm_cache* cache, int32_t expert);
PM_API int32_t pm_cache_promote(pm_cache* cache, int32_t expert);
PM_API int32_t pm_cache_is_transient(const pm_cache* cache, int32_t expert);

// One token is done.
PM_API int32_t pm_cache_tick(pm_cache* cache);

// All residents lie in slots below `capacity`, which are all there are from now on.
PM_API int32_t pm_cache_resize(pm_cache* cache, int64_t capacity);

// The residents' numbers, who leaves first comes first, whoever is in use.
PM_API int32_t pm_cache_order(const pm_cache* cache, int32_t* experts);

#ifdef __cplusplus
}
#endif
#endif
