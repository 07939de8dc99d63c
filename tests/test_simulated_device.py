"""The simulated device is as treacherous as a real one: what is not waited for is not there."""

from __future__ import annotations

import pytest
import torch
from pocketmoe.offload.errors import DeviceMemoryError
from pocketmoe.offload.simulated_device import SimulatedDevice, Speeds

SLOW_LINK = Speeds(link=1e6, latency=0.0, kernel=1e-5, host=1e-6)  # 1 kB takes a millisecond


def record(value: float) -> torch.Tensor:
    return torch.full((256,), value)


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice(speeds=SLOW_LINK)


def doubled(device: SimulatedDevice, source: torch.Tensor, out: torch.Tensor) -> None:
    device.launch(lambda: out.copy_(source * 2))


def test_a_kernel_after_the_mark_of_a_copy_sees_what_was_copied(device):
    slot, out = (device.empty((256,), torch.float32) for _ in range(2))
    device.compute_after(device.copy_in(slot, record(3.0), ()))
    doubled(device, slot, out)
    device.join()
    assert torch.equal(out, record(6.0))


def test_a_kernel_that_does_not_wait_for_its_copy_sees_poison(device):
    slot, out = (device.empty((256,), torch.float32) for _ in range(2))
    device.copy_in(slot, record(3.0), ())
    doubled(device, slot, out)
    device.join()
    assert out.isnan().all()


def test_a_copy_that_does_not_wait_for_the_last_use_of_its_slot_spoils_it(device):
    slow_kernel = SimulatedDevice(speeds=SLOW_LINK._replace(kernel=1.0))
    for waits in (True, False):
        slot, out = (slow_kernel.empty((256,), torch.float32) for _ in range(2))
        slow_kernel.compute_after(slow_kernel.copy_in(slot, record(3.0), ()))
        doubled(slow_kernel, slot, out)
        used = slow_kernel.mark()
        slow_kernel.copy_in(slot, record(5.0), (used,) if waits else ())
        slow_kernel.join()
        assert torch.equal(out, record(6.0)) == waits


def test_a_source_that_changes_while_it_travels_arrives_changed(device):
    slot, source = device.empty((256,), torch.float32), record(3.0)
    mark = device.copy_in(slot, source, ())
    source.fill_(4.0)
    mark.wait()
    assert torch.equal(slot, record(4.0))


def test_copies_take_the_time_that_the_link_needs_and_kernels_run_meanwhile(device):
    slot, out = (device.empty((256,), torch.float32) for _ in range(2))
    mark = device.copy_in(slot, record(1.0), ())
    doubled(device, record(2.0), out)
    device.join()
    assert not mark.passed() and torch.equal(out, record(4.0))
    mark.wait()
    assert mark.passed() and mark.seconds() == pytest.approx(1024 / 1e6)


def test_discarded_memory_is_poisoned_once_its_last_use_is_over(device):
    slot, out = (device.empty((256,), torch.float32) for _ in range(2))
    device.compute_after(device.copy_in(slot, record(3.0), ()))
    doubled(device, slot, out)
    device.discard(slot, (device.mark(),))
    assert torch.equal(device.to_host([out]).wait()[0], record(6.0))
    device.copy_in(torch.empty(4), torch.zeros(4), ()).wait()  # behind the poison in the same queue
    assert slot.isnan().all()


def test_what_goes_to_the_host_is_not_held_up_by_a_kernel_that_is_launched_later():
    device = SimulatedDevice(speeds=SLOW_LINK._replace(kernel=1.0))
    value, out = record(3.0), device.empty((256,), torch.float32)
    on_its_way = device.to_host([value])
    doubled(device, value, out)
    assert torch.equal(on_its_way.wait()[0], value) and device.now < 1.0
    device.join()
    assert device.now > 1.0


def test_what_went_to_the_host_is_gone_when_more_goes_there(device):
    first = device.to_host([record(3.0)]).wait()[0]
    device.to_host([record(4.0)])
    assert first.isnan().all()


def test_memory_runs_out_and_comes_back_when_it_is_freed():
    device = SimulatedDevice(capacity=4096)
    first = device.empty((1024,), torch.float32)
    with pytest.raises(DeviceMemoryError, match="0 left"):
        device.empty((1,), torch.float32)
    del first
    assert device.empty((1024,), torch.float32).isnan().all()


def test_an_allocation_can_be_made_to_fail():
    device = SimulatedDevice(fail_at={2})
    device.empty((1,), torch.float32)
    with pytest.raises(DeviceMemoryError):
        device.empty((1,), torch.float32)
    device.empty((1,), torch.float32)


def test_the_same_seed_gives_the_same_schedule():
    def finish(seed: int) -> float:
        device = SimulatedDevice(seed, Speeds(jitter=3.0))
        slots = [device.empty((256,), torch.float32) for _ in range(8)]
        for slot in slots:
            device.compute_after(device.copy_in(slot, record(1.0), ()))
            doubled(device, slot, slot)
        device.join()
        return device.now

    assert finish(1) == finish(1) != finish(2)
