"""What a token costs: a model of an answer's speed from the misses of each layer and a few measured times.

It steps through recorded tokens layer by layer with two clocks, that of compute and that of the disk. A layer's hits
are computed while its misses are read; what prefetch has asked for one layer earlier has a head start; wrong guesses
keep the disk busy. Everything else takes as long as it was measured to take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from .counters import Step

if TYPE_CHECKING:
    from .stats import RunStats


class DiskSpeed(NamedTuple):
    """Random reads of whole records."""

    bytes_per_s: float
    """With several reads at a time."""
    read_s: float
    """One read alone."""


class Costs(NamedTuple):
    """Seconds, but for the last two."""

    rest: float
    """Per layer of a token: everything but kernels and waiting."""
    expert: float
    """Per request, in the kernels."""
    miss: float
    """Per missing expert, beside waiting for it: booking it, a call of the kernels of its own, and the processor's time
    that its read takes."""
    read: float
    """Per record, several being read at a time."""
    latency: float
    """What a read alone takes longer than that."""
    ahead: float = 0.0
    """Share of the missing experts that prefetch had asked for."""
    wrong: float = 0.0
    """Reads of wrong guesses for each of those."""

    @classmethod
    def of(cls, run: RunStats, disk: DiskSpeed | None, latest: Sequence[Step]) -> Costs | None:
        """Those of the `latest` steps of a run; None without any. Without `disk`, its speed in the run stands for its
        best; and so it does where it was quicker then: what it has given it can give."""
        answer = run.answer
        if not latest or not answer.requests or not run.layers:
            return None
        reads = run.total("demand_reads") + run.total("prefetch_reads")
        found = ([run.record_bytes / disk.bytes_per_s] if disk else []) + ([run.read_busy_s / reads] if reads else [])
        read = min(found) if found else 0.0
        requests = answer.requests / answer.steps
        expert = answer.compute_s / answer.requests
        base, miss = _line([(step.missing, step.seconds - step.stall_s) for step in latest], PRIOR_MISS * read)
        used = run.total("prefetch_useful") + run.total("prefetch_late")
        return cls(
            rest=max(0.0, base - requests * expert) / run.layers,
            expert=expert,
            miss=miss,
            read=read,
            latency=max(0.0, disk.read_s - read) if disk else 0.0,
            ahead=min(1.0, used / answer.missing) if answer.missing else 0.0,
            wrong=run.total("prefetch_wasted") / used if used else 0.0,
        )


PRIOR_MISS, PRIOR_WEIGHT = 0.3, 100.0
"""What `Costs.miss` is taken to be, as a share of a read, before a run has shown it, and how much variance of missing
experts (steps x experts squared) it takes to believe the run as much."""


def _line(points: Sequence[tuple[float, float]], slope: float) -> tuple[float, float]:
    """Least squares with a prior slope: the value at 0, and the slope, none of them below 0."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    variance = sum((x - mean_x) ** 2 for x, _ in points) + PRIOR_WEIGHT
    slope = (sum((x - mean_x) * (y - mean_y) for x, y in points) + PRIOR_WEIGHT * slope) / variance
    slope = max(0.0, min(slope, mean_y / mean_x if mean_x else slope))
    return mean_y - slope * mean_x, slope


def seconds_per_token(requests: Sequence[int], misses: Sequence[int], layers: int, costs: Costs) -> float:
    """The mean of whole tokens.

    Args:
        requests, misses: of each layer of each token, in order; misses without prefetch.
    """
    now = disk = 0.0  # when compute and when the disk are through with what they have
    for wanted, missing in zip(requests, misses, strict=True):
        asked, now = now, now + costs.rest
        end = now + wanted * costs.expert
        if missing:
            ahead = missing * costs.ahead
            if ahead:  # asked for when the layer before knew its experts
                disk = max(disk, asked) + ahead * (1 + costs.wrong) * costs.read
            if missing > ahead:
                disk = max(disk, now) + (missing - ahead) * costs.read
            end = max(end, disk + costs.latency + costs.expert) + missing * costs.miss
        now = end
    return now * layers / len(requests)
