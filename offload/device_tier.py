"""A device above the RAM tier: which one, what fits there, and what each way to compute an expert costs on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch

from ..cache.hybrid import Cost, TierCosts
from ..cache.units import format_bytes
from ..quant.codecs import ExpertShape
from ..quant.kernels import ExpertJob, ExpertKernels, ResidentKernels
from ..quant.triton_kernels import TILE_TOKENS
from .config import OffloadConfig
from .device import Device, TorchDevice, default_device
from .device_runtime import DeviceRuntime
from .errors import VramBudgetError
from .native_cache import make_cache
from .placement import LEAVE_FREE, VramNeeds, VramPlan, plan_vram
from .runtime import ExpertRuntime
from .source import OnNotice
from .tiers import DeviceSlots

_TIMED = 5
_MOST_SLOWDOWN = 0.6


def open_device(config: OffloadConfig, on_notice: OnNotice) -> Device | None:
    """What computes, if it is not the CPU. Raises UsageError when it does not exist."""
    name = default_device() if config.device == "auto" else config.device
    if name != "cpu":
        return TorchDevice(name)
    if config.vram is not None:
        why = "torch sees no GPU that it can use" if config.device == "auto" else "the device is the CPU"
        on_notice(f"--vram has no effect: {why}.")
    return None


def plan_device(device: Device, config: OffloadConfig, needs: VramNeeds) -> VramPlan:
    """Divide the device's memory, before anything is put there.

    Args:
        needs: its `program` is what a process holds on such a device by itself.

    Raises:
        VramBudgetError: more was asked for than is free, or the trunk and a slot for each layer do not fit; says
            what would.
    """
    free = device.free_bytes()
    if config.vram is None:
        try:
            return plan_vram(needs._replace(program=0), int(free * (1 - LEAVE_FREE)), config.vram_slots)
        except VramBudgetError as error:
            raise VramBudgetError(f"{device.name}: {error}, or use --device cpu") from None
    if config.vram > free + needs.program:
        most = (free + needs.program) // 10_000_000 * 10
        raise VramBudgetError(
            f"--vram {format_bytes(config.vram)} is more than {device.name} has free ({format_bytes(free)}); "
            f"use --vram {most}MB or less, or close what else uses the GPU"
        )
    return plan_vram(needs, config.vram, config.vram_slots)


def make_device_runtime(
    device: Device,
    plan: VramPlan,
    ram: ExpertRuntime,
    kernels: list[ExpertKernels],
    config: OffloadConfig,
    hidden: Sequence[int],
    experts: Sequence[int],
    on_notice: OnNotice,
) -> DeviceRuntime:
    """The tier above `ram`: takes the slots, pins the RAM below and measures what copies and kernels cost.

    Args:
        hidden, experts: the width of each MoE layer, and how many it has.

    Raises:
        VramBudgetError: the device has no room even for a slot for each layer.
    """
    refusal = ram.slots.pin(device)
    if refusal:
        on_notice(f"RAM cannot be pinned ({refusal}): copies to {device.name} will be slower.")
    try:
        layers, record, top_k = ram.cache.layers, ram.slots.record_bytes, ram.cache.floor
        device.trim()
        workspace = device.empty((plan.needs.workspace,), torch.uint8)  # so that slots do not take it
        slots = DeviceSlots(device, plan.slots, record)
        del workspace
        if slots.capacity < layers:
            raise VramBudgetError(
                f"{device.name} has run out of memory after {slots.capacity} expert slots of {format_bytes(record)}, "
                f"{layers} are needed; use a smaller --context, or --device cpu"
            )
        if slots.capacity < plan.slots:
            on_notice(
                f"{device.name} has room for {slots.capacity:,} of the {plan.slots:,} expert slots that were planned"
            )
        floor = max(1, min(top_k, slots.capacity // layers))
        cache = make_cache(config.policy, slots.capacity, layers * floor, experts, floor)
        costs = measure_costs(device, slots, ram, kernels[0], hidden[0])
        runtime = DeviceRuntime(device, cache, slots, ram, kernels, experts, costs, config.deterministic)
        runtime.stats.link_peak = record / costs.copy.each if costs.copy.each else None
        ram.stats.device = runtime.stats
        return runtime
    except BaseException:
        ram.slots.unpin()
        raise


def warm_up(device: Device, kernels: Sequence[ExpertKernels], shapes: Sequence[ExpertShape], record_bytes: int) -> None:
    """Run each layer's kind of kernel in each size that it is compiled for: what compilers and libraries take of RAM,
    they take now."""
    record = device.empty((record_bytes,), torch.uint8)
    device.launch(record.zero_)
    for shape, kernel in dict(zip(shapes, kernels, strict=True)).items():
        for tokens in (1, *TILE_TOKENS):
            hidden, out = (device.empty((tokens, shape.hidden), torch.float32) for _ in range(2))
            rows, nobody = (device.empty((tokens,), dtype) for dtype in (torch.int32, torch.int64))
            for tensor in (hidden, rows, nobody):
                device.launch(tensor.zero_)
            device.launch(partial(kernel.run, hidden, rows, [ExpertJob(record, 0, tokens)], out))
            if tokens == 1 and isinstance(kernel, ResidentKernels):
                device.launch(partial(kernel.run_resident, hidden, nobody, nobody, out))
    device.mark().wait()


def measure_costs(
    device: Device, slots: DeviceSlots, ram: ExpertRuntime, kernel: ExpertKernels, hidden: int
) -> TierCosts:
    """What one token's experts take each way, on slots that hold nothing yet.

    Two sizes of a call tell what it costs at all from what each expert adds.
    """
    most = min(ram.cache.floor, slots.capacity)
    on_host, rows = torch.zeros(1, hidden), torch.zeros(most, dtype=torch.int32)
    for i in range(most):
        ram.slots.record(i).zero_()
        device.copy_in(slots.record(i), ram.slots.record(i), ()).wait()
    copies = [device.copy_in(slots.record(0), ram.slots.record(0), ()) for _ in range(_TIMED)]
    copies[-1].wait()
    copy = Cost(0.0, median(mark.seconds() for mark in copies))

    x, places, out = (device.empty(t.shape, t.dtype) for t in (on_host, rows, torch.empty(most, hidden)))
    device.put(x, on_host)
    device.put(places, rows)
    jobs = [ExpertJob(slots.record(i), i, 1) for i in range(most)]

    def on_device(count: int) -> float:
        end = device.timed(lambda: kernel.run(x, places, jobs[:count], out))
        end.wait()
        return end.seconds()

    gpu = _cost(on_device, most)

    below = [ExpertJob(ram.slots.record(i), i, 1) for i in range(most)]
    parts = torch.empty(most, hidden)

    def on_cpu(count: int) -> float:
        begin = device.clock()
        ram.kernels[0].run(on_host, rows, below[:count], parts)
        return device.clock() - begin

    cpu = _cost(on_cpu, most)
    # The CPU computes as fast as it reads, and loses to a copy what that takes of the memory's speed.
    slowdown = min(_MOST_SLOWDOWN, cpu.each / copy.each) if copy.each else 0.0
    return TierCosts(copy, cpu, gpu, slowdown)


def _cost(seconds: Callable[[int], float], most: int) -> Cost:
    """A fixed and a proportional part, from calls over one expert and over `most`."""
    seconds(most)  # the first call may compile
    one, many = (median(seconds(count) for _ in range(_TIMED)) for count in (1, most))
    each = max(0.0, many - one) / max(1, most - 1)
    return Cost(max(0.0, one - each), each)
