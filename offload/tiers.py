"""Slots in RAM: one anonymous mapping of fixed-size, 4 KiB-aligned places for records, on huge pages if possible."""

from __future__ import annotations

import mmap

import torch

_HUGE_PAGE = 2 << 20


class RamSlots:
    """`capacity` slots of `record_bytes` each. Pages are resident from the first write into them until `resize`.

    Args:
        capacity: slots.
        record_bytes: bytes of one record, a multiple of 4096.
    """

    def __init__(self, capacity: int, record_bytes: int) -> None:
        assert record_bytes % mmap.PAGESIZE == 0 or record_bytes % 4096 == 0, record_bytes
        self.capacity, self.record_bytes = capacity, record_bytes
        # Anonymous maps are only page aligned: leave room to begin on a huge page.
        # Private: Python's default is shared memory, which gets no huge pages and keeps its pages after MADV_DONTNEED.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        self._map = mmap.mmap(-1, max(capacity * record_bytes, 1) + _HUGE_PAGE, **private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self._map.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                pass  # a kernel without huge pages: slower streaming, same bytes
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        self._start = -whole.data_ptr() % _HUGE_PAGE
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
        """Give the memory of slots `capacity` and above back to the system, or use slots again that were given back.

        The number that the slots were made with is the most.
        """
        assert 0 <= capacity <= len(self._slots), (capacity, len(self._slots))
        if capacity < self.capacity and hasattr(self._map, "madvise"):
            start = -(-(self._start + capacity * self.record_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
            end = self._start + self.capacity * self.record_bytes
            if end > start:
                self._map.madvise(mmap.MADV_DONTNEED, start, end - start)
        self.capacity = capacity
        self._tensors = list(self._slots[:capacity].unbind(0))
