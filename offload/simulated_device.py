"""The twin of a GPU, on the processor: memory of its own, two queues in virtual time, and poison wherever a real device
would promise nothing.

It computes what a GPU would compute, but late. A kernel reads its operands when it ends, and a copy reads its source
when it ends; from its begin until then its target holds poison. What went to the host is poisoned when more goes
there. So a wait that is missing, a slot that is used again too early, or a source in RAM that is overwritten while it
travels gives wrong numbers, the same ones for the same seed.
"""

from __future__ import annotations

import functools
import math
import random
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..quant.linear import MakeLinear, PackedMatrix, QuantLinear
from .device import Mark, OnItsWay
from .errors import DeviceMemoryError

_POISON = 0xFF
"""All bits set: NaN in every floating-point format, in scales as well as in results."""


class Speeds(NamedTuple):
    """Virtual seconds, and bytes per second."""

    link: float = 12e9
    latency: float = 10e-6
    kernel: float = 30e-6
    host: float = 5e-6
    """Mean time that the caller spends between two calls."""
    jitter: float = 0.0
    """Copies and kernels take longer than they should by up to this factor, at random."""


DEFAULT_SPEEDS = Speeds()


class _Work:
    """One entry of a queue, from `started` to `ended` in virtual time."""

    def __init__(
        self, queued: float, took: float, end: Callable[[], object], begin: Callable[[], object], after: Iterable[_Work]
    ) -> None:
        self.queued, self.took, self.begin, self.end, self.after = queued, took, begin, end, tuple(after)
        self.started = self.ended = math.inf

    def let_go(self) -> None:
        """Marks outlive what they mark, and must not keep its memory."""
        self.begin = self.end = lambda: None
        self.after = ()


class _SimulatedMark:
    def __init__(self, device: SimulatedDevice, work: _Work | None) -> None:
        self._device, self.work = device, work

    def passed(self) -> bool:
        self._device.pass_time()
        return self.work is None or self.work.ended <= self._device.now

    def wait(self) -> None:
        self._device.waits += 1
        self._device.run_until(self.work)

    def seconds(self) -> float:
        assert self.work is not None and self.work.ended <= self._device.now, "not passed yet"
        return self.work.ended - self.work.started


class _Fetched:
    def __init__(self, end: _SimulatedMark, tensors: list[torch.Tensor]) -> None:
        self._end, self._tensors = end, tensors

    def wait(self) -> list[torch.Tensor]:
        self._end.wait()
        return self._tensors


class _LateLinear(QuantLinear):
    """The matrix is dequantised when the queue comes to it."""

    def __init__(
        self, device: SimulatedDevice, packed: PackedMatrix, dtype: torch.dtype, bias: nn.Parameter | None
    ) -> None:
        super().__init__(packed, dtype, bias)
        self._device = device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._device.empty((*x.shape[:-1], self.out_features), x.dtype)
        self._device.launch(lambda: y.copy_(F.linear(x, self.packed.dequantize(x.dtype), self.bias)))
        self._device.join()
        return y


class SimulatedDevice:
    """A `Device` in virtual time.

    Args:
        capacity: bytes.
        fail_at: which allocations, counted from 1, fail as if memory had run out.
        may_pin: whether RAM can be pinned.
    """

    name = "simulated"
    torch_device = torch.device("cpu")
    lacks: str | None = "The simulated device has no GPU kernels."

    def __init__(
        self,
        seed: int = 0,
        speeds: Speeds = DEFAULT_SPEEDS,
        capacity: int = 1 << 40,
        fail_at: Collection[int] = (),
        may_pin: bool = True,
    ) -> None:
        self.speeds, self.capacity, self.fail_at, self.may_pin = speeds, capacity, fail_at, may_pin
        self.linear: MakeLinear | None = functools.partial(_LateLinear, self)
        self.now = 0.0
        self.allocations = self.allocated_bytes = self.copied_bytes = 0
        self.waits = 0
        """How often the caller has blocked, if only for a moment."""
        self._at_host: list[torch.Tensor] = []
        self._random = random.Random(seed)
        self._compute: deque[_Work] = deque()
        self._copies: deque[_Work] = deque()
        self._free_at = {id(self._compute): 0.0, id(self._copies): 0.0}
        self._barrier: list[_Work] = []
        """What the next kernel waits for."""

    # The contract

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self.allocations += 1
        memory = torch.empty(shape, dtype=dtype)
        if self.allocations in self.fail_at or memory.nbytes > self.free_bytes():
            raise DeviceMemoryError(
                f"{self.name} has run out of memory: {memory.nbytes:,} bytes were asked for, {self.free_bytes():,} left"
            )
        self.allocated_bytes += memory.nbytes
        weakref.finalize(memory, self._freed, memory.nbytes)
        _poison(memory)
        return memory

    def launch(self, work: Callable[[], object]) -> None:
        self._enqueue(self._compute, self.speeds.kernel, work)

    def join(self) -> None:
        """A GPU would go on; torch here computes at once, so that everything before it has to be over."""
        self.run_until(self._end_of_compute())

    def compute_after(self, mark: Mark) -> None:
        self._barrier += _works((mark,))

    def mark(self) -> Mark:
        return _SimulatedMark(self, self._end_of_compute())

    def copy_in(self, target: torch.Tensor, source: torch.Tensor, after: Iterable[Mark]) -> Mark:
        self.copied_bytes += target.nbytes
        took = self.speeds.latency + target.nbytes / self.speeds.link
        work = self._enqueue(self._copies, took, lambda: _copy(target, source), lambda: _poison(target), _works(after))
        return _SimulatedMark(self, work)

    def timed(self, work: Callable[[], object]) -> Mark:
        self.launch(work)
        return self.mark()

    def put(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._enqueue(self._compute, self.speeds.latency, lambda: _copy(target, source), lambda: _poison(target))

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def to_host(self, tensors: list[torch.Tensor]) -> OnItsWay:
        for stale in self._at_host:
            _poison(stale)
        self._at_host = copies = [torch.empty_like(tensor) for tensor in tensors]

        def end() -> None:
            for target, source in zip(copies, tensors, strict=True):
                target.copy_(source)

        work = self._enqueue(self._compute, self.speeds.latency, end)
        return _Fetched(_SimulatedMark(self, work), copies)

    def discard(self, target: torch.Tensor, after: Iterable[Mark]) -> None:
        self._enqueue(self._copies, 0.0, lambda: _poison(target), after=_works(after))

    def pin(self, memory: torch.Tensor) -> str | None:
        return None if self.may_pin else "the simulated driver refused"

    def unpin(self, memory: torch.Tensor) -> None:
        pass

    def clock(self) -> float:
        return self.now

    def free_bytes(self) -> int:
        return self.capacity - self.allocated_bytes

    def limit(self, nbytes: int) -> None:
        self.capacity = min(self.capacity, nbytes)

    def trim(self) -> None:
        """Waits for both queues, as real devices do."""
        for queue in (self._compute, self._copies):
            self.run_until(queue[-1] if queue else None)

    # Virtual time

    def pass_time(self) -> None:
        """The caller has been busy; queued work went on meanwhile."""
        self._advance(self.now + self._random.expovariate(1 / self.speeds.host))

    def run_until(self, work: _Work | None) -> None:
        """Let time pass until this is over."""
        while work is not None and work.ended > self.now:
            self._advance(min(self._next_event(queue) for queue in (self._compute, self._copies)))

    def _enqueue(
        self,
        queue: deque[_Work],
        took: float,
        end: Callable[[], object],
        begin: Callable[[], object] = lambda: None,
        after: Iterable[_Work] = (),
    ) -> _Work:
        self.pass_time()
        if queue is self._compute:
            after, self._barrier = (*after, *self._barrier), []
        took *= 1 + self.speeds.jitter * self._random.random()
        work = _Work(self.now, took, end, begin, after)
        queue.append(work)
        return work

    def _end_of_compute(self) -> _Work | None:
        return self._compute[-1] if self._compute else None

    def _next_event(self, queue: deque[_Work]) -> float:
        """When the first entry begins, if it has not, or ends; infinity while it waits for something."""
        if not queue:
            return math.inf
        work = queue[0]
        if work.started < math.inf:
            return work.started + work.took
        return max(work.queued, self._free_at[id(queue)], *(other.ended for other in work.after))

    def _advance(self, until: float) -> None:
        assert until < math.inf, "both queues wait for something that is not queued"
        while True:
            queue = min((self._compute, self._copies), key=self._next_event)
            event = self._next_event(queue)
            if event > until:
                break
            self.now = max(self.now, event)
            work = queue[0]
            if work.started == math.inf:
                work.started = event
                work.begin()
            else:
                work.ended = self._free_at[id(queue)] = event
                work.end()
                work.let_go()
                queue.popleft()
        self.now = until

    def _freed(self, nbytes: int) -> None:
        self.allocated_bytes -= nbytes


def _works(marks: Iterable[Mark]) -> list[_Work]:
    return [mark.work for mark in marks if isinstance(mark, _SimulatedMark) and mark.work is not None]


def _poison(memory: torch.Tensor) -> None:
    memory.view(torch.uint8).fill_(_POISON)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)
