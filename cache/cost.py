"""What a token costs: a model of an answer's speed from the misses of each layer and a few measured times.

It steps through recorded tokens layer by layer with two clocks, that of compute and that of the disk. A layer's hits
are computed while its misses are read; what prefetch has asked for one layer earlier has a head start; wrong guesses
keep the disk busy. Everything else takes as long as it was measured to take: some time per layer, more in layers that
are not gone through at full speed, because they or their neighbours miss something, and more for each miss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

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
    """Per layer of a token: everything but kernels and waiting, where nothing is missing."""
    expert: float
    """Per request, in the kernels."""
    stop: float
    """Per layer of `stops`, beside `rest`."""
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
        found = ([run.record_bytes / disk.bytes_per_s] if disk else []) + ([run.read_s] if run.read_s else [])
        read = min(found) if found else 0.0
        used = run.total("prefetch_useful") + run.total("prefetch_late")
        base, stop, miss = _without_waiting(latest, run.layers, used > 0, read)
        requests = answer.requests / answer.steps
        expert = min(answer.compute_s / answer.requests, base / requests)
        return cls(
            rest=(base - requests * expert) / run.layers,
            expert=expert,
            stop=stop,
            miss=miss,
            read=read,
            latency=max(0.0, disk.read_s - read) if disk else 0.0,
            ahead=min(1.0, used / answer.missing) if answer.missing else 0.0,
            wrong=run.total("prefetch_wasted") / used if used else 0.0,
        )


def stops(missing: Sequence[int], layers: int, ahead: bool) -> list[bool]:
    """Of the layers of whole tokens, those that are not gone through at full speed.

    Where all is in memory, one native call takes a token through layer after layer. It ends at a layer that misses
    something; behind that, threads have to be woken and the processor's caches be filled again; and, if reads are asked
    for `ahead`, the layer before it ends the call as well, to do so.
    """
    found = [count > 0 for count in missing]
    for at, count in enumerate(missing):
        if count and (at + 1) % layers:
            found[at + 1] = True
        if count and ahead and at % layers:
            found[at - 1] = True
    return found


PRIOR_STOP, PRIOR_MISS = 0.4, 0.1
"""What `Costs.stop` and `Costs.miss` are taken to be, as shares of a read, before a run has shown it: about what they
were with layers of 0.3 and of 2 ms."""
PRIOR_WEIGHT = 30.0
"""How much variance of what they count (steps x its square) it takes to believe the run as much."""


def _without_waiting(steps: Sequence[Step], layers: int, ahead: bool, read: float) -> tuple[float, float, float]:
    """What a token takes beside waiting where it misses nothing, per stop, and per miss: least squares with prior
    slopes, none of them below 0. A step counts as three times the usual at most."""
    counts = np.array([[sum(stops(_bits(s.missing_in, layers), layers, ahead)), s.missing] for s in steps], float)
    seconds = np.array([s.seconds - s.stall_s for s in steps])
    seconds = np.minimum(seconds, 3 * np.median(seconds))
    prior = np.array([PRIOR_STOP, PRIOR_MISS]) * read
    means, mean = counts.mean(axis=0), seconds.mean()
    spread = counts - means
    slopes = np.linalg.solve(
        spread.T @ spread + PRIOR_WEIGHT * np.eye(2), spread.T @ (seconds - mean) + PRIOR_WEIGHT * prior
    )
    slopes = np.maximum(slopes, 0.0)
    slopes *= min(1.0, mean / max(means @ slopes, 1e-12))
    return float(mean - means @ slopes), *slopes.tolist()


def _bits(number: int, count: int) -> list[int]:
    return [number >> bit & 1 for bit in range(count)]


class TokenTime(NamedTuple):
    """Seconds."""

    working: float
    waiting: float
    """For reads."""

    @property
    def seconds(self) -> float:
        return self.working + self.waiting


def time_per_token(requests: Sequence[int], misses: Sequence[int], layers: int, costs: Costs) -> TokenTime:
    """The mean of whole tokens.

    Args:
        requests, misses: of each layer of each token, in order; misses without prefetch.
    """
    now = disk = waiting = 0.0  # when compute and when the disk are through with what they have
    stopped = stops(misses, layers, costs.ahead > 0)
    for wanted, missing, stop in zip(requests, misses, stopped, strict=True):
        asked, now = now, now + costs.rest + stop * costs.stop
        end = now + wanted * costs.expert
        if missing:
            ahead = missing * costs.ahead
            if ahead:  # asked for when the layer before knew its experts
                disk = max(disk, asked) + ahead * (1 + costs.wrong) * costs.read
            if missing > ahead:
                disk = max(disk, now) + (missing - ahead) * costs.read
            arrived = max(end, disk + costs.latency + costs.expert)
            waiting += arrived - end
            end = arrived + missing * costs.miss
        now = end
    tokens = len(requests) / layers
    return TokenTime((now - waiting) / tokens, waiting / tokens)
