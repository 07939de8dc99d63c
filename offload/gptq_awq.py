"""Linears as GPTQ and AWQ pack them, 4 bits with integer zero points, turned into nn.Linear's order.

Both keep the transpose of a Linear's weight: `qweight` along `scales` [groups, rows] and `qzeros` [groups, rows / 8],
and W = scale * (code - zero). GPTQ packs eight columns of the Linear in an int32 and writes each zero point less one
(but for checkpoint_format "gptq_v2"); AWQ packs eight rows in the order 0 2 4 6 1 3 5 7. Sources: qlinear_torch.py of
GPTQModel and gemm.py of AutoAWQ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..quant.int4 import Int4Matrix, word_codes
from .errors import DataError
from .packed_scheme import AWQ, GPTQ, Scheme
from .tensorfile import DTYPE_NAMES, TensorEntry

_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_ZERO = 8
"""The zero point of every group of a symmetric matrix."""


class PackedLinear(NamedTuple):
    """A Linear's weight in three or four tensors of a file."""

    name: str
    scheme: Scheme
    qweight: TensorEntry
    qzeros: TensorEntry
    scales: TensorEntry
    g_idx: TensorEntry | None
    to: torch.dtype

    @property
    def path(self) -> Path:
        return self.qweight.path

    @property
    def dtype(self) -> str:
        return DTYPE_NAMES[self.to]

    @property
    def shape(self) -> tuple[int, ...]:
        rows = self.scales.shape[1]
        return rows, self.scales.shape[0] * self.scheme.group

    @property
    def nbytes(self) -> int:
        """Of the file and of the matrix that `read` makes, in float32 on the way."""
        rows, cols = self.shape
        return self.qweight.nbytes + rows * cols * (2 * 4 + self.to.itemsize)

    def matrix(self) -> Int4Matrix:
        """The codes as they are; where zero points differ, groups' minimums are rounded to float16.

        Raises:
            DataError: columns are out of order, or the zero points are not those that the config promises.
        """
        codes, zeros, scales = self._codes(), self._zeros(), self.scales.read().T.contiguous()
        if not self.scheme.symmetric:
            return Int4Matrix.of_codes(codes, scales, (scales.float() * -zeros.float()).half())
        if not (zeros == _ZERO).all():
            raise DataError(f"{self.path}: tensor {self.qzeros.name} differs from {_ZERO}, but config.json says sym")
        return Int4Matrix.of_codes(codes, scales)

    def read(self) -> torch.Tensor:
        """The weights [rows, cols], with the zero points as they are."""
        steps = self._codes().unflatten(1, (-1, self.scheme.group)).float() - self._zeros().unsqueeze(-1)
        return (steps * self.scales.read().T.float().unsqueeze(-1)).flatten(1).to(self.to)

    def read_index(self, index: int) -> torch.Tensor:
        """A row, [1, cols]; reads them all."""
        return self.read()[index : index + 1]

    def _codes(self) -> torch.Tensor:
        """uint8 [rows, cols]."""
        if self.g_idx is not None:
            groups = self.g_idx.read()
            if not torch.equal(groups.long(), torch.arange(len(groups)) // self.scheme.group):
                raise DataError(f"{self.path}: tensor {self.g_idx.name} orders columns, which is not supported")
        packed = self.qweight.read()
        return word_codes(packed.T) if self.scheme.method == GPTQ else _awq_codes(packed).T.contiguous()

    def _zeros(self) -> torch.Tensor:
        """uint8 [rows, groups]."""
        packed = self.qzeros.read()
        if self.scheme.method == AWQ:
            return _awq_codes(packed).T
        zeros = word_codes(packed).T
        return zeros + 1 & 15 if self.scheme.zeros_less_one else zeros


def _awq_codes(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 8 m] of int32 [n, m]."""
    pairs = packed.view(torch.uint8).unflatten(1, (-1, 4))
    low, high = (pairs & 15).unbind(-1), (pairs >> 4).unbind(-1)
    return torch.stack((low[0], low[2], high[0], high[2], low[1], low[3], high[1], high[3]), -1).flatten(1)


def join_linears(entries: dict[str, TensorEntry], scheme: Scheme, dtype: torch.dtype) -> dict[str, Any]:
    """Replace the tensors NAME.qweight, .qzeros, .scales and .g_idx by one entry NAME.weight; all others stay.

    Raises:
        DataError: tensors are missing or do not fit together.
    """
    joined: dict[str, Any] = {}
    for key, entry in entries.items():
        module, _, part = key.rpartition(".")
        if part not in _PARTS or (part == "scales" and f"{module}.qweight" not in entries):
            joined[key] = entry
            continue
        found = [entries.get(f"{module}.{name}") for name in _PARTS]
        for name, its in zip(_PARTS[:3], found, strict=False):
            if its is None:
                raise DataError(f"{entry.path}: tensor {key} comes without {module}.{name}; is a shard missing?")
        if f"{module}.weight" in entries:
            raise DataError(f"{entry.path}: tensors {key} and {module}.weight are the same weights twice")
        if part == "qweight":
            linear = PackedLinear(f"{module}.weight", scheme, *found, dtype)  # type: ignore[arg-type]
            _check_shapes(linear)
            joined[linear.name] = linear
    return joined


def _check_shapes(linear: PackedLinear) -> None:
    rows, cols = linear.shape if len(linear.scales.shape) == 2 else (0, 0)
    packed = (cols // 8, rows) if linear.scheme.method == GPTQ else (cols, rows // 8)
    want = {
        linear.qweight: ("I32", packed),
        linear.qzeros: ("I32", (cols // linear.scheme.group, rows // 8)),
        linear.g_idx: ("I32", (cols,)),
    }
    for entry, (dtype, shape) in want.items():
        if entry is not None and (entry.dtype != dtype or entry.shape != shape or rows % 8):
            raise DataError(
                f"{entry.path}: tensor {entry.name} is {entry.dtype} {entry.shape}, which does not fit "
                f"{linear.scales.shape} of {linear.scales.name} in groups of {linear.scheme.group}"
            )
    if linear.scales.dtype not in ("F16", "BF16", "F32"):
        raise DataError(f"{linear.path}: tensor {linear.scales.name} is {linear.scales.dtype}, not a float")
