"""Orders of residents: what the eviction policies are made of.

The order is kept per layer, so that whoever must take a victim from one layer does not search through all the others,
and every expert has a rank, so that layers can be compared.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from bisect import insort
from collections.abc import Iterator
from itertools import chain
from operator import itemgetter
from typing import Generic, TypeVar

from .expert import ExpertId

Ranked = tuple[ExpertId, float]
"""A resident and its place in the order of all layers: the lowest rank leaves first, and size is below 2**60."""
T = TypeVar("T")
LEVEL = 2.0**48  # a rank is so many levels and the placements before: 2**48 of them do not happen


class Order(ABC, Generic[T]):
    """Residents of every layer, each with a rank. What the eviction policies are made of; not one itself."""

    def __init__(self) -> None:
        self.stale: set[int] = set()
        self._layers: dict[int, T] = {}

    def victims(self, layer: int | None = None) -> Iterator[Ranked]:
        if layer is None:
            return heapq.merge(*map(self._of_layer, self._layers), key=itemgetter(1))
        return self._of_layer(layer) if layer in self._layers else iter(())

    def reconsider(self, expert: ExpertId) -> bool:
        return False

    @abstractmethod
    def _of_layer(self, layer: int) -> Iterator[Ranked]:
        """Residents of one layer, by ascending rank."""


class LevelledOrder(Order[list[dict[ExpertId, float]]]):
    """Residents by level, then by placement."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self._clock = 0.0
        self._level: dict[ExpertId, int] = {}
        self._levels = levels  # a layer is a list of them: ranks in ascending order

    def place(self, expert: ExpertId, level: int) -> None:
        """Put `expert` last in `level`, wherever it was before."""
        layer, old = expert[0], self._level.get(expert)
        orders = self._layers.get(layer) or self._layers.setdefault(layer, [{} for _ in range(self._levels)])
        if old is not None:
            del orders[old][expert]
            self.stale.add(layer)
        self._level[expert] = level
        self._clock = clock = self._clock + 1.0
        orders[level][expert] = level * LEVEL + clock

    def remove(self, expert: ExpertId) -> None:
        level = self._level.pop(expert)
        del self._layers[expert[0]][level][expert]
        self.stale.add(expert[0])

    def _of_layer(self, layer: int) -> Iterator[Ranked]:
        return chain.from_iterable(map(dict.items, self._layers[layer]))


class SortedOrder(Order[list[ExpertId]]):
    """Residents by a key that is given when they are placed; the lowest leaves first.

    A layer is sorted when somebody asks for its victims: most requests are hits, and nearly sorted lists sort fast.
    """

    def __init__(self) -> None:
        super().__init__()
        self._keys: dict[ExpertId, float] = {}
        self._unsorted: set[int] = set()

    def place(self, expert: ExpertId, key: float) -> None:
        """Put `expert` where `key` belongs, wherever it was before. No two experts may have the same key."""
        layer, keys = expert[0], self._keys
        known = expert in keys
        keys[expert] = key
        if known:
            self._unsorted.add(layer)
            self.stale.add(layer)
        elif layer in self._unsorted:
            self._layers[layer].append(expert)
        else:
            insort(self._layers.setdefault(layer, []), expert, key=keys.__getitem__)

    def remove(self, expert: ExpertId) -> None:
        del self._keys[expert]
        self._layers[expert[0]].remove(expert)
        self.stale.add(expert[0])

    def _of_layer(self, layer: int) -> Iterator[Ranked]:
        for expert in self._in_order(layer):
            yield expert, self._keys[expert]

    def _in_order(self, layer: int) -> list[ExpertId]:
        if layer in self._unsorted:
            self._unsorted.remove(layer)
            self._layers[layer].sort(key=self._keys.__getitem__)
        return self._layers[layer]


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
