"""A trunk matrix on a GPU: it stays packed in its memory, and Triton's kernels multiply by it as it lies there.

Few rows are computed row by row in float32. More go through tensor cores, which hold all codes exactly: rows of 16 bits
are multiplied as they are, float32 ones as closely as `triton_kernels.py` says. Sums are float32, no sum is split
between programs, and the result is rounded once, to the dtype of the rows.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from .int4 import ROW_BLOCK, round_up
from .linear import PackedMatrix, QuantLinear
from .triton_kernels import (
    MATVEC_ROWS,
    TILE_COLS,
    TILE_ROWS,
    PackedShape,
    Variant,
    device_code,
    launch_options,
)

# Chosen by reasoning, as those of the experts' kernels.
CHUNKS = (128, 64, 32)
"""Of 64 bytes that a matvec program reads at once; whichever wastes least of the last read, of those the first."""
TILE_TOKENS = (16, 64)
"""Rows that share one read of the codes; the smallest that holds all, else the last. Each is one more compilation."""


class TritonLinear(QuantLinear):
    """On a GPU; with tensors in main memory, in Triton's interpreter.

    Rows are float32, float16 or bfloat16. Nothing waits for the GPU: work is queued on torch's current stream. The
    kernels are compiled at their first use, and for all processes of this user.
    """

    def __init__(self, packed: PackedMatrix, dtype: torch.dtype, bias: nn.Parameter | None = None) -> None:
        super().__init__(packed, dtype, bias)
        self.shape = PackedShape.of(packed.format, packed.rows, packed.cols)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, y = x.contiguous(), x.new_empty((*x.shape[:-1], self.out_features))
        tokens = x.numel() // self.in_features
        size = tile_tokens(tokens)
        kernel, constants, options, rows = variant(size, self.shape, x.dtype, interpret=not x.is_cuda)
        count = () if size == 1 else (tokens,)
        with torch.cuda.device_of(x):
            grid = -(-tokens // size), -(-self.out_features // rows)
            kernel[grid](self.packed.data, self.bias, x, y, *count, **constants, **options)
        return y


def tile_tokens(tokens: int) -> int:
    """How many rows of so many a program computes."""
    return 1 if tokens <= MATVEC_ROWS else next((n for n in TILE_TOKENS if tokens <= n), TILE_TOKENS[-1])


@cache
def variant(tokens: int, shape: PackedShape, dtype: torch.dtype, interpret: bool) -> Variant:
    """The kernel whose programs compute so many rows of that dtype."""
    code, options = device_code(interpret), launch_options(tokens)
    if tokens == 1:
        chunks = min(CHUNKS, key=lambda n: round_up(shape.padded // shape.word, n))
        return Variant(code.linear_matvec, {"P": shape, "CHUNKS": chunks}, options, ROW_BLOCK)
    operand = code.tl.float16 if dtype == torch.float16 else code.tl.bfloat16
    if interpret:  # which cannot multiply bfloat16
        operand = code.tl.float32
    tiles = {"TOKENS": tokens, "TILE_ROWS": TILE_ROWS, "TILE_COLS": TILE_COLS, "OPERAND": operand}
    return Variant(code.linear_matmul, {"P": shape, **tiles}, options, TILE_ROWS)
