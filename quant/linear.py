"""Trunk matrices that stay packed: a Linear and an Embedding over INT8 or INT4 bytes.

The Linear here computes on the CPU with the experts' kernels; `triton_linear.py` has that of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from . import int4, int8
from .int4 import ROW_BLOCK, Int4Format, MapPieces, Rows, round_up
from .int8 import Int8Format
from .native import NativeMatrix, NativePool

MatrixFormat = Int4Format | Int8Format
_FORMATS: dict[str, MatrixFormat] = {
    **{f"int8-g{group}": Int8Format(group) for group in int4.GROUPS},
    **{f"int4-g{group}": Int4Format(group) for group in int4.GROUPS},
}

_PIECE = 1 << 22
"""Weights that are dequantised at a time."""


def matrix_format_names() -> list[str]:
    return list(_FORMATS)


def matrix_format(name: str) -> MatrixFormat:
    """The format of that name (`int8-g32`, `int4-g32`, ...). Raises ValueError with the known names."""
    try:
        return _FORMATS[name]
    except KeyError:
        raise ValueError(f"unknown matrix format {name!r}; known: {', '.join(_FORMATS)}") from None


class PackedMatrix(NamedTuple):
    """A matrix [rows, cols] as packed bytes, uint8 [format's nbytes]."""

    data: torch.Tensor
    rows: int
    cols: int
    format: MatrixFormat

    @classmethod
    def pack(cls, weight: Rows, fmt: MatrixFormat, run: MapPieces = map) -> PackedMatrix:
        """Quantise a matrix, its pieces by `run`. Raises ValueError when it is not finite."""

        def encode(rows: slice) -> torch.Tensor:
            if isinstance(fmt, Int8Format):
                return int8.pack(*int8.quantize(weight[rows], fmt), fmt)
            return int4.pack(*int4.quantize(weight[rows], fmt), fmt)

        rows, cols = weight.shape
        data, done = torch.empty(fmt.nbytes(rows, cols), dtype=torch.uint8), 0
        for packed in run(encode, int4.row_pieces(weight)):
            data[done : done + len(packed)] = packed
            done += len(packed)
        assert done == len(data), (done, len(data))
        return cls(data, rows, cols, fmt)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix that the bytes stand for, [rows, cols]. Beside it there is never more than a few rows' float32."""
        out = torch.empty(self.rows, self.cols, dtype=dtype, device=self.data.device)
        step = max(ROW_BLOCK, _PIECE // self.cols // ROW_BLOCK * ROW_BLOCK)
        unpack = int8.dequantize if isinstance(self.format, Int8Format) else int4.dequantize
        for start in range(0, self.rows, step):
            count = min(step, self.rows - start)
            first, last = (self.format.nbytes(rows, self.cols) if rows else 0 for rows in (start, start + count))
            out[start : start + count] = unpack(self.data[first:last], count, self.cols, self.format, dtype)  # type: ignore[arg-type]
        return out

    def take_rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Some rows, float32 [n, cols]; reads only their bytes."""
        fmt, n = self.format, len(indices)
        padded = round_up(self.cols, fmt.group)
        groups = padded // fmt.group
        head, _ = fmt.block_bytes(self.cols)
        blocks = self.data.reshape(round_up(self.rows, ROW_BLOCK) // ROW_BLOCK, -1)
        block, row = indices // ROW_BLOCK, indices % ROW_BLOCK
        heads = int4.Int4Format(fmt.group) if isinstance(fmt, Int8Format) else fmt  # INT8 has the scales of INT4
        scales, minimums = int4.unpack_heads(blocks[:, :head][block], groups, heads)
        body, each = blocks[:, head:], torch.arange(n, device=indices.device)
        if isinstance(fmt, Int8Format):
            codes = body.unflatten(1, (padded // 4, ROW_BLOCK, 4))[block, :, row].reshape(n, groups, fmt.group)
            zero = int8.ZERO
        else:
            nibbles = body.unflatten(1, (padded // 8, ROW_BLOCK, 4))[block, :, row]  # [n, chunks, 4]
            codes = torch.stack((nibbles & 15, nibbles >> 4), 2).reshape(n, groups, fmt.group)
            zero = 8 if minimums is None else 0
        values = (codes.float() - zero) * scales[each, :, row].float().unsqueeze(-1)
        if minimums is not None:
            values += minimums[each, :, row].float().unsqueeze(-1)
        return values.reshape(n, padded)[:, : self.cols]


_ATTRIBUTES = ("device", "dtype", "is_cuda", "is_meta", "layout", "ndim", "requires_grad", "shape")
_ATTRIBUTE_METHODS = ("dim", "get_device", "is_floating_point", "numel", "size")


def asks_for_attribute(function: Any) -> bool:
    """Whether a call that `__torch_function__` sees looks at a tensor's dtype, device or shape only."""
    name = getattr(function, "__name__", "")
    return (
        getattr(function.__self__, "__name__", "") in _ATTRIBUTES if name == "__get__" else name in _ATTRIBUTE_METHODS
    )


class PackedWeight(torch.Tensor):
    """Stands where a module's `weight` is looked for: it has dtype, device and shape, but computing with it is an error
    because the numbers are packed elsewhere."""

    @classmethod
    def of(cls, packed: PackedMatrix, dtype: torch.dtype) -> PackedWeight:
        return torch.Tensor._make_subclass(cls, torch.zeros((), dtype=dtype).expand(packed.rows, packed.cols))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not asks_for_attribute(func):
            raise RuntimeError(
                "this model computes with a weight that is packed; convert it again, or with --trunk keep"
            )
        return super().__torch_function__(func, types, args, kwargs or {})


class QuantLinear(nn.Module):
    """`nn.Linear` whose weight stays packed; what multiplies by it is a subclass's.

    Args:
        dtype: that the model's code finds its weight to be of.
        bias: [out_features], or None.
    """

    def __init__(self, packed: PackedMatrix, dtype: torch.dtype, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.cols, packed.rows
        self.packed, self.dtype = packed, dtype
        self.bias = bias

    @property
    def weight(self) -> PackedWeight:
        return PackedWeight.of(self.packed, self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features], in the same dtype."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.packed.format}"


MakeLinear = Callable[[PackedMatrix, torch.dtype, nn.Parameter | None], QuantLinear]
"""A `QuantLinear` of some kind, from the arguments of its base."""


class NativeLinear(QuantLinear):
    """On the CPU. Computes in float32."""

    def __init__(
        self, pool: NativePool, packed: PackedMatrix, dtype: torch.dtype, bias: nn.Parameter | None = None
    ) -> None:
        super().__init__(packed, dtype, bias)
        self._pool = pool
        self._matrix: NativeMatrix | None = None

    @property
    def matrix(self) -> NativeMatrix:
        """The matrix with its bias, bound at the first use because a loader may give the bias last."""
        if self._matrix is None:
            bias = None if self.bias is None else self.bias.detach().float().contiguous()
            packed = self.packed
            self._matrix = NativeMatrix(self._pool, packed.data, packed.rows, packed.cols, packed.format, bias)
        return self._matrix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.matrix(x.float().contiguous()).to(x.dtype)


def linear_weight(module: nn.Module) -> torch.Tensor:
    """The weights of a Linear, plain or packed, [out_features, in_features]; a packed one's in float32."""
    if isinstance(module, QuantLinear):
        return module.packed.dequantize()
    assert isinstance(module, nn.Linear), module
    return module.weight.detach()


class QuantEmbedding(nn.Module):
    """`nn.Embedding` whose weight stays packed; a row is dequantised when it is looked up."""

    def __init__(self, packed: PackedMatrix, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = packed.rows, packed.cols
        self.packed, self.dtype = packed, dtype

    @property
    def weight(self) -> PackedWeight:
        return PackedWeight.of(self.packed, self.dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids integer [...] to [..., embedding_dim]."""
        return self.packed.take_rows(ids.reshape(-1)).reshape(*ids.shape, self.embedding_dim).to(self.dtype)
