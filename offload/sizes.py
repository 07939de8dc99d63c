"""What a model weighs in each format, from its shapes alone, and the manifest of the store that it would become."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from ..quant.codecs import get_codec, record_layout
from ..quant.linear import matrix_format
from ..quant.mxfp4 import GROUP as MX_GROUP
from .config import DEFAULT_CODEC, DEFAULT_TRUNK, KEEP, MXFP4, default_trunk, kept_codec
from .hf import Skeleton
from .manifest import Manifest
from .outline import Format
from .packed_scheme import AWQ, GPTQ
from .packing import PackedEntry

_SMALLER_CODEC = "int4-g128-zp"
_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


def planned_manifest(skeleton: Skeleton, packable: set[str], name: str, codec: str, trunk: str) -> Manifest:
    """What `convert` would write of a checkpoint with that skeleton, without checksums and files.

    Args:
        packable: the trunk parameters that may be packed, `packable_names(skeleton)`.

    Raises:
        ValueError: an unknown codec or trunk format, with the known ones.
    """
    layers = [site.layer for site in skeleton.sites]
    record = max(record_layout(get_codec(codec), layer.shape).nbytes for layer in layers)
    if trunk != KEEP:
        matrix_format(trunk)
    packed, total = {}, 0
    for parameter in skeleton.trunk_names():
        tensor = skeleton.full_state[parameter]
        if trunk != KEEP and parameter in packable:
            packed[parameter] = entry = PackedEntry(trunk, *tensor.shape)
            total += entry.nbytes
        else:
            total += tensor.numel() * skeleton.dtypes[parameter].itemsize
    return Manifest(name, codec, layers, record, [], [], {}, total, trunk_packed=packed)


def format_of(manifest: Manifest, dtype: torch.dtype) -> Format:
    """The format of a store, whose trunk has that dtype where it is not packed."""
    trunk = next((entry.format for entry in manifest.trunk_packed.values()), _NAMES[dtype])
    experts = manifest.record_bytes * manifest.num_experts
    return Format(manifest.codec, trunk, manifest.record_bytes, experts, manifest.trunk_bytes)


def shipped_format(
    skeleton: Skeleton, packable: set[str], dtype: torch.dtype, quantization: dict[str, Any] | None
) -> Format:
    """The checkpoint, as far as its config tells: packed values with their scales, all else in `dtype`."""
    experts_as = trunk_as = _NAMES[dtype]
    expert_bits = trunk_bits = 8.0 * dtype.itemsize
    method, kept = (quantization or {}).get("quant_method"), kept_codec(quantization)
    if method == MXFP4:
        experts_as, expert_bits = MXFP4, 4 + 8 / MX_GROUP
    elif kept is not None:
        experts_as, expert_bits = kept, 4 + 16 / int(kept.removesuffix("-asym").rpartition("g")[2])
        if method in (GPTQ, AWQ):  # attention as well
            trunk_as, trunk_bits = experts_as, expert_bits
    elif method is not None:
        experts_as = trunk_as = method
        expert_bits = trunk_bits = 8.0
    trunk = 0.0
    for name in skeleton.trunk_names():
        tensor = skeleton.full_state[name]
        trunk += tensor.numel() * (trunk_bits / 8 if name in packable else skeleton.dtypes[name].itemsize)
    each = [
        sum(prod(part) * (expert_bits / 8 if len(part) == 2 else dtype.itemsize) for part in shape.parts().values())
        for shape in (site.layer.shape for site in skeleton.sites)
    ]
    experts = sum(one * site.layer.num_experts for one, site in zip(each, skeleton.sites, strict=True))
    return Format(experts_as, trunk_as, int(max(each)), int(experts), int(trunk), ships=True)


def usual_formats(
    skeleton: Skeleton, packable: set[str], dtype: torch.dtype, kept: str | None, shipped: Format, chosen: Format
) -> list[Format]:
    """What a checkpoint is and what it usually becomes, `chosen` among them; the largest first."""
    stores = {DEFAULT_CODEC: DEFAULT_TRUNK, _SMALLER_CODEC: DEFAULT_TRUNK}
    if kept is not None:
        stores[kept] = DEFAULT_TRUNK
    formats = {
        format_of(planned_manifest(skeleton, packable, "", codec, trunk), dtype) for codec, trunk in stores.items()
    }
    formats |= {chosen, shipped, shipped_format(skeleton, packable, dtype, None)}
    return sorted(formats, key=lambda one: (-one.total, one.ships))


def chosen_formats(kept: str | None, codec: str | None, trunk: str | None) -> tuple[str, str]:
    """Codec and trunk format of a conversion, as `load` chooses where nothing was said. `kept` keeps all values."""
    codec = codec or kept or DEFAULT_CODEC
    return codec, trunk or default_trunk(codec)
