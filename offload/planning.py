"""The plan of a load, made before anything large is read: what goes where, and how long the context can be."""

from __future__ import annotations

import torch

from ..quant.native import NativePool
from . import hf, memory
from .config import OffloadConfig
from .device import Device
from .device_tier import device_needs, plan_device
from .errors import MemoryBudgetError, UsageError
from .manifest import Manifest
from .placement import VramPlan
from .source import OnNotice
from .trunk import largest_tensor, trunk_bytes
from .workspace import Workspace

CONTEXTS = (4096, 3072, 2048, 1536, 1024)
"""The largest of these that fits is the default context."""
GROWTH = 32 << 20
"""What libraries may still load after the first plan."""


def plan_load(
    skeleton: hf.Skeleton,
    manifest: Manifest,
    config: OffloadConfig,
    workspace: Workspace,
    kv_dtype: torch.dtype | None,
    pool: NativePool | None,
    device: Device | None,
    on_notice: OnNotice,
) -> tuple[memory.MemoryPlan, VramPlan | None]:
    """Divide RAM, and a device's memory, for the context that was asked for or the largest usual one that fits.

    Args:
        pool: what keeps the trunk's matrices packed; None = they are dequantised.

    Raises:
        UsageError: the context is longer than the model's.
        MemoryBudgetError: a budget cannot hold what has to be there; says what would.
    """
    longest = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None) or CONTEXTS[0]
    if config.context and config.context > longest:
        raise UsageError(f"context {config.context:,} is more than the {longest:,} tokens that this model was made for")
    contexts = [config.context] if config.context else sorted({min(longest, c) for c in CONTEXTS}, reverse=True)
    memory.return_freed_memory()  # this process may have done other work before
    program, refusal = memory.resident_bytes(), None
    record = manifest.record_bytes
    for context in contexts:
        needs = memory.Needs(
            program=program,
            trunk=trunk_bytes(manifest, skeleton, pool is not None),
            kv=hf.measure_kv_bytes(skeleton, context, config.prefill_chunk, kv_dtype),
            workspace=workspace.bytes(min(config.prefill_chunk, context), context),
            step=workspace.bytes(1, context),
            record=record,
            experts=manifest.num_experts,
            floor=sum(layer.top_k for layer in manifest.layers),
            context=context,
        )
        above = None
        try:
            if device is not None:  # RAM holds slots, and the trunk's tensors as they pass through
                on_device = device_needs(needs.trunk, needs.kv, needs.workspace, record, manifest, context)
                above = plan_device(device, config, on_device)
                passing = needs.step + largest_tensor(manifest, skeleton)
                needs = needs._replace(trunk=0, kv=0, workspace=passing, step=passing)
            plan = memory.make_plan(needs, config.ram, config.slots)
            if context != contexts[0]:  # not so close that what libraries load later would not fit
                memory.make_plan(needs._replace(program=program + GROWTH), config.ram, config.slots)
        except MemoryBudgetError as error:
            refusal = refusal or error
            continue
        if context != contexts[0]:
            on_notice(f"the budget has room for a context of {context:,} tokens, not for {contexts[0]:,}")
        return plan, above
    assert refusal is not None
    raise refusal
