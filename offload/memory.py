"""What the machine has, what this process uses, and the plan that divides a budget before anything large is read."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import psutil

from ..cache.units import as_option, format_bytes
from .errors import MemoryBudgetError

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_CGROUP_USAGE = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")
LEAVE_FREE = 0.15
"""Share of the available memory that an automatic budget leaves to other programs."""


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return psutil.Process().memory_info().rss


def peak_resident_bytes() -> int:
    """The most resident memory that this process ever had."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int:
    """Memory that can be taken without swapping: the system's, or what a container's limit leaves if that is less."""
    available = psutil.virtual_memory().available
    for limit_file, usage_file in zip(_CGROUP_LIMITS, _CGROUP_USAGE, strict=True):
        try:
            limit = int(Path(limit_file).read_text())
            usage = int(Path(usage_file).read_text())
        except (OSError, ValueError):
            continue
        # Page cache counts as usage but is given back on demand: what this process holds is the floor.
        available = min(available, max(limit - min(usage, resident_bytes()), 0))
    return available


def return_freed_memory() -> None:
    """Ask the C library to give freed memory back to the system (glibc keeps it otherwise)."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def left_for_child(ram: int | None) -> int | None:
    """What a budget leaves to a child process; None when there is no budget."""
    return None if ram is None else ram - resident_bytes()


class KvGrowth(NamedTuple):
    """Bytes of the KV cache by tokens of context."""

    layers: Sequence[tuple[int, int]]
    """For each layer, bytes of a token and the most tokens that are kept; empty where not all are like that."""
    points: Sequence[tuple[int, int]] = ()
    """Then, what was measured: contexts, the least first, and their bytes. In between and beyond, lines through them:
    right for states that do not grow, and for windows of thousands of tokens more than they take in the end."""

    def at(self, context: int) -> int:
        if self.layers:
            return sum(width * min(context, most) for width, most in self.layers)
        (low, less), (high, more) = next(
            (pair for pair in zip(self.points, self.points[1:], strict=False) if context < pair[1][0]), self.points[-2:]
        )
        return more + (more - less) * (context - high) // (high - low)


class Needs(NamedTuple):
    """What a model asks for, in bytes unless said otherwise."""

    program: int
    """Resident already: Python, torch, the model's skeleton, the tokenizer."""
    trunk: int
    kv: int
    workspace: int
    """Transient memory of a forward pass over a piece of a prompt."""
    step: int
    """The same for a single token; prompts borrow the difference from the experts' slots."""
    record: int
    experts: int
    """Number of experts in the model."""
    floor: int
    """Number of slots below which a layer could not run: MoE layers x top-k."""
    context: int
    """Tokens that `kv` is for."""

    @property
    def fixed(self) -> int:
        """What slots have to leave free while a prompt is read."""
        return self.program + self.trunk + self.kv + self.workspace

    @property
    def fixed_in_answers(self) -> int:
        """What slots have to leave free otherwise."""
        return self.fixed - self.workspace + self.step


@dataclass(frozen=True)
class MemoryPlan:
    """How a budget is divided. `str(plan)` is what the user sees before the first token."""

    needs: Needs
    budget: int
    automatic: bool
    slots: int

    @property
    def slot_bytes(self) -> int:
        return self.slots * self.needs.record

    def slots_beside(self, workspace: int) -> int:
        """How many of the slots may be in use while a forward pass needs that many bytes; at least the floor."""
        left = self.budget - self.needs.fixed + self.needs.workspace - workspace
        return max(self.needs.floor, min(self.slots, left // self.needs.record))

    def __str__(self) -> str:
        n, size = self.needs, format_bytes
        budget = size(self.budget)
        if self.automatic:
            all_fit = self.slots == n.experts
            budget += f" ({'all that it can use' if all_fit else f'{1 - LEAVE_FREE:.0%} of what is free'})"
        on_disk = n.experts - self.slots
        where = f"{self.slots:,} fit in RAM ({size(self.slot_bytes)})"
        lent = self.slots - self.slots_beside(n.workspace)
        if lent > 0:
            where += f", {lent:,} of them lent to prompts while they are read"
        if on_disk > 0:
            where += f" | {on_disk:,} stay on disk ({size(on_disk * n.record)})"
        return (
            f"memory: {budget} = program {size(n.program)} + trunk {size(n.trunk)} + KV cache {size(n.kv)} "
            f"({n.context:,} tokens) + workspace {size(n.step)} + experts {size(self.slot_bytes)}\n"
            f"experts: {n.experts:,} of {size(n.record)}: {where}"
        )


def make_plan(needs: Needs, ram: int | None, slots: int | None = None) -> MemoryPlan:
    """Divide the budget: everything fixed first, the rest is slots.

    Args:
        ram: the budget in bytes, or None to choose one from what is free.
        slots: a number of slots to use instead of what is left (for tests and benchmarks).

    Raises:
        MemoryBudgetError: the budget cannot hold the fixed part and the floor of slots; says what would.
    """
    everything = needs.fixed + needs.experts * needs.record
    automatic = ram is None
    budget = ram if ram is not None else min(everything, resident_bytes() + int(available_bytes() * (1 - LEAVE_FREE)))
    most = (budget - needs.fixed_in_answers) // needs.record
    if slots is None:
        slots = max(0, min(most, needs.experts))
    elif slots > most:
        raise MemoryBudgetError(
            f"{slots} slots of {format_bytes(needs.record)} do not fit into {format_bytes(budget)}, "
            f"at most {max(most, 0)} do"
        )
    if slots < needs.floor or budget < needs.fixed + needs.floor * needs.record:
        least = needs.fixed + needs.floor * needs.record
        size = format_bytes
        lead = "this machine's free memory allows" if automatic else "the budget is"
        short = f", {size(least - budget)} too little" if size(least) == size(budget) else ""
        raise MemoryBudgetError(
            f"{lead} {size(budget)}{short}, but this model needs at least {size(least)}: "
            f"program {size(needs.program)}, trunk {size(needs.trunk)}, KV cache {size(needs.kv)} "
            f"for {needs.context:,} tokens, workspace {size(needs.workspace)}, "
            f"and {needs.floor} expert slots ({size(needs.floor * needs.record)}); {_remedy(needs, budget, least)}"
        )
    return MemoryPlan(needs, budget, automatic, slots)


def _remedy(needs: Needs, budget: int, least: int) -> str:
    per_token = needs.kv / needs.context
    spare = budget - (least - needs.kv)
    if per_token and spare > 256 * per_token:
        return f"--context {int(spare / per_token) // 256 * 256} would fit, or give it --ram {as_option(least)}"
    return f"give it --ram {as_option(least)} or more"


def adjust(plan: MemoryPlan, needs: Needs) -> MemoryPlan:
    """The same budget with needs that have been measured since, slots only ever fewer. A budget that was chosen is
    chosen again, because it followed from the needs."""
    if plan.automatic:
        again = make_plan(needs, None)
        return replace(again, slots=min(plan.slots, again.slots))
    if plan.slots * needs.record + needs.fixed_in_answers <= plan.budget and make_plan(needs, plan.budget):
        return replace(plan, needs=needs)
    return replace(plan, needs=needs, slots=min(make_plan(needs, plan.budget).slots, plan.slots))
