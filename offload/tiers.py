"""Slots: fixed-size places for records, in RAM and in the memory of a device."""

from __future__ import annotations

import mmap

import torch

from .device import Device
from .errors import DeviceMemoryError
from .pages import huge_pages

_SEGMENT = 256 << 20


class RamSlots:
    """One anonymous mapping with 4 KiB-aligned slots, on huge pages if possible. Pages are resident from the first
    write into them until `resize`; pinned ones from `pin` on.

    Args:
        capacity: slots.
        record_bytes: bytes of one record, a multiple of 4096.
    """

    _pinned_by: Device | None = None

    def __init__(self, capacity: int, record_bytes: int) -> None:
        assert record_bytes % mmap.PAGESIZE == 0 or record_bytes % 4096 == 0, record_bytes
        self.capacity, self.record_bytes = capacity, record_bytes
        self._map, self._start = huge_pages(capacity * record_bytes)
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        self._slots = whole[self._start : self._start + capacity * record_bytes].reshape(capacity, record_bytes)
        self._view = memoryview(self._map)
        self._tensors = list(self._slots.unbind(0))

    def view(self, slot: int) -> memoryview:
        """The writable bytes of a slot, for a read to fill."""
        start = self._start + slot * self.record_bytes
        return self._view[start : start + self.record_bytes]

    def record(self, slot: int) -> torch.Tensor:
        """The bytes of a slot, uint8 [record_bytes], for a kernel to read where they lie."""
        return self._tensors[slot]

    def resize(self, capacity: int) -> None:
        """Give the memory of slots `capacity` and above back to the system, unless it is pinned; or use slots again
        that were given back.

        The number that the slots were made with is the most.
        """
        assert 0 <= capacity <= len(self._slots), (capacity, len(self._slots))
        if capacity < self.capacity and self._pinned_by is None and hasattr(self._map, "madvise"):
            start = -(-(self._start + capacity * self.record_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
            end = self._start + self.capacity * self.record_bytes
            if end > start:
                self._map.madvise(mmap.MADV_DONTNEED, start, end - start)
        self.capacity = capacity
        self._tensors = list(self._slots[:capacity].unbind(0))

    def pin(self, device: Device) -> str | None:
        """Lock the pages for fast copies to a device; returns why not, if that cannot be."""
        refusal = device.pin(self._slots[: self.capacity]) if self.capacity else None
        self._pinned_by = None if refusal else device
        return refusal

    def unpin(self) -> None:
        if self._pinned_by is not None:
            self._pinned_by.unpin(self._slots)
            self._pinned_by = None


class DeviceSlots:
    """Slots on a device, in segments, so that some can be given back when memory runs short.

    `capacity` may come out smaller than asked for, where the device has less memory than was believed.
    """

    def __init__(self, device: Device, capacity: int, record_bytes: int) -> None:
        self.record_bytes, self.capacity = record_bytes, 0
        self._device = device
        self._segments: list[torch.Tensor] = []
        self._records: list[torch.Tensor] = []
        self._grow(capacity, min(max(1, _SEGMENT // record_bytes), -(-capacity // 8)))

    def record(self, slot: int) -> torch.Tensor:
        """The bytes of a slot, uint8 [record_bytes], on the device."""
        return self._records[slot]

    def without(self, slots: int, least: int) -> int:
        """How many are left if at least that many are given back, the last ones, a whole segment at a time; never fewer
        than `least`, so that it may be all of them."""
        left, segments = self.capacity, [len(segment) for segment in self._segments]
        while left > self.capacity - slots and left - segments[-1] >= least:
            left -= segments.pop()
        return left

    def release(self, left: int) -> None:
        """Give the memory of all others back, `left` being what `without` has returned. Nothing may read them."""
        while self.capacity > left:
            self.capacity -= len(self._segments.pop())
        del self._records[self.capacity :]
        self._device.trim()

    def _grow(self, capacity: int, step: int) -> None:
        while self.capacity < capacity:
            count = min(step, capacity - self.capacity)
            try:
                segment = self._device.empty((count, self.record_bytes), torch.uint8)
            except DeviceMemoryError:
                return
            self._segments.append(segment)
            self._records += segment.unbind(0)
            self.capacity += count
