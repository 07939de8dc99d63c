// What the scheduling code (experts.cpp, linear.cpp) asks of an instruction set. One `Isa` table per isa_*.cpp.
//
// Activations are quantised to int8 per group of 32 columns. A group's integer dot product n with the weights' codes is
// turned into a float without a conversion instruction: the accumulator starts at the bits of MAGIC = 1.5 * 2^23, so
// that afterwards its bits are those of the float MAGIC + n, and fma(scale, MAGIC + n, -scale * MAGIC) is scale * n,
// correctly rounded, because `scale` is kept to 22 significant bits and scale * MAGIC is therefore exact.
#ifndef POCKETMOE_ISA_H
#define POCKETMOE_ISA_H

#include <stdint.h>

#include "pocketmoe_cpu.h"

namespace pm {

constexpr int ROW_BLOCK = 16;         // rows of a packed block
constexpr int COLUMNS = 32;           // columns of an activation group
constexpr int32_t MAGIC_BITS = 0x4B400000;
constexpr float MAGIC = 12582912.0f;

// The weights of MXFP4 that its 16 codes stand for: E2M1 values, doubled to be integers, plus E2M1_ZERO.
constexpr int32_t E2M1_ZERO = 12;
alignas(16) constexpr uint8_t E2M1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// Of 16 rows' scales of one weight group.
template <int FORMAT>
constexpr int SCALE_BYTES = FORMAT == PM_MXFP4 ? 16 : 32;

// Whether a weight group has a minimum, what its code 0 stands for, which is added beside Group::start's zero.
template <int FORMAT>
constexpr bool HAS_MINIMUM = FORMAT == PM_INT4_ASYMMETRIC || FORMAT == PM_INT4_ZERO_POINT;

// The words of PM_INT4_ZERO_POINT: `(word & WORD_SCALE) << 12`, plus WORD_BIAS, are the bits of the scale; the other
// bits are the zero point in quarters of a step.
constexpr int32_t WORD_SCALE = 0xFFC0, WORD_ZERO = 0x3F, WORD_BIAS = 103 << 23;
constexpr float WORD_STEP = -0.25f;

// 32 columns of one quantised row of activations.
struct Group {
    float scale;
    float shift;         // -scale * MAGIC
    int32_t start;       // MAGIC_BITS - zero * (sum of codes), zero = the weights' code that stands for 0
    float sum;           // scale * (sum of codes): what a weight group's minimum is multiplied by
    int8_t codes[COLUMNS];
};
static_assert(sizeof(Group) == 48, "kernels address groups by byte offsets");

// Some blocks of 16 weight rows times `count` rows of activations.
struct DotArgs {
    const uint8_t* block;       // the first block: scales, minimums, padding, codes
    int64_t block_bytes;
    int64_t head_bytes;         // of a block, before its codes
    int32_t blocks;
    int32_t rows;               // weight rows that exist in these blocks; only the last may be cut short
    int32_t format;             // pm_format
    int32_t weight_groups;      // per row
    int32_t groups_per_scale;   // activation groups in one weight group
    const Group* x;             // activations; row i is x + (index ? index[i] : i) * x_stride
    int64_t x_stride;
    const int32_t* index;
    int64_t count;
    const float* bias;          // [rows] or null
    float* out;                 // [count, rows]; row i goes to out + i * out_stride
    int64_t out_stride;
};

// Gate and up projections of 32 hidden units for `count` rows, joined by the activation and quantised.
struct ActivateArgs {
    int32_t activation;         // pm_activation
    float alpha, limit;
    int32_t zero;               // of the next matrix' weights; see Group::start
    const float* gate;          // [count, 32], null without a gate
    const float* up;            // [count, 32]
    int64_t count;
    Group* out;                 // row i goes to out + i * out_stride
    int64_t out_stride;
};

// Some query heads that share one key and value head, over the cached tokens.
struct AttendArgs {
    const float* query;         // [heads, key_dim]
    int64_t heads;
    const void* keys;           // [tokens, key_dim], float32 or, if `half`, float16, as all that is cached
    const float* extra_query;   // [heads, extra_dim], [tokens, extra_dim]: a second part of queries and keys
    const void* extra_keys;
    const void* values;         // [tokens, value_dim]
    bool half;
    int64_t tokens, key_dim, extra_dim, value_dim;
    float scaling;
    const float* sinks;         // [heads] or null: a logit that takes its share of the softmax and gives nothing
    float* scores;              // [2, tokens] scratch
    float* out;                 // [heads, value_dim]
};

struct GateArgs {
    int32_t activation;         // pm_activation, one with a gate
    float alpha, limit;
    const float* gate;          // [n]
    const float* up;            // [n]
    int64_t n;
    float* out;                 // [n]; may be gate or up
};

struct Isa {
    const char* name;
    bool (*usable)();
    // One row x [cols] to groups [ceil(cols / 32)..n_groups), zero beyond cols.
    void (*quantize)(const float* x, int64_t cols, int64_t n_groups, int32_t zero, Group* out);
    void (*dot)(const DotArgs& args);
    void (*activate)(const ActivateArgs& args);
    // out [n] = sum of weights[j] * parts[index[j]] [n], in the order of j; parts has rows of `stride` floats.
    void (*combine)(const float* parts, int64_t stride, const int32_t* index, const float* weights, int64_t k,
                    int64_t n, float* out);
    uint64_t (*read)(const uint8_t* data, int64_t nbytes);
    // y [n] += x
    void (*add)(const float* x, int64_t n, float* y);
    // out [n] = weight * x / sqrt(mean(x^2) + eps); out may be x.
    void (*rms_norm)(const float* x, const float* weight, int64_t n, float eps, float* out);
    // y [rows] = w [rows, cols] x + bias; bias may be null.
    void (*matvec)(const float* w, int64_t rows, int64_t cols, const float* bias, const float* x, float* y);
    // n pairs of x turned by angles; `rotation` is a pm_rotation.
    void (*rotate)(float* x, const float* cosine, const float* sine, int64_t n, int32_t rotation);
    void (*attend)(const AttendArgs& args);
    // out [n] = x, in float32 or float16: to the nearest, and to the largest finite number where that is exceeded.
    void (*store)(const float* x, int64_t n, bool half, void* out);
    void (*gate)(const GateArgs& args);
};

extern const Isa isa_portable;
#if defined(__x86_64__) || defined(_M_X64)
#define PM_X86 1
extern const Isa isa_avx2;
extern const Isa isa_avxvnni;
extern const Isa isa_avx512;
bool cpu_has_avx2();       // with FMA and F16C
bool cpu_has_avxvnni();
bool cpu_has_avx512vnni();
#elif defined(__aarch64__)
#define PM_ARM64 1
extern const Isa isa_neon;
bool cpu_has_dot_product();
#endif

}  // namespace pm

#if defined(_MSC_VER) && !defined(__clang__)
#define PM_INLINE static __forceinline
#define PM_INLINE_MEMBER __forceinline
#define PM_UNROLL
#elif defined(__clang__)
#define PM_INLINE static inline __attribute__((always_inline))
#define PM_INLINE_MEMBER inline __attribute__((always_inline))
#define PM_UNROLL _Pragma("clang loop unroll(full)")
#else
#define PM_INLINE static inline __attribute__((always_inline))
#define PM_INLINE_MEMBER inline __attribute__((always_inline))
#define PM_UNROLL _Pragma("GCC unroll 16")
#endif

#endif
