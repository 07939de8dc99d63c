"""Counters of the tier above RAM: what the device computed from its own slots, and how the rest was done."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .json_fields import of_kind


@dataclass(slots=True)
class DeviceLayerStats:
    """One MoE layer. Every request is a hit, copied or on the CPU."""

    requests: int = 0
    hits: int = 0
    """Computed from where they lay on the device when the router chose them, or were about to arrive."""
    copied: int = 0
    """Copied up to be computed on the device."""
    on_cpu: int = 0
    """Computed by the CPU from RAM."""
    admitted: int = 0
    """Computed by the CPU, and copied up for later."""


class DeviceStats:
    """Counters of a device's slots. Called from one thread.

    Args:
        slots: how many there are.
        link: bytes per second of copies to the device with nothing else going on, if somebody has measured them.
    """

    def __init__(self, layers: int, record_bytes: int, slots: int, link: float | None = None) -> None:
        self.record_bytes, self.slots, self.link_peak = record_bytes, slots, link
        self.reset(layers)

    def reset(self, layers: int | None = None) -> None:
        """Back to 0. Copies that are under way are not counted when they end."""
        self._under_way = 0 if layers else self._under_way
        self._uncounted = self._under_way
        self.per_layer = [DeviceLayerStats() for _ in range(layers or len(self.per_layer))]
        self.copies, self.copy_s = 0, 0.0

    def record(self, layer: int, more: DeviceLayerStats) -> None:
        """A layer is through, with all its requests."""
        self._under_way += more.copied + more.admitted
        self.per_layer[layer] = _sum(self.per_layer[layer], more)

    def record_copy(self, seconds: float) -> None:
        """A copy is over; it took the link that long."""
        self._under_way -= 1
        if self._uncounted:
            self._uncounted -= 1
            return
        self.copies += 1
        self.copy_s += seconds

    def forget_copies(self) -> None:
        """After an interruption: nobody will say when those end that are under way."""
        self._under_way = self._uncounted = 0

    def snapshot(self) -> DeviceStats:
        return copy.deepcopy(self)

    def merge(self, other: DeviceStats) -> None:
        """Add the counters of a later run of the same model."""
        self.per_layer = [_sum(mine, more) for mine, more in zip(self.per_layer, other.per_layer, strict=True)]
        self.slots, self.link_peak = other.slots, other.link_peak
        self.copies += other.copies
        self.copy_s += other.copy_s

    @property
    def layers(self) -> int:
        return len(self.per_layer)

    @property
    def bytes_copied(self) -> int:
        return (self.total("copied") + self.total("admitted")) * self.record_bytes

    @property
    def link_speed(self) -> float | None:
        """Bytes per second while a copy was under way."""
        return self.copies * self.record_bytes / self.copy_s if self.copy_s else None

    def total(self, name: str) -> int:
        """The sum of a counter over all layers."""
        return sum(getattr(counters, name) for counters in self.per_layer)

    def check(self) -> None:
        """Raise AssertionError when a layer's counters do not add up."""
        for layer, c in enumerate(self.per_layer):
            assert c.hits + c.copied + c.on_cpu == c.requests, f"layer {layer}: {c} does not add up"
            assert c.admitted <= c.on_cpu, f"layer {layer}: {c.admitted} admitted of {c.on_cpu} on the CPU"
        assert self.copies <= self.total("copied") + self.total("admitted"), f"{self.copies} copies ended"

    def to_dict(self) -> dict[str, Any]:
        """Totals, rates and layers, JSON-serialisable. Bytes per second are those of copies under way."""
        totals = {f.name: self.total(f.name) for f in fields(DeviceLayerStats)}
        return {
            "record_bytes": self.record_bytes,
            "slots": self.slots,
            "link_peak": self.link_peak,
            **totals,
            "hit_rate": totals["hits"] / totals["requests"] if totals["requests"] else None,
            "bytes_copied": self.bytes_copied,
            "link_bytes_per_s": self.link_speed,
            "copies": self.copies,
            "copy_s": self.copy_s,
            "per_layer": [asdict(counters) for counters in self.per_layer],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DeviceStats:
        """What `to_dict` gave. Raises LookupError, TypeError or ValueError when it is something else."""
        kinds = {"record_bytes": int, "slots": int, "link_peak": float, "copies": int, "copy_s": float}
        if data["link_peak"] is None:
            del kinds["link_peak"]
        found = {name: of_kind(name, data[name], kind) for name, kind in kinds.items()}
        out = cls(len(data["per_layer"]), found["record_bytes"], found["slots"], found.get("link_peak"))
        names = [f.name for f in fields(DeviceLayerStats)]
        out.per_layer = [
            DeviceLayerStats(**{name: of_kind(name, counters[name], int) for name in names})
            for counters in data["per_layer"]
        ]
        out.copies, out.copy_s = found["copies"], found["copy_s"]
        return out


def _sum(a: DeviceLayerStats, b: DeviceLayerStats) -> DeviceLayerStats:
    return DeviceLayerStats(*(getattr(a, f.name) + getattr(b, f.name) for f in fields(a)))
