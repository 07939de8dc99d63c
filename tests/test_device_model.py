"""Whole models on the simulated device: the same answers whatever lies in which tier, and memory that runs out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from fakes_runtime import found_jobs
from pocketmoe.offload import packing
from pocketmoe.offload.checkpoint import CheckpointSource
from pocketmoe.offload.config import OffloadConfig
from pocketmoe.offload.convert import convert
from pocketmoe.offload.errors import DeviceMemoryError, MemoryBudgetError, UsageError
from pocketmoe.offload.kv_cache import can_crop
from pocketmoe.offload.model import Model
from pocketmoe.offload.simulated_device import SimulatedDevice, Speeds
from pocketmoe.quant.kernels import ExpertKernels, TorchKernels
from pocketmoe.quant.triton_kernels import TILE_TOKENS, load_triton, why_missing

HASTY = Speeds(link=2e7, jitter=5.0, kernel=1e-4)
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")


@pytest.fixture(scope="module", params=FAMILIES)
def store(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    tiny.make_checkpoint(path / "source", request.param, num_key_value_heads=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SMALLEST", 0)
        return convert(CheckpointSource(path / "source"), path / "store", "int4-g32", trunk="int8-g32")


def opened(store, device: SimulatedDevice | None = None, device_name: str = "auto", **options) -> Model:
    config = OffloadConfig.of(
        device=device_name, **{"kernels": "torch", "ram": "4GB", "context": 128, "prefill_chunk": 16} | options
    )
    return Model(store, config, device=device)


def device_slots(model: Model) -> int:
    assert model._on_device is not None
    return model._on_device.cache.capacity


def answer(model: Model, count: int = 6, prompt: int = 23) -> list[torch.Tensor]:
    """The logits of a prompt (in two pieces) and of a greedy answer."""
    ids = torch.randint(3, tiny.VOCABULARY, (prompt,), generator=torch.Generator().manual_seed(3)).tolist()
    sequence = model.new_sequence()
    out = [sequence.feed(ids)]
    for _ in range(count):
        out.append(sequence.feed([int(out[-1].argmax())]))
    model.check_integrity()
    return out


class Finding:
    """Kernels that find records as those of a GPU do."""

    name = "finding"

    def __init__(self, model: Model, kernels: ExpertKernels) -> None:
        assert model._on_device is not None
        self._slots, self._kernels, self.run = model._on_device.slots, kernels, kernels.run

    def run_resident(self, hidden, chosen, addresses, out):
        if jobs := found_jobs(self._slots, chosen, addresses):
            self._kernels.run(hidden, torch.zeros(len(chosen), dtype=torch.int32), jobs, out)


def find_hits(model: Model) -> None:
    """From now on the simulated device finds its hits itself."""
    assert model._on_device is not None
    model._on_device._finders[:] = [Finding(model, kernels) for kernels in model._on_device.kernels]


def test_logits_are_those_of_the_cpu_to_the_bit_whatever_lies_where(store):
    with opened(store, prefetch=False) as model:
        want = answer(model)
        floor, experts = model.plan.needs.floor, model.plan.needs.experts
    for seed, (slots, ram) in enumerate([(3, floor), (floor, experts), (floor + 3, floor + 1), (experts, floor)]):
        device = SimulatedDevice(seed, HASTY)
        with opened(store, device, vram_slots=slots, slots=ram, deterministic=True) as model:
            assert model.vram_plan is not None and model.vram_plan.slots == slots
            for finds in (False, True):  # cold and warm
                if finds:
                    find_hits(model)
                for got, expected in zip(answer(model), want, strict=True):
                    assert torch.equal(got, expected), (slots, ram)


def test_the_trunk_takes_of_the_device_what_was_planned_whether_it_stays_packed_or_not(store):
    plans = []
    for kernels in (True, False):
        device = SimulatedDevice()
        if not kernels:
            device.linear = None
        with opened(store, device) as model:
            trunk = model.transformers_model
            packed = [module.packed.data for module in trunk.modules() if hasattr(module, "packed")]
            placed = [*packed, *trunk.state_dict().values()]
            assert model.vram_plan is not None and bool(packed) is kernels
            assert model.vram_plan.needs.trunk == sum(tensor.nbytes for tensor in placed)
            plans.append(model.vram_plan.needs.trunk)
    assert plans[0] < plans[1] / 2


def test_a_share_for_the_cpu_stays_within_rounding(store):
    with opened(store) as model:
        want = answer(model)
    with opened(store, SimulatedDevice(5, HASTY), vram_slots=8) as model:
        for got, expected in zip(answer(model), want, strict=True):
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_memory_that_runs_out_once_costs_slots_and_changes_nothing(store):
    device = SimulatedDevice(1, HASTY)
    with opened(store, device, deterministic=True) as model:
        want, used = answer(model), device.allocations
    notices: list[str] = []
    tried = 0
    for at in (
        1,
        2,
        3,
        *range(5, used, 11),
    ):  # at the first of all, in the middle of a prompt, of an answer, of any layer
        device = SimulatedDevice(1, HASTY)
        config = OffloadConfig.of(kernels="torch", ram="4GB", context=128, prefill_chunk=16, deterministic=True)
        with Model(store, config, on_notice=notices.append, device=device) as model:
            device.fail_at = {device.allocations + at}
            before = device_slots(model)
            try:
                got = answer(model)
            except DeviceMemoryError:  # a window that has moved on cannot take tokens back
                assert "gpt_oss" in str(store)
                got = answer(model)  # and the model lives
            else:
                tried += device_slots(model) < before
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a, b), at
    if "gpt_oss" not in str(store):
        assert tried and any("slots remain" in notice for notice in notices)


def test_slots_give_way_to_all_that_the_failed_step_asked_for(store, monkeypatch):
    notices: list[str] = []
    with opened(store, SimulatedDevice(1, HASTY), deterministic=True) as model:
        want = answer(model, 1)
    config = OffloadConfig.of(kernels="torch", ram="4GB", context=128, prefill_chunk=16, deterministic=True)
    with Model(store, config, on_notice=notices.append, device=SimulatedDevice(1, HASTY)) as model:
        assert model.vram_plan is not None and model._on_device is not None
        kv, asked, shrink = 1 << 30, [], model._on_device.shrink
        model.vram_plan = replace(model.vram_plan, needs=model.vram_plan.needs._replace(kv=kv))
        monkeypatch.setattr(model._on_device, "shrink", lambda slots: asked.append(slots) or shrink(1))
        errors = [RuntimeError("CUDA error: out of memory"), None, RuntimeError("CUDA error: out of memory"), None]

        def fail(*_: object) -> None:
            if error := errors.pop(0) if errors else None:
                raise error

        model.transformers_model.register_forward_pre_hook(fail)
        if can_crop(model.new_sequence()._cache):
            assert all(map(torch.equal, answer(model, 1), want))
            first, second = (count * model._store.record_bytes for count in asked)
            assert first > kv > second >= 256 << 20
            assert sum("slots remain" in notice for notice in notices) == 2


def test_a_device_with_less_memory_than_planned_gets_fewer_slots_and_says_so(store):
    with opened(store, SimulatedDevice()) as model:
        total = device_slots(model)
    device, notices, taken = SimulatedDevice(), [], []
    device.free_bytes = lambda: 1 << 40  # as drivers do that count what others hold
    empty = device.empty

    def limited(shape, dtype):
        if dtype == torch.uint8 and len(shape) == 2:
            taken.append(shape[0])
            if sum(taken) > total - 4:
                raise DeviceMemoryError("full")
        return empty(shape, dtype)

    device.empty = limited
    config = OffloadConfig.of(kernels="torch", ram="4GB", context=128, deterministic=True)
    with Model(store, config, on_notice=notices.append, device=device) as model:
        assert device_slots(model) < total
        assert any("that were planned" in notice for notice in notices)


def test_budgets_of_the_device_are_checked_before_anything_is_read(store):
    with pytest.raises(MemoryBudgetError, match=r"is more than simulated has free"):
        opened(store, SimulatedDevice(capacity=1 << 30), vram="4GB")
    with pytest.raises(MemoryBudgetError, match=r"VRAM.*--device cpu"):
        opened(store, SimulatedDevice(capacity=8 << 20), device_name="simulated")


def test_a_gpu_that_is_too_small_leaves_the_work_to_the_cpu_unless_it_was_asked_for(store):
    notices: list[str] = []
    config = OffloadConfig.of(kernels="torch", ram="4GB", context=128)
    with Model(store, config, on_notice=notices.append, device=SimulatedDevice(capacity=8 << 20)) as model:
        assert model.vram_plan is None and len(answer(model)) == 7
    assert sum("The CPU computes instead" in notice for notice in notices) == 1


def test_a_device_that_does_not_exist_is_refused_by_name(store):
    with pytest.raises(UsageError, match="cuda:7"):
        Model(store, OffloadConfig.of(device="cuda:7", ram="4GB"))


def test_ram_that_cannot_be_pinned_is_said_once(store):
    notices: list[str] = []
    config = OffloadConfig.of(kernels="torch", ram="4GB", context=128)
    with Model(store, config, on_notice=notices.append, device=SimulatedDevice(may_pin=False)) as model:
        answer(model)
    assert sum("pinned" in notice for notice in notices) == 1


def test_the_last_plan_counts_what_kernels_take_of_ram_when_they_first_run(store, monkeypatch):
    sizes: list[int] = []
    run, hold = TorchKernels.run, Model._hold_to_plan
    monkeypatch.setattr(
        TorchKernels, "run", lambda self, x, rows, jobs, out: sizes.append(len(rows)) or run(self, x, rows, jobs, out)
    )
    monkeypatch.setattr(Model, "_hold_to_plan", lambda self: sizes.append(0) or hold(self))
    with opened(store, SimulatedDevice()):
        assert sizes[: sizes.index(0)] == [1, *TILE_TOKENS]


@pytest.mark.skipif(load_triton() is None, reason=why_missing())
def test_the_gpu_kernels_give_the_logits_of_the_reference(store):
    """Triton's interpreter computes the device's experts: one family here, because it is slow."""
    if "qwen3_moe" not in str(store):
        pytest.skip("the kernels' own tests have every activation")
    with opened(store) as model:
        want = answer(model, 1, prompt=3)
    device = SimulatedDevice(2, HASTY)
    device.lacks = None
    config = OffloadConfig.of(ram="4GB", context=128, prefill_chunk=16, deterministic=True)
    with Model(store, config, device=device) as model:
        assert model._on_device is not None and model._on_device.kernels[0].name == "triton"
        found = answer(model, 1, prompt=3)
        for got, expected in zip(found, want, strict=True):
            assert torch.allclose(got, expected, rtol=1e-3, atol=1e-3)
        again = answer(model, 1, prompt=3)  # with hits that the kernel finds itself
        assert all(map(torch.equal, found, again))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here")
def test_on_a_real_gpu_logits_do_not_depend_on_what_lies_where_either(store):
    """The twin of the first two tests."""
    with opened(store, prefetch=False) as model:
        on_cpu = answer(model)
        floor, experts = model.plan.needs.floor, model.plan.needs.experts
    want: list[torch.Tensor] | None = None
    for slots, ram in [(experts, experts), (3, floor), (floor, experts), (floor + 3, floor + 1)]:
        config = OffloadConfig.of(
            ram="4GB", context=128, prefill_chunk=16, device="cuda", vram_slots=slots, slots=ram, deterministic=True
        )
        with Model(store, config) as model:
            got = answer(model)
        want = want or got
        for a, b, c in zip(got, want, on_cpu, strict=True):
            assert torch.equal(a, b), (slots, ram)
            assert torch.allclose(a, c, rtol=1e-2, atol=1e-2)
    with Model(store, OffloadConfig.of(ram="4GB", context=128, device="cuda", vram_slots=8)) as model:
        for a, b in zip(answer(model), on_cpu, strict=True):
            assert torch.allclose(a, b, rtol=1e-2, atol=1e-2)
