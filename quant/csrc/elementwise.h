// Activations: the gate functions, quantisation, and the weighted sum of experts. Part of kernels.h.
#ifndef POCKETMOE_ELEMENTWISE_H
#define POCKETMOE_ELEMENTWISE_H

#include <math.h>
#include <string.h>

#include "isa.h"
#include "pocketmoe_cpu.h"

namespace {

using pm::COLUMNS;
using pm::Group;
using pm::MAGIC;
using pm::MAGIC_BITS;
using pm::ROW_BLOCK;

// e^x, relative error below 2e-7 for x in [-87, 88], saturating outside; NaN stays NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2; the series for e^r ends at r^7 / 7!, whose successor is below 6e-9.
PM_INLINE Vec exp_(Vec x) {
    x = vmin(vset(88.0f), vmax(vset(-87.0f), x));
    const Vec n = vround(vmul(x, vset(1.44269504088896341f)));
    Vec r = vfma(n, vset(-0.693359375f), x);  // exact: few bits
    r = vfma(n, vset(2.12194440e-4f), r);     // 0.693359375 - ln 2
    Vec p = vset(1.0f / 5040);
    p = vfma(p, r, vset(1.0f / 720));
    p = vfma(p, r, vset(1.0f / 120));
    p = vfma(p, r, vset(1.0f / 24));
    p = vfma(p, r, vset(1.0f / 6));
    p = vfma(p, r, vset(0.5f));
    p = vfma(p, r, vset(1.0f));
    p = vfma(p, r, vset(1.0f));
    return vscale2(p, n);
}

// x * sigmoid(z)
PM_INLINE Vec gated(Vec x, Vec z) { return vdiv(x, vadd(vset(1.0f), exp_(vsub(vset(0.0f), z)))); }

template <int KIND>
PM_INLINE Vec activation(Vec gate, Vec up, Vec alpha, Vec limit) {
    if (KIND == PM_RELU2) {
        const Vec positive = vmax(vset(0.0f), up);
        return vmul(positive, positive);
    }
    if (KIND == PM_SILU) return vmul(gated(gate, gate), up);
    if (KIND == PM_GELU_TANH) {
        // 0.5 (1 + tanh(u)) = sigmoid(2u), u = sqrt(2 / pi) (g + 0.044715 g^3)
        const Vec cube = vmul(vmul(gate, gate), gate);
        const Vec u = vmul(vset(2 * 0.7978845608028654f), vfma(vset(0.044715f), cube, gate));
        return vmul(gated(gate, u), up);
    }
    const Vec g = vmin(limit, gate);
    const Vec u = vmin(limit, vmax(vsub(vset(0.0f), limit), up));
    if (KIND == PM_SILU_CLAMP) return vmul(gated(g, g), u);
    return vmul(vadd(u, vset(1.0f)), gated(g, vmul(alpha, g)));  // PM_GPT_OSS
}

PM_INLINE float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

PM_INLINE uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

// One group of 32 columns. A group with NaN or infinity gets a NaN scale, so that it cannot pass unnoticed.
PM_INLINE void quantize_group(const float* x, int32_t zero, Group* out) {
    const uint32_t largest = max_magnitude_bits(x);
    float scale, inverse;
    if (largest >= 0x7F800000u) {
        scale = bits_float(0x7FC00000u);
        inverse = 0.0f;
    } else {
        // Two low bits cleared: see MAGIC in isa.h. Below 1e-30 the inverse would overflow.
        scale = bits_float(float_bits(bits_float(largest) * (1.0f / 127)) & ~3u);
        if (scale < 1e-30f) scale = 0.0f;
        inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    }
    const int32_t sum = round_codes(x, inverse, out->codes);
    out->scale = scale;
    out->shift = -(scale * MAGIC);
    // Unsigned: codes of a NaN group are arbitrary on x86, and so is their sum.
    const uint32_t offset = static_cast<uint32_t>(zero) * static_cast<uint32_t>(sum);
    out->start = static_cast<int32_t>(static_cast<uint32_t>(MAGIC_BITS) - offset);
    out->sum = scale * static_cast<float>(sum);
}

void quantize(const float* x, int64_t cols, int64_t n_groups, int32_t zero, Group* out) {
    const int64_t whole = cols / COLUMNS;
    for (int64_t g = 0; g < whole; g++) quantize_group(x + g * COLUMNS, zero, out + g);
    for (int64_t g = whole; g < n_groups; g++) {
        float padded[COLUMNS] = {};
        if (g * COLUMNS < cols) memcpy(padded, x + g * COLUMNS, (cols - g * COLUMNS) * sizeof(float));
        quantize_group(padded, zero, out + g);
    }
}

template <int KIND>
void activate_kind(const pm::ActivateArgs& a) {
    const Vec alpha = vset(a.alpha), limit = vset(a.limit);
    for (int64_t i = 0; i < a.count; i++) {
        float hidden[COLUMNS];
        for (int c = 0; c < COLUMNS; c += WIDTH) {
            const Vec up = vload(a.up + i * COLUMNS + c);
            const Vec gate = KIND == PM_RELU2 ? up : vload(a.gate + i * COLUMNS + c);
            vstore(hidden + c, activation<KIND>(gate, up, alpha, limit));
        }
        quantize_group(hidden, a.zero, a.out + i * a.out_stride);
    }
}

void activate(const pm::ActivateArgs& args) {
    switch (args.activation) {
        case PM_SILU: return activate_kind<PM_SILU>(args);
        case PM_SILU_CLAMP: return activate_kind<PM_SILU_CLAMP>(args);
        case PM_GPT_OSS: return activate_kind<PM_GPT_OSS>(args);
        case PM_GELU_TANH: return activate_kind<PM_GELU_TANH>(args);
        default: return activate_kind<PM_RELU2>(args);
    }
}

void combine(const float* parts, int64_t stride, const int32_t* index, const float* weights, int64_t k, int64_t n,
             float* out) {
    int64_t c = 0;
    for (; c + WIDTH <= n; c += WIDTH) {
        Vec sum = vset(0.0f);
        for (int64_t j = 0; j < k; j++)
            if (index[j] >= 0) sum = vadd(sum, vmul(vset(weights[j]), vload(parts + index[j] * stride + c)));
        vstore(out + c, sum);
    }
    for (; c < n; c++) {
        float sum = 0.0f;
        for (int64_t j = 0; j < k; j++)
            if (index[j] >= 0) sum += weights[j] * parts[index[j] * stride + c];
        out[c] = sum;
    }
}

}  // namespace
#endif
