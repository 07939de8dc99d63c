"""Checkpoints that ship quantised: which tensors of their files make up one matrix."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..quant.mxfp4 import GROUP, Mxfp4Matrix
from .errors import DataError
from .tensorfile import TensorEntry

_BLOCKS, _SCALES = "_blocks", "_scales"


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


def join_mxfp4(entries: dict[str, TensorEntry]) -> dict[str, TensorEntry | Mxfp4Entry]:
    """Replace each pair NAME_blocks and NAME_scales by one entry NAME; all other tensors stay.

    Raises:
        DataError: one of a pair is missing, or the two do not fit together.
    """
    joined: dict[str, TensorEntry | Mxfp4Entry] = {}
    for key, entry in entries.items():
        name, suffix = key[: -len(_BLOCKS)], key[-len(_BLOCKS) :]
        if suffix not in (_BLOCKS, _SCALES):
            joined[key] = entry
            continue
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
