"""Guesses to reads: into free or idle slots, behind every read that is waited for, dropped when proved wrong."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from ..cache.expert import ExpertId
from ..cache.manager import ExpertCache
from ..cache.stats import RunStats
from .tiers import RamSlots
from .transfer import Ticket, Transfers, Urgency, finish_one


class Prefetch(Protocol):
    """The contract of the prefetcher and its null twin."""

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way, so that `settle` would find nothing to do."""
        ...

    def request(self, layer: int, indices: Sequence[int]) -> None:
        """Read these experts of `layer` ahead, where there is room; the likeliest come first."""
        ...

    def settle(self, layer: int, chosen: Collection[int]) -> None:
        """`layer`'s router has spoken: note what has arrived, drop the guesses that it disproves."""
        ...

    def claim(self, expert: ExpertId) -> Ticket:
        """The read of a guess that is now demanded; whoever claims it waits for it."""
        ...

    def first_uses(self, hits: Iterable[ExpertId]) -> int:
        """How many of these hits are the first use of an expert that was read ahead."""
        ...

    def evicted(self, expert: ExpertId | None) -> None:
        """`expert` lost its slot; if it was read ahead and never used, that read was wasted."""
        ...

    def make_room(self) -> bool:
        """Give up, or wait for, one guess, so that its slot can be taken; False when there is none."""
        ...

    def drain(self) -> None:
        """Drop every guess, and wait until none is being read any more."""
        ...

    def forget(self) -> None:
        """After an interruption: nothing is being read any more, and the caller frees the slots of what was."""
        ...


class Precision:
    """How often the guess of each rank (the router's first, second, ... choice) has been right lately.

    A router's last choices are nearly tied with those it does not make, so that a guess at them is often wrong: of
    eight, the first was right in 97 of 100 cases and the last in 43. Only experts that were not resident count, because
    only they are read.
    """

    prior = 16
    """Guesses that a rank is taken to have got right before the first."""
    memory = 512
    """Guesses after which old ones count half."""

    def __init__(self) -> None:
        self._right: list[float] = []
        self._all: list[float] = []

    def note(self, rank: int, right: bool) -> None:
        while len(self._all) <= rank:
            self._right.append(self.prior)
            self._all.append(self.prior)
        self._right[rank] += right
        self._all[rank] += 1
        if self._all[rank] > 2 * self.memory:
            self._right[rank] /= 2
            self._all[rank] /= 2

    def of(self, rank: int) -> float:
        return self._right[rank] / self._all[rank] if rank < len(self._all) else 1.0


class Prefetcher:
    """Guesses that are likely enough to be right are read ahead; each owns a slot from the request on.

    Args:
        depth: most guesses in flight.
        worth: least precision of a rank. A wrong guess costs a read, and the slot of an expert that may be wanted; a
            right one saves at most the wait for one.
        idle_worth: the same of a rank whose guesses are read only while the disk has nothing else to do, as while the
            next layer's attention is computed.
        experts: how many each layer has, for routers that also choose experts without weights, numbered behind them.
    """

    def __init__(
        self,
        cache: ExpertCache,
        slots: RamSlots,
        transfers: Transfers,
        stats: RunStats,
        depth: int = 16,
        worth: float = 0.6,
        idle_worth: float = 0.3,
        experts: Sequence[int] | None = None,
    ) -> None:
        self._cache, self._slots, self._transfers, self._stats = cache, slots, transfers, stats
        self._depth, self._worth, self._idle_worth = depth, worth, idle_worth
        self._experts = experts
        self._precision = Precision()
        self._guessed: dict[int, list[tuple[int, int]]] = {}
        """By layer: rank and index of the guesses that were not resident."""
        self._flying: dict[ExpertId, Ticket] = {}
        self._unused: set[ExpertId] = set()

    @property
    def idle(self) -> bool:
        return not self._flying

    def request(self, layer: int, indices: Sequence[int]) -> None:
        end = self._experts[layer] if self._experts else float("inf")
        guess = [(rank, ExpertId(layer, index)) for rank, index in enumerate(dict.fromkeys(indices)) if index < end]
        missing = [(rank, expert) for rank, expert in guess if self._cache.slot_of(expert) is None]
        self._guessed[layer] = [(rank, expert.index) for rank, expert in missing]
        if missing:
            with self._cache.locked([expert for _, expert in guess]):  # or one would take another's slot
                for rank, expert in missing:
                    self._read(expert, self._precision.of(rank))

    def _read(self, expert: ExpertId, precision: float) -> None:
        if len(self._flying) >= self._depth or precision < self._idle_worth:
            return
        admission = self._cache.admit(expert, transient=True)
        if admission is None:
            return
        self.evicted(admission.evicted)
        self._stats.record_prefetch(expert.layer, issued=1)
        urgency = Urgency.AHEAD if precision >= self._worth else Urgency.IDLE
        self._flying[expert] = self._transfers.fetch(expert, self._slots.view(admission.slot), urgency)

    def settle(self, layer: int, chosen: Collection[int]) -> None:
        for rank, index in self._guessed.pop(layer, ()):
            self._precision.note(rank, index in chosen)
        for expert, ticket in list(self._flying.items()):
            wrong = expert.layer == layer and expert.index not in chosen
            if ticket.done or (wrong and self._transfers.cancel(ticket)):
                self._land(expert)

    def claim(self, expert: ExpertId) -> Ticket:
        ticket = self._flying.pop(expert)
        self._transfers.promote(ticket)
        self._stats.record_prefetch(expert.layer, outcome="late")
        return ticket

    def first_uses(self, hits: Iterable[ExpertId]) -> int:
        if not self._unused:
            return 0
        used = self._unused.intersection(hits)
        self._unused -= used
        for expert in used:
            self._stats.record_prefetch(expert.layer, outcome="useful")
        return len(used)

    def evicted(self, expert: ExpertId | None) -> None:
        if expert is not None and expert in self._unused:
            self._unused.discard(expert)
            self._stats.record_prefetch(expert.layer, outcome="wasted")

    def make_room(self) -> bool:
        if not self._flying:
            return False
        waiting = (ticket for ticket in self._flying.values() if not ticket.running)
        if not any(map(self._transfers.cancel, waiting)):
            finish_one(self._transfers, self._flying.values())
        for expert, ticket in list(self._flying.items()):
            if ticket.done:
                self._land(expert)
        return True

    def drain(self) -> None:
        while self.make_room():
            pass

    def forget(self) -> None:
        while self._flying:  # one by one: a second Ctrl-C must not have any counted twice
            expert, _ = self._flying.popitem()
            self._stats.record_prefetch(expert.layer, outcome="cancelled")

    def _land(self, expert: ExpertId) -> None:
        ticket = self._flying.pop(expert)
        if ticket.cancelled or ticket.error is not None:
            self._cache.abandon(expert)
            self._stats.record_prefetch(expert.layer, outcome="cancelled")
        else:
            self._cache.arrived(expert)
            self._unused.add(expert)


class NoPrefetch:
    """The null twin: never reads ahead."""

    idle = True

    def request(self, layer: int, indices: Sequence[int]) -> None:
        pass

    def settle(self, layer: int, chosen: Collection[int]) -> None:
        pass

    def claim(self, expert: ExpertId) -> Ticket:
        raise AssertionError(f"{expert} was never prefetched")

    def first_uses(self, hits: Iterable[ExpertId]) -> int:
        return 0

    def evicted(self, expert: ExpertId | None) -> None:
        pass

    def make_room(self) -> bool:
        return False

    def drain(self) -> None:
        pass

    def forget(self) -> None:
        pass
