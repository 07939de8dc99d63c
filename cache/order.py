"""Orders of residents: what the eviction policies are made of.

The order is kept per layer, so that whoever must take a victim from one layer does not search through all the others,
and every expert has a rank, so that layers can be compared.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain

from .expert import ExpertId

LEVEL_BITS = 48  # a rank is the level above a clock that ticks once per placement: 2**48 of them do not happen


class LevelledOrder:
    """Residents by level, then by placement: what the policies share. Not a policy itself: it knows no requests."""

    def __init__(self, levels: int) -> None:
        self.stale: set[int] = set()
        self.ranks: dict[ExpertId, int] = {}
        self._levels = levels
        self._clock = 0
        self._layers: dict[int, list[OrderedDict[ExpertId, None]]] = {}

    def place(self, expert: ExpertId, level: int) -> None:
        """Put `expert` last in `level`, wherever it was before."""
        layer = expert[0]
        self._clock += 1
        rank = level << LEVEL_BITS | self._clock
        old = self.ranks.get(expert)
        self.ranks[expert] = rank
        self.stale.add(layer)
        if layer not in self._layers:
            self._layers[layer] = [OrderedDict() for _ in range(self._levels)]
        orders = self._layers[layer]
        if old is not None:
            old_level = old >> LEVEL_BITS
            if old_level == level:
                orders[level].move_to_end(expert)
                return
            del orders[old_level][expert]
        orders[level][expert] = None

    def remove(self, expert: ExpertId) -> None:
        level = self.ranks.pop(expert) >> LEVEL_BITS
        del self._layers[expert[0]][level][expert]
        self.stale.add(expert[0])

    def victims(self, layer: int | None = None) -> Iterator[ExpertId]:
        if layer is None:
            return heapq.merge(*map(self.victims, self._layers), key=self.ranks.__getitem__)
        return chain.from_iterable(self._layers.get(layer, ()))


class SortedOrder:
    """Residents by a key that is given when they are placed; the lowest leaves first. Not a policy itself.

    A layer is sorted when somebody asks for its victims: most requests are hits, and nearly sorted lists sort fast.
    """

    def __init__(self) -> None:
        self.stale: set[int] = set()
        self.ranks: dict[ExpertId, float] = {}
        self._keys = self.ranks
        self._layers: dict[int, list[ExpertId]] = {}
        self._unsorted: set[int] = set()

    def place(self, expert: ExpertId, key: float) -> None:
        """Put `expert` where `key` belongs, wherever it was before. No two experts may have the same key."""
        layer, keys = expert[0], self._keys
        known = expert in keys
        keys[expert] = key
        self.stale.add(layer)
        if known:
            self._unsorted.add(layer)
        elif layer in self._unsorted:
            self._layers[layer].append(expert)
        else:
            insort(self._layers.setdefault(layer, []), expert, key=keys.__getitem__)

    def remove(self, expert: ExpertId) -> None:
        del self._keys[expert]
        self._layers[expert[0]].remove(expert)
        self.stale.add(expert[0])

    def victims(self, layer: int | None = None) -> Iterator[ExpertId]:
        if layer is None:
            return heapq.merge(*map(self.victims, self._layers), key=self.ranks.__getitem__)
        order = self._layers.get(layer, [])
        if layer in self._unsorted:
            self._unsorted.remove(layer)
            order.sort(key=self._keys.__getitem__)
        return iter(order)


class UseCounts:
    """How often each expert was used, resident or not; halved now and then, so that it forgets.

    The halving is TinyLFU's reset (Einziger et al., 2017). All experts of a model are few enough to be counted exactly.
    """

    MOST = 15  # counts above this say nothing more about what to keep
    HALVE_AFTER = 64  # tokens; an expert of 128 with top-8 is then counted 4 times between two halvings on average

    def __init__(self) -> None:
        self._count: dict[ExpertId, int] = {}
        self._age = 0

    def __getitem__(self, expert: ExpertId) -> int:
        return self._count.get(expert, 0)

    def add(self, expert: ExpertId) -> int:
        """Count one use; returns the uses so far, `MOST` at most."""
        count = self._count.get(expert, 0)
        if count < self.MOST:
            self._count[expert] = count = count + 1
        return count

    def tick(self) -> bool:
        """One token is done; True when the counts have just been halved."""
        self._age += 1
        if self._age % self.HALVE_AFTER:
            return False
        self._count = {expert: count // 2 for expert, count in self._count.items() if count > 1}
        return True
