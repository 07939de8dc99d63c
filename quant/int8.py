"""Packed INT8 matrices for the trunk: layout, quantisation, and the plain reference that kernels are compared with.

The twin of `int4.py`, symmetric only. A matrix W of shape [rows, cols] is cut into groups of `group` columns; each
group of each row has a float16 scale and codes 1..255 with

    W = scale * (code - 128)

Code 0 never occurs, so that the signed weight always has an opposite (8-bit multiplies without VNNI need that). Bytes:

    for each block of 16 rows:
        scales    [groups, 16] float16
        (zero bytes up to a multiple of 64)
        codes     [cols / 4, 16, 4] uint8            byte j of row r in chunk c holds column 4c + j

Rows are padded to a multiple of 16 with scale 0 and columns to a multiple of `group` with code 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .int4 import ALIGNMENT, GROUPS, ROW_BLOCK, finite_matrix, round_up

ZERO = 128


@dataclass(frozen=True)
class Int8Format:
    """How a matrix is packed: columns per scale."""

    group: int = 32

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"INT8 group size must be one of {GROUPS}, not {self.group}")

    def block_bytes(self, cols: int) -> tuple[int, int]:
        """Bytes of one block of 16 rows: (scales with their padding, codes)."""
        padded = round_up(cols, self.group)
        return round_up(padded // self.group * ROW_BLOCK * 2, ALIGNMENT), padded * ROW_BLOCK

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of a packed matrix of shape [rows, cols]; a multiple of 64."""
        return round_up(rows, ROW_BLOCK) // ROW_BLOCK * sum(self.block_bytes(cols))


def quantize(weight: torch.Tensor, fmt: Int8Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a matrix: each group's largest magnitude maps to 127.

    Args:
        weight: [rows, cols], any floating dtype.

    Returns:
        codes uint8 [rows, padded cols], scales float16 [rows, groups].

    Raises:
        ValueError: weight is not a finite matrix, or its values are beyond float16's range.
    """
    w = finite_matrix(weight)
    rows, cols = w.shape
    padded = round_up(cols, fmt.group)
    w = torch.nn.functional.pad(w, (0, padded - cols)).reshape(rows, padded // fmt.group, fmt.group)
    scale = (w.abs().amax(-1, keepdim=True) / 127).half()
    if not torch.isfinite(scale).all():
        raise ValueError(f"matrix of shape {tuple(weight.shape)} has values beyond float16's range")
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale.float())
    codes = (w * inverse).round_().clamp_(-127, 127).add_(ZERO)
    return codes.to(torch.uint8).reshape(rows, padded), scale.squeeze(-1)


def pack(codes: torch.Tensor, scales: torch.Tensor, fmt: Int8Format) -> torch.Tensor:
    """Lay codes and scales out as the packed bytes described at the top of this file: uint8 [nbytes]."""
    rows, padded = codes.shape
    blocks = round_up(rows, ROW_BLOCK) // ROW_BLOCK
    pad_rows = blocks * ROW_BLOCK - rows
    if pad_rows:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, pad_rows), value=ZERO)
        scales = torch.nn.functional.pad(scales, (0, 0, 0, pad_rows))
    head, body = fmt.block_bytes(padded)
    out = torch.zeros(blocks, head + body, dtype=torch.uint8)
    by_block = scales.half().reshape(blocks, ROW_BLOCK, -1).transpose(1, 2).contiguous()
    scale_bytes = by_block.view(torch.uint8).reshape(blocks, -1)
    out[:, : scale_bytes.shape[1]] = scale_bytes
    out[:, head:] = codes.reshape(blocks, ROW_BLOCK, padded // 4, 4).transpose(1, 2).reshape(blocks, body)
    return out.reshape(-1)


def unpack(packed: torch.Tensor, rows: int, cols: int, fmt: Int8Format) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `pack`: codes uint8 [rows, padded cols] and scales float16 [rows, groups]."""
    padded = round_up(cols, fmt.group)
    groups = padded // fmt.group
    blocks = round_up(rows, ROW_BLOCK) // ROW_BLOCK
    head, body = fmt.block_bytes(cols)
    by_block = packed.reshape(blocks, head + body)
    scales = by_block[:, : groups * ROW_BLOCK * 2].contiguous().view(torch.float16)
    scales = scales.reshape(blocks, groups, ROW_BLOCK).transpose(1, 2).reshape(blocks * ROW_BLOCK, groups)[:rows]
    codes = by_block[:, head:].reshape(blocks, padded // 4, ROW_BLOCK, 4).transpose(1, 2)
    return codes.reshape(blocks * ROW_BLOCK, padded)[:rows], scales


def dequantize(
    packed: torch.Tensor, rows: int, cols: int, fmt: Int8Format, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The matrix [rows, cols] that the packed bytes stand for. The reference for every kernel."""
    codes, scales = unpack(packed, rows, cols, fmt)
    values = (codes.reshape(rows, -1, fmt.group).float() - ZERO) * scales.float().unsqueeze(-1)
    return values.reshape(rows, -1)[:, :cols].to(dtype)
