"""Checkpoints that ship quantised: which tensors of their files make up one matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..quant.int4 import Int4Matrix
from ..quant.mxfp4 import GROUP, Mxfp4Matrix
from .config import MXFP4, kept_codec
from .errors import DataError
from .gptq_awq import PackedLinear, join_linears
from .packed_scheme import AWQ, GPTQ, read_scheme
from .tensorfile import DTYPE_NAMES, TensorEntry

FP8 = "fp8"
_BLOCKS, _SCALES = "_blocks", "_scales"
_FP8_SCALE = "_scale_inv"
_PACKED, _PACKED_SCALE, _PACKED_SHAPE, _PACKED_ORDER = (
    ".weight_packed",
    ".weight_scale",
    ".weight_shape",
    ".weight_g_idx",
)


class Mxfp4Entry(NamedTuple):
    """A projection of all experts of a layer in two tensors of a file, as gpt-oss ships."""

    name: str
    blocks: TensorEntry
    """U8 [experts, rows, groups, 16]."""
    scales: TensorEntry
    """U8 [experts, rows, groups]."""

    @property
    def path(self) -> Path:
        return self.blocks.path

    @property
    def shape(self) -> tuple[int, ...]:
        """(experts, rows, cols), in `nn.Linear` order whatever the model's own is."""
        experts, rows, groups = self.scales.shape
        return experts, rows, groups * GROUP

    def read_expert(self, index: int) -> Mxfp4Matrix:
        """One expert's matrix, reading only its bytes."""
        return Mxfp4Matrix(self.blocks.read_index(index)[0], self.scales.read_index(index)[0])


class Fp8Entry(NamedTuple):
    """A matrix in FP8 with a scale for each block of it, as DeepSeek ships; read as what it stands for.

    Blocks at the lower and right edges may be cut short.
    """

    weight: TensorEntry
    """F8_E4M3 [rows, cols]."""
    scale: TensorEntry
    """[ceil(rows / block rows), ceil(cols / block cols)], floats to multiply by."""
    block: tuple[int, int]
    to: torch.dtype

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def path(self) -> Path:
        return self.weight.path

    @property
    def dtype(self) -> str:
        return DTYPE_NAMES[self.to]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        """Of the file and of the matrix that `read` makes."""
        return self.weight.nbytes * (1 + self.to.itemsize) + self.scale.nbytes

    def read(self) -> torch.Tensor:
        weight, scales = self.weight.read(), self.scale.read().float()
        out, (height, width) = torch.empty(weight.shape, dtype=self.to), self.block
        for i, of_row in enumerate(scales):
            rows = slice(i * height, (i + 1) * height)
            out[rows] = weight[rows].float() * of_row.repeat_interleave(width)[: weight.shape[1]]
        return out

    def read_index(self, index: int) -> torch.Tensor:
        """A row, [1, cols]; reads them all."""
        return self.read()[index : index + 1]


class Int4Entry(NamedTuple):
    """A symmetric INT4 matrix in two tensors, as compressed-tensors packs it."""

    name: str
    words: TensorEntry
    """I32 [rows, cols / 8]."""
    scales: TensorEntry
    """[rows, groups], floats."""
    to: torch.dtype

    @property
    def path(self) -> Path:
        return self.words.path

    @property
    def dtype(self) -> str:
        return DTYPE_NAMES[self.to]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.words.shape[0], self.words.shape[1] * 8

    @property
    def nbytes(self) -> int:
        """Of the file and of the matrix that `read` makes, in float32 on the way."""
        return self.words.nbytes * (1 + 2 * 4 + 2 * self.to.itemsize) + self.scales.nbytes

    def matrix(self) -> Int4Matrix:
        return Int4Matrix(self.words.read(), self.scales.read())

    def read(self) -> torch.Tensor:
        return self.matrix().dequantize(self.to)

    def read_index(self, index: int) -> torch.Tensor:
        """A row, [1, cols]; reads them all."""
        return self.read()[index : index + 1]


Readable = TensorEntry | Fp8Entry | Int4Entry | PackedLinear
Entry = Readable | Mxfp4Entry


def join_quantized(
    path: Path, entries: dict[str, TensorEntry], how: dict[str, Any], dtype: torch.dtype
) -> dict[str, Entry]:
    """Replace tensors that only together make up a weight by one entry under its name; all others stay.

    Args:
        path: of the checkpoint, for messages.
        how: the `quantization_config` of config.json.
        dtype: to dequantise to, where values are not kept packed.

    Raises:
        DataError: the format is not supported, or tensors are missing or do not fit together.
    """
    method = how.get("quant_method")
    if method == MXFP4:
        return join_mxfp4(entries)
    if method in (GPTQ, AWQ):
        try:
            return join_linears(entries, read_scheme(how), dtype)
        except ValueError as error:
            raise DataError(
                f"{path} is quantised ({method}, {error}); of {method} only 4 bits in groups of 32, 64 or 128 without "
                "reordered columns can be converted yet"
            ) from None
    codec = kept_codec(how)
    if codec is not None:
        return join_int4(entries, int(codec.removeprefix("int4-g")), dtype)
    block = how.get("weight_block_size")
    if method == FP8 and isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block):
        return join_fp8(entries, (block[0], block[1]), dtype)
    what = f"{method} without weight_block_size" if method == FP8 else method or "?"
    raise DataError(
        f"{path} is quantised ({what}); only bf16, f16, f32, MXFP4, FP8 in blocks, GPTQ, AWQ and symmetric "
        "pack-quantized INT4 in groups of 32, 64 or 128 can be converted yet"
    )


def join_int4(entries: dict[str, TensorEntry], group: int, dtype: torch.dtype) -> dict[str, Entry]:
    """`join_quantized` for the tensors NAME_packed, NAME_scale and NAME_shape that make up a matrix NAME."""
    joined: dict[str, Entry] = {}
    for key, entry in entries.items():
        suffix = next((s for s in (_PACKED, _PACKED_SCALE, _PACKED_SHAPE, _PACKED_ORDER) if key.endswith(s)), None)
        if suffix is None:
            joined[key] = entry
            continue
        module = key.removesuffix(suffix)
        if suffix == _PACKED_ORDER:
            raise DataError(f"{entry.path}: tensor {key} says that columns are out of order, which is not supported")
        if f"{module}.weight" in entries:
            raise DataError(f"{entry.path}: tensors {key} and {module}.weight are the same weights twice")
        for part in (_PACKED, _PACKED_SCALE):
            if module + part not in entries:
                raise DataError(f"{entry.path}: tensor {key} comes without {module}{part}; is a shard missing?")
        if suffix != _PACKED:
            continue
        scales = entries[module + _PACKED_SCALE]
        fits = len(entry.shape) == 2 and scales.shape == (entry.shape[0], entry.shape[1] * 8 // group)
        known = entry.dtype == "I32" and scales.dtype in ("F32", "BF16", "F16")
        if not fits or entry.shape[1] * 8 % group or not known:
            raise DataError(
                f"{entry.path}: tensor {key} is {entry.dtype} {entry.shape}, which does not fit {scales.dtype} "
                f"{scales.shape} of {scales.name} for INT4 in groups of {group}"
            )
        joined[f"{module}.weight"] = Int4Entry(f"{module}.weight", entry, scales, dtype)
    return joined


def join_fp8(entries: dict[str, TensorEntry], block: tuple[int, int], dtype: torch.dtype) -> dict[str, Entry]:
    """`join_quantized` for each pair NAME in FP8 and NAME_scale_inv."""
    joined: dict[str, Entry] = {}
    for key, entry in entries.items():
        if key.endswith(_FP8_SCALE):
            if key.removesuffix(_FP8_SCALE) not in entries:
                raise DataError(f"{entry.path}: tensor {key} comes without what it scales; is a shard missing?")
            continue
        scale = entries.get(key + _FP8_SCALE)
        if entry.dtype != "F8_E4M3":
            if scale is not None:
                raise DataError(f"{entry.path}: tensor {key} has scales but dtype {entry.dtype}, not F8_E4M3")
            joined[key] = entry
            continue
        if scale is None:
            raise DataError(f"{entry.path}: tensor {key} comes without {key}{_FP8_SCALE}; is a shard missing?")
        want = tuple(-(-size // step) for size, step in zip(entry.shape, block, strict=False))
        if len(entry.shape) != 2 or scale.shape != want or scale.dtype not in ("F32", "BF16", "F16"):
            raise DataError(
                f"{scale.path}: tensor {scale.name} has shape {scale.shape} and dtype {scale.dtype}, which does not "
                f"fit {entry.shape} of {key} in blocks of {block[0]} x {block[1]}"
            )
        joined[key] = Fp8Entry(entry, scale, block, dtype)
    return joined


def join_mxfp4(entries: dict[str, TensorEntry]) -> dict[str, Entry]:
    """`join_quantized` for each pair NAME_blocks and NAME_scales."""
    joined: dict[str, Entry] = {}
    for key, entry in entries.items():
        name, suffix = key[: -len(_BLOCKS)], key[-len(_BLOCKS) :]
        if suffix not in (_BLOCKS, _SCALES):
            joined[key] = entry
            continue
        if name in entries:
            raise DataError(f"{entry.path}: tensors {key} and {name} are the same weights twice")
        other = name + (_SCALES if suffix == _BLOCKS else _BLOCKS)
        if other not in entries:
            raise DataError(f"{entry.path}: tensor {key} comes without {other}; is a shard missing?")
        if entry.dtype != "U8":
            raise DataError(f"{entry.path}: tensor {key} has dtype {entry.dtype}, in MXFP4 it is U8")
        blocks, scales = entries[name + _BLOCKS], entries[name + _SCALES]
        if len(scales.shape) != 3 or blocks.shape != (*scales.shape, GROUP // 2):
            raise DataError(
                f"{blocks.path}: tensor {blocks.name} has shape {blocks.shape}, which does not fit {scales.shape} of "
                f"{scales.name}; in MXFP4 they are (experts, rows, groups, {GROUP // 2}) and (experts, rows, groups)"
            )
        joined[name] = Mxfp4Entry(name, blocks, scales)
    return joined
