"""Tensors of a GGUF file as torch tensors, and experts' matrices with the codes that they ship with.

Blocks as ggml-common.h of llama.cpp describes them. A Q4_K group's scale and minimum are products of a float16 and a
6-bit number; rounding them to float16 moves a weight by less than 0.4 % of the step between two codes.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from ..quant.codecs import Weight
from ..quant.int4 import Int4Matrix
from ..quant.mxfp4 import Mxfp4Matrix
from .errors import DataError
from .gguf_file import Place
from .tensorfile import TensorEntry

PLAIN = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
_ROWS_BYTES = 4 << 20
"""Of packed rows that are dequantised at once: it takes several times their size."""


class GgufTensor(NamedTuple):
    """One tensor, read piece by piece as float32 or as what is packed."""

    place: Place

    @property
    def shape(self) -> tuple[int, ...]:
        return self.place.shape

    @property
    def nbytes(self) -> int:
        """As float32, which `read` makes."""
        return prod(self.shape) * 4

    @property
    def _raw(self) -> TensorEntry:
        path, name, kind, shape, start, nbytes = self.place
        dtype = PLAIN.get(kind)
        if dtype is not None:
            return TensorEntry(path, name, kind.name, shape, start, nbytes)
        row = nbytes // max(1, prod(shape[:-1]))
        return TensorEntry(path, name, "U8", (*shape[:-1], row), start, nbytes)

    def read(self) -> torch.Tensor:
        """The whole tensor, float32."""
        out, rows = torch.empty(self.shape), self.shape[0]
        step = max(1, _ROWS_BYTES * rows // max(1, self.place.nbytes))
        for start in range(0, rows, step):
            out[start : start + step] = self.read_rows(start, min(rows, start + step))
        return out

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        """Some of the rows of the first dimension, float32."""
        return self._floats(self._raw.read_rows(start, stop))

    def expert(self, index: int) -> Weight:
        """The matrix of one expert, packed with the codes that it has where a record can hold them, else float32."""
        raw = self._raw.read_index(index)[0]
        unpacked = _UNPACK.get(self.place.kind)
        return self._floats(raw) if unpacked is None or raw.dim() != 2 else unpacked(raw)

    def _floats(self, raw: torch.Tensor) -> torch.Tensor:
        if self.place.kind in PLAIN:
            return raw.float()
        try:
            return torch.from_numpy(np.asarray(dequantize(raw.numpy(), self.place.kind), dtype=np.float32))
        except NotImplementedError:
            raise DataError(
                f"{self.place.path}: tensor {self.place.name} is of type {self.place.kind.name}, which the gguf "
                "package cannot dequantise; a newer one may (pip install -U gguf)"
            ) from None


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a GGUF llama q or k projection in transformers' order.

    GGUF keeps the two members of a rotary pair next to each other (rows 2i and 2i + 1 of a head), transformers half a
    head apart (rows i and i + head_dim / 2).

    Args:
        weight: [heads * head_dim, ...].
    """
    rows, rest = weight.shape[0], weight.shape[1:]
    return weight.reshape(heads, rows // heads // 2, 2, *rest).transpose(1, 2).reshape(rows, *rest).contiguous()


def _halves(block: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 number at that byte of each block: [rows, blocks]."""
    return block[..., start : start + 2].contiguous().view(torch.float16).squeeze(-1)


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, cols] of uint8 [rows, blocks, n]: the low nibbles of each n bytes, then the high ones."""
    return torch.cat((codes & 15, codes >> 4), -1).flatten(1)


def _q4_0(raw: torch.Tensor) -> Int4Matrix:
    block = raw.unflatten(1, (-1, 18))
    return Int4Matrix.of_codes(_nibbles(block[..., 2:]), _halves(block, 0))


def _q4_1(raw: torch.Tensor) -> Int4Matrix:
    block = raw.unflatten(1, (-1, 20))
    return Int4Matrix.of_codes(_nibbles(block[..., 4:]), _halves(block, 0), _halves(block, 2))


def _q4_k(raw: torch.Tensor) -> Int4Matrix:
    """Blocks of 256 columns: two float16 factors, 8 pairs of 6-bit numbers in 12 bytes, 4 times 32 bytes of codes."""
    block = raw.unflatten(1, (-1, 144))
    low, middle, high = block[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat((low & 63, high & 15 | low >> 6 << 4), -1)
    minimums = torch.cat((middle & 63, high >> 4 | middle >> 6 << 4), -1)
    codes = _nibbles(block[..., 16:].unflatten(-1, (4, 32)).flatten(1, 2))
    scales = _halves(block, 0).float().unsqueeze(-1) * scales
    minimums = _halves(block, 2).float().unsqueeze(-1) * -minimums.float()
    return Int4Matrix.of_codes(codes, scales.flatten(1).half(), minimums.flatten(1).half())


def _mxfp4(raw: torch.Tensor) -> Mxfp4Matrix:
    block = raw.unflatten(1, (-1, 17))
    codes = _nibbles(block[..., 1:])
    pairs = codes[:, 0::2] | codes[:, 1::2] << 4
    return Mxfp4Matrix(pairs.unflatten(1, (-1, 16)), block[..., 0].contiguous())


_UNPACK = {Kind.Q4_0: _q4_0, Kind.Q4_1: _q4_1, Kind.Q4_K: _q4_k, Kind.MXFP4: _mxfp4}
