"""How fast a model will answer, as arithmetic over bytes and rates: which tier a token's bytes come from, and how long
that takes.

A token reads the trunk, the keys and values of the conversation, and its experts. Hits are read where they are
resident; misses in VRAM are computed by the CPU where they lie in RAM; the others come from the disk, and nothing is
taken to happen meanwhile. Of the speeds in benchmarks/RESULTS.md this gives 0.96 to 1.13 (`tests/test_estimate.py`).
"""

from __future__ import annotations

from typing import NamedTuple

LAYER_S = 0.28e-3
"""Seconds a layer takes beside reading its weights, measured (benchmarks/RESULTS.md: wall time beyond streaming)."""
PLAIN_LAYER_S = 1.31e-3
"""The same where single tokens run through the model's own modules."""
GPU_LAYER_S = 0.3e-3
"""The same on a GPU: an assumption."""


class Rates(NamedTuple):
    """Bytes per second."""

    ram: float
    disk: float
    vram: float = 0.0
    """0 = there is no GPU."""


class Bytes(NamedTuple):
    """What a token reads from each tier."""

    vram: float
    ram: float
    disk: float

    @property
    def total(self) -> float:
        return sum(self)


class Seconds(NamedTuple):
    """What a token takes, part by part."""

    vram: float
    ram: float
    disk: float
    layers: float

    @property
    def total(self) -> float:
        return sum(self)


class Hits(NamedTuple):
    """The share of a token's experts that is found in each tier; disk is the rest."""

    vram: float
    ram: float

    @property
    def disk(self) -> float:
        return max(0.0, 1.0 - self.vram - self.ram)


def bytes_per_token(shared: int, experts: int, hits: Hits, on_gpu: bool) -> Bytes:
    """Bytes from each tier.

    Args:
        shared: bytes that every token reads: the trunk, and keys and values.
        experts: bytes of those that a token chooses in all layers together.
        on_gpu: what is shared lies in VRAM, else in RAM.
    """
    vram, ram, disk = hits.vram * experts, hits.ram * experts, hits.disk * experts
    return Bytes(vram + shared, ram, disk) if on_gpu else Bytes(0.0, ram + shared, disk)


def seconds_per_token(read: Bytes, rates: Rates, layers: int, layer_s: float) -> Seconds:
    """Seconds. What comes from the disk is read once more where it is computed: from RAM."""
    return Seconds(
        vram=read.vram / rates.vram if rates.vram else 0.0,
        ram=(read.ram + read.disk) / rates.ram,
        disk=read.disk / rates.disk,
        layers=layers * layer_s,
    )
