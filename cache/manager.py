"""Who is in which slot: lookup, admission, eviction, locks. It moves no bytes and keeps no statistics.

One pool of slots serves all layers, because layers differ in how many experts they reuse. A floor per layer keeps the
pool from starving one: an admission for one layer never takes another layer below its floor.

A resident expert is *arriving* from `admit` until `arrived`: it owns its slot, but its bytes are not there yet. Experts
that are arriving or locked are never evicted. All calls come from one thread, the one that runs the layers.

`PlainCache` is the reference; `NativeCache` keeps the same books in compiled code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from operator import itemgetter
from typing import NamedTuple, Protocol

from .expert import ExpertId, Lookup


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


class ExpertCache(ABC):
    """The residents of one tier.

    `capacity` slots are numbered 0..capacity-1; `layers` is the number of MoE layers; `floor` the residents that each
    keeps against the others, normally its top-k; `table` is kept up to date. Raises ValueError when the floors do not
    fit into the capacity.
    """

    def __init__(self, capacity: int, layers: int, floor: int, table: Table | None = None) -> None:
        if layers < 1 or floor < 1:
            raise ValueError(f"An expert cache needs at least 1 layer and a floor of 1, not {layers} and {floor}.")
        self.layers = layers
        self.floor = floor
        self._table = table or _NoTable()
        self._ids = [_LayerIds(layer) for layer in range(layers)]
        self._require_floors(capacity)
        self.capacity = capacity
        self._start()
        self._table.replace({})

    @abstractmethod
    def __len__(self) -> int:
        """How many experts are resident, arriving ones included."""

    def __contains__(self, expert: object) -> bool:
        return isinstance(expert, ExpertId) and self.slot_of(expert) is not None

    # Requests

    @abstractmethod
    def lookup(self, layer: int, indices: Sequence[int], promote: bool = True) -> Lookup:
        """Split the distinct experts `indices` of `layer` into hits and misses, in the order of the request.

        An arriving expert is a miss that waits less: ask `is_arriving` before starting a read. Hits and arriving
        experts are touched in the policy; a transient one joins it, unless `promote` is false (for a prompt, whose
        single pass over an expert says little about the answer).
        """

    def use(self, steps: Sequence[tuple[int, Sequence[int]]]) -> list[tuple[ExpertId, ...]]:
        """`lookup` for several layers of one token, whose distinct experts have to be there: the hits of each."""
        found = [self.lookup(layer, indices) for layer, indices in steps]
        missing = [expert for wanted in found for expert in wanted.misses]
        assert not missing, f"not there: {missing}"
        return [wanted.hits for wanted in found]

    @abstractmethod
    def slot_of(self, expert: ExpertId) -> int | None:
        """The slot of a resident expert (arriving ones included), else None."""

    @abstractmethod
    def slots_of(self, experts: Sequence[ExpertId]) -> list[int]:
        """The slots of resident experts, whose bytes have to be there."""

    @abstractmethod
    def is_arriving(self, expert: ExpertId) -> bool:
        """Whether `expert` owns a slot whose bytes are still on their way."""

    @abstractmethod
    def is_transient(self, expert: ExpertId) -> bool:
        """Whether `expert` is resident and among the first to leave: admitted as transient and not promoted since."""

    # Admission

    def admit(self, expert: ExpertId, transient: bool = False) -> Admission | None:
        """Give `expert` a slot, a free one or that of a victim. It is arriving until `arrived` or `abandon`.

        `transient` (prefetch, the stream of a prompt) puts it among the first victims, oldest first. Returns None when
        nobody may leave: every candidate is locked, arriving or protected by its layer's floor. For a demanded expert
        the caller then waits for, or abandons, a read in flight and asks again.
        """
        admissions = self.admit_all((expert,), transient)
        return admissions[0] if admissions else None

    @abstractmethod
    def admit_all(self, experts: Sequence[ExpertId], transient: bool = False) -> list[Admission]:
        """`admit` one after the other, as many of one layer's distinct experts as there are slots for."""

    @abstractmethod
    def next_victim(self, layer: int) -> ExpertId | None:
        """Who would leave for an admission to `layer` now: nobody while a slot is free, or where nobody may leave."""

    @abstractmethod
    def arrived(self, expert: ExpertId) -> None:
        """The bytes of `expert` are in its slot."""

    @abstractmethod
    def abandon(self, expert: ExpertId) -> None:
        """The read of the arriving `expert` failed or was cancelled: its slot is free again. Locks on it stay."""

    @abstractmethod
    def demote(self, expert: ExpertId) -> None:
        """Put a resident expert among the first to leave: it is to be had elsewhere, too."""

    @abstractmethod
    def promote(self, expert: ExpertId) -> None:
        """Undo `demote`, or a transient admission, if the expert is still resident."""

    @abstractmethod
    def tick(self) -> None:
        """One token is done."""

    # Locks

    @abstractmethod
    def lock(self, experts: Iterable[ExpertId]) -> None:
        """Keep `experts` from being evicted until `unlock`; counted. They may be locked before they are admitted."""

    @abstractmethod
    def unlock(self, experts: Iterable[ExpertId]) -> None:
        """Undo one `lock` of each of `experts`."""

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
        slots = sorted(self.residents().items(), key=itemgetter(1))
        beyond = {expert: slot for expert, slot in slots if slot >= capacity}
        lost = beyond if move is None else self._coldest(capacity)
        moving = {expert: slot for expert, slot in beyond.items() if expert not in lost}
        self._require_idle([*lost, *moving])
        for expert in lost:
            self._release(expert)
        free = sorted({*range(capacity)}.difference(self.residents().values()), reverse=True)
        for expert, slot in moving.items():
            assert move is not None
            move(expert, slot, free[-1])
            self._place(expert, free[-1])
            self._table.enter(expert, free.pop())
        self.capacity = capacity
        self._resized()
        return list(lost.items())

    @abstractmethod
    def residents(self) -> dict[ExpertId, int]:
        """A copy of who is in which slot, arriving experts included."""

    @abstractmethod
    def resident_count(self, layer: int) -> int:
        """Residents of one layer, arriving experts included."""

    @abstractmethod
    def order(self) -> list[ExpertId]:
        """All residents, who leaves first comes first, whoever is in use and whatever the floors are."""

    def clear(self) -> None:
        """Evict everybody; what the policy has learnt is forgotten. Raises SlotInUseError, changing nothing, when
        somebody is locked or arriving."""
        self._require_idle([*self.residents(), *self._lock_counts()])
        self._start()
        self._table.replace({})

    def recover(self) -> None:
        """After an interruption, when nothing is being read any more: nobody is arriving or locked from now on.

        Where the interruption fell into one of these methods and left the books half-written, everybody is evicted and
        the policy begins anew.
        """
        self._unlock_all()
        try:
            for expert in self._arriving():
                self.abandon(expert)
            self.check_integrity(idle=True)
            self._repair()
        except (AssertionError, LookupError, ValueError):
            self._start()
        self._table.replace(self.residents())

    def check_integrity(self, idle: bool = False) -> None:
        """Raise AssertionError with the numbers when the books do not balance; `idle`: also when anybody is in use."""
        residents, locks, arriving, ordered = self.residents(), self._lock_counts(), self._arriving(), self.order()
        slots = sorted([*residents.values(), *self._free_slots()])
        assert slots == list(range(self.capacity)), f"slots used and free are {slots}, not 0..{self.capacity - 1}"
        assert len(ordered) == len(set(ordered)), f"{len(ordered)} evictable, but only {len(set(ordered))} distinct"
        odd = set(ordered) ^ set(residents)
        assert not odd, f"either resident or in an order, not both: {odd}"
        assert arriving <= set(residents), f"arriving without a slot: {arriving - set(residents)}"
        assert all(count > 0 for count in locks.values()), f"lock counts below 1: {locks}"
        assert self.capacity >= self.layers * self.floor, f"{self.capacity} slots < {self.layers} x {self.floor}"
        if idle:
            assert not locks, f"{len(locks)} experts are locked: {locks}"
            assert not arriving, f"{len(arriving)} experts are arriving: {arriving}"

    def _coldest(self, capacity: int) -> dict[ExpertId, int]:
        """Who leaves so that `capacity` remain, each with the slot."""
        residents = self.residents()
        return {expert: residents[expert] for expert in self.order()[: max(0, len(residents) - capacity)]}

    def _require_floors(self, capacity: int) -> None:
        if capacity < self.layers * self.floor:
            raise ValueError(
                f"{capacity} slots are too few: {self.layers} layers with a floor of {self.floor} experts "
                f"need {self.layers * self.floor}."
            )

    def _require_idle(self, experts: Sequence[ExpertId]) -> None:
        locks, arriving = self._lock_counts(), self._arriving()
        busy = [expert for expert in experts if expert in locks or expert in arriving]
        if busy:
            raise SlotInUseError(f"{len(busy)} of {len(experts)} experts are locked or arriving, first {busy[0]}.")

    # The books themselves

    @abstractmethod
    def _start(self) -> None:
        """Begin with `capacity` free slots and a new policy."""

    @abstractmethod
    def _release(self, expert: ExpertId) -> None:
        """A resident's slot is free."""

    @abstractmethod
    def _place(self, expert: ExpertId, slot: int) -> None:
        """A resident is in another slot; `_resized` follows."""

    @abstractmethod
    def _resized(self) -> None:
        """`capacity` is another one; all residents have slots below it."""

    @abstractmethod
    def _free_slots(self) -> list[int]: ...

    @abstractmethod
    def _arriving(self) -> set[ExpertId]:
        """A copy."""

    @abstractmethod
    def _lock_counts(self) -> dict[ExpertId, int]:
        """A copy; of those who are locked."""

    @abstractmethod
    def _unlock_all(self) -> None:
        """Also after books were left half-written."""

    @abstractmethod
    def _repair(self) -> None:
        """After an interruption: put in order what `check_integrity` does not see, or raise one of its errors."""
