"""Loading the trunk: plain tensors as they are, packed matrices into modules that keep them packed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..quant.linear import PackedMatrix, QuantEmbedding, QuantLinear, matrix_format
from ..quant.native import NativePool
from .hf import Skeleton, load_trunk
from .manifest import Manifest
from .source import OnProgress
from .store import ExpertStore

_CPU = torch.device("cpu")


def load_packed_trunk(
    skeleton: Skeleton,
    store: ExpertStore,
    pool: NativePool | None,
    on_progress: OnProgress | None,
    device: torch.device = _CPU,
) -> None:
    """Load a store's trunk. Packed matrices stay packed where there are native kernels, else they are dequantised, on
    `device`."""
    entries, model = store.manifest.trunk_packed, skeleton.model
    packed: dict[str, PackedMatrix] = {}
    ties = dict(model.all_tied_weights_keys)

    def plain() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in store.trunk(on_progress):
            if name not in entries:
                yield name, tensor
                continue
            entry = entries[name]
            matrix = PackedMatrix(tensor.to(device), entry.rows, entry.cols, matrix_format(entry.format))
            if pool is None:
                yield name, matrix.dequantize(skeleton.dtypes[name])
            else:
                packed[name] = matrix
                _replace(model, name, matrix, pool)

    load_trunk(skeleton, plain(), stand_ins=set() if pool is None else set(entries), device=device)
    if pool is not None:
        for target, source in ties.items():
            if source in packed:
                _replace(model, target, packed[source], pool)


def trunk_bytes(manifest: Manifest, skeleton: Skeleton, packed: bool) -> int:
    """What the trunk takes in memory; matrices that do not stay packed grow to the model's dtype."""
    return manifest.trunk_bytes + sum(
        entry.rows * entry.cols * skeleton.dtypes[name].itemsize - entry.nbytes
        for name, entry in manifest.trunk_packed.items()
        if not packed
    )


def largest_tensor(manifest: Manifest, skeleton: Skeleton) -> int:
    """Bytes of the trunk's largest tensor as the store holds it."""
    packed = manifest.trunk_packed
    sizes = [matrix_format(e.format).nbytes(e.rows, e.cols) for e in packed.values()]
    plain = (name for name in skeleton.trunk_names() if name not in packed)
    sizes += [skeleton.full_state[name].numel() * skeleton.dtypes[name].itemsize for name in plain]
    return max(sizes, default=0)


def _replace(model: Any, name: str, matrix: PackedMatrix, pool: NativePool) -> None:
    """Put the packed twin of a Linear or Embedding into its place."""
    path = name.removesuffix(".weight")
    parent_path, _, leaf = path.rpartition(".")
    old = model.get_submodule(path)
    if isinstance(old, nn.Embedding):
        new: nn.Module = QuantEmbedding(matrix, old.weight.dtype)
    else:
        new = QuantLinear(pool, matrix, old.bias)
    setattr(model.get_submodule(parent_path), leaf, new)
