"""The counters that statistics are made of, per layer and per phase. Seconds are wall-clock seconds."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar

from .json_fields import of_kind


@dataclass(slots=True)
class LayerStats:
    """Counters of one MoE layer. A request is one distinct expert of one forward pass."""

    requests: int = 0
    hits: int = 0
    misses: int = 0
    late: int = 0
    """Misses whose read was in flight when the router chose the expert."""
    prefetch_hits: int = 0
    """Hits on experts that prefetch had brought, counted at their first use."""
    demand_reads: int = 0
    prefetch_reads: int = 0
    bytes_read: int = 0
    """Of these reads, and of those that were given up half-way."""
    stall_s: float = 0.0
    """Time that compute waited for bytes."""
    prefetch_issued: int = 0
    prefetch_useful: int = 0
    """Arrived before it was chosen. The other outcomes: chosen while in flight, never chosen, withdrawn."""
    prefetch_late: int = 0
    prefetch_wasted: int = 0
    prefetch_cancelled: int = 0


@dataclass(slots=True)
class PhaseStats:
    """The prompt (prefill) or the answer (decode)."""

    tokens: int = 0
    steps: int = 0
    """Forward passes in `seconds`. An answer's first token comes out of the prompt's pass and needs none."""
    seconds: float = 0.0
    requests: int = 0
    hits: int = 0
    missing: int = 0
    """Requests that would have been misses without prefetch."""
    stall_s: float = 0.0
    compute_s: float = 0.0
    """Time in the expert kernels."""
    layers_s: float = 0.0
    """Time in the layers' experts: waiting for them, the kernels, and the cache's own work."""
    forward_s: float = 0.0
    """Time in forward passes; only answers record it."""
    bytes_read: int = 0


class Step(NamedTuple):
    """One forward pass of an answer."""

    seconds: float
    stall_s: float
    missing: int
    missing_in: int
    """The layers that `missing` were of, a bit each, the first layer's the lowest."""


Counters = TypeVar("Counters", LayerStats, PhaseStats)


def copied(counters: Counters) -> Counters:
    return type(counters)(*values_of(counters))


def values_of(counters: LayerStats | PhaseStats) -> tuple[Any, ...]:
    return tuple(getattr(counters, f.name) for f in fields(counters))


def outstanding(counters: LayerStats) -> int:
    ended = counters.prefetch_useful + counters.prefetch_late + counters.prefetch_wasted + counters.prefetch_cancelled
    return counters.prefetch_issued - ended


def check(layer: int, c: LayerStats, record_bytes: int) -> None:
    """Raise AssertionError, with the numbers, when the counters of one layer do not add up."""
    reads = c.demand_reads + c.prefetch_reads
    assert min(values_of(c)) >= 0, f"layer {layer}: a counter is negative: {c}"
    assert c.hits + c.misses == c.requests, f"layer {layer}: {c.hits} + {c.misses} != {c.requests} requests"
    assert c.late <= c.misses, f"layer {layer}: {c.late} late > {c.misses} misses"
    assert c.prefetch_hits <= c.hits, f"layer {layer}: {c.prefetch_hits} prefetch hits > {c.hits} hits"
    assert c.bytes_read >= record_bytes * reads, (
        f"layer {layer}: {c.bytes_read} bytes read < {reads} reads of {record_bytes} bytes"
    )
    assert outstanding(c) >= 0, f"layer {layer}: {-outstanding(c)} more guesses ended than were issued: {c}"


def filled(kind: type[Counters], data: dict[str, Any]) -> Counters:
    """What `asdict` gave. Raises LookupError, TypeError or ValueError when it is something else."""
    return kind(**{f.name: of_kind(f.name, data[f.name], type(f.default)) for f in fields(kind)})
