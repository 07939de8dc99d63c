"""Where a device's kernels find experts by themselves: the addresses of the records that lie there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..cache.expert import ExpertId
from .device import Device


class ResidentTable:
    """The address of each expert's record on the device, 0 for those that are not there; and what the host has set.

    Changes are queued among the kernels: whatever is launched later sees them, whatever was launched before does not.

    Args:
        experts: how many each layer has.
    """

    def __init__(self, device: Device, experts: Sequence[int]) -> None:
        self._device, self._total = device, sum(experts)
        self._addresses = device.empty((len(experts), max(experts)), torch.int64)
        self._rows = list(self._addresses.unbind(0))
        self._entered: set[ExpertId] = set()
        self.replace({})

    def __contains__(self, expert: object) -> bool:
        return expert in self._entered

    @property
    def full(self) -> bool:
        """Whether every expert of the model is there: no router can choose what a kernel would not find."""
        return len(self._entered) == self._total

    def row(self, layer: int) -> torch.Tensor:
        """int64 [experts], on the device."""
        return self._rows[layer]

    def residents(self) -> set[ExpertId]:
        """Who is entered (for tests)."""
        return set(self._entered)

    def enter(self, expert: ExpertId, record: torch.Tensor) -> None:
        """The record of `expert` lies there, whole."""
        self._set(expert, record.data_ptr())
        self._entered.add(expert)

    def remove(self, expert: ExpertId) -> None:
        """Kernels that are launched from now on do not find `expert`, if they would have."""
        if expert in self._entered:
            self._entered.remove(expert)
            self._set(expert, 0)

    def replace(self, records: Mapping[ExpertId, torch.Tensor]) -> None:
        """Exactly these lie there, whole. Waits for the device."""
        self._entered.clear()
        addresses = torch.zeros(self._addresses.shape, dtype=torch.int64)
        for expert, record in records.items():
            addresses[expert] = record.data_ptr()
        self._device.put(self._addresses, addresses)
        self._device.mark().wait()
        self._entered.update(records)

    def _set(self, expert: ExpertId, address: int) -> None:
        entry = self._rows[expert.layer][expert.index]
        self._device.launch(lambda: entry.fill_(address))  # a number in the launch itself: no memory that has to stay
