"""Decisions of a GPU whose experts lie partly in RAM: which misses are copied, which the CPU computes, who is admitted.

Pure arithmetic over measured costs, the same for the runtime and for the simulator. A record in RAM is read there by
both the link and the CPU, so an upload that nobody waits for is not free either: it takes speed from the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import NamedTuple, TypeVar

from .expert import ExpertId
from .forecast import expected_wait, faded

MOST_UPLOADS = 2
"""Uploads per layer and token that nobody waits for."""
HORIZON = 32.0
"""Tokens for which the difference between two experts' uses is believed to last (docs/notes/gpu-simulated.md)."""
COLDEST = 0.005
"""Uses per token that are expected of anybody: the past says too little of those whom it has hardly seen, and whoever
leaves VRAM and RAM for that is read again (docs/notes/gpu-simulated.md)."""
_MOST_RATIO = 4.0  # one page fault or a clock that has not risen yet says little
Expert = TypeVar("Expert")


class Cost(NamedTuple):
    """Seconds of a call over `count` experts: `fixed + count * each`, nothing when there are none."""

    fixed: float
    each: float

    def of(self, count: int) -> float:
        return self.fixed + count * self.each if count else 0.0

    def scaled(self, factor: float) -> Cost:
        return Cost(self.fixed * factor, self.each * factor)


class Measured(NamedTuple):
    """What a call over `count` experts took."""

    count: int
    seconds: float


@dataclass(frozen=True)
class TierCosts:
    """What one record costs each way, for the layers of one model on one machine."""

    copy: Cost
    """From RAM to VRAM; `fixed` is the latency before the first byte, `each` includes what every copy adds."""
    cpu: Cost
    """Computed by the CPU; `fixed` includes sending the activations down and the result up."""
    gpu: Cost
    """Computed by the GPU from VRAM; `fixed` is the launch."""
    cpu_slowdown: float = 0.0
    """Share of its speed, from 0 to 1, that the CPU loses while a copy reads the same RAM."""

    def __post_init__(self) -> None:
        assert 0 <= self.cpu_slowdown < 1, f"a CPU slowed down by {self.cpu_slowdown} never ends"

    @property
    def saving(self) -> float:
        """Seconds that a hit saves: the only miss of a layer, done at the sum of the speeds of CPU and link."""
        copy, cpu = self.copy.of(1), self.cpu.of(1)
        miss = copy * cpu / (copy + cpu) if copy + cpu else 0.0
        return max(0.0, miss - self.gpu.each)

    def dearness(self, read: float) -> float:
        """How many misses one is worth whose record is not in RAM either: it has to be read, in `read` seconds."""
        return 1 + read / self.saving if self.saving else 1.0

    def corrected(
        self,
        *,
        copy: Measured | None = None,
        cpu: Measured | None = None,
        gpu: Measured | None = None,
        weight: float = 0.05,
    ) -> TierCosts:
        """Moved towards what was measured by the share `weight`, fixed and per-expert parts in proportion.

        A single measurement moves a cost by `weight` x 3 at most, however odd it is. What took no time, or had no
        expert, or was taken to be free, corrects nothing. Measure the CPU while nothing is copied.
        """

        def moved(cost: Cost, measured: Measured | None) -> Cost:
            if measured is None or measured.seconds <= 0 or cost.of(measured.count) <= 0:
                return cost
            ratio = measured.seconds / cost.of(measured.count)
            return cost.scaled(1 + weight * (min(max(ratio, 1 / _MOST_RATIO), _MOST_RATIO) - 1))

        return replace(self, copy=moved(self.copy, copy), cpu=moved(self.cpu, cpu), gpu=moved(self.gpu, gpu))


class Ends(NamedTuple):
    """Seconds from the router's choice until each device has computed its share of a layer."""

    gpu: float
    cpu: float


def ends(
    hits: int,
    copied: int,
    on_cpu: int,
    costs: TierCosts,
    *,
    late: Sequence[float] = (),
    link_busy: float = 0.0,
    behind: float = 0.0,
    ahead: float = 0.0,
) -> Ends:
    """When a layer's experts are done: the GPU computes the hits together, then each copy as it arrives.

    Args:
        late: of the experts besides whose copies were in flight before, seconds until each arrives, ascending.
        link_busy: seconds until the link is free of what was asked of it before.
        behind: seconds of uploads that follow the copies.
        ahead: seconds that the GPU has computed hits already, which it found by itself.
    """
    one, gpu = costs.gpu.of(1), max(0.0, costs.gpu.of(hits) - ahead)
    for arrival in late:
        gpu = max(gpu, arrival) + one
    if copied:  # copies arrive evenly, so that the GPU waits longest for the first or for the last
        first, last = link_busy + costs.copy.of(1), link_busy + costs.copy.of(copied)
        gpu = max(max(gpu, first) + copied * one, last + one)
    alone, copying = costs.cpu.of(on_cpu), link_busy + costs.copy.of(copied) + behind
    done_while_copying = copying * (1 - costs.cpu_slowdown)
    if alone <= done_while_copying:
        return Ends(gpu, alone / (1 - costs.cpu_slowdown))
    return Ends(gpu, alone + copying - done_while_copying)


class Split(NamedTuple):
    """What becomes of the misses of a layer whose records are in RAM."""

    copied: tuple
    on_cpu: tuple


def split_misses(
    hits: int,
    in_ram: Sequence[Expert],
    costs: TierCosts,
    *,
    arriving: Sequence[tuple[float, Expert]] = (),
    link_busy: float = 0.0,
    most: int | None = None,
) -> Split:
    """Divide misses between the link and the CPU so that the later of the two ends as early as can be.

    Experts are alike, so every number of copies is tried; of equal ones the fewest copies are taken.

    Args:
        hits: experts in VRAM, which the GPU computes meanwhile.
        in_ram: the misses, the one most worth having in VRAM first: copied are the first ones.
        arriving: misses besides whose copies are in flight, with the seconds until each arrives, ascending. The GPU
            waits for them, unless the CPU is quicker: those are among `on_cpu`, and their copies go on.
        link_busy: as in `ends`.
        most: copies for which there is room.
    """
    misses = len(in_ram)
    room = misses if most is None else min(most, misses)
    least, best, best_waited = inf, 0, 0
    for waited in range(len(arriving), -1, -1):
        late = [arrival for arrival, _ in arriving[:waited]]
        for copied in range(room + 1):
            on_cpu = misses - copied + len(arriving) - waited
            gpu, cpu = ends(hits, copied, on_cpu, costs, late=late, link_busy=link_busy)
            if max(gpu, cpu) < least:
                least, best, best_waited = max(gpu, cpu), copied, waited
            if gpu >= least:  # and more copies only make it later
                break
    on_cpu = (*in_ram[best:], *(expert for _, expert in arriving[best_waited:]))
    return Split(tuple(in_ram[:best]), on_cpu)


class Worth:
    """How often each expert is expected to be used, resident or not: the estimate of the `forecast` policy.

    Tell it every use, also those that the CPU computes: an eviction policy sees residents only.
    """

    def __init__(self) -> None:
        self._token = 0
        self._uses: dict[ExpertId, tuple[float, int]] = {}  # decayed count at the last use, and when that was

    def use(self, experts: Iterable[ExpertId]) -> None:
        """These experts were chosen for the present token."""
        for expert in experts:
            count, last = self._uses.get(expert, (0.0, self._token))
            self._uses[expert] = 1.0 + faded(count, self._token - last), self._token

    def tick(self) -> None:
        """One token is done."""
        self._token += 1

    def rate(self, expert: ExpertId) -> float:
        """Expected uses per token, from `COLDEST` for an expert that was never used to 1."""
        if expert not in self._uses:
            return COLDEST
        count, last = self._uses[expert]
        age = self._token - last
        return min(1.0, max(COLDEST, 1 / expected_wait(faded(count, age), age)))

    def ordered(self, experts: Iterable[ExpertId]) -> list[ExpertId]:
        """Most worth having first, as `split_misses` wants them."""
        return sorted(experts, key=self.rate, reverse=True)

    def gain(self, expert: ExpertId, victim: ExpertId | None, dearness: float = 1.0) -> float:
        """Hits, also below 0, that having `expert` instead of `victim` (None: an empty slot) is expected to bring.

        `dearness`: how many other misses one of the victim is worth; see `TierCosts.dearness`.
        """
        return HORIZON * (self.rate(expert) - (0.0 if victim is None else dearness * self.rate(victim)))


def worth_uploading(gain: float, costs: TierCosts, cpu_share: float) -> bool:
    """Whether an expert should be copied to VRAM that nobody waits for, given what `Worth.gain` says of it and its
    victim.

    Args:
        cpu_share: of the time that the copy takes, in which the CPU computes, from 0 to 1.
    """
    price = cpu_share * costs.cpu_slowdown * costs.copy.each  # what the CPU loses meanwhile
    return gain > 0 and gain * costs.saving > price


def upload_budget(costs: TierCosts, link_busy: float, most: int = MOST_UPLOADS) -> int:
    """How many uploads that nobody waits for may be queued now: so many that less than one copy is before the last.

    Args:
        link_busy: seconds until the link is free of what was asked of it before.
    """
    each = costs.copy.each
    return most if each <= 0 else max(0, min(most, ceil(1 - link_busy / each)))
