"""The misses of one layer on their way from the store to slots in RAM."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from ..cache.expert import ExpertId, Lookup
from ..cache.manager import ExpertCache
from ..cache.stats import RunStats
from .prefetch import Prefetch
from .tiers import RamSlots
from .transfer import Transfers, Urgency


class RamTier(Protocol):
    """What reads go into; `ExpertRuntime` is one."""

    cache: ExpertCache
    slots: RamSlots
    transfers: Transfers
    prefetch: Prefetch
    stats: RunStats
    prompt_reads: int

    def make_room(self) -> bool:
        """Free, or make evictable, one slot that a guess holds; False when there is none."""
        ...


class Reads:
    """The misses of one layer on their way: started as slots allow, handed out as they arrive, everything locked until
    released, and nothing left half-done when an error or Ctrl-C cuts in.

    Args:
        keep: experts that stay after a prompt; the others leave first. None (an answer's token): all stay.
    """

    def __init__(self, tier: RamTier, layer: int, wanted: Lookup, keep: set[int] | None) -> None:
        self._cache, self._slots, self._transfers = tier.cache, tier.slots, tier.transfers
        self._prefetch, self._stats = tier.prefetch, tier.stats
        self._layer, self._tier = layer, tier
        # Guesses that turned out right come first: they own slots already, which nobody may take from them now.
        self._flying = {e: self._prefetch.claim(e) for e in wanted.misses if self._cache.is_arriving(e)}
        self._waiting = deque(e for e in wanted.misses if e not in self._flying)
        self._keep, self._most = keep, tier.prompt_reads
        self._locked: set[ExpertId] = {*wanted.hits, *self._flying}
        self._cache.lock(self._locked)

    def start(self) -> None:
        """Start as many reads as there are slots for."""
        if self._keep is None:
            self._begin(tuple(self._waiting), transient=False)
            return
        while self._waiting and len(self._flying) < self._most:
            expert = self._waiting[0]
            if not self._begin((expert,), expert.index not in self._keep):
                return

    def _begin(self, experts: tuple[ExpertId, ...], transient: bool) -> int:
        """Start to read the first of those that wait, as many as get slots; how many that are."""
        admissions = self._cache.admit_all(experts, transient) if experts else []
        for slot, evicted in admissions:
            self._prefetch.evicted(evicted)
            expert = self._waiting.popleft()
            self._flying[expert] = self._transfers.fetch(expert, self._slots.view(slot), Urgency.DEMAND)
        begun = experts[: len(admissions)]
        self._cache.lock(begun)
        self._locked.update(begun)
        return len(begun)

    def next(self) -> list[ExpertId]:
        """The experts that have arrived since, at least one; empty when all are through."""
        self.start()
        while self._waiting and not self._flying:  # every slot is taken, for instance by a guess for another layer
            assert self._tier.make_room(), (self._waiting[0], self._cache.capacity)
            self.start()
        if not self._flying:
            return []
        begin = time.perf_counter()
        done = self._transfers.wait_any(self._flying.values())
        self._stats.record_stall(self._layer, time.perf_counter() - begin)
        for ticket in done:
            del self._flying[ticket.expert]
            self._cache.arrived(ticket.expert)
        return [ticket.expert for ticket in done]

    def release(self, experts: Sequence[ExpertId]) -> None:
        self._locked.difference_update(experts)  # first, so that `close` unlocks nothing twice
        self._cache.unlock(experts)

    def close(self) -> None:
        """After an error: wait for reads under way, since they write into slots, and forget them."""
        for expert, ticket in self._flying.items():
            if not self._transfers.cancel(ticket):
                try:
                    while not ticket.done:
                        self._transfers.wait_any((ticket,))
                except Exception:
                    pass  # the first error is already on its way to the user
            with suppress(AssertionError, LookupError):  # books that an interruption has torn: `recover` sees to them
                self._cache.abandon(expert)
        self._cache.unlock(tuple(self._locked))
        self._locked.clear()
