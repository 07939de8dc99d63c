"""What the runtime tells the decisions that it shares with the simulator, and that it follows them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fakes_runtime import LAYERS, TOP_K
from pocketmoe.cache.expert import ExpertId
from pocketmoe.cache.hybrid import Cost
from pocketmoe.offload.simulated_device import SimulatedDevice, Speeds
from test_device_runtime import COPY_ONLY, CPU_ONLY, World, wanted

FREE = replace(COPY_ONLY, gpu=Cost(0.0, 1e-7))


def say(world: World, *experts: int) -> None:
    token = torch.tensor([experts])
    for layer in range(LAYERS):
        assert torch.equal(world.run(layer, token), wanted(layer, token))


def used_to(*experts: int) -> World:
    """A world with slots for one cycle, in which these have been chosen for long."""
    world = World(slots=LAYERS * TOP_K, costs=FREE)
    for _ in range(20):
        say(world, *experts)
    return world


@pytest.mark.parametrize("slow", [1.0, 3.0])
def test_the_cpu_s_share_of_a_token_is_measured(slow, monkeypatch):
    world = World(device=SimulatedDevice(speeds=Speeds(host=1e-5)), costs=CPU_ONLY)
    renewal, clock = world.runtime.admissions.renewal, world.device
    run = world.on_cpu.run

    def takes_time(*args):
        run(*args)
        clock.run_until(clock._enqueue(clock._copies, slow * 1e-3, lambda: None))

    monkeypatch.setattr(world.on_cpu, "run", takes_time)
    assert renewal.cpu_share == 1.0
    for _ in range(20):
        began = clock.now
        say(world, 5, 2)
        took = clock.now - began
    assert renewal.cpu_share == pytest.approx(LAYERS * slow * 1e-3 / took, rel=0.05)
    assert 0.5 < renewal.cpu_share < 1.0


def test_who_has_to_be_copied_leaves_again_where_the_one_before_is_worth_more_and_lies_nowhere_else():
    world = used_to(5, 2)
    world.runtime.drain()
    world.ram.cache.clear()
    world.runtime.deterministic = True
    say(world, 5, 1)
    residents = {expert: world.cache.is_transient(expert) for expert in world.cache.residents()}
    assert residents == {ExpertId(layer, index): index == 1 for layer in range(LAYERS) for index in (5, 1)}
    world.check()


def test_no_copy_pushes_somebody_worth_more_out_to_the_disk():
    world = used_to(5, 2)
    world.runtime.drain()
    world.ram.cache.clear()
    assert not world.on_cpu.calls
    say(world, 5, 1)
    assert {expert.index for expert in world.cache.residents()} == {5, 2}
    assert len(world.on_cpu.calls) == LAYERS
    world.check()


def test_who_could_not_be_copied_is_not_the_first_to_leave_ram(monkeypatch):
    world = used_to(5, 2)

    def fails(expert, slot):
        raise OSError("no more copies")

    monkeypatch.setattr(world.runtime.uploads, "start", fails)
    with pytest.raises(OSError, match="no more copies"):
        say(world, 5, 1)
    left_out = ExpertId(0, 1)
    assert left_out not in world.cache and left_out in world.ram.cache
    assert not world.ram.cache.is_transient(left_out)
