"""The GPU kernels, in Triton: experts computed from records that lie in GPU memory, with the contract of `kernels.py`.

This file is the host's side and may be imported without Triton; `triton_device.py` is the device's. With tensors in
main memory the same code runs in Triton's interpreter, which is slow and meant for tests.

A job of few rows is computed row by row in float32. For one of more, tensor cores multiply the codes, which stay exact,
by activations cut into two bfloat16 numbers; sums are float32. Beside float32's own rounding, a projection W x is then
at most 2^-14 |W| |x| from exact. Which of the two depends on the job's own number of rows only, and no sum is split
between programs: results are the same, bit for bit, whatever else is in the call.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from .activations import KINDS, Activation
from .codecs import ExpertShape, RecordLayout
from .int4 import MINIMUM, ROW_BLOCK, SYMMETRIC, ZERO_POINT, Int4Format, round_up
from .int8 import Int8Format
from .mxfp4 import Mxfp4Format

if TYPE_CHECKING:
    from .kernels import ExpertJob

# What can be tuned. Chosen by reasoning and by the compiler's output, for memory-bound work on consumer GPUs.
MATVEC_ROWS = 4
"""Up to so many rows a job is computed row by row: each row reads the codes again, but from the L2 cache."""
MATVEC_CHUNKS = (64, 32)
"""Of 64 bytes that a matvec program reads at once; whichever wastes less of the last read, else the first."""
MATVEC_WARPS = 4
TILE_TOKENS = (16, 32)
"""Rows of a job that share one read of the codes; the smallest that holds the job, else the last."""
TILE_ROWS = 64
TILE_COLS = 32
"""No more than the smallest group."""
TILE_WARPS = 4

CAPABILITY = (8, 0)
"""What Triton and bfloat16 need: Ampere or newer."""


class TritonError(RuntimeError):
    """There is no Triton."""


@cache
def load_triton() -> ModuleType | None:
    """Triton, or None; `why_missing` then says why."""
    try:
        import triton
        import triton.knobs
    except ImportError:
        return None
    return triton


def why_missing() -> str:
    """Why `load_triton` found nothing, and what to do: one or two sentences."""
    if load_triton() is not None:
        return "Triton is there."
    if importlib.util.find_spec("triton") is not None:
        return "The installed Triton cannot be used; pip install 'pocketmoe[gpu]' brings one that can."
    if sys.platform == "linux":
        return "Triton is not installed; pip install 'pocketmoe[gpu]' brings it."
    return "Triton is not installed; there are wheels of it for Linux (triton) and for Windows (triton-windows)."


@cache
def device_code(interpret: bool) -> Any:
    """`triton_device.py`, a copy of its own for the interpreter: Triton decides when it meets a function."""
    triton = load_triton()
    if triton is None:
        raise TritonError(why_missing())
    name = f"{__package__}.triton_device" + ("_interpreted" if interpret else "")
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("triton_device.py"))
    assert spec is not None and spec.loader is not None, name
    module = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = interpret
        spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class PackedShape:
    """How a kernel reads a packed matrix."""

    rows: int
    cols: int
    codes: Literal["int4", "int8", "mxfp4"]
    word: int
    """Columns in four bytes of codes."""
    group: int
    padded: int
    """Columns with their padding."""
    head: int
    body: int
    """Bytes of the scales and of the codes of a block of 16 rows."""
    minimums: int | None
    """Where the minimums lie in such a block, in bytes; None where the weights' zero is a fixed code."""
    words: bool
    """Scales and minimums are those of `int4.ZERO_POINT`."""

    @classmethod
    def of(cls, fmt: Int4Format | Int8Format | Mxfp4Format, rows: int, cols: int) -> PackedShape:
        padded, wide = round_up(cols, fmt.group), isinstance(fmt, Int8Format)
        head, body = fmt.block_bytes(cols)
        kind = fmt.kind if isinstance(fmt, Int4Format) else SYMMETRIC
        return cls(
            rows=rows,
            cols=cols,
            codes="int8" if wide else "mxfp4" if isinstance(fmt, Mxfp4Format) else "int4",
            word=4 if wide else 8,
            group=fmt.group,
            padded=padded,
            head=head,
            body=body,
            minimums={MINIMUM: padded // fmt.group * ROW_BLOCK * 2, ZERO_POINT: 0}.get(kind),
            words=kind == ZERO_POINT,
        )


@dataclass(frozen=True)
class Projection(PackedShape):
    """What an expert's kernel is compiled for: one launch's matrices, and what to do with their products.

    Offsets are in bytes from the record's start.
    """

    up: int
    gate: int | None
    up_bias: int | None
    gate_bias: int | None
    activation: Activation | None
    gather: bool


class Launch(NamedTuple):
    """Pieces of work that one kernel takes at a time."""

    tokens: int
    """The most rows of a piece."""
    first: int
    pieces: int


class Schedule(NamedTuple):
    """How a call's jobs are divided: into pieces of at most so many rows, those of one size together."""

    table: torch.Tensor
    """int64 [pieces, 3]: the record's address, its first assignment, how many."""
    launches: tuple[Launch, ...]


def schedule(jobs: Sequence[ExpertJob]) -> Schedule:
    """Divide jobs into pieces; the table lies in main memory."""
    by_size: dict[int, list[tuple[int, int, int]]] = {}
    for record, start, count in jobs:
        size = 1 if count <= MATVEC_ROWS else next((n for n in TILE_TOKENS if count <= n), TILE_TOKENS[-1])
        address, end = record.data_ptr(), start + count
        pieces = [(address, at, min(size, end - at)) for at in range(start, end, size)]
        by_size.setdefault(size, []).extend(pieces)
    launches, table = [], []
    for size in sorted(by_size):
        launches.append(Launch(size, len(table), len(by_size[size])))
        table += by_size[size]
    return Schedule(torch.tensor(table, dtype=torch.int64).reshape(-1, 3), tuple(launches))


class TritonKernels:
    """Experts of one shape and codec on a GPU: implements `kernels.ResidentKernels` for tensors that lie there.

    Records must start on multiples of 64 bytes. Nothing waits for the GPU: work is queued on torch's current stream.
    The kernels are compiled at their first use, and for all processes of this user.

    Args:
        fmt: of the packed matrices.
        layout, shape: of the records.
        activation: what joins gate and up projections.

    Raises:
        ValueError: an activation that is unknown or does not fit the shape.
        TritonError: Triton is not installed.
    """

    name = "triton"

    def __init__(
        self, fmt: Int4Format | Mxfp4Format, layout: RecordLayout, shape: ExpertShape, activation: Activation
    ) -> None:
        if activation.kind not in KINDS:
            raise ValueError(f"unknown activation {activation.kind!r}; known: {', '.join(KINDS)}")
        if activation.has_gate != shape.has_gate:
            raise ValueError(f"activation {activation.kind!r} does not fit experts with has_gate={shape.has_gate}")
        if load_triton() is None:
            raise TritonError(why_missing())

        def projection(cols: int, up: str, gate: str | None, activation: Activation | None) -> Projection:
            offsets = {name: part.offset for name, part in layout.parts.items()}
            return Projection(
                **vars(PackedShape.of(fmt, layout.parts[up].shape[0], cols)),
                up=offsets[up],
                gate=offsets[gate] if gate else None,
                up_bias=offsets.get(f"{up}_bias"),
                gate_bias=offsets.get(f"{gate}_bias"),
                activation=activation,
                gather=activation is not None,
            )

        self.shape = shape
        self.gate_up = projection(shape.hidden, "up_proj", "gate_proj" if shape.has_gate else None, activation)
        self.down = projection(shape.intermediate, "down_proj", None, None)

    def workspace(self, rows: int) -> int:
        """Bytes of GPU memory that a call with so many assignments takes and gives back."""
        return rows * self.shape.intermediate * 4

    def run(self, hidden: torch.Tensor, rows: torch.Tensor, jobs: Sequence[ExpertJob], out: torch.Tensor) -> None:
        """See `kernels.ExpertKernels.run`."""
        table, launches = schedule(jobs)
        if hidden.is_cuda:  # pinned memory is torch's own until the copy is over; any other, only CUDA has read by then
            table = table.pin_memory()
        self.launch(hidden, rows, Schedule(table.to(hidden.device, non_blocking=True), launches), out)

    def launch(self, hidden: torch.Tensor, rows: torch.Tensor, schedule: Schedule, out: torch.Tensor) -> None:
        """`run` with a schedule whose table lies on the device already."""
        table, launches = schedule
        _require_floats(hidden, out)
        assert rows.dtype is torch.int32 and table.dtype is torch.int64, (rows.dtype, table.dtype)
        inner = torch.empty(len(rows), self.shape.intermediate, device=hidden.device)
        with torch.cuda.device_of(hidden):
            for launch in launches:
                _project(table, launch, hidden, rows, inner, self.gate_up)
                _project(table, launch, inner, rows, out, self.down)

    def run_resident(
        self, hidden: torch.Tensor, chosen: torch.Tensor, addresses: torch.Tensor, out: torch.Tensor
    ) -> None:
        """See `kernels.ResidentKernels.run_resident`."""
        _require_floats(hidden, out)
        assert chosen.dtype is addresses.dtype is torch.int64, (chosen.dtype, addresses.dtype)
        inner = torch.empty(len(chosen), self.shape.intermediate, device=hidden.device)
        with torch.cuda.device_of(hidden):
            for x, y, p in ((hidden, inner, self.gate_up), (inner, out, self.down)):
                _kernel, constants, options, tile = variant(1, p, code := device_code(not x.is_cuda), not x.is_cuda)
                grid = len(chosen), -(-p.rows // tile)
                code.matvec_resident[grid](chosen, addresses, x, y, **constants, **options)


def _require_floats(hidden: torch.Tensor, out: torch.Tensor) -> None:
    for name, tensor in (("hidden", hidden), ("out", out)):
        assert tensor.dtype is torch.float32 and tensor.is_contiguous(), (name, tensor.dtype, tensor.stride())


class Variant(NamedTuple):
    """One compilation of a kernel."""

    kernel: Any
    constants: dict[str, Any]
    options: dict[str, Any]
    rows: int
    """Rows of the matrices that one program computes."""


def launch_options(tokens: int) -> dict[str, Any]:
    """What Triton compiles a kernel with whose programs compute so many rows."""
    # Triton's default for contracting products and sums to fma changes between its versions.
    return {"num_warps": MATVEC_WARPS if tokens == 1 else TILE_WARPS, "enable_fp_fusion": True}


def variant(tokens: int, p: Projection, code: Any, interpret: bool) -> Variant:
    """The kernel of `code`, a copy of `triton_device.py`, for pieces of so many rows."""
    options = launch_options(tokens)
    if tokens == 1:
        chunks = min(MATVEC_CHUNKS, key=lambda n: round_up(p.padded // 8, n))
        return Variant(code.matvec, {"P": p, "CHUNKS": chunks}, options, ROW_BLOCK)
    operand = code.tl.float32 if interpret else code.tl.bfloat16
    tiles = {"TOKENS": tokens, "TILE_ROWS": TILE_ROWS, "TILE_COLS": TILE_COLS, "OPERAND": operand}
    return Variant(code.matmul, {"P": p, **tiles}, options, TILE_ROWS)


def _project(
    table: torch.Tensor, launch: Launch, x: torch.Tensor, rows: torch.Tensor, y: torch.Tensor, p: Projection
) -> None:
    interpret = not x.is_cuda
    kernel, constants, options, tile = variant(launch.tokens, p, device_code(interpret), interpret)
    kernel[launch.pieces, -(-p.rows // tile)](table, launch.first, x, rows, y, **constants, **options)
