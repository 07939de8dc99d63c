"""The native CPU kernels, called with torch tensors. `native_library.py` finds and loads the library itself.

Activations are quantised to int8 in groups of 32 columns; weights stay as they are packed. Results are the same, bit
for bit, for any number of threads and any spread of rows over calls; they differ in rounding between instruction sets.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .activations import KINDS, Activation
from .codecs import ExpertShape, RecordLayout, get_codec, packed_format
from .int4 import Int4Format
from .int8 import Int8Format
from .mxfp4 import Mxfp4Format
from .native_library import NativeError, NativeLibrary, build, check, default_threads, load_native, main, why_missing

if TYPE_CHECKING:
    from .kernels import ExpertJob

__all__ = [
    "NativeError",
    "NativeKernels",
    "NativeLibrary",
    "NativeMatrix",
    "NativePool",
    "build",
    "check",
    "default_threads",
    "load_native",
    "why_missing",
]
PackedFormat = Int4Format | Int8Format | Mxfp4Format
_FORMATS = {"sym": 0, "asym": 1, "int8": 2, "mxfp4": 4, "zp": 5}
FLOAT32 = 3
"""`pm_format` of a matrix that is not packed."""


class _ExpertSpec(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")),
        *((name, ctypes.c_int32) for name in ("hidden", "intermediate", "format", "group", "activation")),
        ("alpha", ctypes.c_float),
        ("limit", ctypes.c_float),
    )


class Matrix(ctypes.Structure):
    """`pm_matrix`: y = x W^T + bias, W packed or plain float32."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("rows", "cols", "format", "group")),
    )


class NativePool:
    """Worker threads and their scratch memory; one per process is right for most uses.

    It may be shared between Python threads (calls wait for each other) and between any number of kernels. In a forked
    child it computes on the calling thread alone.

    Args:
        threads: the calling thread included; None = the physical cores.
        isa: force one of `NativeLibrary.isas`; None = the best.
        library: None = `load_native()`.

    Raises:
        NativeError: there is no library, or the processor lacks the instruction set.
    """

    def __init__(
        self, threads: int | None = None, isa: str | None = None, library: NativeLibrary | None = None
    ) -> None:
        library = library or load_native()
        if library is None:
            raise NativeError(why_missing())
        self.library = library
        self._threads = threads or default_threads()
        self.handle = library.c.pm_create(self._threads, isa.encode() if isa else None)
        if not self.handle:
            raise NativeError(f"instruction set {isa!r} is not available; this machine has {', '.join(library.isas)}")
        self._close = weakref.finalize(self, library.c.pm_destroy, self.handle)

    @property
    def isa(self) -> str:
        return self.library.c.pm_context_isa(self.handle).decode()

    @isa.setter
    def isa(self, isa: str) -> None:
        check(self.library.c.pm_set_isa(self.handle, isa.encode()), f"instruction set {isa!r}")

    @property
    def threads(self) -> int:
        return self._threads

    @threads.setter
    def threads(self, threads: int) -> None:
        check(self.library.c.pm_set_threads(self.handle, threads), f"threads={threads}")
        self._threads = threads

    def combine(self, parts: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
        """out[t] = the sum of weights[t, j] * parts[index[t, j]] over j, in that order; negative indices are skipped.

        Args:
            parts: float32 [R, H], contiguous, as all four.
            index: int32 [T, k]; sorted by expert, so that the sum does not depend on which expert came first.
            weights: float32 [T, k].
            out: float32 [T, H].
        """
        tokens, k = index.shape
        assert parts.dtype == weights.dtype == out.dtype == torch.float32, (parts.dtype, weights.dtype, out.dtype)
        assert index.dtype == torch.int32, index.dtype
        assert weights.shape == index.shape, (weights.shape, index.shape)
        assert out.shape == (tokens, parts.shape[1]), (out.shape, parts.shape)
        status = self.library.c.pm_combine(
            self.handle,
            parts.data_ptr(),
            index.data_ptr(),
            weights.data_ptr(),
            tokens,
            k,
            parts.shape[1],
            out.data_ptr(),
        )
        check(status, "pm_combine")

    def stream(self, buffers: Sequence[torch.Tensor]) -> int:
        """Read every byte of contiguous tensors once with all threads, for benchmarks: no kernel can be faster."""
        n = len(buffers)
        pointers = (ctypes.c_void_p * n)(*(b.data_ptr() for b in buffers))
        sizes = (ctypes.c_int64 * n)(*(b.nbytes for b in buffers))
        return self.library.c.pm_stream(self.handle, pointers, sizes, n)

    def close(self) -> None:
        """End the worker threads. Kernels made with this pool must not be used afterwards."""
        self._close()


def _format_fields(fmt: PackedFormat) -> dict[str, int]:
    if isinstance(fmt, Int4Format):
        name = fmt.kind
    else:
        name = "int8" if isinstance(fmt, Int8Format) else "mxfp4"
    return {"format": _FORMATS[name], "group": fmt.group}


class NativeKernels:
    """Experts of one shape and codec, computed by the native library: implements `kernels.ExpertKernels`.

    Args:
        codec: the codec's name or its format.
        layout, shape: of the records.
        activation: what joins gate and up projections.
        threads, isa: see `NativePool`; ignored with `pool`.
        pool: threads to share with other kernels.

    Raises:
        ValueError: a codec that the native kernels do not have, or an activation that does not fit the shape.
        NativeError: see `NativePool`.
    """

    def __init__(
        self,
        codec: str | Int4Format | Mxfp4Format,
        layout: RecordLayout,
        shape: ExpertShape,
        activation: Activation,
        threads: int | None = None,
        isa: str | None = None,
        pool: NativePool | None = None,
    ) -> None:
        fmt = _format_of(codec) if isinstance(codec, str) else codec
        if activation.kind not in KINDS:
            raise ValueError(f"unknown activation {activation.kind!r}; known: {', '.join(KINDS)}")
        if activation.has_gate != shape.has_gate:
            raise ValueError(f"activation {activation.kind!r} does not fit experts with has_gate={shape.has_gate}")
        self.pool = pool or NativePool(threads, isa)
        self.name = f"native-{self.pool.isa}"
        self.shape = shape

        def offset(name: str) -> int:
            return layout.parts[name].offset if name in layout.parts else -1

        self._spec = _ExpertSpec(
            gate=offset("gate_proj"),
            up=offset("up_proj"),
            down=offset("down_proj"),
            gate_bias=offset("gate_proj_bias"),
            up_bias=offset("up_proj_bias"),
            down_bias=offset("down_proj_bias"),
            hidden=shape.hidden,
            intermediate=shape.intermediate,
            activation=KINDS.index(activation.kind),
            alpha=activation.alpha,
            limit=activation.limit,
            **_format_fields(fmt),
        )
        self.spec_pointer = ctypes.addressof(self._spec)
        """Of the `pm_expert_spec`; valid as long as this object."""
        self._call = self.pool.library.c.pm_experts
        self._jobs = (ctypes.c_int64 * 0)()  # pm_job is three 64-bit integers; grown, reused, written in one assignment

    def run(self, hidden: torch.Tensor, rows: torch.Tensor, jobs: Sequence[ExpertJob], out: torch.Tensor) -> None:
        """See `kernels.ExpertKernels.run`."""
        assert hidden.dtype is torch.float32, hidden.dtype
        assert out.dtype is torch.float32, out.dtype
        assert rows.dtype is torch.int32, rows.dtype
        assert hidden.is_contiguous(), "hidden must be contiguous"
        assert out.is_contiguous(), "out must be contiguous"
        numbers = [number for record, start, count in jobs for number in (record.data_ptr(), start, count)]
        if len(self._jobs) < len(numbers):
            self._jobs = (ctypes.c_int64 * (2 * len(numbers)))()
        array = self._jobs
        array[: len(numbers)] = numbers
        status = self._call(
            self.pool.handle,
            self.spec_pointer,
            hidden.data_ptr(),
            len(hidden),
            rows.data_ptr(),
            len(rows),
            array,
            len(jobs),
            out.data_ptr(),
        )
        if status:
            check(status, f"pm_experts with {len(jobs)} jobs for hidden {tuple(hidden.shape)}")


def _format_of(codec: str) -> Int4Format | Mxfp4Format:
    fmt = packed_format(get_codec(codec))
    if fmt is None:
        raise ValueError(f"the native kernels have no codec {codec!r}, only packed INT4 and MXFP4")
    return fmt


class NativeMatrix:
    """A packed matrix of the trunk, y = x W^T + bias, on the same threads as the experts.

    Args:
        packed: uint8, as `pack` of `int4`, `int8` or `mxfp4` laid it out; kept, not copied.
        rows, cols: of the unpacked matrix (out_features, in_features).
        bias: float32 [rows], contiguous, or None.
    """

    def __init__(
        self,
        pool: NativePool,
        packed: torch.Tensor,
        rows: int,
        cols: int,
        fmt: PackedFormat,
        bias: torch.Tensor | None = None,
    ) -> None:
        if packed.nbytes != fmt.nbytes(rows, cols) or not packed.is_contiguous():
            raise ValueError(
                f"packed matrix has {packed.nbytes} bytes, [{rows}, {cols}] takes {fmt.nbytes(rows, cols)}"
            )
        if bias is not None and (bias.dtype != torch.float32 or bias.shape != (rows,) or not bias.is_contiguous()):
            raise ValueError(f"bias must be contiguous float32 [{rows}], not {bias.dtype} {tuple(bias.shape)}")
        self.pool, self.rows, self.cols = pool, rows, cols
        self._tensors = (packed, bias)  # keeps the addresses below alive
        self.spec = Matrix(
            data=packed.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            rows=rows,
            cols=cols,
            **_format_fields(fmt),
        )
        self._spec_pointer = ctypes.addressof(self.spec)
        self._call = pool.library.c.pm_linear

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x float32 [..., cols], contiguous, to float32 [..., rows]."""
        assert x.dtype is torch.float32, x.dtype
        assert x.shape[-1] == self.cols, (x.shape, self.cols)
        assert x.is_contiguous(), "x must be contiguous"
        if out is None:
            out = torch.empty(*x.shape[:-1], self.rows)
        status = self._call(
            self.pool.handle,
            self._spec_pointer,
            x.data_ptr(),
            x.numel() // self.cols,
            out.data_ptr(),
        )
        if status:
            check(status, f"pm_linear [{self.rows}, {self.cols}]")
        return out


if __name__ == "__main__":
    raise SystemExit(main())
