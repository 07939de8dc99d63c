"""Where the CPU's kernels find experts by themselves: the addresses of the records that lie in slots."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

from ..cache.expert import ExpertId
from .tiers import RamSlots


class RamTable:
    """The address of each expert's record in RAM, 0 for those that are not there. An `ExpertCache` keeps it.

    Args:
        experts: how many each layer has.
    """

    def __init__(self, slots: RamSlots, experts: Sequence[int]) -> None:
        self._slots = slots
        self._rows = [(ctypes.c_int64 * count)() for count in experts]

    def row(self, layer: int) -> ctypes.Array[ctypes.c_int64]:
        """By expert; it is the same memory at all times."""
        return self._rows[layer]

    def enter(self, expert: ExpertId, slot: int) -> None:
        self._rows[expert.layer][expert.index] = self._slots.record(slot).data_ptr()

    def remove(self, expert: ExpertId) -> None:
        self._rows[expert.layer][expert.index] = 0

    def replace(self, slots: Mapping[ExpertId, int]) -> None:
        for row in self._rows:
            ctypes.memset(row, 0, ctypes.sizeof(row))
        for expert, slot in slots.items():
            self.enter(expert, slot)
