"""Whether a model on the hub will fit, said before its weights are downloaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..cache.units import format_bytes
from . import hf, memory
from .checkpoint import CheckpointSource
from .device import default_device
from .errors import DataError, UsageError
from .sizes import planned_manifest

if TYPE_CHECKING:
    from .gguf_source import GgufSource

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
    source: CheckpointSource | GgufSource,
    codec: str,
    trunk: str,
    dest: Path,
    download: tuple[Path, int],
    to_run: dict[str, Any] | None,
    remedy: str = "",
) -> None:
    """Check that a model can be downloaded, converted and, if that is what for, run.

    Args:
        download: where the files go, and the most bytes that they take at a time.
        to_run: the budget for running it, {"ram": bytes or None, "device": name}.
        remedy: what else than free space would help on a full disk.

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
    _require_disk(source.name, [(dest, size.total), download], remedy)


def store_size(source: CheckpointSource | GgufSource, codec: str, trunk: str) -> StoreSize:
    """The size of the store that a conversion would write. Raises ValueError for unknown formats."""
    planned = planned_manifest(source.skeleton, source.packable(), source.name, codec, trunk)
    return StoreSize(planned.record_bytes, planned.num_experts, planned.trunk_bytes)


def _require_memory(
    source: CheckpointSource | GgufSource, size: StoreSize, ram: int | None, trunk_in_ram: bool
) -> None:
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


def _require_disk(name: str, wanted: list[tuple[Path, int]], remedy: str) -> None:
    disks: dict[int, tuple[Path, int]] = {}
    for path, count in wanted:
        existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        device = existing.stat().st_dev
        disks[device] = existing, disks.get(device, (existing, 0))[1] + count
    for path, count in disks.values():
        free = shutil.disk_usage(path).free
        if free < count:
            raise DataError(
                f"{name} needs {format_bytes(count)} on the disk of {path}, which has {format_bytes(free)} free; "
                f"free some space{remedy}"
            )
