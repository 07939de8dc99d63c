"""Packed INT4 matrices: layout, quantisation, and the plain reference that every kernel is compared with.

This file knows one matrix. It does not know experts, records or files.

A matrix W of shape [rows, cols] is cut into groups of `group` columns. Each group of each row has codes 0..15 and

    sym    W = scale * (code - 8)                    scale in float16
    asym   W = scale * code + minimum                both in float16: holds GGUF's Q4_1 exactly
    zp     W = scale * (code - zero point)           both in one word of 16 bits: the least error in the bytes of sym

The word of zp has the zero point in its low 6 bits, in quarters of a step, and in its high 10 a scale of 5 bits of
exponent and 5 of mantissa, 2^-24 to 252: `(word & 0xFFC0) << 12`, plus 103 << 23, are the bits of a float32. The
bytes, the same on disk, in RAM, in VRAM and for every instruction set:

    for each block of 16 rows:
        scales    [groups, 16] float16, or words
        minimums  [groups, 16] float16               asym only
        (zero bytes up to a multiple of 64)
        codes     [cols / 8, 16, 4] uint8            byte j of row r in chunk c holds
                                                     column 8c + j (low nibble) and 8c + 4 + j (high nibble)

so that one 64-byte register holds 16 rows, and four neighbouring bytes are one lane of an int8 dot product. Rows are
padded to a multiple of 16 with zero bytes and columns to a multiple of `group` with any code; neither shows in the
result because the activations are padded with zeros and the extra rows are cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

ROW_BLOCK = 16
ALIGNMENT = 64
GROUPS = (32, 64, 128)
SYMMETRIC, MINIMUM, ZERO_POINT = KINDS = ("sym", "asym", "zp")
_ZERO_STEPS, _ZERO_LIMIT = 4, 63
_SCALE_BIAS, _SCALE_SHIFT = 103 << 23, 18  # of a zero point's scale as float32: least exponent, bits that are not kept
_PIECE = 1 << 20  # weights
MapPieces = Callable[[Callable[[slice], torch.Tensor], Iterable[slice]], Iterable[torch.Tensor]]
"""`map`, or the `map` of a pool of threads: what quantises the pieces of a matrix."""


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Int4Format:
    """How a matrix is packed: columns per scale and what of `KINDS` a group has beside it."""

    group: int = 32
    kind: str = SYMMETRIC

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"INT4 group size must be one of {GROUPS}, not {self.group}")
        if self.kind not in KINDS:
            raise ValueError(f"INT4 kind must be one of {KINDS}, not {self.kind!r}")

    def block_bytes(self, cols: int) -> tuple[int, int]:
        """Bytes of one block of 16 rows: (scales and minimums with their padding, codes)."""
        padded = round_up(cols, self.group)
        return round_up(padded // self.group * ROW_BLOCK * 2 * self.planes, ALIGNMENT), padded // 2 * ROW_BLOCK

    @property
    def planes(self) -> int:
        """Numbers of 16 bits that a group has."""
        return 2 if self.kind == MINIMUM else 1

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of a packed matrix of shape [rows, cols]; a multiple of 64."""
        return round_up(rows, ROW_BLOCK) // ROW_BLOCK * sum(self.block_bytes(cols))


@dataclass(frozen=True)
class Int4Matrix:
    """A matrix of 4-bit codes as checkpoints hold it, symmetric or with a minimum for each group."""

    words: torch.Tensor
    """int32 [rows, cols / 8]: eight codes each, the first column in the lowest bits."""
    scales: torch.Tensor
    """[rows, groups], any floating dtype."""
    minimums: torch.Tensor | None = None
    """[rows, groups]; None for symmetric matrices, whose code 8 is zero."""

    @classmethod
    def of_codes(cls, codes: torch.Tensor, scales: torch.Tensor, minimums: torch.Tensor | None = None) -> Int4Matrix:
        """From codes 0..15, uint8 [rows, cols]; cols is a multiple of 8."""
        pairs = codes[:, 0::2] | codes[:, 1::2] << 4
        return cls(pairs.view(torch.int32), scales, minimums)

    @property
    def shape(self) -> tuple[int, int]:
        return self.words.shape[0], self.words.shape[1] * 8

    @property
    def format(self) -> Int4Format:
        """The format that holds its codes. Raises ValueError for a group size that no format has."""
        return Int4Format(self.shape[1] // self.scales.shape[1], SYMMETRIC if self.minimums is None else MINIMUM)

    def __getitem__(self, rows: slice) -> Int4Matrix:
        """Some of the rows."""
        return Int4Matrix(*(None if part is None else part[rows] for part in self._parts()))  # type: ignore[arg-type]

    def contiguous(self) -> Int4Matrix:
        return Int4Matrix(*(None if p is None else p.contiguous() for p in self._parts()))  # type: ignore[arg-type]

    def _parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.words, self.scales, self.minimums

    def codes(self) -> torch.Tensor:
        """uint8 [rows, cols]."""
        return word_codes(self.words)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights [rows, cols]; symmetric ones exact in float32."""
        values = self.codes().unflatten(1, (self.scales.shape[1], -1)).float()
        scales = self.scales.float().unsqueeze(-1)
        if self.minimums is None:
            values = (values - 8) * scales
        else:
            values = values * scales + self.minimums.float().unsqueeze(-1)
        return values.flatten(1).to(dtype)


def word_codes(words: torch.Tensor) -> torch.Tensor:
    """The codes in int32 words, the first in the lowest bits: uint8 [n, 8 m] of [n, m]."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(1)


def is_finite(values: torch.Tensor) -> bool:
    """Whether there is no NaN and no infinity: by the extremes, in a tenth of the time of `torch.isfinite`."""
    return values.numel() == 0 or all(torch.isfinite(extreme).item() for extreme in torch.aminmax(values))


def finite_matrix(weight: torch.Tensor) -> torch.Tensor:
    """`weight` in float32. Raises ValueError when it is not a matrix or not finite."""
    if weight.dim() != 2:
        raise ValueError(f"expected a matrix, got shape {tuple(weight.shape)}")
    w = weight.float()
    if not is_finite(w):
        raise ValueError(f"matrix of shape {tuple(weight.shape)} holds NaN or infinity")
    return w


class Rows(Protocol):
    """A matrix, or what reads one piece by piece."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, rows: slice, /) -> torch.Tensor: ...


def row_pieces(weight: Rows) -> list[slice]:
    """A matrix cut into pieces of whole row blocks: quantising takes several times the memory of what it works on."""
    rows, cols = weight.shape
    blocks = round_up(rows, ROW_BLOCK) // ROW_BLOCK
    pieces = max(1, -(-rows * cols // _PIECE))  # of the same size, so that two threads have the same work
    step = max(1, -(-blocks // pieces)) * ROW_BLOCK
    return [slice(start, min(rows, start + step)) for start in range(0, max(1, rows), step)]


def quantize(weight: torch.Tensor, fmt: Int4Format) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes and scales of a matrix.

    Symmetric: the value of largest magnitude in a group (the negative one of two) maps to code 0 (that is, -8), as
    GGUF's Q4_0 does; of symmetric rules it has the lowest perplexity, although not the least squared error.
    With a minimum: the smallest value maps to code 0 and the largest to 15, which gives back a matrix that already was
    Q4_1 exactly. With a zero point: the same of a range that includes 0, by a scale of 10 bits. Groups that lie on one
    side of 0, which trained weights hardly have, lose by that: 2 % error at 10 +- 0.1.

    Args:
        weight: [rows, cols], any floating dtype.

    Returns:
        codes uint8 [rows, padded cols]; scales [rows, groups], and minimums of that shape or None, in float16, with
        zero points in float32.

    Raises:
        ValueError: weight is not a finite matrix.
    """
    w = finite_matrix(weight)
    rows, cols = w.shape
    padded = round_up(cols, fmt.group)
    if padded != cols:
        # Repeat the last column while scales are searched, so that padding never widens a group's range.
        w = torch.cat([w, w[:, -1:].expand(rows, padded - cols)], dim=1)
    w = w.reshape(rows, padded // fmt.group, fmt.group)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    minimum = None
    if fmt.kind == SYMMETRIC:
        extreme = torch.where(-low >= high, low, high)  # an argmax of magnitudes is as slow as all the rest together
        scale = (extreme / -8).half()
        codes = (w * _inverse(scale)).round_().add_(8).clamp_(0, 15)
    elif fmt.kind == MINIMUM:
        scale, minimum = ((high - low) / 15).half(), low.half()
        codes = ((w - minimum.float()) * _inverse(scale)).round_().clamp_(0, 15)
    else:
        scale, zero = _zero_point(low, high)
        minimum = -scale * zero
        codes = torch.addcmul(zero, w, _inverse(scale)).round_().clamp_(0, 15)
    if not torch.isfinite(scale).all() or (minimum is not None and not torch.isfinite(minimum).all()):
        wider = "; int4-g32 reaches further" if fmt.kind == ZERO_POINT else ""
        raise ValueError(f"matrix of shape {tuple(weight.shape)} has values beyond the range of INT4's scales{wider}")
    codes = codes.to(torch.uint8).reshape(rows, padded)
    if padded != cols:
        codes[:, cols:] = 8 if fmt.kind == SYMMETRIC else 0
    return codes, scale.squeeze(-1), None if minimum is None else minimum.squeeze(-1)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0.0, 1.0 / scale.float())


def _zero_point(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points, float32, as their words hold them; a scale beyond their range is infinite."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    half, least, most = 1 << _SCALE_SHIFT - 1, _SCALE_BIAS, _SCALE_BIAS + (0x3FF << _SCALE_SHIFT)
    bits = ((high - low) / 15).view(torch.int32) + half & -2 * half
    scale = bits.clamp(least, most).view(torch.float32)
    zero = (low * (-_ZERO_STEPS / scale)).round_().clamp_(0, _ZERO_LIMIT) / _ZERO_STEPS
    return scale.masked_fill_(bits > most, torch.inf), zero


def _words(scales: torch.Tensor, minimums: torch.Tensor) -> torch.Tensor:
    """int16: scales and zero points as records hold them."""
    zeros = (minimums / scales * -_ZERO_STEPS).round().int()
    return ((scales.view(torch.int32) - _SCALE_BIAS >> _SCALE_SHIFT - 6) + zeros).to(torch.int16)


def pack(codes: torch.Tensor, scales: torch.Tensor, minimums: torch.Tensor | None, fmt: Int4Format) -> torch.Tensor:
    """Lay codes, scales and minimums out as the packed bytes described at the top of this file: uint8 [nbytes]."""
    rows, padded = codes.shape
    blocks = round_up(rows, ROW_BLOCK) // ROW_BLOCK
    if fmt.kind == ZERO_POINT:
        assert minimums is not None, fmt
        planes = [_words(scales, minimums)]
    else:
        planes = [scales.half()] if minimums is None else [scales.half(), minimums.half()]
    if pad_rows := blocks * ROW_BLOCK - rows:
        codes, *planes = (torch.nn.functional.pad(part, (0, 0, 0, pad_rows)) for part in (codes, *planes))
    head, body = fmt.block_bytes(padded)
    out = torch.zeros(blocks, head + body, dtype=torch.uint8)

    def plane(values: torch.Tensor) -> torch.Tensor:  # [rows, groups] of 16 bits -> [blocks, groups * 16 * 2] bytes
        by_block = values.reshape(blocks, ROW_BLOCK, -1).transpose(1, 2).contiguous()
        return by_block.view(torch.uint8).reshape(blocks, -1)

    heads = torch.cat([plane(values) for values in planes], dim=1)
    out[:, : heads.shape[1]] = heads
    # [blocks, row, chunk, half, byte] -> [blocks, chunk, row, byte], low nibble from half 0, high from half 1
    halves = codes.reshape(blocks, ROW_BLOCK, padded // 8, 2, 4).permute(3, 0, 2, 1, 4)
    out[:, head:] = (halves[0] | (halves[1] << 4)).reshape(blocks, body)
    return out.reshape(-1)


def repack(matrix: Int4Matrix, fmt: Int4Format) -> torch.Tensor:
    """`pack` with the codes and scales that a matrix has already.

    Args:
        fmt: the matrix's own, or the one with minimums of its group for a symmetric matrix.

    Raises:
        ValueError: a scale or minimum is no number of float16.
    """
    minimums = matrix.minimums
    if minimums is None and fmt.kind == MINIMUM:
        minimums = matrix.scales.float() * -8
    for what, values in (("scale", matrix.scales), ("minimum", minimums)):
        kept = values is None or (is_finite(values.half()) and torch.equal(values.half().float(), values.float()))
        if not kept:
            raise ValueError(f"a {what} is no number of float16, as INT4 records have them; choose codec bf16 or f32")
    return pack(matrix.codes(), matrix.scales.half(), None if minimums is None else minimums.half(), fmt)


def unpack(
    packed: torch.Tensor, rows: int, cols: int, fmt: Int4Format
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The inverse of `pack`: codes uint8 [rows, padded cols], scales and minimums [rows, groups] as of `quantize`."""
    padded = round_up(cols, fmt.group)
    blocks = round_up(rows, ROW_BLOCK) // ROW_BLOCK
    head, body = fmt.block_bytes(cols)
    by_block = packed.reshape(blocks, head + body)
    scales, minimums = (
        None if part is None else part.transpose(1, 2).reshape(blocks * ROW_BLOCK, -1)[:rows]
        for part in unpack_heads(by_block, padded // fmt.group, fmt)
    )
    assert scales is not None
    nibbles = by_block[:, head:].reshape(blocks, padded // 8, ROW_BLOCK, 4)
    halves = torch.stack((nibbles & 15, nibbles >> 4), dim=3)  # [blocks, chunk, row, half, byte]
    codes = halves.permute(0, 2, 1, 3, 4).reshape(blocks * ROW_BLOCK, padded)[:rows]
    return codes, scales, minimums


def unpack_heads(blocks: torch.Tensor, groups: int, fmt: Int4Format) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and minimums of packed blocks, uint8 [blocks, bytes]: [blocks, groups, 16] each, None for no minimums."""
    heads = blocks[:, : fmt.planes * groups * ROW_BLOCK * 2].contiguous().view(torch.int16)
    first, *second = heads.reshape(-1, fmt.planes, groups, ROW_BLOCK).unbind(1)
    if fmt.kind != ZERO_POINT:
        return first.view(torch.float16), second[0].view(torch.float16) if second else None
    words = first.int()
    scales = ((words & 0xFFC0) << _SCALE_SHIFT - 6).add_(_SCALE_BIAS).view(torch.float32)
    return scales, (words & _ZERO_LIMIT) * (scales / -_ZERO_STEPS)


def dequantize(
    packed: torch.Tensor, rows: int, cols: int, fmt: Int4Format, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The matrix [rows, cols] that the packed bytes stand for. The reference for every kernel."""
    codes, scales, minimums = unpack(packed, rows, cols, fmt)
    values = codes.reshape(rows, -1, fmt.group).float()
    if minimums is None:
        values = (values - 8) * scales.float().unsqueeze(-1)
    else:
        values = values * scales.float().unsqueeze(-1) + minimums.float().unsqueeze(-1)
    return values.reshape(rows, -1)[:, :cols].to(dtype)


def matvec(packed: torch.Tensor, rows: int, cols: int, fmt: Int4Format, x: torch.Tensor) -> torch.Tensor:
    """W @ x without building W: float32 [rows] for x float32 [cols].

    Works in the packed order (the activations are brought into it instead of the weights), which is 2 to 3 times faster
    than its reference, `dequantize(...) @ x`.
    """
    padded = round_up(cols, fmt.group)
    groups = padded // fmt.group
    head, body = fmt.block_bytes(cols)
    by_block = packed.reshape(-1, head + body)
    blocks = by_block.shape[0]
    if padded != cols:
        x = torch.nn.functional.pad(x, (0, padded - cols))
    # One small dense product per group: x is spread so that row r of the result only sees row r of the block. It costs
    # 16 times the multiplications and is still 3 times faster than a broadcast product and a sum over strided axes.
    group_chunks = fmt.group // 8
    spread = torch.zeros(2, groups, group_chunks, ROW_BLOCK, 4, ROW_BLOCK, device=packed.device)
    values = x.reshape(groups, group_chunks, 2, 4).permute(2, 0, 1, 3).unsqueeze(-1)
    torch.diagonal(spread, dim1=3, dim2=5).copy_(values.expand(2, groups, group_chunks, 4, ROW_BLOCK))
    spread = spread.reshape(2, groups, group_chunks * ROW_BLOCK * 4, ROW_BLOCK)
    nibbles = by_block[:, head:].reshape(blocks, groups, -1).transpose(0, 1)  # [groups, blocks, bytes]
    sums = torch.bmm((nibbles & 15).float(), spread[0])
    sums = sums.baddbmm_((nibbles >> 4).float(), spread[1]).transpose(0, 1)  # [blocks, groups, 16]
    of_x = x.reshape(groups, fmt.group).sum(-1)[:, None]
    scales, minimums = unpack_heads(by_block, groups, fmt)
    if minimums is None:
        out = ((sums - 8 * of_x) * scales.float()).sum(1)
    else:
        out = (sums * scales.float() + of_x * minimums.float()).sum(1)
    return out.reshape(-1)[:rows]
