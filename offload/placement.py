"""How a GPU's memory is divided, as arithmetic alone: no device is asked, so that it can be planned for from anywhere.

What every token reads comes first: the trunk, then the KV cache. What is left are slots for experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..cache.units import format_bytes
from .errors import VramBudgetError
from .memory import Needs

CUDA_CONTEXT = 400_000_000
"""What a process holds on the GPU before its first tensor: the driver's context, and the kernels of torch and cuBLAS.
Drivers and cards differ (about 300 to 500 MB); measure it where a GPU is there."""
CUDA_LIBRARIES = 700_000_000
"""What CUDA's libraries and the driver take in RAM beside: an assumption."""
LEAVE_FREE = 0.08
"""Share of the free memory of a device that an automatic budget leaves: screens, and what libraries take late."""
STEP = 256
"""Contexts are proposed in multiples of this many tokens."""


class VramNeeds(NamedTuple):
    """What a model asks of a GPU, in bytes unless said otherwise."""

    trunk: int
    kv: int
    workspace: int
    """Transient memory of the largest forward pass: torch keeps what it has once taken."""
    record: int
    experts: int
    """Number of experts in the model."""
    context: int
    """Tokens that `kv` is for."""
    floor: int = 0
    """Number of slots below which the tier cannot work. None are needed where misses are computed from RAM."""
    program: int = CUDA_CONTEXT

    @property
    def fixed(self) -> int:
        """What slots have to leave free."""
        return self.program + self.trunk + self.kv + self.workspace


@dataclass(frozen=True)
class VramPlan:
    """How a GPU's budget is divided. `str(plan)` is one line for the user."""

    needs: VramNeeds
    budget: int
    slots: int

    @property
    def slot_bytes(self) -> int:
        return self.slots * self.needs.record

    @property
    def left(self) -> int:
        """Bytes that nothing uses."""
        return self.budget - self.needs.fixed - self.slot_bytes

    def __str__(self) -> str:
        n, size = self.needs, format_bytes
        return (
            f"VRAM: {size(self.budget)} = CUDA {size(n.program)} + trunk {size(n.trunk)} + KV cache {size(n.kv)} "
            f"({n.context:,} tokens) + workspace {size(n.workspace)} + {self.slots:,} experts {size(self.slot_bytes)}"
        )


def plan_vram(needs: VramNeeds, vram: int, slots: int | None = None) -> VramPlan:
    """Divide a GPU's memory: everything fixed first, the rest is slots.

    Args:
        vram: the budget in bytes, for the whole process.
        slots: a number of slots to use instead of what is left (for tests and benchmarks).

    Raises:
        VramBudgetError: the budget cannot hold the fixed part and the floor of slots; says what would.
    """
    most = (vram - needs.fixed) // needs.record
    if slots is not None and slots > most:
        raise VramBudgetError(
            f"{slots} slots of {format_bytes(needs.record)} do not fit into {format_bytes(vram)} of VRAM, "
            f"at most {max(most, 0)} do"
        )
    chosen = min(most, needs.experts) if slots is None else slots
    if vram < needs.fixed or chosen < needs.floor:
        raise VramBudgetError(_refusal(needs, vram))
    return VramPlan(needs, vram, chosen)


def _refusal(needs: VramNeeds, vram: int) -> str:
    size, least = format_bytes, needs.fixed + needs.floor * needs.record
    spare = vram - (least - needs.kv)
    shorter = spare * needs.context // needs.kv // STEP * STEP if needs.kv and spare > 0 else 0
    remedy = f"give it --vram {-(-least // 10_000_000) * 10}MB or more"
    if shorter:
        remedy = f"--context {shorter} would fit, or {remedy}"
    floor = f", and {needs.floor} expert slots ({size(needs.floor * needs.record)})" if needs.floor else ""
    return (
        f"the VRAM budget is {size(vram)}, but this model needs at least {size(least)} of it: CUDA "
        f"{size(needs.program)}, trunk {size(needs.trunk)}, KV cache {size(needs.kv)} for {needs.context:,} tokens, "
        f"workspace {size(needs.workspace)}{floor}; {remedy}"
    )


def with_device(needs: Needs, layers: int, largest: int) -> tuple[VramNeeds, Needs]:
    """What a device takes of a model's needs, one slot for each layer at least, and what is left to RAM: slots, and the
    trunk's tensors on their way.

    Args:
        layers: MoE layers.
        largest: bytes of the trunk's largest tensor.
    """
    passing = needs.step + largest
    on_device = VramNeeds(
        needs.trunk, needs.kv, needs.workspace, needs.record, needs.experts, needs.context, floor=layers
    )
    return on_device, needs._replace(trunk=0, kv=0, workspace=passing, step=passing)


def longest_context(bytes_of: Callable[[int], int], room: int, longest: int) -> int:
    """The most tokens, a multiple of STEP or `longest` itself, whose memory fits; 0 when not even STEP tokens do.

    Args:
        bytes_of: what a context of that many tokens takes, growing with it.
        room: bytes for it.
        longest: tokens that the model was made for.
    """
    if bytes_of(longest) <= room:
        return longest
    low, high = 0, -(-longest // STEP)  # in steps: `low` fits, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bytes_of(middle * STEP) <= room else (low, middle)
    return low * STEP
