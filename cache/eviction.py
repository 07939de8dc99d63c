"""Who leaves next: the first of the policy's order who is not in use and whose layer is above its floor.

Each layer's next victim is remembered until something in that layer changes, so that an eviction looks at the one or
two layers that did change and then takes the minimum of a list. Whoever came into use since is found out then.
"""

from __future__ import annotations

from collections.abc import Container, Sequence, Sized
from itertools import chain, count
from operator import itemgetter

from .expert import ExpertId
from .policy import EvictionPolicy

_NOBODY = float("inf")  # the rank of a layer that has nothing to give
_TRANSIENT_FIRST = -(1 << 62)  # the first transient's rank: those that follow stay below every rank of a policy


class Eviction:
    """An order of residents: transient ones, oldest first, then the policy's.

    Args:
        residents: of each layer; as the owner changes them.
        floor: residents that each layer keeps against the others.
        locked, arriving: who is in use; as the owner changes them.
    """

    def __init__(
        self,
        policy: EvictionPolicy,
        residents: Sequence[Sized],
        floor: int,
        locked: Container[object],
        arriving: Container[object],
    ) -> None:
        layers = len(residents)
        self.transient: list[dict[ExpertId, float]] = [{} for _ in range(layers)]  # ranks, by layer and ascending
        self._policy, self._residents, self._floor = policy, residents, floor
        self._locked, self._arriving = locked, arriving
        self._clock = count(_TRANSIENT_FIRST)
        self._stale = policy.stale
        self._stale.update(range(layers))
        self._heads: list[ExpertId | None] = [None] * layers
        self._ranks = [_NOBODY] * layers
        self._open = [_NOBODY] * layers  # the same, of layers above their floor

    def insert(self, expert: ExpertId, transient: bool) -> None:
        """`expert` is resident and arriving from now on."""
        layer = expert[0]
        if transient:
            self.transient[layer][expert] = next(self._clock)
        else:
            self._policy.insert(expert)
        if len(self._residents[layer]) == self._floor + 1:
            self._stale.add(layer)

    def remove(self, expert: ExpertId) -> None:
        layer = expert[0]
        if expert in self.transient[layer]:
            del self.transient[layer][expert]
            self._stale.add(layer)
        else:
            self._policy.remove(expert)

    def demote(self, expert: ExpertId) -> None:
        if expert not in self.transient[expert[0]]:
            self._policy.remove(expert)
            self.transient[expert[0]][expert] = next(self._clock)

    def promote(self, expert: ExpertId) -> None:
        if expert in self.transient[expert[0]]:
            del self.transient[expert[0]][expert]
            self._policy.insert(expert)
            self._stale.add(expert[0])

    def changed(self, layer: int) -> None:
        """Somebody has arrived, or nobody knows what has happened."""
        self._stale.add(layer)

    def victim(self, layer: int) -> ExpertId | None:
        """Who leaves next for an admission to `layer`, if anybody may."""
        while True:
            for changed in tuple(self._stale):
                self._find_head(changed)
            lowest = min(self._open)  # but its own layer may always give, down to nothing
            giving = layer if self._ranks[layer] <= lowest else self._open.index(lowest)
            head = self._heads[giving]
            if head is None:
                return None
            if head in self._locked or head in self._arriving:
                self._stale.add(giving)
            elif head in self.transient[giving] or not self._policy.reconsider(head):
                return head

    def order(self) -> list[ExpertId]:
        """All residents, who leaves first comes first, whoever is in use and whatever the floors are."""
        transient = sorted(chain.from_iterable(layer.items() for layer in self.transient), key=itemgetter(1))
        return [expert for expert, _ in chain(transient, self._policy.victims())]

    def check_integrity(self) -> None:
        """Raise AssertionError where a victim that is remembered is not the one that would be found."""
        for layer in set(range(len(self._heads))) - self._stale:
            known = self._heads[layer], self._ranks[layer], self._open[layer]
            in_use = known[0] in self._locked
            self._find_head(layer)
            now = self._heads[layer], self._ranks[layer], self._open[layer]
            assert known == now or in_use, f"layer {layer}: {known} is remembered as next to leave, but it is {now}"

    def _find_head(self, layer: int) -> None:
        """Remember who would leave `layer` next, and with what rank."""
        locked, arriving, order = self._locked, self._arriving, self._policy.victims(layer)
        self._stale.discard(layer)
        head, rank = None, _NOBODY
        for expert, place in chain(self.transient[layer].items(), order) if self.transient[layer] else order:
            if expert not in locked and expert not in arriving:
                head, rank = expert, place
                break
            self._stale.add(layer)  # who is passed over may leave as soon as nobody uses it
        self._heads[layer], self._ranks[layer] = head, rank
        self._open[layer] = rank if len(self._residents[layer]) > self._floor else _NOBODY
