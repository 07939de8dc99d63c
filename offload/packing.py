"""Packing the trunk's large matrices at conversion: which ones, and what the manifest says of them.

Attention, shared experts and the head are read whole for every token: in INT8 they cost half of what bf16 does, in time
and in memory, and run on the same kernels as the experts. Routers, norms and small matrices stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from ..quant.int4 import MapPieces
from ..quant.linear import PackedMatrix, matrix_format
from .errors import DataError
from .source import RowReader

if TYPE_CHECKING:  # packing itself does without transformers, which is a good part of a conversion's memory
    from .hf import Skeleton

SMALLEST = 1 << 16
"""Matrices of fewer weights stay as they are: they cost nothing, and some are sensitive."""


class PackedEntry(NamedTuple):
    """A packed trunk matrix in the manifest: its format's name and its real shape."""

    format: str
    rows: int
    cols: int

    @property
    def nbytes(self) -> int:
        return matrix_format(self.format).nbytes(self.rows, self.cols)


def packable_names(skeleton: Skeleton) -> set[str]:
    """The trunk parameters that may be packed: weights of plain Linears and Embeddings that only their own modules
    compute with, routers excepted."""
    routers = [site.router for site in skeleton.sites if site.router is not None]
    inside = {id(module) for router in routers for module in router.modules()}
    named = {
        f"{name}.weight"
        for name, module in skeleton.model.named_modules()
        if type(module) in (nn.Linear, nn.Embedding)
        and id(module) not in inside
        and skeleton.full_state[f"{name}.weight"].numel() >= SMALLEST
        and f"{name}.weight" not in skeleton.model.all_tied_weights_keys
        and skeleton.dtypes[f"{name}.weight"]
        == skeleton.full_state[f"{name}.weight"].dtype  # not kept in float32 on purpose
    }
    return named - skeleton.computed_with_directly(named) if named else named


def pack_trunk(
    tensors: Iterator[tuple[str, torch.Tensor | RowReader]],
    names: set[str],
    fmt: str,
    packed: dict[str, PackedEntry],
    run: MapPieces = map,
) -> Iterator[tuple[str, torch.Tensor | RowReader]]:
    """Pack the tensors of `names`, pass the others through, and enter what was packed into `packed`.

    Args:
        run: what packs the pieces of a tensor, `map` or a pool's.
    """
    chosen = matrix_format(fmt)
    for name, tensor in tensors:
        if name in names:
            try:
                matrix = PackedMatrix.pack(tensor, chosen, run)
            except ValueError as error:
                raise DataError(f"trunk tensor {name}: {error}") from None
            packed[name] = PackedEntry(fmt, matrix.rows, matrix.cols)
            tensor = matrix.data
        yield name, tensor
