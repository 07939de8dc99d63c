"""Computing experts from their records: the contract, and its torch implementation.

A kernel knows one layer's record layout and nothing of caches. The native kernels in `native.py` implement the same
contract.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from . import int4
from .codecs import Codec, Int4Codec, RecordLayout

ApplyGate = Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor]


class ExpertJob(NamedTuple):
    """One expert and its share of the assignments of tokens to experts."""

    record: torch.Tensor
    """uint8 [record bytes], in a slot, 64-byte aligned."""
    start: int
    """First row of the share in `rows` and `out`."""
    count: int


class ExpertKernels(Protocol):
    """Computes the experts of one layer."""

    name: str

    def run(self, hidden: torch.Tensor, rows: torch.Tensor, jobs: Sequence[ExpertJob], out: torch.Tensor) -> None:
        """Write each job's expert applied to its tokens, not weighted by the router.

        The result of a job does not depend, to the bit, on which other jobs are in the call.

        Args:
            hidden: float32 [T, H], contiguous.
            rows: int32 [R], the token of each assignment.
            jobs: each covers rows `start` to `start + count`.
            out: float32 [R, H].
        """
        ...


@runtime_checkable
class ResidentKernels(ExpertKernels, Protocol):
    """Kernels that find the records of a single token's experts themselves, in the memory that they compute in."""

    def run_resident(
        self, hidden: torch.Tensor, chosen: torch.Tensor, addresses: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Write each chosen expert's output, those whose address is 0 excepted; the same, to the bit, as `run` would.

        Args:
            hidden: float32 [1, H], contiguous.
            chosen: int64 [k].
            addresses: int64 [E], of each expert's record.
            out: float32 [k, H], in the order of `chosen`.
        """
        ...


class TorchKernels:
    """Plain torch, for any codec and any activation; the reference for faster kernels and the fallback without them.

    Args:
        apply_gate: joins gate and up projections, each [rows, intermediate]; gate is None for experts without one.
    """

    name = "torch"

    def __init__(self, codec: Codec, layout: RecordLayout, apply_gate: ApplyGate) -> None:
        self.codec, self.layout, self.apply_gate = codec, layout, apply_gate

    def run(self, hidden: torch.Tensor, rows: torch.Tensor, jobs: Sequence[ExpertJob], out: torch.Tensor) -> None:
        for record, start, count in jobs:
            x = hidden[rows[start : start + count].long()]
            gate = self._linear(record, "gate_proj", x) if "gate_proj" in self.layout.parts else None
            inner = self.apply_gate(gate, self._linear(record, "up_proj", x))
            out[start : start + count] = self._linear(record, "down_proj", inner)

    def _linear(self, record: torch.Tensor, name: str, x: torch.Tensor) -> torch.Tensor:
        part = self.layout.parts[name]
        shape = (part.shape[0], part.shape[1])
        data = record[part.offset : part.offset + part.nbytes]
        bias = self.layout.parts.get(f"{name}_bias")
        bias_data = None if bias is None else record[bias.offset : bias.offset + bias.nbytes].view(torch.float32)
        if isinstance(self.codec, Int4Codec) and x.shape[0] == 1:
            y = int4.matvec(data, *shape, self.codec.fmt, x[0])[None]
            return y if bias_data is None else y + bias_data
        return F.linear(x, self.codec.decode_matrix(data, shape, torch.float32), bias_data)
