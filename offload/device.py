"""A device with memory of its own: one queue that computes, one that copies, and marks that order the two.

Everything that the runtime asks of a GPU is in the protocol `Device`. `TorchDevice` is written against
`torch.accelerator`, `torch.Stream` and `torch.Event`, so that CUDA, ROCm and XPU are the same code; what differs is
in `pin` alone. `simulated_device.py` has the twin that tests run on.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch

from ..quant.linear import MakeLinear
from ..quant.triton_kernels import CAPABILITY
from .errors import DeviceMemoryError, UsageError

_ALIGNMENT = 64
_QUEUED = ("cuda", "xpu")
"""Kinds with queues of their own. Apple's share the processor's memory: slots in RAM serve them as well."""


class Mark(Protocol):
    """A place in a queue. It is passed when all work that was queued before it is over."""

    def passed(self) -> bool: ...

    def wait(self) -> None:
        """Block the caller until it is passed."""
        ...

    def seconds(self) -> float:
        """How long the copy took whose end this marks. Only once it is passed."""
        ...


class OnItsWay(Protocol):
    """Tensors that travel to RAM."""

    def wait(self) -> list[torch.Tensor]:
        """Block the caller until they are there; valid until the next `to_host`. What was launched after they were
        asked for is not waited for."""
        ...


class Device(Protocol):
    """What computes the trunk and the resident experts.

    torch operations on the device's tensors belong to the compute queue, in program order.
    """

    name: str
    torch_device: torch.device
    lacks: str | None
    """Why the GPU kernels cannot run there; None if they can."""
    linear: MakeLinear | None
    """What multiplies by packed trunk matrices without them; None: these are dequantised."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory on the device, of undefined content. Raises DeviceMemoryError."""
        ...

    def launch(self, work: Callable[[], object]) -> None:
        """Queue a kernel: `work` computes on tensors of this device."""
        ...

    def join(self) -> None:
        """What has been launched precedes the torch operations that follow."""
        ...

    def compute_after(self, mark: Mark) -> None:
        """What is launched from now on begins when `mark` is passed. Does not block the caller."""
        ...

    def mark(self) -> Mark:
        """The present end of the compute queue."""
        ...

    def copy_in(self, target: torch.Tensor, source: torch.Tensor, after: Iterable[Mark]) -> Mark:
        """Queue a copy from pinned RAM on the copying queue; it begins when all of `after` are passed. The source must
        stay as it is until the returned mark is passed."""
        ...

    def timed(self, work: Callable[[], object]) -> Mark:
        """`launch`, and its end, which knows how long it took."""
        ...

    def put(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a small copy from RAM on the compute queue. The source must stay until a later `to_host` has been
        waited for, whether it is pinned or not."""
        ...

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """RAM that `put` need not wait to copy from: pinned, where that can be."""
        ...

    def to_host(self, tensors: list[torch.Tensor]) -> OnItsWay:
        """Queue copies to RAM on the compute queue. To wait for them is the only wait of a layer."""
        ...

    def discard(self, target: torch.Tensor, after: Iterable[Mark]) -> None:
        """Nobody will read this memory, once all of `after` are passed, before it is written again."""
        ...

    def pin(self, memory: torch.Tensor) -> str | None:
        """Lock pages of RAM for fast copies; returns why not, if it cannot."""
        ...

    def unpin(self, memory: torch.Tensor) -> None: ...

    def clock(self) -> float:
        """Seconds, for what the caller does meanwhile."""
        ...

    def free_bytes(self) -> int:
        """Memory that can still be taken, what torch holds in reserve included."""
        ...

    def limit(self, nbytes: int) -> None:
        """Take no more than this from now on, for tensors of any kind; what exceeds it is out of memory."""
        ...

    def trim(self) -> None:
        """Give memory that torch holds in reserve back to the device, once both queues are through: after an
        interruption there may be a copy of which nobody has a mark."""
        ...


class _TorchMark:
    """An event, and for what is timed the one before it."""

    __slots__ = ("_begin", "_end")

    def __init__(self, end: torch.Event, begin: torch.Event | None = None) -> None:
        self._end, self._begin = end, begin

    def passed(self) -> bool:
        return self._end.query()

    def wait(self) -> None:
        self._end.synchronize()

    def seconds(self) -> float:
        assert self._begin is not None, "this was not timed"
        return self._begin.elapsed_time(self._end) / 1000

    def hold_up(self, stream: torch.Stream) -> None:
        stream.wait_event(self._end)


class _Fetched:
    """Copies to RAM and the event behind them."""

    def __init__(self, tensors: list[torch.Tensor], end: Mark) -> None:
        self._tensors, self._end = tensors, end

    def wait(self) -> list[torch.Tensor]:
        self._end.wait()
        return self._tensors


class TorchDevice:
    """A GPU, through torch's own streams and events.

    Raises:
        UsageError: there is none of that name; says what there is.
    """

    linear: MakeLinear | None = None

    def __init__(self, name: str) -> None:
        self.torch_device = require_device(name)
        self.name = str(self.torch_device)
        self.lacks = kernel_obstacle(self.torch_device)
        torch.accelerator.set_device_index(self.torch_device.index or 0)
        self._copies = torch.Stream(device=self.torch_device)
        self._staging = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        with memory_errors(self.name):
            return torch.empty(shape, dtype=dtype, device=self.torch_device)

    def launch(self, work: Callable[[], object]) -> None:
        with memory_errors(self.name):
            work()

    def join(self) -> None:
        pass  # one and the same queue

    def compute_after(self, mark: Mark) -> None:
        assert isinstance(mark, _TorchMark)
        mark.hold_up(torch.accelerator.current_stream(self.torch_device))

    def mark(self) -> Mark:
        return _TorchMark(torch.accelerator.current_stream(self.torch_device).record_event())

    def copy_in(self, target: torch.Tensor, source: torch.Tensor, after: Iterable[Mark]) -> Mark:
        for mark in after:
            assert isinstance(mark, _TorchMark)
            mark.hold_up(self._copies)
        begin, end = (torch.Event(device=self.torch_device, enable_timing=True) for _ in range(2))
        compute = torch.accelerator.current_stream(self.torch_device)
        torch.accelerator.set_stream(self._copies)
        try:
            begin.record(self._copies)
            target.copy_(source, non_blocking=True)
            end.record(self._copies)
        finally:
            torch.accelerator.set_stream(compute)
        return _TorchMark(end, begin)

    def timed(self, work: Callable[[], object]) -> Mark:
        begin, end = (torch.Event(device=self.torch_device, enable_timing=True) for _ in range(2))
        begin.record()
        self.launch(work)
        end.record()
        return _TorchMark(end, begin)

    def put(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return _pinned(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)

    def to_host(self, tensors: list[torch.Tensor]) -> OnItsWay:
        offsets, end = [], 0
        for tensor in tensors:
            offsets.append(end)
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if self._staging.nbytes < end:
            self._staging = _pinned(end)
        out = []
        for tensor, offset in zip(tensors, offsets, strict=True):
            place = self._staging[offset : offset + tensor.nbytes].view(tensor.dtype).reshape(tensor.shape)
            out.append(place.copy_(tensor, non_blocking=True))
        return _Fetched(out, self.mark())

    def discard(self, target: torch.Tensor, after: Iterable[Mark]) -> None:
        pass  # its content does no harm; the simulated twin poisons it

    def pin(self, memory: torch.Tensor) -> str | None:
        if self.torch_device.type != "cuda":  # torch registers memory that it did not allocate with CUDA and ROCm only
            return f"torch has no call for it on {self.torch_device.type}"
        code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)  # type: ignore[union-attr]
        if int(code) == 0:
            return None
        with contextlib.suppress(RuntimeError):  # CUDA remembers it; torch would raise it at the next kernel
            torch.zeros(1, device=self.torch_device)
        return f"the driver refused, error {int(code)}"

    def unpin(self, memory: torch.Tensor) -> None:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[union-attr]

    def clock(self) -> float:
        return time.perf_counter()

    def free_bytes(self) -> int:
        module = torch.get_device_module(self.torch_device)
        free, _total = module.mem_get_info(self.torch_device)
        reserve = module.memory_reserved(self.torch_device) - module.memory_allocated(self.torch_device)
        return free + reserve

    def limit(self, nbytes: int) -> None:
        module = torch.get_device_module(self.torch_device)
        if hasattr(module, "set_per_process_memory_fraction"):
            _free, total = module.mem_get_info(self.torch_device)
            module.set_per_process_memory_fraction(min(1.0, nbytes / total), self.torch_device)

    def trim(self) -> None:
        torch.accelerator.synchronize(self.torch_device)
        torch.get_device_module(self.torch_device).empty_cache()


def require_device(name: str) -> torch.device:
    """The torch device of that name. Raises UsageError when it does not exist or has no memory of its own."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r} is none that torch knows; use cpu, cuda, cuda:1 or xpu") from None
    if device.type not in _QUEUED:
        raise UsageError(f"device {name!r} has no memory of its own to keep experts in; use --device cpu")
    count = torch.accelerator.device_count() if default_device() == device.type else 0
    if (device.index or 0) >= count:
        there = ", ".join(f"{default_device()}:{i}" for i in range(torch.accelerator.device_count())) or "no GPU at all"
        raise UsageError(f"device {name!r} does not exist: torch {torch.__version__} sees {there}; use --device cpu")
    return torch.device(device.type, device.index or 0)


def kernel_obstacle(device: torch.device) -> str | None:
    """Why the GPU kernels cannot run there, as a sentence; None if they can."""
    if device.type != "cuda":
        return f"The GPU kernels have not been made to work on {device.type}."
    if torch.version.hip is None and (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        has, needs = (".".join(map(str, pair)) for pair in (found, CAPABILITY))
        return f"{torch.cuda.get_device_name(device)} has compute capability {has}, the GPU kernels need {needs}."
    return None


def default_device() -> str:
    """The kind of GPU that torch can use now, "cpu" without one."""
    if not torch.accelerator.is_available():
        return "cpu"
    kind = torch.accelerator.current_accelerator()
    return kind.type if kind is not None and kind.type in _QUEUED else "cpu"


_RAN_OUT = re.compile(
    r"""(?x) out.?of.?memory  # CUDA, HIP, XPU and MPS, by torch or by Triton; hipErrorOutOfMemory
    | error.?memory.?allocation  # cudaErrorMemoryAllocation
    | (blas|dnn|fft|solver|sparse).status.alloc.failed | rocblas.status.memory.error
    | error.out.of.(device.memory|resources)  # of Level Zero's UR_RESULT and ZE_RESULT""",
    re.IGNORECASE,
)


def ran_out(error: BaseException) -> bool:
    """Whether it says that a device's memory has run out: only some of torch's own calls have a type for it."""
    known = isinstance(error, (DeviceMemoryError, torch.OutOfMemoryError))
    return known or (isinstance(error, RuntimeError) and _RAN_OUT.search(str(error)) is not None)


@contextlib.contextmanager
def memory_errors(name: str) -> Iterator[None]:
    """An error of torch, a library or a driver for memory that has run out, as ours."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        raise DeviceMemoryError(f"{name} has run out of memory: {str(error).splitlines()[0]}") from None


def _pinned(nbytes: int) -> torch.Tensor:
    with torch.inference_mode(False):  # it may be written to outside of it later
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:
            return torch.empty(nbytes, dtype=torch.uint8)
