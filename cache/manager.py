"""Who is in which slot: lookup, admission, eviction, locks. It moves no bytes and keeps no statistics.

One pool of slots serves all layers, because layers differ in how many experts they reuse. A floor per layer keeps the
pool from starving one: an admission for one layer never takes another layer below its floor.

A resident expert is *arriving* from `admit` until `arrived`: it owns its slot, but its bytes are not there yet. Experts
that are arriving or locked are never evicted. All calls come from one thread, the one that runs the layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from .eviction import Eviction
from .expert import ExpertId, Lookup
from .policy import EvictionPolicy


class SlotInUseError(RuntimeError):
    """A slot has to be emptied now, but its expert is locked or arriving."""


class Admission(NamedTuple):
    """The slot that an admitted expert owns, and who had to leave it."""

    slot: int
    evicted: ExpertId | None


class Table(Protocol):
    """Who keeps a list of the residents whose bytes are there, for those who cannot ask the cache."""

    def enter(self, expert: ExpertId, slot: int) -> None: ...

    def remove(self, expert: ExpertId) -> None:
        """`expert` loses its slot, if it has one."""
        ...

    def replace(self, slots: Mapping[ExpertId, int]) -> None:
        """Exactly these are there."""
        ...


class _NoTable:
    """The null twin."""

    def enter(self, expert: ExpertId, slot: int) -> None:
        pass

    def remove(self, expert: ExpertId) -> None:
        pass

    def replace(self, slots: Mapping[ExpertId, int]) -> None:
        pass


class _Locked(AbstractContextManager[None]):
    """What `ExpertCache.locked` returns: a class, because a generator costs twice as much per layer."""

    __slots__ = ("_cache", "_experts")

    def __init__(self, cache: ExpertCache, experts: tuple[ExpertId, ...]) -> None:
        self._cache = cache
        self._experts = experts

    def __enter__(self) -> None:
        self._cache.lock(self._experts)

    def __exit__(self, *exc_info: object) -> None:
        self._cache.unlock(self._experts)


class _LayerIds(dict[int, ExpertId]):
    """The ids of one layer by index, made once: creating eight of them for every layer and token costs 2 us."""

    def __init__(self, layer: int) -> None:
        self._layer = layer

    def __missing__(self, index: int) -> ExpertId:
        self[index] = expert = ExpertId(self._layer, index)
        return expert


class ExpertCache:
    """The residents of one tier.

    `capacity` slots are numbered 0..capacity-1; `layers` is the number of MoE layers; `floor` the residents that each
    keeps against the others, normally its top-k; `table` is kept up to date. Raises ValueError when the floors do not
    fit into the capacity.
    """

    def __init__(
        self, capacity: int, policy: EvictionPolicy, layers: int, floor: int, table: Table | None = None
    ) -> None:
        if layers < 1 or floor < 1:
            raise ValueError(f"An expert cache needs at least 1 layer and a floor of 1, not {layers} and {floor}.")
        self.layers = layers
        self.floor = floor
        self._table = table or _NoTable()
        self._new_policy = copy.deepcopy(policy)  # for `recover`
        self._ids = [_LayerIds(layer) for layer in range(layers)]
        self._require_floors(capacity)
        self.capacity = capacity
        self._start(policy)

    def __len__(self) -> int:
        return self.capacity - len(self._free)

    def __contains__(self, expert: object) -> bool:
        return isinstance(expert, ExpertId) and expert in self._slots[expert.layer]

    # Requests

    def lookup(self, layer: int, indices: Sequence[int], promote: bool = True) -> Lookup:
        """Split the distinct experts `indices` of `layer` into hits and misses, in the order of the request.

        An arriving expert is a miss that waits less: ask `is_arriving` before starting a read. Hits and arriving
        experts are touched in the policy; a transient one joins it, unless `promote` is false (for a prompt, whose
        single pass over an expert says little about the answer).
        """
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
        if self._arriving and not self._arriving.isdisjoint(hits):
            hits = [expert for expert in hits if expert not in self._arriving]
            misses = [expert for index in dict.fromkeys(indices) if (expert := ids[index]) not in hits]
        return Lookup(tuple(hits), tuple(misses))

    def slot_of(self, expert: ExpertId) -> int | None:
        """The slot of a resident expert (arriving ones included), else None."""
        return self._slots[expert[0]].get(expert)

    def slots_of(self, experts: Sequence[ExpertId]) -> list[int]:
        """The slots of resident experts, whose bytes have to be there."""
        assert self._arriving.isdisjoint(experts), f"still on their way: {self._arriving.intersection(experts)}"
        slots = [self._slots[expert[0]].get(expert, -1) for expert in experts]
        assert -1 not in slots, f"not resident: {[expert for expert in experts if expert not in self]}"
        return slots

    def is_arriving(self, expert: ExpertId) -> bool:
        """Whether `expert` owns a slot whose bytes are still on their way."""
        return expert in self._arriving

    def is_transient(self, expert: ExpertId) -> bool:
        """Whether `expert` is resident and among the first to leave: admitted as transient and not promoted since."""
        return expert in self._eviction.transient[expert[0]]

    # Admission

    def admit(self, expert: ExpertId, transient: bool = False) -> Admission | None:
        """Give `expert` a slot, a free one or that of a victim. It is arriving until `arrived` or `abandon`.

        `transient` (prefetch, the stream of a prompt) puts it among the first victims, oldest first. Returns None when
        nobody may leave: every candidate is locked, arriving or protected by its layer's floor. For a demanded expert
        the caller then waits for, or abandons, a read in flight and asks again.
        """
        layer = expert[0]
        assert 0 <= layer < self.layers, f"{expert} is not in one of {self.layers} layers"
        assert expert not in self, f"{expert} is resident already, in slot {self.slot_of(expert)}"
        victim = None
        if self._free:
            slot = self._free.pop()
        else:
            victim = self._eviction.victim(layer)
            if victim is None:
                return None
            slot = self._release(victim)
        self._slots[layer][expert] = slot
        self._arriving.add(expert)
        self._eviction.insert(expert, transient)
        return Admission(slot, victim)

    def next_victim(self, layer: int) -> ExpertId | None:
        """Who would leave for an admission to `layer` now: nobody while a slot is free, or where nobody may leave."""
        return None if self._free else self._eviction.victim(layer)

    def arrived(self, expert: ExpertId) -> None:
        """The bytes of `expert` are in its slot."""
        assert expert in self._arriving, f"{expert} is not arriving"
        self._arriving.remove(expert)
        self._table.enter(expert, self._slots[expert[0]][expert])
        self._eviction.changed(expert[0])

    def abandon(self, expert: ExpertId) -> None:
        """The read of the arriving `expert` failed or was cancelled: its slot is free again. Locks on it stay."""
        assert expert in self._arriving, f"{expert} is not arriving"
        self._free.append(self._release(expert))
        self._arriving.remove(expert)  # last: where the books were torn, it must not pass for one that has arrived

    def demote(self, expert: ExpertId) -> None:
        """Put a resident expert among the first to leave: it is to be had elsewhere, too."""
        if expert in self:
            self._eviction.demote(expert)

    def promote(self, expert: ExpertId) -> None:
        """Undo `demote`, or a transient admission, if the expert is still resident."""
        self._eviction.promote(expert)

    def tick(self) -> None:
        """One token is done."""
        self._policy.tick()

    # Locks

    def lock(self, experts: Iterable[ExpertId]) -> None:
        """Keep `experts` from being evicted until `unlock`; counted. They may be locked before they are admitted."""
        locks = self._locks
        for expert in experts:
            locks[expert] = locks.get(expert, 0) + 1

    def unlock(self, experts: Iterable[ExpertId]) -> None:
        """Undo one `lock` of each of `experts`."""
        locks = self._locks
        for expert in experts:
            count = locks.pop(expert, 0)
            assert count > 0, f"{expert} is not locked"
            if count > 1:
                locks[expert] = count - 1

    def locked(self, experts: Lookup | Iterable[ExpertId]) -> AbstractContextManager[None]:
        """Hold locks on `experts`, or on the hits and misses of a lookup, for the length of a `with` block."""
        return _Locked(self, experts.hits + experts.misses if isinstance(experts, Lookup) else tuple(experts))

    # The whole pool

    def resize(
        self, capacity: int, move: Callable[[ExpertId, int, int], None] | None = None
    ) -> list[tuple[ExpertId, int]]:
        """Grow or shrink to `capacity` slots; returns the experts that lost their slot, each with that slot.

        Those leave whose slot is `capacity` or higher, however hot they are; but with `move`, which brings an expert's
        record from one slot to another, the first victims do. Raises SlotInUseError, changing nothing, when one that
        leaves or moves is locked or arriving, and ValueError below the floors.
        """
        self._require_floors(capacity)
        beyond = [(expert, slot) for expert, slot in self.residents().items() if slot >= capacity]
        lost, moving = (beyond, []) if move is None else self._coldest(capacity, beyond)
        self._require_idle([expert for expert, _ in (*lost, *moving)])
        for expert, slot in lost:
            self._release(expert)
            if slot < capacity:
                self._free.append(slot)
        kept = [slot for slot in self._free if slot < capacity]
        for expert, slot in moving:
            assert move is not None
            move(expert, slot, kept[-1])
            self._slots[expert[0]][expert] = kept[-1]
            self._table.enter(expert, kept.pop())
        self._free = [*range(capacity - 1, self.capacity - 1, -1), *kept]
        self.capacity = capacity
        self._policy.resize(capacity)
        return lost

    def residents(self) -> dict[ExpertId, int]:
        """A copy of who is in which slot, arriving experts included."""
        return {expert: slot for slots in self._slots for expert, slot in slots.items()}

    def resident_count(self, layer: int) -> int:
        """Residents of one layer, arriving experts included."""
        return len(self._slots[layer])

    def clear(self) -> None:
        """Evict everybody. Raises SlotInUseError, changing nothing, when somebody is locked or arriving."""
        self._require_idle([*self.residents(), *self._locks])
        for expert in self.residents():
            self._eviction.remove(expert)
        self._start(self._policy)

    def recover(self) -> None:
        """After an interruption, when nothing is being read any more: nobody is arriving or locked from now on.

        Where the interruption fell into one of these methods and left the books half-written, everybody is evicted and
        the policy begins anew.
        """
        self._locks.clear()
        for layer in range(self.layers):
            self._eviction.changed(layer)
        try:
            for expert in tuple(self._arriving):
                self.abandon(expert)
            self.check_integrity(idle=True)
            policy = copy.deepcopy(self._policy)
            for expert, _ in tuple(policy.victims()):
                policy.remove(expert)  # fails where the policy's own books are half-written
        except (AssertionError, LookupError, ValueError):
            policy = copy.deepcopy(self._new_policy)
            policy.resize(self.capacity)
            self._start(policy)
        self._table.replace(self.residents())

    def check_integrity(self, idle: bool = False) -> None:
        """Raise AssertionError with the numbers when the books do not balance; `idle`: also when anybody is in use."""
        residents = self.residents()
        slots = sorted([*residents.values(), *self._free])
        assert slots == list(range(self.capacity)), f"slots used and free are {slots}, not 0..{self.capacity - 1}"
        ordered = self._eviction.order()
        assert len(ordered) == len(set(ordered)), f"{len(ordered)} evictable, but only {len(set(ordered))} distinct"
        odd = set(ordered) ^ set(residents)
        assert not odd, f"either resident or in an order, not both: {odd}"
        assert self._arriving <= set(residents), f"arriving without a slot: {self._arriving - set(residents)}"
        assert all(count > 0 for count in self._locks.values()), f"lock counts below 1: {self._locks}"
        assert self.capacity >= self.layers * self.floor, f"{self.capacity} slots < {self.layers} x {self.floor}"
        self._eviction.check_integrity()
        if idle:
            assert not self._locks, f"{len(self._locks)} experts are locked: {self._locks}"
            assert not self._arriving, f"{len(self._arriving)} experts are arriving: {self._arriving}"

    def _coldest(
        self, capacity: int, beyond: list[tuple[ExpertId, int]]
    ) -> tuple[list[tuple[ExpertId, int]], list[tuple[ExpertId, int]]]:
        """Who leaves so that `capacity` remain, and who has to move then, each with the slot."""
        first = self._eviction.order()[: max(0, len(self) - capacity)]
        lost = {expert: self._slots[expert[0]][expert] for expert in first}
        return list(lost.items()), [(expert, slot) for expert, slot in beyond if expert not in lost]

    def _release(self, expert: ExpertId) -> int:
        self._table.remove(expert)
        self._eviction.remove(expert)
        return self._slots[expert[0]].pop(expert)

    def _require_floors(self, capacity: int) -> None:
        if capacity < self.layers * self.floor:
            raise ValueError(
                f"{capacity} slots are too few: {self.layers} layers with a floor of {self.floor} experts "
                f"need {self.layers * self.floor}."
            )

    def _require_idle(self, experts: Sequence[ExpertId]) -> None:
        busy = [expert for expert in experts if expert in self._locks or expert in self._arriving]
        if busy:
            raise SlotInUseError(f"{len(busy)} of {len(experts)} experts are locked or arriving, first {busy[0]}.")

    def _start(self, policy: EvictionPolicy) -> None:
        """Begin with no residents."""
        self._policy = policy
        self._slots: list[dict[ExpertId, int]] = [{} for _ in range(self.layers)]
        self._free = list(range(self.capacity - 1, -1, -1))  # a stack, lowest slot on top
        self._arriving: set[ExpertId] = set()
        self._locks: dict[ExpertId, int] = {}
        self._eviction = Eviction(policy, self._slots, self.floor, self._locks, self._arriving)
        self._table.replace({})
