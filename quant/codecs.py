"""The record formats: how one expert becomes one contiguous block of bytes, and back.

A record holds the expert's matrices in `nn.Linear` order [out, in]: `gate_proj` and `up_proj` [intermediate, hidden],
`down_proj` [hidden, intermediate], and for models that have them the float32 biases `gate_proj_bias`, `up_proj_bias`
[intermediate] and `down_proj_bias` [hidden]. Every part starts on a multiple of 64 bytes and the record is padded to
4 KiB, so that one aligned direct read brings one expert and a kernel can use it where it lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from . import int4, mxfp4, nf4
from .int4 import Int4Matrix, MapPieces
from .mxfp4 import Mxfp4Format, Mxfp4Matrix

RECORD_ALIGNMENT = 4096


class ExpertShape(NamedTuple):
    """Sizes of one routed expert."""

    hidden: int
    intermediate: int
    has_gate: bool = True
    has_bias: bool = False

    def parts(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of an expert, in record order."""
        inner, outer = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        parts: dict[str, tuple[int, ...]] = {"gate_proj": inner} if self.has_gate else {}
        parts |= {"up_proj": inner, "down_proj": outer}
        if self.has_bias:
            parts |= {f"{name}_bias": shape[:1] for name, shape in list(parts.items())}
        return parts


class Part(NamedTuple):
    """Where one tensor lies inside a record. `offset` and `nbytes` are in bytes, `shape` is the tensor's own."""

    offset: int
    nbytes: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class RecordLayout:
    """The parts of a record and its size on disk and in a slot, a multiple of 4 KiB."""

    parts: dict[str, Part]
    nbytes: int


Weight = torch.Tensor | Int4Matrix | Mxfp4Matrix
"""A tensor of an expert as a checkpoint holds it."""


class Codec(Protocol):
    """One record format."""

    @property
    def name(self) -> str: ...

    @property
    def lossless(self) -> bool:
        """Whether weights come back as they were, given a checkpoint of that dtype."""
        ...

    def part_nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of one encoded tensor; biases (1-D) are float32 in every codec."""
        ...

    def encode_matrix(self, weight: torch.Tensor, run: MapPieces = map) -> torch.Tensor:
        """A matrix [out, in] as uint8 [part_nbytes]. Raises ValueError when it is not finite in this format."""
        ...

    def decode_matrix(self, data: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """The matrix that the bytes stand for."""
        ...


@dataclass(frozen=True)
class Int4Codec:
    """Packed INT4 of `int4.py`."""

    fmt: int4.Int4Format
    lossless: bool = False

    @property
    def name(self) -> str:
        return f"int4-g{self.fmt.group}" + ("" if self.fmt.kind == int4.SYMMETRIC else f"-{self.fmt.kind}")

    def part_nbytes(self, shape: tuple[int, ...]) -> int:
        return self.fmt.nbytes(*shape) if len(shape) == 2 else shape[0] * 4

    def encode_matrix(self, weight: torch.Tensor, run: MapPieces = map) -> torch.Tensor:
        def encode(rows: slice) -> torch.Tensor:
            return int4.pack(*int4.quantize(weight[rows], self.fmt), self.fmt)

        return torch.cat(list(run(encode, int4.row_pieces(weight))))

    def decode_matrix(self, data: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        return int4.dequantize(data, *shape, self.fmt, dtype)


@dataclass(frozen=True)
class Mxfp4Codec:
    """Packed MXFP4 of `mxfp4.py`, for weights that ship so; what it cannot hold exactly is refused."""

    fmt: Mxfp4Format = field(default_factory=Mxfp4Format)
    name: str = "mxfp4"
    lossless: bool = True

    def part_nbytes(self, shape: tuple[int, ...]) -> int:
        return self.fmt.nbytes(*shape) if len(shape) == 2 else shape[0] * 4

    def encode_matrix(self, weight: torch.Tensor, run: MapPieces = map) -> torch.Tensor:
        return mxfp4.pack(mxfp4.quantize(weight))

    def decode_matrix(self, data: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        return mxfp4.dequantize(data, *shape, dtype)


@dataclass(frozen=True)
class Nf4Codec:
    """Packed NF4 of `nf4.py`, which bitsandbytes decodes on GPUs."""

    name: str = "nf4"
    lossless: bool = False

    def part_nbytes(self, shape: tuple[int, ...]) -> int:
        return nf4.nbytes(*shape) if len(shape) == 2 else shape[0] * 4

    def encode_matrix(self, weight: torch.Tensor, run: MapPieces = map) -> torch.Tensor:
        return nf4.quantize(weight)

    def decode_matrix(self, data: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        return nf4.dequantize(data, *shape, dtype)


@dataclass(frozen=True)
class RawCodec:
    """The weights themselves: lossless when the checkpoint has the same dtype."""

    name: str
    dtype: torch.dtype
    lossless: bool = True

    def part_nbytes(self, shape: tuple[int, ...]) -> int:
        return shape[0] * shape[1] * self.dtype.itemsize if len(shape) == 2 else shape[0] * 4

    def encode_matrix(self, weight: torch.Tensor, run: MapPieces = map) -> torch.Tensor:
        kept = weight.to(self.dtype)
        if not int4.is_finite(kept):
            raise ValueError(f"matrix of shape {tuple(weight.shape)} holds NaN or infinity as {self.name}")
        return kept.contiguous().view(torch.uint8).reshape(-1)

    def decode_matrix(self, data: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        return data.view(self.dtype).reshape(shape).to(dtype)


_CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        *(Int4Codec(int4.Int4Format(group, kind)) for group in int4.GROUPS for kind in int4.KINDS),
        Mxfp4Codec(),
        Nf4Codec(),
        RawCodec("bf16", torch.bfloat16),
        RawCodec("f16", torch.float16),
        RawCodec("f32", torch.float32),
    )
}


def codec_names() -> list[str]:
    return list(_CODECS)


def get_codec(name: str) -> Codec:
    """The codec of that name (`int4-g32-zp`, `int4-g32`, `bf16`, ...). Raises ValueError with the known names."""
    try:
        return _CODECS[name]
    except KeyError:
        raise ValueError(f"unknown codec {name!r}; known: {', '.join(_CODECS)}") from None


def packed_format(codec: Codec) -> int4.Int4Format | Mxfp4Format | None:
    """How a codec packs matrices for the native kernels; None if it does not."""
    return codec.fmt if isinstance(codec, Int4Codec | Mxfp4Codec) else None


def record_layout(codec: Codec, shape: ExpertShape) -> RecordLayout:
    """Where each tensor of an expert of that shape lies in a record of that codec."""
    parts, offset = {}, 0
    for name, part_shape in shape.parts().items():
        nbytes = codec.part_nbytes(part_shape)
        parts[name] = Part(offset, nbytes, part_shape)
        offset = int4.round_up(offset + nbytes, int4.ALIGNMENT)
    return RecordLayout(parts, int4.round_up(offset, RECORD_ALIGNMENT))


def encode_expert(
    codec: Codec, layout: RecordLayout, weights: Mapping[str, Weight], run: MapPieces = map
) -> torch.Tensor:
    """One expert's tensors as a record, uint8 [layout.nbytes].

    Args:
        run: what encodes the pieces of a matrix, `map` or a pool's.

    Raises:
        ValueError: a tensor is missing, unknown, of the wrong shape, or none that the codec can hold; the message
            names it.
    """
    if weights.keys() != layout.parts.keys():
        raise ValueError(f"expert has tensors {sorted(weights)}, expected {sorted(layout.parts)}")
    record = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for name, part in layout.parts.items():
        tensor = weights[name]
        if tuple(tensor.shape) != part.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {part.shape}")
        try:
            data = _encode(codec, tensor, run)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        record[part.offset : part.offset + part.nbytes] = data
    return record


def _encode(codec: Codec, weight: Weight, run: MapPieces) -> torch.Tensor:
    if isinstance(weight, Mxfp4Matrix) and isinstance(codec, Mxfp4Codec):
        return mxfp4.pack(weight)
    if isinstance(weight, Int4Matrix) and isinstance(codec, Int4Codec) and codec.fmt in _holding(weight.format):
        return int4.repack(weight, codec.fmt)
    if not isinstance(weight, torch.Tensor):
        weight = weight.dequantize()
    return weight.float().contiguous().view(torch.uint8) if weight.dim() == 1 else codec.encode_matrix(weight, run)


def _holding(fmt: int4.Int4Format) -> tuple[int4.Int4Format, ...]:
    """The formats that hold the codes of another: a minimum of -8 scales makes a symmetric matrix asymmetric."""
    return fmt, int4.Int4Format(fmt.group, int4.MINIMUM)


def decode_expert(
    codec: Codec, layout: RecordLayout, record: torch.Tensor, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """The tensors that a record stands for; biases stay float32. Raw codecs of the same dtype return views."""
    out = {}
    for name, part in layout.parts.items():
        data = record[part.offset : part.offset + part.nbytes]
        if len(part.shape) == 1:
            out[name] = data.view(torch.float32)
        else:
            out[name] = codec.decode_matrix(data, (part.shape[0], part.shape[1]), dtype)
    return out
