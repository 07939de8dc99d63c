"""What of a model fits where on a machine, how fast it will be there, and which one change would help most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..cache.hit_curve import RECORDED, HitCurve, even_hits
from ..cache.units import format_bytes
from .contexts import first_that_fits, usual_contexts
from .errors import MemoryBudgetError
from .estimate import (
    GPU_LAYER_S,
    LAYER_S,
    PLAIN_LAYER_S,
    Bytes,
    Hits,
    Rates,
    Seconds,
    bytes_per_token,
    seconds_per_token,
)
from .memory import MemoryPlan, Needs, make_plan
from .outline import Outline
from .placement import CUDA_LIBRARIES, VramPlan, longest_context, plan_vram, with_device

WORTHWHILE = 1.03
"""A change that makes it faster by less is none."""


@dataclass(frozen=True)
class Machine:
    """What is planned for. `ram` and `vram` are budgets in bytes."""

    rates: Rates
    program: int
    """What Python, torch and the model's skeleton take in RAM."""
    ram: int | None = None
    """None = what this machine has free, less a rest."""
    vram: int | None = None
    """None = no GPU."""


@dataclass(frozen=True)
class Fit:
    """A model on a machine; `fit` makes it."""

    ram: MemoryPlan
    vram: VramPlan | None
    without_gpu: str
    """Why a GPU that is there is left out; empty where it is used, or there is none."""
    hits: Hits
    """As the curve expects them."""
    read: Bytes
    """For a token at the beginning of a conversation."""
    seconds: Seconds
    """Likewise."""
    full: float
    """Seconds for a token that fills the context."""
    even: float
    """Seconds for a token where every expert is as likely as any other."""
    longest: int
    """Tokens of context that still fit beside the fewest slots, at most what the model was made for."""

    @property
    def tokens_per_second(self) -> float:
        return 1 / self.seconds.total

    @property
    def on_disk(self) -> int:
        """Experts in no slot. What is in VRAM has been read from RAM and may still be there."""
        return self.ram.needs.experts - max(self.ram.slots, self.vram.slots if self.vram else 0)


class Change(NamedTuple):
    """Something to do, and the tokens per second that it would give."""

    what: str
    tokens_per_second: float


def fit(outline: Outline, machine: Machine, context: int | None = None, curve: HitCurve = RECORDED) -> Fit:
    """Place a model as `Model` does: the trunk first, KV cache, workspace, then slots.

    Args:
        context: tokens; by default the largest usual number that fits.

    Raises:
        MemoryBudgetError: it does not fit; says what would.
    """
    refusal, without_gpu = None, ""
    if machine.vram is not None:
        try:
            return _fit(outline, machine, context, curve, "")
        except MemoryBudgetError as error:
            refusal, without_gpu = error, str(error)
    try:
        return _fit(outline, replace(machine, vram=None), context, curve, without_gpu)
    except MemoryBudgetError as error:
        raise refusal or error from None


def _fit(outline: Outline, machine: Machine, context: int | None, curve: HitCurve, without_gpu: str) -> Fit:
    ram, vram = _in_usual_context(outline, machine, context)
    cycle, experts, needs = outline.cycle, ram.needs.experts, ram.needs
    on_gpu = vram is not None
    kv = vram.needs.kv if vram else needs.kv
    shared = (outline.gpu if vram else outline.cpu).trunk_read

    def seconds(hits: Hits, kv: int) -> tuple[Bytes, Seconds]:
        read = bytes_per_token(shared + kv, cycle * needs.record, hits, on_gpu)
        layer_s = GPU_LAYER_S if on_gpu else LAYER_S if outline.cpu.workspace.lean else PLAIN_LAYER_S
        return read, seconds_per_token(read, machine.rates, outline.decoder_layers, layer_s)

    def hits_of(share: Callable[[int], float]) -> Hits:
        in_vram = share(vram.slots) if vram else 0.0
        return Hits(in_vram, max(0.0, share(ram.slots) - in_vram))

    hits = hits_of(lambda slots: curve.hits(slots, cycle, experts))
    read, start = seconds(hits, 0)
    return Fit(
        ram=ram,
        vram=vram,
        without_gpu=without_gpu,
        hits=hits,
        read=read,
        seconds=start,
        full=seconds(hits, kv)[1].total,
        even=seconds(hits_of(lambda slots: even_hits(slots, experts)), 0)[1].total,
        longest=_longest(outline, machine, ram),
    )


def _in_usual_context(outline: Outline, machine: Machine, context: int | None) -> tuple[MemoryPlan, VramPlan | None]:
    """Both plans, for the context that was asked for or the largest usual one that fits."""
    on_gpu = machine.vram is not None

    def plans(needs: Needs) -> tuple[MemoryPlan, VramPlan | None]:
        if machine.vram is None:
            return make_plan(needs, machine.ram), None
        above, left = with_device(needs, len(outline.layers), outline.largest_tensor)
        left = left._replace(program=left.program + CUDA_LIBRARIES)
        return make_plan(left, machine.ram), plan_vram(above, machine.vram)

    contexts = usual_contexts(context, outline.longest)
    return first_that_fits(contexts, lambda tokens: outline.needs(tokens, machine.program, on_gpu), plans)


def _longest(outline: Outline, machine: Machine, ram: MemoryPlan) -> int:
    def taken(context: int) -> int:
        if machine.vram is None:
            needs = outline.needs(context, machine.program)
            return needs.fixed + needs.floor * needs.record
        needs = outline.needs(context, machine.program, on_gpu=True)
        above, _ = with_device(needs, len(outline.layers), outline.largest_tensor)
        return above.fixed + above.floor * above.record

    room = ram.budget if machine.vram is None else machine.vram
    return longest_context(taken, room, outline.longest)


def changes(
    outline: Outline,
    machine: Machine,
    context: int | None,
    now: Fit | None,
) -> list[Change]:
    """What would make it faster, or possible, the best first.

    Args:
        now: how it is; None when it does not fit.
    """
    found = [
        Change(what, 1 / fitted.seconds.total)
        for what, other, another in _candidates(outline, machine, now)
        if (fitted := _or_none(other, another, context)) is not None
    ]
    least = now.tokens_per_second * WORTHWHILE if now else 0.0
    return sorted((change for change in found if change.tokens_per_second > least), key=lambda c: -c[1])


def _candidates(outline: Outline, machine: Machine, now: Fit | None) -> Iterator[tuple[str, Outline, Machine]]:
    record, experts = outline.record_bytes, outline.num_experts
    ram = now.ram.budget if now else machine.ram
    if ram is not None and (now is None or now.ram.slots < experts):
        enough = ram + (experts - now.ram.slots) * record if now else 2 * ram
        more, holds = min(2 * ram, enough), ", which holds all experts" if enough <= 2 * ram and now else ""
        yield f"{format_bytes(more)} of RAM{holds}", outline, replace(machine, ram=more)
    if machine.vram is not None and (now is None or now.vram is None or now.vram.slots < experts):
        yield f"{format_bytes(2 * machine.vram)} of VRAM", outline, replace(machine, vram=2 * machine.vram)
    if now and now.read.disk:
        rates = machine.rates
        faster = rates._replace(disk=2 * rates.disk)
        yield f"a disk of {format_bytes(faster.disk)}/s", outline, replace(machine, rates=faster)
    if outline.smaller is not None:
        yield f"--trunk {outline.smaller.chosen.trunk_as}", outline.smaller, machine


def _or_none(outline: Outline, machine: Machine, context: int | None) -> Fit | None:
    try:
        return fit(outline, machine, context)
    except MemoryBudgetError:
        return None
