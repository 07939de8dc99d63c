// What a token needs between the matrices: norms, small dense products, rotation, attention over the KV cache. Part of
// kernels.h. Every sum has one fixed order, so results do not depend on how work is spread over threads.
#ifndef POCKETMOE_ATTEND_H
#define POCKETMOE_ATTEND_H

#include <math.h>

#include "elementwise.h"
#include "half.h"
#include "isa.h"

namespace {

// What the cache holds: float, or uint16_t for float16.
PM_INLINE Vec load_cached(const float* p) { return vload(p); }
PM_INLINE Vec load_cached(const uint16_t* p) { return load_half(reinterpret_cast<const uint8_t*>(p)); }
PM_INLINE float one_cached(const float* p) { return *p; }
PM_INLINE float one_cached(const uint16_t* p) { return pm::half_float(reinterpret_cast<const uint8_t*>(p)); }

// Four accumulators, because one would wait for itself.
template <typename T>
PM_INLINE float dot_floats(const float* a, const T* b, int64_t n) {
    Vec sums[4];
    PM_UNROLL for (int j = 0; j < 4; j++) sums[j] = vset(0.0f);
    int64_t i = 0;
    for (; i + 4 * WIDTH <= n; i += 4 * WIDTH)
        PM_UNROLL for (int j = 0; j < 4; j++)
            sums[j] = vfma(vload(a + i + j * WIDTH), load_cached(b + i + j * WIDTH), sums[j]);
    for (; i + WIDTH <= n; i += WIDTH) sums[0] = vfma(vload(a + i), load_cached(b + i), sums[0]);
    float sum = vsum(vadd(vadd(sums[0], sums[1]), vadd(sums[2], sums[3])));
    for (; i < n; i++) sum += a[i] * one_cached(b + i);
    return sum;
}

// y += scale * x
PM_INLINE void add_scaled(const float* x, float scale, int64_t n, float* y) {
    const Vec factor = vset(scale);
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) vstore(y + i, vfma(factor, vload(x + i), vload(y + i)));
    for (; i < n; i++) y[i] += scale * x[i];
}

void add(const float* x, int64_t n, float* y) { add_scaled(x, 1.0f, n, y); }

void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
    const float inverse = 1.0f / sqrtf(dot_floats(x, x, n) / static_cast<float>(n) + eps);
    const Vec factor = vset(inverse);
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) vstore(out + i, vmul(vload(weight + i), vmul(vload(x + i), factor)));
    for (; i < n; i++) out[i] = weight[i] * (x[i] * inverse);
}

void matvec(const float* w, int64_t rows, int64_t cols, const float* bias, const float* x, float* y) {
    for (int64_t r = 0; r < rows; r++) y[r] = dot_floats(w + r * cols, x, cols) + (bias ? bias[r] : 0.0f);
}

void rotate(float* x, const float* cosine, const float* sine, int64_t n, int32_t rotation) {
    const int64_t step = rotation == PM_HALVES ? 1 : 2, partner = rotation == PM_HALVES ? n : 1;
    for (int64_t i = 0; i < n; i++) {
        const float first = x[i * step], second = x[i * step + partner];
        x[i * step] = first * cosine[i] - second * sine[i];
        x[i * step + partner] = second * cosine[i] + first * sine[i];
    }
    if (rotation != PM_SORTED) return;
    // In place and without a buffer: each pass puts one more pair's first value in front of the seconds before it.
    for (int64_t i = 1; i < n; i++) {
        const float first = x[2 * i];
        for (int64_t j = 2 * i; j > i; j--) x[j] = x[j - 1];
        x[i] = first;
    }
}

// exp(x - shift) in place; returns the sum.
PM_INLINE float exponentials(float* x, int64_t n, float shift) {
    const Vec by = vset(shift);
    Vec sums = vset(0.0f);
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        const Vec e = exp_(vsub(vload(x + i), by));
        vstore(x + i, e);
        sums = vadd(sums, e);
    }
    float sum = vsum(sums);
    for (; i < n; i++) sum += x[i] = expf(x[i] - shift);
    return sum;
}

template <int HEADS, typename T>
PM_INLINE void scores_of(const pm::AttendArgs& a, int64_t head, float* const* scores) {
    const T* const keys = static_cast<const T*>(a.keys);
    const T* const extra_keys = static_cast<const T*>(a.extra_keys);
    for (int64_t t = 0; t < a.tokens; t++) {
        const T* key = keys + t * a.key_dim;
        float found[HEADS];
        int64_t i = 0;
        Vec sums[HEADS];
        PM_UNROLL for (int h = 0; h < HEADS; h++) sums[h] = vset(0.0f);
        for (; i + WIDTH <= a.key_dim; i += WIDTH) {
            const Vec k = load_cached(key + i);
            PM_UNROLL for (int h = 0; h < HEADS; h++)
                sums[h] = vfma(vload(a.query + (head + h) * a.key_dim + i), k, sums[h]);
        }
        PM_UNROLL for (int h = 0; h < HEADS; h++) found[h] = vsum(sums[h]);
        for (; i < a.key_dim; i++)
            PM_UNROLL for (int h = 0; h < HEADS; h++)
                found[h] += a.query[(head + h) * a.key_dim + i] * one_cached(key + i);
        if (a.extra_dim)
            for (int h = 0; h < HEADS; h++)
                found[h] += dot_floats(a.extra_query + (head + h) * a.extra_dim, extra_keys + t * a.extra_dim,
                                       a.extra_dim);
        PM_UNROLL for (int h = 0; h < HEADS; h++) scores[h][t] = a.scaling * found[h];
    }
}

// One query head over all cached tokens of its key and value head. `scores` are this head's own.
template <typename T>
PM_INLINE void weigh_values(const pm::AttendArgs& a, int64_t head, float* scores, float* out) {
    const T* const values = static_cast<const T*>(a.values);
    float largest = a.sinks ? a.sinks[head] : scores[0];
    for (int64_t t = 0; t < a.tokens; t++) largest = scores[t] > largest ? scores[t] : largest;
    float total = exponentials(scores, a.tokens, largest);
    if (a.sinks) total += expf(a.sinks[head] - largest);
    const float inverse = 1.0f / total;
    int64_t i = 0;
    for (; i + 4 * WIDTH <= a.value_dim; i += 4 * WIDTH) {
        Vec sums[4];
        PM_UNROLL for (int j = 0; j < 4; j++) sums[j] = vset(0.0f);
        for (int64_t t = 0; t < a.tokens; t++) {
            const Vec p = vset(scores[t]);
            const T* value = values + t * a.value_dim + i;
            PM_UNROLL for (int j = 0; j < 4; j++) sums[j] = vfma(p, load_cached(value + j * WIDTH), sums[j]);
        }
        PM_UNROLL for (int j = 0; j < 4; j++) vstore(out + i + j * WIDTH, vmul(sums[j], vset(inverse)));
    }
    for (; i + WIDTH <= a.value_dim; i += WIDTH) {
        Vec sum = vset(0.0f);
        for (int64_t t = 0; t < a.tokens; t++)
            sum = vfma(vset(scores[t]), load_cached(values + t * a.value_dim + i), sum);
        vstore(out + i, vmul(sum, vset(inverse)));
    }
    for (; i < a.value_dim; i++) {
        float sum = 0.0f;
        for (int64_t t = 0; t < a.tokens; t++) sum += scores[t] * one_cached(values + t * a.value_dim + i);
        out[i] = sum * inverse;
    }
}

template <typename T>
void attend_cached(const pm::AttendArgs& a) {
    int64_t head = 0;
    for (; head + 2 <= a.heads; head += 2) {
        float* const scores[2] = {a.scores, a.scores + a.tokens};
        scores_of<2, T>(a, head, scores);
        for (int h = 0; h < 2; h++) weigh_values<T>(a, head + h, scores[h], a.out + (head + h) * a.value_dim);
    }
    for (; head < a.heads; head++) {
        float* const scores[1] = {a.scores};
        scores_of<1, T>(a, head, scores);
        weigh_values<T>(a, head, a.scores, a.out + head * a.value_dim);
    }
}

void attend(const pm::AttendArgs& a) { a.half ? attend_cached<uint16_t>(a) : attend_cached<float>(a); }

void store(const float* x, int64_t n, bool half, void* out) {
    if (half)
        for (int64_t i = 0; i < n; i++) static_cast<uint16_t*>(out)[i] = pm::float_half(x[i]);
    else
        memcpy(out, x, n * sizeof(float));
}

template <int KIND>
void gate_kind(const pm::GateArgs& g) {
    const Vec alpha = vset(g.alpha), limit = vset(g.limit);
    for (int64_t i = 0; i < g.n; i += WIDTH) {
        float gates[WIDTH] = {}, ups[WIDTH] = {}, out[WIDTH];
        const int width = g.n - i < WIDTH ? static_cast<int>(g.n - i) : WIDTH;
        for (int j = 0; j < width; j++) gates[j] = g.gate[i + j], ups[j] = g.up[i + j];
        vstore(out, activation<KIND>(vload(gates), vload(ups), alpha, limit));
        for (int j = 0; j < width; j++) g.out[i + j] = out[j];
    }
}

// The gate functions on floats, for a feed-forward block of the trunk.
void gate(const pm::GateArgs& args) {
    switch (args.activation) {
        case PM_SILU_CLAMP: return gate_kind<PM_SILU_CLAMP>(args);
        case PM_GPT_OSS: return gate_kind<PM_GPT_OSS>(args);
        case PM_GELU_TANH: return gate_kind<PM_GELU_TANH>(args);
        default: return gate_kind<PM_SILU>(args);
    }
}

}  // namespace
#endif
