"""Whether a model on the hub will fit, said before its weights are downloaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from ..cache.units import format_bytes
from . import hf, memory
from .checkpoint import CheckpointSource
from .device import default_device
from .errors import DataError, UsageError
from .hub_source import HubSource
from .sizes import planned_manifest

LEAST_CONTEXT = 1024
"""Tokens for which there must be room."""


class StoreSize(NamedTuple):
    """What a store will take, in bytes; `record` of them for each expert."""

    record: int
    experts: int
    trunk: int

    @property
    def total(self) -> int:
        return self.record * self.experts + self.trunk


def require_fit(
    source: HubSource, codec: str, trunk: str, dest: Path, keep_source: bool, to_run: dict[str, Any] | None
) -> None:
    """Check that a model can be downloaded, converted and, if that is what for, run.

    Args:
        keep_source: the shards go into the hub's cache and not, one after the other, beside `dest`.
        to_run: the budget for running it, {"ram": bytes or None, "device": name}.

    Raises:
        UsageError: the codec or the trunk format is unknown.
        DataError: a disk has too little room.
        MemoryBudgetError: the budget, or what is free, is too little for any number of experts in memory.
    """
    try:
        size = store_size(source, codec, trunk)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if to_run is not None:
        device = default_device() if to_run["device"] == "auto" else to_run["device"]
        _require_memory(source, size, to_run["ram"], trunk_in_ram=device == "cpu")
    shards = (source.path, sum(source.model.missing().values())) if keep_source else (dest, source.shards.most_bytes())
    _require_disk(source.name, [(dest, size.total), shards], keep_source)


def store_size(source: CheckpointSource, codec: str, trunk: str) -> StoreSize:
    """The size of the store that a conversion would write. Raises ValueError for unknown formats."""
    planned = planned_manifest(source.skeleton, source.packable(), source.name, codec, trunk)
    return StoreSize(planned.record_bytes, planned.num_experts, planned.trunk_bytes)


def _require_memory(source: CheckpointSource, size: StoreSize, ram: int | None, trunk_in_ram: bool) -> None:
    """A plan with what is needed at the least: the program, the trunk, a short context and the experts of one token.
    The plan proper is made at the load."""
    memory.make_plan(
        memory.Needs(
            program=memory.resident_bytes(),
            trunk=size.trunk if trunk_in_ram else 0,
            kv=hf.measure_kv_bytes(source.skeleton, LEAST_CONTEXT, LEAST_CONTEXT) if trunk_in_ram else 0,
            workspace=0,
            step=0,
            record=size.record,
            experts=size.experts,
            floor=sum(layer.top_k for layer in source.layers()),
            context=LEAST_CONTEXT,
        ),
        ram,
    )


def _require_disk(name: str, wanted: list[tuple[Path, int]], keep_source: bool) -> None:
    disks: dict[int, tuple[Path, int]] = {}
    for path, count in wanted:
        existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        device = existing.stat().st_dev
        disks[device] = existing, disks.get(device, (existing, 0))[1] + count
    for path, count in disks.values():
        free = shutil.disk_usage(path).free
        if free < count:
            remedy = ", or keep only the store with --no-keep-source" if keep_source else ""
            raise DataError(
                f"{name} needs {format_bytes(count)} on the disk of {path}, which has {format_bytes(free)} free; "
                f"free some space{remedy}"
            )
