// The C interface of pocketmoe's CPU kernels. Plain C types, no Python, no torch.
//
// All matrices are packed as quant/int4.py and quant/int8.py describe. All floats are float32, all sizes are counts of
// elements unless a name says bytes. Functions return PM_OK or an error code; they never throw and never print.
#ifndef POCKETMOE_CPU_H
#define POCKETMOE_CPU_H

#include <stdint.h>

#if defined(_WIN32)
#define PM_API __declspec(dllexport)
#else
#define PM_API __attribute__((visibility("default")))
#endif

// Raised whenever a structure or a signature below changes; quant/native.py refuses another number.
#define PM_ABI_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

enum pm_status { PM_OK = 0, PM_OUT_OF_MEMORY = 1, PM_BAD_ARGUMENT = 2 };
enum pm_format { PM_INT4 = 0, PM_INT4_ASYMMETRIC = 1, PM_INT8 = 2 };
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

typedef struct {
    int32_t rows, cols;
    int32_t format, group;
} pm_matrix_spec;

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

// y = x W^T + bias. x [tokens, cols], y [tokens, rows], bias [rows] or NULL.
PM_API int32_t pm_linear(pm_context* context, const pm_matrix_spec* spec, const uint8_t* packed, const float* bias,
                         const float* x, int64_t tokens, float* y);

// out[t] = sum over j = 0..k-1, in that order, of weights[t, j] * parts[index[t, j]]; negative indices are skipped.
PM_API int32_t pm_combine(pm_context* context, const float* parts, const int32_t* index, const float* weights,
                          int64_t tokens, int64_t k, int64_t hidden, float* out);

// Reads every byte of the buffers once with all threads: the speed that no kernel can exceed. Returns their XOR.
PM_API uint64_t pm_stream(pm_context* context, const uint8_t* const* buffers, const int64_t* nbytes, int64_t n);

#ifdef __cplusplus
}
#endif
#endif
