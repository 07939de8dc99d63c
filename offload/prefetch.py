"""Guesses to reads: into free or idle slots, behind every read that is waited for, dropped when proved wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from ..cache.expert import ExpertId
from ..cache.manager import ExpertCache
from ..cache.stats import RunStats
from .tiers import RamSlots
from .transfer import Ticket, Transfers


class Prefetch(Protocol):
    """The contract of the prefetcher and its null twin."""

    def request(self, layer: int, indices: Iterable[int]) -> None:
        """Read these experts of `layer` ahead, where there is room."""
        ...

    def settle(self, layer: int, chosen: set[int]) -> None:
        """`layer`'s router has spoken: note what has arrived, drop disproved guesses that are not being read yet."""
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
        """Drop every guess that has not begun and wait for the others."""
        ...


class Prefetcher:
    """At most `depth` guesses are in flight; each owns a slot from the request on."""

    def __init__(
        self, cache: ExpertCache, slots: RamSlots, transfers: Transfers, stats: RunStats, depth: int = 16
    ) -> None:
        self._cache, self._slots, self._transfers, self._stats = cache, slots, transfers, stats
        self._depth = depth
        self._flying: dict[ExpertId, Ticket] = {}
        self._unused: set[ExpertId] = set()

    def request(self, layer: int, indices: Iterable[int]) -> None:
        for index in indices:
            expert = ExpertId(layer, index)
            if len(self._flying) >= self._depth:
                return
            if self._cache.slot_of(expert) is not None:
                continue
            admission = self._cache.admit(expert, transient=True)
            if admission is None:
                return
            self.evicted(admission.evicted)
            self._stats.record_prefetch(layer, issued=1)
            self._flying[expert] = self._transfers.fetch(expert, self._slots.view(admission.slot), demand=False)

    def settle(self, layer: int, chosen: set[int]) -> None:
        for expert, ticket in list(self._flying.items()):
            if ticket.done:
                self._land(expert)
            elif expert.layer == layer and expert.index not in chosen and self._transfers.cancel(ticket):
                self._drop(expert)

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
        for expert, ticket in self._flying.items():
            if self._transfers.cancel(ticket):
                self._drop(expert)
                return True
        if not self._flying:
            return False
        try:
            self._transfers.wait_any(self._flying.values())
        except Exception:
            pass  # a guess that failed: the demand read that follows meets the error itself
        for expert, ticket in list(self._flying.items()):
            if ticket.done:
                self._land(expert)
        return True

    def drain(self) -> None:
        while self.make_room():
            pass

    def _land(self, expert: ExpertId) -> None:
        ticket = self._flying.pop(expert)
        if ticket.error is not None:
            self._cache.abandon(expert)
            self._stats.record_prefetch(expert.layer, outcome="cancelled")
        else:
            self._cache.arrived(expert)
            self._unused.add(expert)

    def _drop(self, expert: ExpertId) -> None:
        del self._flying[expert]
        self._cache.abandon(expert)
        self._stats.record_prefetch(expert.layer, outcome="cancelled")


class NoPrefetch:
    """The null twin: never reads ahead."""

    def request(self, layer: int, indices: Iterable[int]) -> None:
        pass

    def settle(self, layer: int, chosen: set[int]) -> None:
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
