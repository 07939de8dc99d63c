"""The expert cache, compiled: what a running model uses where there is the native library."""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

from ..cache.expert import ExpertId, Lookup
from ..cache.manager import Admission, ExpertCache, Table
from ..cache.plain_cache import PlainCache
from ..cache.policy import get_policy
from ..quant.native_library import NativeError, NativeLibrary, check, load_native

_NOWHERE = -1


class _Spec(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("layers", "experts", "floor")),
        *((name, ctypes.c_int64) for name in ("capacity", "cycle")),
        *((name, ctypes.c_void_p) for name in ("slots", "locks", "arriving")),
    )


def make_cache(
    policy: str, capacity: int, cycle: int, experts: Sequence[int], floor: int, table: Table | None = None
) -> ExpertCache:
    """An `ExpertCache` for layers of so many experts. Raises ValueError for an unknown policy and below the floors."""
    plain = get_policy(policy, capacity, cycle)
    library = load_native()
    if library is None:
        return PlainCache(capacity, plain, len(experts), floor, table)
    return NativeCache(library, policy, capacity, cycle, experts, floor, table)


class _Numbered(dict[int, ExpertId | None]):
    """Ids by the library's numbers, made once; nobody has -1."""

    def __init__(self, width: int) -> None:
        super().__init__({-1: None})
        self._width = width

    def __missing__(self, number: int) -> ExpertId:
        self[number] = expert = ExpertId(*divmod(number, self._width))
        return expert


class NativeCache(ExpertCache):
    """The books are in memory that both sides see, so that only what asks the policy is a call."""

    def __init__(
        self,
        library: NativeLibrary,
        policy: str,
        capacity: int,
        cycle: int,
        experts: Sequence[int],
        floor: int,
        table: Table | None = None,
    ) -> None:
        c = library.short
        self._c, self._lookup, self._admit = c, c.pm_cache_lookup, c.pm_cache_admit
        self._policy, self._cycle, self._width = policy, cycle, max(experts, default=0)
        self._numbered = _Numbered(self._width)
        self._end: Callable[[], object] | None = None
        self._make_room(self._width)
        super().__init__(capacity, len(experts), floor, table)

    def __len__(self) -> int:
        return self._c.pm_cache_count(self._handle)

    def lookup(self, layer: int, indices: Sequence[int], promote: bool = True) -> Lookup:
        count = len(indices)
        if count > len(self._indices):
            self._make_room(count)
        self._indices[:count] = indices
        hits = self._lookup(self._handle, layer, self._request, count, promote, self._misses)
        if hits < 0:
            check(-hits, f"lookup of {list(indices)} in layer {layer}")
        experts = tuple(map(self._ids[layer].__getitem__, self._indices[: hits + self._misses[0]]))
        return Lookup(experts[:hits], experts[hits:])

    def use(self, steps: Sequence[tuple[int, Sequence[int]]]) -> list[tuple[ExpertId, ...]]:
        layers, counts = array("i", [layer for layer, _ in steps]), array("i", [len(indices) for _, indices in steps])
        flat = array("i", chain.from_iterable([indices for _, indices in steps]))
        addresses = [numbers.buffer_info()[0] for numbers in (layers, counts, flat)]
        status = self._c.pm_cache_use(self._handle, len(steps), *addresses)
        assert not status, f"not all there: {steps}"
        return [tuple([self._ids[layer][index] for index in indices]) for layer, indices in steps]

    def slot_of(self, expert: ExpertId) -> int | None:
        slot = self._slots[expert[0]][expert[1]]
        return None if slot == _NOWHERE else slot

    def slots_of(self, experts: Sequence[ExpertId]) -> list[int]:
        slots = [self._slots[layer][index] for layer, index in experts]
        assert _NOWHERE not in slots, f"not resident: {[expert for expert in experts if expert not in self]}"
        late = [expert for expert in experts if self._coming[expert[0]][expert[1]]]
        assert not late, f"still on their way: {late}"
        return slots

    def is_arriving(self, expert: ExpertId) -> bool:
        return self._coming[expert[0]][expert[1]] != 0

    def is_transient(self, expert: ExpertId) -> bool:
        return self._c.pm_cache_is_transient(self._handle, self._number(expert)) != 0

    def admit_all(self, experts: Sequence[ExpertId], transient: bool = False) -> list[Admission]:
        layer = experts[0][0] if experts else 0
        assert 0 <= layer < self.layers, f"{experts[0]} is not in one of {self.layers} layers"
        count = len(experts)
        self._indices[:count] = [index for _, index in experts]
        admitted = self._admit(self._handle, layer, self._request, count, transient, *self._answer)
        if admitted < 0:
            check(-admitted, f"admission of {list(experts)}")
        if admitted < count:
            left = experts[admitted]
            assert left not in self, f"{left} is resident already, in slot {self.slot_of(left)}"
        victims = list(map(self._numbered.__getitem__, self._evicted[:admitted]))
        for victim in victims:
            if victim is not None:
                self._table.remove(victim)
        return list(map(Admission, self._gained[:admitted], victims))

    def next_victim(self, layer: int) -> ExpertId | None:
        return self._numbered[self._c.pm_cache_victim(self._handle, layer)]

    def arrived(self, expert: ExpertId) -> None:
        layer, index = expert
        coming = self._coming[layer]
        assert coming[index], f"{expert} is not arriving"
        coming[index] = 0
        self._table.enter(expert, self._slots[layer][index])

    def abandon(self, expert: ExpertId) -> None:
        assert self._coming[expert[0]][expert[1]], f"{expert} is not arriving"
        self._release(expert)

    def demote(self, expert: ExpertId) -> None:
        if expert in self:
            check(self._c.pm_cache_demote(self._handle, self._number(expert)), f"demotion of {expert}")

    def promote(self, expert: ExpertId) -> None:
        if expert in self:
            check(self._c.pm_cache_promote(self._handle, self._number(expert)), f"promotion of {expert}")

    def tick(self) -> None:
        check(self._c.pm_cache_tick(self._handle), "a token's end")

    def lock(self, experts: Iterable[ExpertId]) -> None:
        locks = self._locks
        for layer, index in experts:
            locks[layer][index] += 1

    def unlock(self, experts: Iterable[ExpertId]) -> None:
        locks = self._locks
        for layer, index in experts:
            of_layer = locks[layer]
            count = of_layer[index]
            assert count > 0, f"{ExpertId(layer, index)} is not locked"
            of_layer[index] = count - 1

    def residents(self) -> dict[ExpertId, int]:
        return {expert: slot for expert, slot in self._each(self._slots) if slot != _NOWHERE}

    def resident_count(self, layer: int) -> int:
        return self._width - self._slots[layer].tolist().count(_NOWHERE)

    def order(self) -> list[ExpertId]:
        numbers = (ctypes.c_int32 * len(self))()
        check(self._c.pm_cache_order(self._handle, numbers), "the order of residents")
        return [ExpertId(*divmod(number, self._width)) for number in numbers]

    def check_integrity(self, idle: bool = False) -> None:
        count, known = len(self.residents()), len(self)
        assert count == known, f"{count} experts have slots, but {known} are counted"
        super().check_integrity(idle)

    def _make_room(self, count: int) -> None:
        """For so many experts in a request."""
        room = tuple([(ctypes.c_int32 * size)() for size in (count, count, count, 1)])
        request, *answer = map(ctypes.addressof, room[:3])
        # All at once: an interruption between the two would leave addresses of memory that is gone.
        (self._indices, self._gained, self._evicted, self._misses), self._request, self._answer = room, request, answer

    def _start(self) -> None:
        total = self.layers * self._width
        slots, locks, coming = array("i", bytes(4 * total)), array("i", bytes(4 * total)), array("B", bytes(total))
        spec = _Spec(self.layers, self._width, self.floor, self.capacity, self._cycle)
        spec.slots, spec.locks, spec.arriving = (books.buffer_info()[0] for books in (slots, locks, coming))
        by_layer = [self._by_layer(books) for books in (slots, locks, coming)]
        handle = self._c.pm_cache_create(self._policy.encode(), ctypes.byref(spec))
        if not handle:
            raise NativeError(f"an expert cache of {self.capacity} slots: out of memory")
        former, end = self._end, weakref.finalize(self, self._c.pm_cache_destroy, handle)
        # No call in between, where an interruption could part the cache from the memory that it writes to.
        (self._slots, self._locks, self._coming), self._handle, self._end = by_layer, handle, end
        if former is not None:
            former()

    def _release(self, expert: ExpertId) -> None:
        self._table.remove(expert)
        check(self._c.pm_cache_release(self._handle, self._number(expert)), f"release of {expert}")

    def _place(self, expert: ExpertId, slot: int) -> None:
        self._slots[expert[0]][expert[1]] = slot

    def _resized(self) -> None:
        check(self._c.pm_cache_resize(self._handle, self.capacity), f"resizing to {self.capacity} slots")

    def _free_slots(self) -> list[int]:
        return sorted({*range(self.capacity)}.difference(self.residents().values()))

    def _arriving(self) -> set[ExpertId]:
        return {expert for expert, coming in self._each(self._coming) if coming}

    def _lock_counts(self) -> dict[ExpertId, int]:
        return {expert: count for expert, count in self._each(self._locks) if count}

    def _unlock_all(self) -> None:
        for expert in self._lock_counts():
            self._locks[expert[0]][expert[1]] = 0

    def _repair(self) -> None:
        """A `resize` that was cut short has not said who has moved, or which slots there are; calls never are."""
        self._resized()

    def _number(self, expert: ExpertId) -> int:
        return expert[0] * self._width + expert[1]

    def _by_layer(self, books: array[int]) -> list[memoryview]:
        whole = memoryview(books)
        return [whole[first : first + self._width] for first in range(0, len(books), self._width)]

    def _each(self, books: Sequence[memoryview]) -> Iterator[tuple[ExpertId, int]]:
        for layer, of_layer in enumerate(books):
            for index, value in enumerate(of_layer):
                yield ExpertId(layer, index), value
