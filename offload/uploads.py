"""Copies from slots in RAM to slots on a device, who has to wait for whom, and when the device's kernels may find what
has arrived.

The caller never waits here, unless it needs a slot in RAM back: kernels wait for the copies of their experts, and a
copy waits for the last kernel that reads what it overwrites, all inside the device's queues.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..cache.expert import ExpertId
from ..cache.manager import ExpertCache
from .device import Device, Mark
from .resident_table import ResidentTable
from .tiers import DeviceSlots, RamSlots


class _Copy(NamedTuple):
    expert: ExpertId
    slot: int
    arrived: Mark


class Uploads:
    """Copies in flight, oldest first.

    Args:
        below: the cache of the RAM tier. An expert stays locked there while its record travels.
        table: has those experts whose copies have been seen to arrive and whose slots are still theirs.
    """

    def __init__(
        self, device: Device, slots: DeviceSlots, below: ExpertCache, sources: RamSlots, table: ResidentTable
    ) -> None:
        self._device, self._slots, self._below, self._sources = device, slots, below, sources
        self._table = table
        self._flying: deque[_Copy] = deque()
        self._arrivals: dict[int, Mark] = {}
        """By slot: copies that no kernel has waited for yet."""
        self._newest: dict[int, Mark] = {}
        """By slot: the copy in flight whose expert owns it; those of evicted experts arrive for nobody."""
        self._last_use: dict[int, Mark] = {}
        self._taken: list[float] = []
        """Seconds of copies that are over, for `settle`."""

    def __len__(self) -> int:
        return len(self._flying)

    def position(self, expert: ExpertId) -> int:
        """How many copies have to end until this expert has arrived; 0 when none is under way."""
        return next((i for i, copy in enumerate(self._flying, 1) if copy.expert == expert), 0)

    def start(self, expert: ExpertId, slot: int) -> None:
        """Queue the copy of an expert that lies in RAM to a slot on the device, whatever that slot held before."""
        source = self._below.slot_of(expert)
        assert source is not None and not self._below.is_arriving(expert), f"{expert} is not in RAM"
        last_use = self._last_use.get(slot)
        after = () if last_use is None else (last_use,)
        mark = self._device.copy_in(self._slots.record(slot), self._sources.record(source), after)
        self._below.lock((expert,))
        self._arrivals[slot] = self._newest[slot] = mark
        self._flying.append(_Copy(expert, slot, mark))

    def use(self, slots: Iterable[int]) -> None:
        """The kernel that is launched next reads these slots."""
        for slot in slots:
            arrival = self._arrivals.pop(slot, None)
            if arrival is not None:
                self._device.compute_after(arrival)

    def used(self, slots: Iterable[int], mark: Mark | None = None) -> None:
        """A kernel that ends before `mark`, or the one that was launched last, reads these slots."""
        mark = mark or self._device.mark()
        for slot in slots:
            self._last_use[slot] = mark

    def emptied(self, expert: ExpertId, slot: int) -> None:
        """`expert` has been evicted from its slot. All kernels that found it there must have been noted by `used`."""
        self._table.remove(expert)
        self._newest.pop(slot, None)
        last_use = self._last_use.get(slot)
        self._device.discard(self._slots.record(slot), () if last_use is None else (last_use,))

    def settle(self) -> list[float]:
        """Let go of the sources of copies that are over, and let kernels find them; returns the seconds that each took
        of those that have ended since the last time."""
        while self._flying and self._flying[0].arrived.passed():
            self._let_go()
        taken, self._taken = self._taken, []
        return taken

    def wait_for_one(self) -> bool:
        """Wait for the oldest copy, so that its source may be evicted; False when there is none."""
        if not self._flying:
            return False
        self._flying[0].arrived.wait()
        self._let_go()
        return True

    def wait_for_all(self) -> None:
        """Wait until nothing travels any more, and leave the books as they are."""
        for copy in self._flying:
            copy.arrived.wait()

    def drain(self) -> None:
        while self.wait_for_one():
            pass

    def recover(self, residents: Mapping[ExpertId, int]) -> None:
        """After an interruption: wait for all copies, and forget them; the caller frees what they have locked.

        Args:
            residents: those whose copies had been asked for without a failure, and their slots. Kernels find them now.
        """
        self.wait_for_all()
        for books in (self._flying, self._arrivals, self._newest, self._last_use, self._taken):
            books.clear()
        self._table.replace({expert: self._slots.record(slot) for expert, slot in residents.items()})

    def move(self, expert: ExpertId, slot: int, free: int) -> None:
        """Bring a record to another slot on the device; nothing may be in flight."""
        assert not self._flying, "copies are in flight"
        source, target = self._slots.record(slot), self._slots.record(free)
        self._table.remove(expert)
        self._device.launch(lambda: target.copy_(source))
        self.used((free,))
        self._arrivals.pop(free, None)
        self._table.enter(expert, target)

    def forget(self, expert: ExpertId, slot: int) -> None:
        """The slot of `expert` is given back; nothing may be in flight."""
        assert not self._flying, "copies are in flight"
        self._table.remove(expert)
        self._arrivals.pop(slot, None)
        self._last_use.pop(slot, None)

    def _let_go(self) -> None:
        copy = self._flying.popleft()
        self._below.unlock((copy.expert,))
        if self._newest.get(copy.slot) is copy.arrived:
            del self._newest[copy.slot]
            self._table.enter(copy.expert, self._slots.record(copy.slot))
        self._taken.append(copy.arrived.seconds())
