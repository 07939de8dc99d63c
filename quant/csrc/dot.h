// Packed weights times quantised activations. Part of kernels.h.
//
// A row's result must not depend on the rows beside it, so tiles of any size do the same float operations in the same
// order for each row: per activation group, acc = fma(weight scale, fma(scale, MAGIC + n, shift), acc), and for a group
// minimum acc = fma(minimum, sum, acc).
#ifndef POCKETMOE_DOT_H
#define POCKETMOE_DOT_H

#include <string.h>

#include "isa.h"
#include "pocketmoe_cpu.h"

namespace {

// The activations of row i of a call.
PM_INLINE const pm::Group* row_of(const pm::DotArgs& a, int64_t i) {
    return a.x + (a.index ? a.index[i] : i) * a.x_stride;
}

PM_INLINE const uint8_t* block_of(const pm::DotArgs& a, int32_t block) { return a.block + block * a.block_bytes; }

// Writes results of 16 weight rows, or of fewer where the matrix ends inside the block.
PM_INLINE void store_block(const pm::DotArgs& a, int64_t row, int32_t block, const float* values) {
    const int32_t first = block * pm::ROW_BLOCK, left = a.rows - first;
    float* out = a.out + row * a.out_stride + first;
    const float* bias = a.bias ? a.bias + first : nullptr;
    if (left >= pm::ROW_BLOCK) {
        for (int r = 0; r < pm::ROW_BLOCK; r += WIDTH) {
            const Vec v = vload(values + r);
            vstore(out + r, bias ? vadd(v, vload(bias + r)) : v);
        }
    } else {
        for (int32_t r = 0; r < left; r++) out[r] = bias ? values[r] + bias[r] : values[r];
    }
}

template <int FORMAT, int ROWS, bool PREFETCH>
PM_INLINE void dot_tile(const pm::DotArgs& a, const uint8_t* block, const pm::Group* const* rows, float (*out)[16]);

// Few rows of activations: the weights are unpacked in registers as they come from memory.
template <int FORMAT, int ROWS>
PM_INLINE int64_t dot_rows(const pm::DotArgs& a, int32_t block, int64_t row) {
    if constexpr (ROWS <= DIRECT_TILE) {
        for (; row + ROWS <= a.count; row += ROWS) {
            const pm::Group* x[ROWS];
            for (int t = 0; t < ROWS; t++) x[t] = row_of(a, row + t);
            alignas(64) float results[ROWS][pm::ROW_BLOCK];
            // Only the first tile reads the weights from memory.
            if (row == 0) dot_tile<FORMAT, ROWS, true>(a, block_of(a, block), x, results);
            else dot_tile<FORMAT, ROWS, false>(a, block_of(a, block), x, results);
            for (int t = 0; t < ROWS; t++) store_block(a, row + t, block, results[t]);
        }
    }
    return row;
}

// BLOCKS x 16 weight rows by up to PANEL_GROUPS groups of columns, one byte a code, with float scales.
template <int FORMAT, int BLOCKS>
struct Panel {
    static constexpr int LANES = BLOCKS * pm::ROW_BLOCK, GROUP_BYTES = pm::COLUMNS * pm::ROW_BLOCK;
    static constexpr int64_t PACKED_BYTES = PANEL_GROUPS * GROUP_BYTES / (FORMAT == PM_INT8 ? 1 : 2);  // of a block

    alignas(64) uint8_t unpacked[FORMAT == PM_INT8 ? 64 : BLOCKS * PANEL_GROUPS * GROUP_BYTES];
    alignas(64) float scales[PANEL_GROUPS * LANES];
    alignas(64) float minimums[pm::HAS_MINIMUM<FORMAT> ? PANEL_GROUPS * LANES : 16];
    const uint8_t* codes[BLOCKS];

    static const uint8_t* packed(const pm::DotArgs& a, int32_t block, int32_t panel) {
        return block_of(a, block) + a.head_bytes + panel * PACKED_BYTES;
    }

    // Groups k..k + groups of the activations' columns.
    PM_INLINE_MEMBER void load(const pm::DotArgs& a, int32_t block, int32_t k, int groups) {
        for (int b = 0; b < BLOCKS; b++) {
            codes[b] = packed(a, block + b, k / PANEL_GROUPS);
            if (FORMAT != PM_INT8) {
                uint8_t* to = unpacked + b * PANEL_GROUPS * GROUP_BYTES;
                unpack_nibbles<FORMAT>(codes[b], to, groups * 4);
                codes[b] = to;
            }
            const uint8_t* head = block_of(a, block + b);
            for (int g = 0; g < groups; g++) {
                const int32_t weight_group = (k + g) / a.groups_per_scale, lane = g * LANES + b * pm::ROW_BLOCK;
                const uint8_t* scale = head + weight_group * pm::SCALE_BYTES<FORMAT>;
                if (FORMAT == PM_MXFP4) load_exponents(scale, scales + lane);
                else if (FORMAT == PM_INT4_ZERO_POINT) load_words(scale, scales + lane, minimums + lane);
                else load_halves(scale, scales + lane);
                if (FORMAT == PM_INT4_ASYMMETRIC)
                    load_halves(head + (a.weight_groups + weight_group) * 32, minimums + lane);
            }
        }
    }
};

template <int FORMAT, int BLOCKS, int ROWS>
PM_INLINE void panel_rows(int rows, const Panel<FORMAT, BLOCKS>& panel, int groups, const pm::Group* const* x,
                          float* acc) {
    if (rows == ROWS)
        return panel_tile<FORMAT, BLOCKS, ROWS>(panel.codes, panel.scales, panel.minimums, groups, x, acc);
    if constexpr (ROWS > 1) panel_rows<FORMAT, BLOCKS, ROWS - 1>(rows, panel, groups, x, acc);
}

// A tile's share of what will be needed later: the next panel's weights, if they are not in the cache yet, and the
// lines of `out`, whose rows are far apart. All at once they would keep the tile's own loads waiting.
template <int FORMAT, int BLOCKS>
PM_INLINE void prefetch_share(const pm::DotArgs& a, int32_t block, int64_t row, int32_t k, int tile, int tiles,
                              int first, int size) {
    if (row == 0) {
        const int64_t bytes = Panel<FORMAT, BLOCKS>::PACKED_BYTES;
        const int64_t begin = bytes * tile / tiles & -64, end = bytes * (tile + 1) / tiles & -64;
        for (int b = 0; b < BLOCKS; b++) {
            const uint8_t* next = Panel<FORMAT, BLOCKS>::packed(a, block + b, k / PANEL_GROUPS + 1);
            prefetch_later(next + begin, end - begin);
        }
    }
    if (k == 0) {
        const float* out = a.out + (row + first) * a.out_stride + block * pm::ROW_BLOCK;
        for (int t = 0; t < size; t++, out += a.out_stride)
            prefetch_later(reinterpret_cast<const uint8_t*>(out), BLOCKS * pm::ROW_BLOCK * sizeof(float));
    }
}

// Many rows of activations: each panel of weights is unpacked once and stays in the L1 cache while PANEL_ROWS rows pass
// by, whose sums wait in `acc`.
template <int FORMAT, int BLOCKS>
void dot_panels(const pm::DotArgs& a, int32_t block) {
    constexpr int LANES = BLOCKS * pm::ROW_BLOCK;
    Panel<FORMAT, BLOCKS> panel;
    alignas(64) float acc[PANEL_ROWS * LANES];
    const int32_t total = a.weight_groups * a.groups_per_scale;
    for (int64_t row = 0; row < a.count; row += PANEL_ROWS) {
        const int rows = static_cast<int>(a.count - row < PANEL_ROWS ? a.count - row : PANEL_ROWS);
        // Tiles of nearly the same size: a remainder of one row would cost as much as a whole tile.
        const int tiles = (rows + PANEL_TILE - 1) / PANEL_TILE;
        memset(acc, 0, rows * LANES * sizeof(float));
        for (int32_t k = 0; k < total; k += PANEL_GROUPS) {
            const int groups = total - k < PANEL_GROUPS ? total - k : PANEL_GROUPS;
            panel.load(a, block, k, groups);
            for (int tile = 0, t = 0; tile < tiles; tile++) {
                const int size = (rows - t) / (tiles - tile);
                const pm::Group* x[PANEL_TILE];
                for (int i = 0; i < size; i++) x[i] = row_of(a, row + t + i) + k;
                prefetch_share<FORMAT, BLOCKS>(a, block, row, k, tile, tiles, t, size);
                panel_rows<FORMAT, BLOCKS, PANEL_TILE>(size, panel, groups, x, acc + t * LANES);
                t += size;
            }
        }
        for (int t = 0; t < rows; t++)
            for (int b = 0; b < BLOCKS; b++) store_block(a, row + t, block + b, acc + t * LANES + b * pm::ROW_BLOCK);
    }
}

template <int FORMAT>
void dot_format(const pm::DotArgs& a) {
    int32_t block = 0;
    if (a.count >= PANEL_FROM) {
        for (; block + PANEL_BLOCKS <= a.blocks; block += PANEL_BLOCKS) dot_panels<FORMAT, PANEL_BLOCKS>(a, block);
        for (; block < a.blocks; block++) dot_panels<FORMAT, 1>(a, block);
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
        case PM_INT4_ZERO_POINT: return dot_format<PM_INT4_ZERO_POINT>(args);
        case PM_MXFP4: return dot_format<PM_MXFP4>(args);
        default: return dot_format<PM_INT8>(args);
    }
}

}  // namespace
#endif
