// The kernels that are the same for every instruction set, written on the vector operations of vec_*.h, which the
// including isa_*.cpp names first. Everything is in an anonymous namespace: each isa_*.cpp is compiled with its own
// flags, and a function shared by the linker would carry one file's instructions into the others.
//
// Before the include, an isa_*.cpp declares `Vec`, WIDTH (floats in one), the operations v...(), max_magnitude_bits,
// round_codes, prefetch_later, load_halves, unpack_nibbles, panel_tile
// and the PANEL_... sizes, and dot_tile if DIRECT_TILE, the most rows that it takes, is not 0.
//
// A row's result must not depend on the rows beside it, so tiles of any width do the same float operations in the same
// order for each row: per activation group, acc = fma(weight scale, fma(scale, MAGIC + n, shift), acc), and for a group
// minimum acc = fma(minimum, sum, acc).
#ifndef POCKETMOE_KERNELS_H
#define POCKETMOE_KERNELS_H

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
    out->start = static_cast<int32_t>(static_cast<uint32_t>(MAGIC_BITS) - static_cast<uint32_t>(zero) * static_cast<uint32_t>(sum));
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

// The activations of row i of a call.
PM_INLINE const Group* row_of(const pm::DotArgs& a, int64_t i) {
    return a.x + (a.index ? a.index[i] : i) * a.x_stride;
}

// Writes results of 16 weight rows, or of fewer where the matrix ends inside the block.
PM_INLINE void store_block(const pm::DotArgs& a, int64_t row, int32_t block, const float* values) {
    const int32_t first = block * ROW_BLOCK, lanes = a.rows - first < ROW_BLOCK ? a.rows - first : ROW_BLOCK;
    float* out = a.out + row * a.out_stride + first;
    const float* bias = a.bias ? a.bias + first : nullptr;
    if (lanes == ROW_BLOCK) {
        for (int r = 0; r < ROW_BLOCK; r += WIDTH) {
            const Vec v = vload(values + r);
            vstore(out + r, bias ? vadd(v, vload(bias + r)) : v);
        }
    } else {
        for (int32_t r = 0; r < lanes; r++) out[r] = bias ? values[r] + bias[r] : values[r];
    }
}

template <int FORMAT, int ROWS, bool PREFETCH>
PM_INLINE void dot_tile(const pm::DotArgs& a, const uint8_t* block, const Group* const* rows, float (*out)[16]);

// Few rows of activations: the weights are unpacked in registers as they come from memory.
template <int FORMAT, int ROWS>
PM_INLINE int64_t dot_rows(const pm::DotArgs& a, int32_t block, int64_t row) {
    if constexpr (ROWS <= DIRECT_TILE) for (; row + ROWS <= a.count; row += ROWS) {
        const Group* x[ROWS];
        for (int t = 0; t < ROWS; t++) x[t] = row_of(a, row + t);
        alignas(64) float results[ROWS][ROW_BLOCK];
        const uint8_t* packed = a.block + block * a.block_bytes;
        // Only the first tile reads the weights from memory.
        if (row == 0) dot_tile<FORMAT, ROWS, true>(a, packed, x, results);
        else dot_tile<FORMAT, ROWS, false>(a, packed, x, results);
        for (int t = 0; t < ROWS; t++) store_block(a, row + t, block, results[t]);
    }
    return row;
}

template <int FORMAT, int BLOCKS, int ROWS>
PM_INLINE void panel_tiles_of(int rows, const uint8_t* const* codes, const float* scales, const float* minimums,
                              int groups, const Group* const* x, float* acc) {
    if (rows == ROWS) return panel_tile<FORMAT, BLOCKS, ROWS>(codes, scales, minimums, groups, x, acc);
    if (ROWS > 1) panel_tiles_of<FORMAT, BLOCKS, ROWS - (ROWS > 1)>(rows, codes, scales, minimums, groups, x, acc);
}

// A tile's share of what its panel will need later: the next panel's weights, if they are not in the cache yet, and the
// lines of `out`, whose rows are far apart. All at once they would keep the tile's own loads waiting.
template <int BLOCKS, int64_t PANEL_BYTES>
PM_INLINE void prefetch_for_panel(const pm::DotArgs& a, int32_t block, int64_t row, int32_t k, int tile, int tiles,
                                  int first, int size) {
    if (row == 0) {
        const int64_t begin = PANEL_BYTES * tile / tiles & -64, end = PANEL_BYTES * (tile + 1) / tiles & -64;
        const uint8_t* next = a.block + block * a.block_bytes + a.head_bytes + (k / PANEL_GROUPS + 1) * PANEL_BYTES;
        for (int b = 0; b < BLOCKS; b++) prefetch_later(next + b * a.block_bytes + begin, end - begin);
    }
    if (k == 0) {
        const float* out = a.out + (row + first) * a.out_stride + block * ROW_BLOCK;
        for (int i = 0; i < size; i++)
            prefetch_later(reinterpret_cast<const uint8_t*>(out + i * a.out_stride), BLOCKS * ROW_BLOCK * sizeof(float));
    }
}

// Many rows of activations: BLOCKS x 16 weight rows by PANEL_GROUPS groups of columns at a time are unpacked into a
// panel that stays in the L1 cache while all rows of activations pass by; their sums wait in `acc`.
template <int FORMAT, int BLOCKS>
void dot_panel(const pm::DotArgs& a, int32_t block) {
    constexpr int LANES = BLOCKS * ROW_BLOCK, GROUP_BYTES = COLUMNS * ROW_BLOCK;
    constexpr int64_t PANEL_BYTES = PANEL_GROUPS * GROUP_BYTES / (FORMAT == PM_INT8 ? 1 : 2);  // packed, of one block
    alignas(64) uint8_t panel[FORMAT == PM_INT8 ? 64 : BLOCKS * PANEL_GROUPS * GROUP_BYTES];
    alignas(64) float scales[PANEL_GROUPS * LANES], minimums[FORMAT == PM_INT4_ASYMMETRIC ? PANEL_GROUPS * LANES : 16];
    alignas(64) float acc[PANEL_ROWS * LANES];
    const int32_t total = a.weight_groups * a.groups_per_scale;
    for (int64_t row = 0; row < a.count; row += PANEL_ROWS) {
        const int rows = static_cast<int>(a.count - row < PANEL_ROWS ? a.count - row : PANEL_ROWS);
        // Tiles of nearly the same size: a remainder of one row would cost as much as a whole tile.
        const int tiles = (rows + PANEL_TILE - 1) / PANEL_TILE;
        memset(acc, 0, rows * LANES * sizeof(float));
        for (int32_t k = 0; k < total; k += PANEL_GROUPS) {
            const int groups = total - k < PANEL_GROUPS ? total - k : PANEL_GROUPS;
            const uint8_t* codes[BLOCKS];
            for (int b = 0; b < BLOCKS; b++) {
                const uint8_t* packed = a.block + (block + b) * a.block_bytes;
                const uint8_t* from = packed + a.head_bytes + k / PANEL_GROUPS * PANEL_BYTES;
                codes[b] = from;
                if (FORMAT != PM_INT8) {
                    uint8_t* to = panel + b * PANEL_GROUPS * GROUP_BYTES;
                    unpack_nibbles(from, to, groups * 4);
                    codes[b] = to;
                }
                for (int g = 0; g < groups; g++) {
                    const int32_t weight_group = (k + g) / a.groups_per_scale;
                    load_halves(packed + weight_group * 32, scales + g * LANES + b * ROW_BLOCK);
                    if (FORMAT == PM_INT4_ASYMMETRIC)
                        load_halves(packed + (a.weight_groups + weight_group) * 32, minimums + g * LANES + b * ROW_BLOCK);
                }
            }
            for (int tile = 0, t = 0; tile < tiles; tile++) {
                const int size = (rows - t) / (tiles - tile);
                const Group* x[PANEL_TILE];
                for (int i = 0; i < size; i++) x[i] = row_of(a, row + t + i) + k;
                prefetch_for_panel<BLOCKS, PANEL_BYTES>(a, block, row, k, tile, tiles, t, size);
                panel_tiles_of<FORMAT, BLOCKS, PANEL_TILE>(size, codes, scales, minimums, groups, x, acc + t * LANES);
                t += size;
            }
        }
        for (int t = 0; t < rows; t++)
            for (int b = 0; b < BLOCKS; b++) store_block(a, row + t, block + b, acc + t * LANES + b * ROW_BLOCK);
    }
}

template <int FORMAT>
void dot_format(const pm::DotArgs& a) {
    int32_t block = 0;
    if (a.count >= PANEL_FROM) {
        for (; block + PANEL_BLOCKS <= a.blocks; block += PANEL_BLOCKS) dot_panel<FORMAT, PANEL_BLOCKS>(a, block);
        for (; block < a.blocks; block++) dot_panel<FORMAT, 1>(a, block);
        return;
    }
    for (; block < a.blocks; block++) {
        int64_t row = dot_rows<FORMAT, 8>(a, block, 0);
        row = dot_rows<FORMAT, 4>(a, block, row);
        row = dot_rows<FORMAT, 2>(a, block, row);
        dot_rows<FORMAT, 1>(a, block, row);
    }
}

void dot(const pm::DotArgs& args) {
    switch (args.format) {
        case PM_INT4: return dot_format<PM_INT4>(args);
        case PM_INT4_ASYMMETRIC: return dot_format<PM_INT4_ASYMMETRIC>(args);
        default: return dot_format<PM_INT8>(args);
    }
}

}  // namespace
#endif
