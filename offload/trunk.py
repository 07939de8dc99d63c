"""Loading the trunk: plain tensors as they are, packed matrices into modules that keep them packed where there is a
kernel that multiplies by them so."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..quant.linear import MakeLinear, NativeLinear, PackedMatrix, QuantEmbedding, matrix_format
from ..quant.native import NativePool
from ..quant.triton_kernels import load_triton, why_missing
from ..quant.triton_linear import TILE_TOKENS, TritonLinear
from .config import OffloadConfig
from .device import Device
from .hf import Skeleton, load_trunk
from .manifest import Manifest
from .source import OnNotice, OnProgress
from .store import ExpertStore

_CPU = torch.device("cpu")


def find_linear(
    pool: NativePool | None, device: Device | None, config: OffloadConfig, has_packed: bool, on_notice: OnNotice
) -> MakeLinear | None:
    """What multiplies by packed matrices where the trunk lies; None where they have to be dequantised.

    Args:
        has_packed: whether there are any. Then a device that lacks kernels for them says so.
    """
    if device is None:
        return None if pool is None else functools.partial(NativeLinear, pool)
    if config.kernels == "torch":
        return device.linear
    obstacle = device.lacks or (why_missing() if load_triton() is None else None)
    if obstacle is None:
        return TritonLinear
    if device.linear is None and has_packed:
        on_notice(
            f"{obstacle} The trunk's packed matrices are dequantised on {device.name}, once, "
            "which leaves less of its memory for experts."
        )
    return device.linear


def load_packed_trunk(
    skeleton: Skeleton,
    store: ExpertStore,
    linear: MakeLinear | None,
    on_progress: OnProgress | None,
    device: torch.device = _CPU,
) -> None:
    """Load a store's trunk. Packed matrices stay so if `linear` is not None, else they are dequantised, on `device`."""
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
            if linear is None:
                yield name, matrix.dequantize(skeleton.dtypes[name])
            else:
                packed[name] = matrix
                _replace(model, name, matrix, linear)

    load_trunk(skeleton, plain(), stand_ins=set() if linear is None else set(entries), device=device)
    if linear is not None:
        for target, source in ties.items():
            if source in packed:
                _replace(model, target, packed[source], linear)


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


@torch.inference_mode()
def warm_up_trunk(model: nn.Module) -> None:
    """Multiply once by a matrix of each shape, in each size that its GPU kernel is compiled for."""
    linears = [module for module in model.modules() if isinstance(module, TritonLinear)]
    for linear in {(module.shape, module.dtype, module.bias is None): module for module in linears}.values():
        for tokens in (1, *TILE_TOKENS):
            linear(torch.zeros(tokens, linear.in_features, dtype=linear.dtype, device=linear.packed.data.device))


def _replace(model: Any, name: str, matrix: PackedMatrix, linear: MakeLinear) -> None:
    """Put the packed twin of a Linear or Embedding into its place."""
    path = name.removesuffix(".weight")
    parent_path, _, leaf = path.rpartition(".")
    old = model.get_submodule(path)
    if isinstance(old, nn.Embedding):
        new: nn.Module = QuantEmbedding(matrix, old.weight.dtype)
    else:
        new = linear(matrix, old.weight.dtype, old.bias)
    setattr(model.get_submodule(parent_path), leaf, new)
