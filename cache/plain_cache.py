"""The reference of the expert cache, in Python."""

from __future__ import annotations

import copy
import heapq
from collections.abc import Iterable, Sequence

from .eviction import Eviction
from .expert import ExpertId, Lookup
from .manager import Admission, ExpertCache, Table
from .policy import EvictionPolicy


class PlainCache(ExpertCache):
    """See `ExpertCache`."""

    def __init__(
        self, capacity: int, policy: EvictionPolicy, layers: int, floor: int, table: Table | None = None
    ) -> None:
        self._new_policy = copy.deepcopy(policy)
        super().__init__(capacity, layers, floor, table)

    def __len__(self) -> int:
        return self.capacity - len(self._free)

    def lookup(self, layer: int, indices: Sequence[int], promote: bool = True) -> Lookup:
        ids, slots, transient = self._ids[layer], self._slots[layer], self._eviction.transient[layer]
        hits: list[ExpertId] = []
        misses: list[ExpertId] = []
        for index in dict.fromkeys(indices):
            expert = ids[index]
            (hits if expert in slots else misses).append(expert)
        if not transient:
            self._policy.touch(hits)
        else:
            for expert in hits:
                if expert not in transient:
                    self._policy.touch((expert,))
                elif promote:
                    self.promote(expert)
        if self._coming and not self._coming.isdisjoint(hits):
            hits = [expert for expert in hits if expert not in self._coming]
            misses = [expert for index in dict.fromkeys(indices) if (expert := ids[index]) not in hits]
        return Lookup(tuple(hits), tuple(misses))

    def slot_of(self, expert: ExpertId) -> int | None:
        return self._slots[expert[0]].get(expert)

    def slots_of(self, experts: Sequence[ExpertId]) -> list[int]:
        assert self._coming.isdisjoint(experts), f"still on their way: {self._coming.intersection(experts)}"
        slots = [self._slots[expert[0]].get(expert, -1) for expert in experts]
        assert -1 not in slots, f"not resident: {[expert for expert in experts if expert not in self]}"
        return slots

    def is_arriving(self, expert: ExpertId) -> bool:
        return expert in self._coming

    def is_transient(self, expert: ExpertId) -> bool:
        return expert in self._eviction.transient[expert[0]]

    def admit_all(self, experts: Sequence[ExpertId], transient: bool = False) -> list[Admission]:
        admissions = []
        for expert in experts:
            layer = expert[0]
            assert 0 <= layer < self.layers, f"{expert} is not in one of {self.layers} layers"
            assert expert not in self, f"{expert} is resident already, in slot {self.slot_of(expert)}"
            victim = None
            if self._free:
                slot = heapq.heappop(self._free)
            else:
                victim = self._eviction.victim(layer)
                if victim is None:
                    break
                slot = self._leave(victim)
            self._slots[layer][expert] = slot
            self._coming.add(expert)
            self._eviction.insert(expert, transient)
            admissions.append(Admission(slot, victim))
        return admissions

    def next_victim(self, layer: int) -> ExpertId | None:
        return None if self._free else self._eviction.victim(layer)

    def arrived(self, expert: ExpertId) -> None:
        assert expert in self._coming, f"{expert} is not arriving"
        self._coming.remove(expert)
        self._table.enter(expert, self._slots[expert[0]][expert])
        self._eviction.changed(expert[0])

    def abandon(self, expert: ExpertId) -> None:
        assert expert in self._coming, f"{expert} is not arriving"
        self._release(expert)
        self._coming.remove(expert)  # last: where the books were torn, it must not pass for one that has arrived

    def demote(self, expert: ExpertId) -> None:
        if expert in self:
            self._eviction.demote(expert)

    def promote(self, expert: ExpertId) -> None:
        self._eviction.promote(expert)

    def tick(self) -> None:
        self._policy.tick()

    def lock(self, experts: Iterable[ExpertId]) -> None:
        locks = self._locks
        for expert in experts:
            locks[expert] = locks.get(expert, 0) + 1

    def unlock(self, experts: Iterable[ExpertId]) -> None:
        locks = self._locks
        for expert in experts:
            count = locks.pop(expert, 0)
            assert count > 0, f"{expert} is not locked"
            if count > 1:
                locks[expert] = count - 1

    def residents(self) -> dict[ExpertId, int]:
        return {expert: slot for slots in self._slots for expert, slot in slots.items()}

    def resident_count(self, layer: int) -> int:
        return len(self._slots[layer])

    def order(self) -> list[ExpertId]:
        return self._eviction.order()

    def check_integrity(self, idle: bool = False) -> None:
        super().check_integrity(idle)
        self._eviction.check_integrity()

    def _start(self) -> None:
        self._policy = copy.deepcopy(self._new_policy)
        self._policy.resize(self.capacity)
        self._slots: list[dict[ExpertId, int]] = [{} for _ in range(self.layers)]
        self._free = list(range(self.capacity))  # a heap, the lowest slot on top
        self._coming: set[ExpertId] = set()
        self._locks: dict[ExpertId, int] = {}
        self._eviction = Eviction(self._policy, self._slots, self.floor, self._locks, self._coming)

    def _leave(self, expert: ExpertId) -> int:
        """The slot that a resident has lost."""
        self._table.remove(expert)
        self._eviction.remove(expert)
        return self._slots[expert[0]].pop(expert)

    def _release(self, expert: ExpertId) -> None:
        heapq.heappush(self._free, self._leave(expert))

    def _place(self, expert: ExpertId, slot: int) -> None:
        self._slots[expert[0]][expert] = slot

    def _resized(self) -> None:
        self._free = sorted({*range(self.capacity)}.difference(self.residents().values()))
        self._policy.resize(self.capacity)

    def _free_slots(self) -> list[int]:
        return self._free

    def _arriving(self) -> set[ExpertId]:
        return set(self._coming)

    def _lock_counts(self) -> dict[ExpertId, int]:
        return dict(self._locks)

    def _unlock_all(self) -> None:
        self._locks.clear()
        for layer in range(self.layers):
            self._eviction.changed(layer)

    def _repair(self) -> None:
        policy = copy.deepcopy(self._policy)
        for expert, _ in tuple(policy.victims()):
            policy.remove(expert)
