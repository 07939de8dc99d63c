"""MXFP4 matrices as gpt-oss ships them, laid out for the kernels: the values stay what they are, to the bit.

The twin of `int4.py`. A matrix W of shape [rows, cols] is cut into groups of 32 columns. Each weight is a 4-bit code,
E2M1 of the OCP Microscaling formats, and each group of each row has a power of two:

    W = 2^(scale - 127) * DOUBLED[code]          scale 1..251; 0 = a group of zeros

DOUBLED is twice the E2M1 value and therefore an integer; so the scale is one less than the file's E8M0 exponent. Bytes:

    for each block of 16 rows:
        scales    [groups, 16] uint8
        (zero bytes up to a multiple of 64)
        codes     [cols / 8, 16, 4] uint8            as in `int4.py`

Rows are padded to a multiple of 16 and columns to a multiple of 32 with scale 0 and code 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .int4 import ALIGNMENT, ROW_BLOCK, finite_matrix, round_up

GROUP = 32
DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
EXPONENTS = range(2, 253)
"""E8M0 exponents of groups whose weights are normal numbers of float32 and bfloat16."""
_NAN = 255


@dataclass(frozen=True)
class Mxfp4Format:
    """How a matrix is packed; there is one way."""

    group: int = GROUP

    def block_bytes(self, cols: int) -> tuple[int, int]:
        """Bytes of one block of 16 rows: (scales with their padding, codes)."""
        padded = round_up(cols, GROUP)
        return round_up(padded // GROUP * ROW_BLOCK, ALIGNMENT), padded // 2 * ROW_BLOCK

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of a packed matrix of shape [rows, cols]; a multiple of 64."""
        return round_up(rows, ROW_BLOCK) // ROW_BLOCK * sum(self.block_bytes(cols))


@dataclass(frozen=True)
class Mxfp4Matrix:
    """A matrix as checkpoints hold it: 32 codes a group, the even columns in the low nibbles.

    Raises:
        ValueError: the two tensors do not belong together.
    """

    blocks: torch.Tensor
    """uint8 [rows, groups, 16]."""
    exponents: torch.Tensor
    """uint8 [rows, groups], E8M0: 2^(exponent - 127) scales the group's E2M1 values."""

    def __post_init__(self) -> None:
        shapes = tuple(self.blocks.shape), tuple(self.exponents.shape)
        if len(shapes[0]) != 3 or shapes[0] != (*shapes[1], GROUP // 2):
            raise ValueError(f"MXFP4 blocks of shape {shapes[0]} do not fit scales of shape {shapes[1]}")
        if not self.blocks.dtype == self.exponents.dtype == torch.uint8:
            raise ValueError(f"MXFP4 blocks and scales must be uint8, not {self.blocks.dtype}, {self.exponents.dtype}")

    @property
    def shape(self) -> tuple[int, int]:
        rows, groups = self.exponents.shape
        return rows, groups * GROUP

    def __getitem__(self, rows: slice) -> Mxfp4Matrix:
        """Some of the rows."""
        return Mxfp4Matrix(self.blocks[rows], self.exponents[rows])

    def contiguous(self) -> Mxfp4Matrix:
        return Mxfp4Matrix(self.blocks.contiguous(), self.exponents.contiguous())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights [rows, cols], exactly if `dtype` is float32 or bfloat16 and all exponents are in EXPONENTS."""
        values = torch.tensor(DOUBLED, dtype=torch.float32, device=self.blocks.device) / 2
        pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), 1)  # of every byte
        scales = (self.exponents.int() << 23).view(torch.float32)  # an E8M0 exponent is that of a float32
        weights = pairs[self.blocks.int()].flatten(2) * scales.unsqueeze(-1)
        return weights.reshape(self.shape).to(dtype)


def quantize(weight: torch.Tensor) -> Mxfp4Matrix:
    """Find the codes of a matrix that was MXFP4 once; columns are padded with zeros to a multiple of 32.

    Args:
        weight: [rows, cols], any floating dtype.

    Raises:
        ValueError: weight is not a finite matrix, or MXFP4 cannot hold it exactly.
    """
    w = finite_matrix(weight)
    w = torch.nn.functional.pad(w, (0, -w.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    # With the largest magnitude at 8 or 12 a group has its finest steps; every other choice holds a part of these.
    exponent = torch.frexp(w.abs().amax(-1, keepdim=True)).exponent - 4
    steps = torch.ldexp(w, -exponent)
    integers = steps.abs().round().clamp(max=DOUBLED[7]).to(torch.uint8)
    codes = torch.zeros(DOUBLED[7] + 1, dtype=torch.uint8)
    codes[list(DOUBLED[:8])] = torch.arange(8, dtype=torch.uint8)
    magnitude = codes[integers.int()]
    doubled = torch.tensor(DOUBLED, dtype=torch.float32)
    if not torch.equal(doubled[magnitude.int()], steps.abs()):
        raise ValueError(f"matrix of shape {tuple(weight.shape)} has weights that MXFP4 cannot hold exactly")
    signed = magnitude | (steps < 0).to(torch.uint8) << 3
    blocks = signed[..., 0::2] | signed[..., 1::2] << 4
    return Mxfp4Matrix(blocks, (exponent.squeeze(-1) + 128).clamp(0, _NAN - 1).to(torch.uint8))


def pack(matrix: Mxfp4Matrix) -> torch.Tensor:
    """Lay a matrix out as the packed bytes described at the top of this file: uint8 [nbytes].

    Raises:
        ValueError: a group's exponent is NaN, or not in EXPONENTS although the group is not zero.
    """
    rows, cols = matrix.shape
    scales = matrix.exponents - 1
    outside = (matrix.exponents < EXPONENTS.start) | (matrix.exponents >= EXPONENTS.stop)
    if outside.any():
        zero = (matrix.blocks[outside] & 0x77).amax(-1) == 0
        refused = matrix.exponents[outside][~zero | (matrix.exponents[outside] == _NAN)]
        if refused.numel():
            raise ValueError(
                f"an MXFP4 scale is {int(refused[0])}; weights that are numbers of float32 have "
                f"{EXPONENTS.start} to {EXPONENTS.stop - 1}"
            )
        scales[outside] = 0
    words = matrix.blocks.contiguous().view(torch.int32).reshape(rows, cols // 8)
    words = _swap(_swap(words, 8, 0x0000FF00), 4, 0x00F000F0)  # codes 0 1 2 3 4 5 6 7 -> 0 4 1 5 2 6 3 7
    pad_rows = -rows % ROW_BLOCK
    if pad_rows:
        words = torch.nn.functional.pad(words, (0, 0, 0, pad_rows))
        scales = torch.nn.functional.pad(scales, (0, 0, 0, pad_rows))
    blocks = (rows + pad_rows) // ROW_BLOCK
    head, body = Mxfp4Format().block_bytes(cols)
    out = torch.zeros(blocks, head + body, dtype=torch.uint8)
    out[:, : cols // GROUP * ROW_BLOCK] = scales.reshape(blocks, ROW_BLOCK, -1).transpose(1, 2).reshape(blocks, -1)
    by_block = words.reshape(blocks, ROW_BLOCK, -1).transpose(1, 2).contiguous()
    out[:, head:] = by_block.view(torch.uint8).reshape(blocks, body)
    return out.reshape(-1)


def unpack(packed: torch.Tensor, rows: int, cols: int) -> Mxfp4Matrix:
    """The inverse of `pack`; columns are padded to a multiple of 32."""
    padded = round_up(cols, GROUP)
    head, body = Mxfp4Format().block_bytes(cols)
    by_block = packed.reshape(-1, head + body)
    blocks = len(by_block)
    scales = by_block[:, : padded // GROUP * ROW_BLOCK].reshape(blocks, -1, ROW_BLOCK)
    scales = scales.transpose(1, 2).reshape(blocks * ROW_BLOCK, -1)[:rows]
    words = by_block[:, head:].contiguous().view(torch.int32).reshape(blocks, padded // 8, ROW_BLOCK)
    words = words.transpose(1, 2).reshape(blocks * ROW_BLOCK, -1)[:rows]
    words = _swap(_swap(words, 4, 0x00F000F0), 8, 0x0000FF00).contiguous()
    return Mxfp4Matrix(words.view(torch.uint8).reshape(rows, padded // GROUP, GROUP // 2), scales + 1)


def dequantize(packed: torch.Tensor, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The matrix [rows, cols] that the packed bytes stand for. The reference for every kernel."""
    return unpack(packed, rows, cols).dequantize(dtype)[:, :cols]


def _swap(words: torch.Tensor, distance: int, mask: int) -> torch.Tensor:
    """Exchange the bits under `mask` with those `distance` higher."""
    changed = (words ^ (words >> distance)) & mask
    return words ^ changed ^ (changed << distance)
