"""The plan of a load, made before anything large is read: what goes where, and how long the context can be."""

from __future__ import annotations

import torch

from . import hf, memory
from .config import OffloadConfig
from .contexts import CONTEXTS, first_that_fits, usual_contexts
from .device import Device
from .device_tier import plan_device
from .errors import UsageError
from .manifest import Manifest
from .placement import VramPlan, with_device
from .source import OnNotice
from .trunk import largest_tensor, trunk_bytes
from .workspace import Workspace


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
            on_device, needs = with_device(needs, len(manifest.layers), largest_tensor(manifest, skeleton))
            above = plan_device(device, config, on_device)
        return memory.make_plan(needs, config.ram, config.slots), above

    plans = first_that_fits(contexts, needs_of, plan)
    context = plans[0].needs.context
    if context != contexts[0]:
        on_notice(f"the budget has room for a context of {context:,} tokens, not for {contexts[0]:,}")
    return plans
