"""The plan of a load, made before anything large is read: what goes where, and how long the context can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from . import hf, memory
from .config import OffloadConfig
from .device import Device
from .device_tier import device_needs, plan_device
from .errors import MemoryBudgetError, UsageError
from .manifest import Manifest
from .placement import VramNeeds, VramPlan
from .source import OnNotice
from .trunk import largest_tensor, trunk_bytes
from .workspace import Workspace

CONTEXTS = (4096, 3072, 2048, 1536, 1024)
"""The largest of these that fits is the default context."""
GROWTH = 32 << 20
"""What libraries may still load after the first plan."""
Plans = TypeVar("Plans")


def plan_load(
    skeleton: hf.Skeleton,
    manifest: Manifest,
    config: OffloadConfig,
    workspace: Workspace,
    kv_dtype: torch.dtype | None,
    packed: bool,
    device: Device | None,
    on_notice: OnNotice,
) -> tuple[memory.MemoryPlan, VramPlan | None]:
    """Divide RAM, and a device's memory, for the context that was asked for or the largest usual one that fits.

    Args:
        packed: the trunk's packed matrices stay so in memory.

    Raises:
        UsageError: the context is longer than the model's.
        MemoryBudgetError: a budget cannot hold what has to be there; says what would.
    """
    longest = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None) or CONTEXTS[0]
    if config.context and config.context > longest:
        raise UsageError(f"context {config.context:,} is more than the {longest:,} tokens that this model was made for")
    contexts = usual_contexts(config.context, longest)
    memory.return_freed_memory()  # this process may have done other work before
    program = memory.resident_bytes()
    kv_bytes = hf.measure_kv_growth(skeleton, config.prefill_chunk, kv_dtype)

    def needs_of(context: int) -> memory.Needs:
        return memory.Needs(
            program=program,
            trunk=trunk_bytes(manifest, skeleton, packed),
            kv=kv_bytes(context),
            workspace=workspace.bytes(min(config.prefill_chunk, context), context),
            step=workspace.bytes(1, context),
            record=manifest.record_bytes,
            experts=manifest.num_experts,
            floor=sum(layer.top_k for layer in manifest.layers),
            context=context,
        )

    def plan(needs: memory.Needs) -> tuple[memory.MemoryPlan, VramPlan | None]:
        above = None
        if device is not None:
            on_device, needs = with_device(needs, manifest, skeleton)
            above = plan_device(device, config, on_device)
        return memory.make_plan(needs, config.ram, config.slots), above

    plans = first_that_fits(contexts, needs_of, plan)
    context = plans[0].needs.context
    if context != contexts[0]:
        on_notice(f"the budget has room for a context of {context:,} tokens, not for {contexts[0]:,}")
    return plans


def usual_contexts(context: int | None, longest: int) -> list[int]:
    """The one that was asked for, or those to be tried, longest first; none beyond what the model was made for."""
    return [context] if context else sorted({min(longest, usual) for usual in CONTEXTS}, reverse=True)


def first_that_fits(
    contexts: list[int], needs_of: Callable[[int], memory.Needs], plan: Callable[[memory.Needs], Plans]
) -> Plans:
    """The plans for the first context that they can be made for. Raises the MemoryBudgetError of the last of all."""
    refusal = None
    for context in contexts:
        needs = needs_of(context)
        try:
            if context != contexts[0]:  # not so close that what libraries load later would not fit
                plan(needs._replace(program=needs.program + GROWTH))
            return plan(needs)
        except MemoryBudgetError as error:
            refusal = error  # the shortest context needs the least
    assert refusal is not None
    raise refusal


def with_device(needs: memory.Needs, manifest: Manifest, skeleton: hf.Skeleton) -> tuple[VramNeeds, memory.Needs]:
    """What a device takes of a model's needs, and what is left to RAM: slots, and the trunk's tensors on their way."""
    passing = needs.step + largest_tensor(manifest, skeleton)
    on_device = device_needs(needs.trunk, needs.kv, needs.workspace, needs.record, manifest, needs.context)
    return on_device, needs._replace(trunk=0, kv=0, workspace=passing, step=passing)
