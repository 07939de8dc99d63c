"""Eviction policies: in which order residents should leave. They know neither slots nor locks nor floors.

Every policy here is a rule for moving experts between a few levels. Level 0 leaves first, and inside a level the one
that was placed longest ago. The order is kept per layer, so that whoever must take a victim from one layer does not
search through all the others, and every expert has a rank, so that layers can be compared.
"""

from __future__ import annotations

import difflib
import heapq
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain
from typing import Protocol

from .expert import ExpertId

_LEVEL_BITS = 48  # a rank is the level above a clock that ticks once per placement: 2**48 of them do not happen


class EvictionPolicy(Protocol):
    """An order of residents. All methods but `resize` and `tick` cost constant or near-constant time."""

    stale: set[int]
    """Layers whose order changed since the caller last cleared the set; the policy only adds to it."""

    ranks: dict[ExpertId, int]
    """Every resident and its place in the order of all layers: the lowest, never below 0, leaves first. Read-only."""

    def insert(self, expert: ExpertId) -> None:
        """`expert` was requested and is resident from now on. It must not be inserted twice."""
        ...

    def touch(self, expert: ExpertId) -> None:
        """The resident `expert` was requested again."""
        ...

    def remove(self, expert: ExpertId) -> None:
        """The resident `expert` is gone."""
        ...

    def victims(self, layer: int | None = None) -> Iterator[ExpertId]:
        """Residents (of one layer, or of all) in the order in which they should leave, by ascending rank.

        Lazy, and may be left early. The policy must not be changed while it is iterated.
        """
        ...

    def resize(self, capacity: int) -> None:
        """The cache has `capacity` slots from now on."""
        ...

    def tick(self) -> None:
        """One token is done; for policies that forget."""
        ...


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
        rank = level << _LEVEL_BITS | self._clock
        old = self.ranks.get(expert)
        self.ranks[expert] = rank
        self.stale.add(layer)
        if layer not in self._layers:
            self._layers[layer] = [OrderedDict() for _ in range(self._levels)]
        orders = self._layers[layer]
        if old is not None:
            old_level = old >> _LEVEL_BITS
            if old_level == level:
                orders[level].move_to_end(expert)
                return
            del orders[old_level][expert]
        orders[level][expert] = None

    def remove(self, expert: ExpertId) -> None:
        level = self.ranks.pop(expert) >> _LEVEL_BITS
        del self._layers[expert[0]][level][expert]
        self.stale.add(expert[0])

    def victims(self, layer: int | None = None) -> Iterator[ExpertId]:
        if layer is None:
            return heapq.merge(*map(self.victims, self._layers), key=self.ranks.__getitem__)
        return chain.from_iterable(self._layers.get(layer, ()))


class LRU(LevelledOrder):
    """Least recently used first. Hits nothing at all with less than one cycle of slots."""

    def __init__(self, capacity: int = 0, cycle: int = 0) -> None:
        super().__init__(levels=1)

    def insert(self, expert: ExpertId) -> None:
        self.place(expert, 0)

    touch = insert

    def resize(self, capacity: int) -> None:
        pass

    def tick(self) -> None:
        pass


class LFU(LevelledOrder):
    """Least frequently used first, then least recently. Counts outlive eviction, saturate and are halved now and then.

    The halving is TinyLFU's reset (Einziger et al., 2017). All experts of a model are few enough to be counted exactly.
    """

    MOST = 15  # counts above this say nothing more about what to keep
    HALVE_AFTER = 64  # tokens; an expert of 128 with top-8 is then counted 4 times between two halvings on average

    def __init__(self, capacity: int = 0, cycle: int = 0) -> None:
        super().__init__(levels=self.MOST + 1)
        self._count: dict[ExpertId, int] = {}
        self._age = 0

    def insert(self, expert: ExpertId) -> None:
        count = self._count.get(expert, 0)
        if count < self.MOST:
            self._count[expert] = count = count + 1
        self.place(expert, count)

    touch = insert

    def resize(self, capacity: int) -> None:
        pass

    def tick(self) -> None:
        self._age += 1
        if self._age % self.HALVE_AFTER:
            return
        self._count = {expert: count // 2 for expert, count in self._count.items() if count > 1}
        for expert in sorted(
            self.ranks, key=self.ranks.__getitem__
        ):  # so that those who meet in a level keep their order
            self.place(expert, self._count.get(expert, 0))


class SLRU(LevelledOrder):
    """Segmented LRU: the first request puts an expert on probation, a second one protects it.

    Probation keeps at least one cycle of slots (`cycle` = layers x top-k experts): below it, an expert on probation
    would leave before its layer comes round again and nothing could ever be protected.
    """

    PROTECTED = 0.7  # share of the slots, where they are many

    def __init__(self, capacity: int, cycle: int) -> None:
        super().__init__(levels=2)
        self._cycle = cycle
        self._protected: OrderedDict[ExpertId, None] = OrderedDict()
        self.resize(capacity)

    def insert(self, expert: ExpertId) -> None:
        self.place(expert, 0)

    def touch(self, expert: ExpertId) -> None:
        self.place(expert, 1)
        self._protected[expert] = None
        self._protected.move_to_end(expert)
        self._demote()

    def remove(self, expert: ExpertId) -> None:
        super().remove(expert)
        self._protected.pop(expert, None)

    def resize(self, capacity: int) -> None:
        self._room = max(0, min(int(capacity * self.PROTECTED), capacity - self._cycle))
        self._demote()

    def tick(self) -> None:
        pass

    def _demote(self) -> None:
        while len(self._protected) > self._room:
            expert, _ = self._protected.popitem(last=False)
            self.place(expert, 0)


_POLICIES: dict[str, type[LRU] | type[LFU] | type[SLRU]] = {"lru": LRU, "lfu": LFU, "slru": SLRU}


def policy_names() -> tuple[str, ...]:
    """Names that `get_policy` knows, the default first."""
    return tuple(_POLICIES)


def get_policy(name: str, capacity: int, cycle: int) -> EvictionPolicy:
    """A new policy for `capacity` slots of a model that touches `cycle` = layers x top-k experts per token.

    Raises ValueError with one sentence that names the known policies and the nearest to an unknown name.
    """
    if name not in _POLICIES:
        near = difflib.get_close_matches(str(name).lower(), _POLICIES, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown eviction policy {name!r}: choose one of {', '.join(_POLICIES)}.{hint}")
    return _POLICIES[name](capacity, cycle)
