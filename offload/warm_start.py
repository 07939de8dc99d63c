"""Free slots are filled with what past runs asked for most, by reads that stand back behind all others."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from ..cache.expert import ExpertId
from ..cache.manager import ExpertCache
from .prefetch import Prefetch
from .tiers import RamSlots
from .transfer import Ticket, Transfers, Urgency, finish_one


class WarmStart:
    """A prefetcher around another one: its reads are guesses, too, but for no layer in particular.

    Args:
        experts: the most wanted first.
    """

    def __init__(
        self, inner: Prefetch, cache: ExpertCache, slots: RamSlots, transfers: Transfers, experts: Sequence[ExpertId]
    ) -> None:
        self._inner, self._cache, self._slots, self._transfers = inner, cache, slots, transfers
        self._experts = experts
        self._flying: dict[ExpertId, Ticket] = {}
        """The most wanted first."""
        self._done = not experts

    def start(self) -> None:
        """Fill the slots that are free."""
        free = self._cache.capacity - len(self._cache)
        chosen = [expert for expert in self._experts if self._cache.slot_of(expert) is None][:free]
        places = {}
        for expert in reversed(chosen):  # the most wanted last, as if it had been used last
            admission = self._cache.admit(expert)
            assert admission is not None and admission.evicted is None, (expert, admission)
            places[expert] = admission.slot
        for expert in chosen:
            self._flying[expert] = self._transfers.fetch(expert, self._slots.view(places[expert]), Urgency.FILL)
        self._done = True  # until slots are freed

    @property
    def idle(self) -> bool:
        return self._done and not self._flying and self._inner.idle

    def request(self, layer: int, indices: Sequence[int]) -> None:
        self._inner.request(layer, indices)

    def settle(self, layer: int, chosen: Collection[int]) -> None:
        if self._flying:
            self._land_all()
            wanted = min(len(chosen), 2 * self._cache.floor)
            while self._cache.capacity - len(self._cache) < wanted and self._cancel_one():
                pass
        elif not self._done and len(chosen) <= self._cache.floor:  # a single token; a prompt wants the slots itself
            self.start()
        self._inner.settle(layer, chosen)

    def claim(self, expert: ExpertId) -> Ticket:
        ticket = self._flying.pop(expert, None)
        if ticket is None:
            return self._inner.claim(expert)
        self._transfers.promote(ticket)
        return ticket

    def first_uses(self, hits: Iterable[ExpertId]) -> int:
        return self._inner.first_uses(hits)

    def evicted(self, expert: ExpertId | None) -> None:
        self._inner.evicted(expert)

    def make_room(self) -> bool:
        if self._cancel_one() or self._inner.make_room():
            return True
        if not self._flying:
            return False
        finish_one(self._transfers, self._flying.values())
        self._land_all()
        return True

    def drain(self) -> None:
        """Also called when slots are taken away: what is free afterwards is filled once more."""
        self._done = not self._experts
        while self._flying and self.make_room():
            pass
        self._inner.drain()

    def forget(self) -> None:
        self._done = not self._experts
        self._flying.clear()
        self._inner.forget()

    def _land_all(self) -> None:
        for expert, ticket in list(self._flying.items()):
            if ticket.done:
                del self._flying[expert]
                if ticket.cancelled or ticket.error is not None:
                    self._cache.abandon(expert)
                else:
                    self._cache.arrived(expert)

    def _cancel_one(self) -> bool:
        """Give up the least wanted read that is not going on right now."""
        for expert in reversed(self._flying):
            ticket = self._flying[expert]
            if not ticket.running and self._transfers.cancel(ticket):
                del self._flying[expert]
                self._cache.abandon(expert)
                return True
        return False
