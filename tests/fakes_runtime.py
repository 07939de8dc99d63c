"""A store and kernels that make a wrong slot visible: experts are numbers."""

from __future__ import annotations

import linecache
import sys
import threading
from importlib import import_module

import torch
from pocketmoe.cache.expert import ExpertId
from pocketmoe.offload.tiers import DeviceSlots
from pocketmoe.quant.kernels import ExpertJob

LAYERS, EXPERTS, TOP_K, HIDDEN, RECORD = 3, 8, 2, 4, 4096


class FakeReader:
    """A record is its expert's number in every byte. Experts in `broken` cannot be read."""

    record_bytes = RECORD

    def __init__(self) -> None:
        self.broken: set[ExpertId] = set()
        self.read: list[ExpertId] = []
        self.gate: threading.Event | None = None

    def read_into(self, expert: ExpertId, view: memoryview, start: int, stop: int) -> None:
        if self.gate is not None:
            assert self.gate.wait(10)
        if expert in self.broken:
            raise OSError(f"{expert} cannot be read")
        self.read.append(expert)
        view[start:stop] = bytes([1 + expert.layer * EXPERTS + expert.index]) * (stop - start)


class FakeKernels:
    """Each expert multiplies by the number in its record, so a wrong slot gives a wrong number."""

    name = "fake"

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.interrupt = False

    def run(self, hidden, rows, jobs, out):
        if self.interrupt:
            raise KeyboardInterrupt
        self.calls.append([int(job.record[0]) - 1 for job in jobs])
        for job in jobs:
            span = slice(job.start, job.start + job.count)
            out[span] = hidden[rows[span].long()] * float(job.record[0])


def found_jobs(slots: DeviceSlots, chosen: torch.Tensor, addresses: torch.Tensor) -> list[ExpertJob]:
    """What a kernel does that finds its records itself. An address where no slot is, is an error, as it is on a GPU."""
    records = {slots.record(slot).data_ptr(): slots.record(slot) for slot in range(slots.capacity)}
    there = [(i, int(addresses[expert])) for i, expert in enumerate(chosen.tolist()) if addresses[expert]]
    return [ExpertJob(records[address], i, 1) for i, address in there]


class Interruption:
    """Raises KeyboardInterrupt before line number `at` of those that this thread executes in some of our files."""

    def __init__(self, files: tuple[str, ...], at: int) -> None:
        self._files = {str(import_module(f"pocketmoe.{name}").__file__) for name in files}
        self._left = at
        self.happened = False

    def __enter__(self) -> Interruption:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame, event, _arg):
        if frame.f_code.co_filename not in self._files:
            return None
        # A `with` statement's line comes again before its lock is given back, where no signal is ever handled.
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not line.lstrip().startswith("with "):
            self._left -= 1
            if self._left < 0:
                self.happened = True
                raise KeyboardInterrupt
        return self._trace
