"""Eviction policies from the literature. Each is a rule for moving experts between a few levels or in one sorted order.

They differ from the textbook in what a cache of experts demands: an expert that is missed is always admitted, since it
is needed now, and a model touches one cycle (layers x top-k experts) per token before anything can be used again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from .expert import ExpertId
from .order import LEVEL, LevelledOrder, SortedOrder, UseCounts


class FIFO(LevelledOrder):
    """First in, first out: the null policy, which learns nothing from requests."""

    def __init__(self, capacity: int = 0, cycle: int = 0) -> None:
        super().__init__(levels=1)

    def insert(self, expert: ExpertId) -> None:
        self.place(expert, 0)

    def touch(self, experts: Sequence[ExpertId]) -> None:
        pass

    def resize(self, capacity: int) -> None:
        pass

    def tick(self) -> None:
        pass


class LRU(LevelledOrder):
    """Least recently used first. Hits nothing at all with less than one cycle of slots."""

    def __init__(self, capacity: int = 0, cycle: int = 0) -> None:
        super().__init__(levels=1)

    def insert(self, expert: ExpertId) -> None:
        self.place(expert, 0)

    def touch(self, experts: Sequence[ExpertId]) -> None:
        for expert in experts:
            self.place(expert, 0)

    def resize(self, capacity: int) -> None:
        pass

    def tick(self) -> None:
        pass


class LFU(LevelledOrder):
    """Least frequently used first, then least recently. Counts outlive eviction, saturate and are halved in time."""

    def __init__(self, capacity: int = 0, cycle: int = 0) -> None:
        super().__init__(levels=UseCounts.MOST + 1)
        self._uses = UseCounts()

    def insert(self, expert: ExpertId) -> None:
        self.place(expert, self._uses.add(expert))

    def touch(self, experts: Sequence[ExpertId]) -> None:
        for expert in experts:
            self.place(expert, self._uses.add(expert))

    def resize(self, capacity: int) -> None:
        pass

    def tick(self) -> None:
        if self._uses.tick():  # in their old order, so that those who meet in a level keep it
            for expert, _ in list(self.victims()):
                self.place(expert, self._uses[expert])


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

    def touch(self, experts: Sequence[ExpertId]) -> None:
        for expert in experts:
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


class LRU2(SortedOrder):
    """The expert whose second-last use lies furthest back leaves first; those used once only before all others.

    LRU-K of O'Neil et al. (1993) with K = 2, and with uses that are remembered beyond eviction.
    """

    def __init__(self, capacity: int = 0, cycle: int = 0) -> None:
        super().__init__()
        self._last: dict[ExpertId, int] = {}
        self._clock = 0

    def insert(self, expert: ExpertId) -> None:
        self._clock += 1
        before = self._last.get(expert)
        self._last[expert] = self._clock
        self.place(expert, self._clock if before is None else LEVEL + before)

    def touch(self, experts: Sequence[ExpertId]) -> None:
        for expert in experts:
            self.insert(expert)

    def resize(self, capacity: int) -> None:
        pass

    def tick(self) -> None:
        pass


class LFRU(LevelledOrder):
    """Least frequent, recently used: a privileged part under LRU, and all others under LFU.

    After Bilal and Kang (2017). A request privileges an expert; the privileged part's oldest then steps back to where
    its count belongs. The unprivileged part keeps at least one cycle of slots, as in `SLRU`.
    """

    PRIVILEGED = 0.5  # share of the slots, where they are many

    def __init__(self, capacity: int, cycle: int) -> None:
        super().__init__(levels=UseCounts.MOST + 2)
        self._cycle = cycle
        self._uses = UseCounts()
        self._privileged: OrderedDict[ExpertId, None] = OrderedDict()
        self.resize(capacity)

    def insert(self, expert: ExpertId) -> None:
        self.place(expert, self._uses.add(expert))

    def touch(self, experts: Sequence[ExpertId]) -> None:
        for expert in experts:
            self._uses.add(expert)
            self.place(expert, UseCounts.MOST + 1)
            self._privileged[expert] = None
            self._privileged.move_to_end(expert)
            self._demote()

    def remove(self, expert: ExpertId) -> None:
        super().remove(expert)
        self._privileged.pop(expert, None)

    def resize(self, capacity: int) -> None:
        self._room = max(0, min(int(capacity * self.PRIVILEGED), capacity - self._cycle))
        self._demote()

    def tick(self) -> None:
        if self._uses.tick():
            for expert, _ in list(self.victims()):
                if expert not in self._privileged:
                    self.place(expert, self._uses[expert])

    def _demote(self) -> None:
        while len(self._privileged) > self._room:
            expert, _ = self._privileged.popitem(last=False)
            self.place(expert, self._uses[expert])


class WTinyLFU(LevelledOrder):
    """A small window for newcomers; who leaves it stays only if used more often than the next to leave.

    Einziger et al. (2017): the others form an SLRU. Who loses the comparison is on level 0 and leaves next.
    """

    WINDOW, PROTECTED = 0.01, 0.8  # shares of the slots and of the slots behind the window

    def __init__(self, capacity: int, cycle: int) -> None:
        super().__init__(levels=4)  # rejected, on probation, protected, window
        self._uses = UseCounts()
        self._parts: list[OrderedDict[ExpertId, None]] = [OrderedDict() for _ in range(4)]
        self.resize(capacity)

    def insert(self, expert: ExpertId) -> None:
        self._uses.add(expert)
        self._move(expert, 3)
        self._settle()

    def touch(self, experts: Sequence[ExpertId]) -> None:
        for expert in experts:
            self._uses.add(expert)
            self._move(expert, 3 if expert in self._parts[3] else 2)
            self._settle()

    def remove(self, expert: ExpertId) -> None:
        del self._parts[self._level[expert]][expert]
        super().remove(expert)

    def resize(self, capacity: int) -> None:
        self._window = max(1, int(capacity * self.WINDOW))
        self._room = int((capacity - self._window) * self.PROTECTED)
        self._settle()

    def tick(self) -> None:
        self._uses.tick()

    def _settle(self) -> None:
        _, probation, protected, window = self._parts
        while len(window) > self._window:
            newcomer, rival = next(iter(window)), next(iter(probation or protected), None)
            self._move(newcomer, 1 if rival is None or self._uses[newcomer] >= self._uses[rival] else 0)
        while len(protected) > self._room:
            self._move(next(iter(protected)), 1)

    def _move(self, expert: ExpertId, part: int) -> None:
        if expert in self._level:
            del self._parts[self._level[expert]][expert]
        self._parts[part][expert] = None
        self.place(expert, part)
