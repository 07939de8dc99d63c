// Where things lie in a packed matrix: the byte layout of quant/int4.py, quant/int8.py and quant/mxfp4.py.
#ifndef POCKETMOE_LAYOUT_H
#define POCKETMOE_LAYOUT_H

#include <cstdint>

#include "isa.h"
#include "pocketmoe_cpu.h"

namespace pm {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Matrix {
    int32_t rows = 0, cols = 0, format = 0, group = 32;

    explicit Matrix(const pm_matrix& m) : rows(m.rows), cols(m.cols), format(m.format), group(m.group) {}
    Matrix(int32_t rows, int32_t cols, int32_t format, int32_t group)
        : rows(rows), cols(cols), format(format), group(group) {}
    Matrix() = default;

    bool valid() const {
        const bool integers = (format >= PM_INT4 && format <= PM_INT8) || format == PM_INT4_ZERO_POINT;
        return rows > 0 && cols > 0 &&
               (group == 32 ? integers || format == PM_MXFP4 : integers && (group == 64 || group == 128));
    }
    int64_t weight_groups() const { return ceil_div(cols, group); }
    int64_t activation_groups() const { return weight_groups() * (group / COLUMNS); }
    int64_t blocks() const { return ceil_div(rows, ROW_BLOCK); }
    int64_t head_bytes() const {
        const int scale_bytes = format == PM_INT4_ASYMMETRIC ? 4 : format == PM_MXFP4 ? 1 : 2;
        return round_up(weight_groups() * ROW_BLOCK * scale_bytes, 64);
    }
    int64_t block_bytes() const {
        const int64_t codes = weight_groups() * group * ROW_BLOCK;
        return head_bytes() + (format == PM_INT8 ? codes : codes / 2);
    }
    // The code that stands for 0 and is subtracted by Group::start.
    int32_t zero() const {
        return format == PM_INT4 ? 8 : format == PM_INT8 ? 128 : format == PM_MXFP4 ? E2M1_ZERO : 0;
    }

    // Everything in DotArgs that depends on the matrix and the blocks alone.
    DotArgs block_args(const uint8_t* packed, int64_t first, int64_t last, const float* bias) const {
        DotArgs args = {};
        args.block = packed + first * block_bytes();
        args.block_bytes = block_bytes();
        args.head_bytes = head_bytes();
        args.blocks = static_cast<int32_t>(last - first);
        args.rows = static_cast<int32_t>((last * ROW_BLOCK < rows ? last * ROW_BLOCK : rows) - first * ROW_BLOCK);
        args.format = format;
        args.weight_groups = static_cast<int32_t>(weight_groups());
        args.groups_per_scale = group / COLUMNS;
        args.bias = bias ? bias + first * ROW_BLOCK : nullptr;
        return args;
    }
};

}  // namespace pm
#endif
