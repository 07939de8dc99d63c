"""A Ctrl-C between any two lines of the hot path: nothing stays locked or arriving, the next token gets its experts."""

from __future__ import annotations

import contextlib

import pytest
import torch
from fakes_runtime import EXPERTS, HIDDEN, LAYERS, RECORD, TOP_K, FakeKernels, FakeReader, Interruption
from pocketmoe.cache.expert import ExpertId
from pocketmoe.cache.plain_cache import PlainCache
from pocketmoe.cache.policy import get_policy, policy_names
from pocketmoe.cache.stats import RunStats
from pocketmoe.offload.native_cache import make_cache
from pocketmoe.offload.prefetch import NoPrefetch, Prefetcher
from pocketmoe.offload.ram_table import RamTable
from pocketmoe.offload.runtime import Assignment, ExpertRuntime
from pocketmoe.offload.tiers import RamSlots
from pocketmoe.offload.transfer import ThreadedTransfers
from pocketmoe.offload.warm_start import WarmStart
from test_prefetch import ManualTransfers

SLOTS = LAYERS * TOP_K + 1
BOOKING = ("offload.reads", "offload.prefetch", "offload.warm_start")
ALL = (
    *BOOKING,
    *("offload.runtime", "offload.transfer", "offload.recovery"),
    *("cache.manager", "cache.plain_cache", "cache.eviction", "cache.order", "cache.published", "cache.analog"),
)


class World:
    """A runtime whose slots are full, so that every read takes somebody's place."""

    def __init__(self, policy: str, plain: bool = True) -> None:
        stats, self.kernels = RunStats(LAYERS, RECORD), FakeKernels()
        self.slots = slots = RamSlots(SLOTS, RECORD)
        self.table = RamTable(slots, [EXPERTS] * LAYERS)
        cycle = LAYERS * TOP_K
        if plain:
            self.cache = PlainCache(SLOTS, get_policy(policy, SLOTS, cycle), LAYERS, TOP_K, self.table)
        else:
            self.cache = make_cache(policy, SLOTS, cycle, [EXPERTS] * LAYERS, TOP_K, self.table)
        self.transfers = ThreadedTransfers(FakeReader(), stats, readers=1, piece_bytes=RECORD // 2)
        ahead = Prefetcher(self.cache, slots, self.transfers, stats)
        ahead = WarmStart(ahead, self.cache, slots, self.transfers, [ExpertId(2, 7), ExpertId(2, 6)])
        self.runtime = ExpertRuntime(
            self.cache, slots, self.transfers, [self.kernels] * LAYERS, stats, ahead, predictor=None, table=self.table
        )
        ahead.start()

    def run(self, layer: int, experts: tuple[int, ...], guess: tuple[int, ...] = ()) -> None:
        """One token through one layer, with each expert's output compared with what it has to be."""
        got = self.runtime.run_experts(layer, torch.ones(1, HIDDEN), Assignment.of(torch.tensor([experts])), guess)
        assert got[:, 0].tolist() == [1.0 + layer * EXPERTS + e for e in sorted(experts)]

    def prompt(self, layer: int) -> None:
        """All experts through one layer."""
        work = Assignment.of(torch.arange(EXPERTS).reshape(-1, TOP_K))
        got = self.runtime.run_experts(layer, torch.ones(EXPERTS // TOP_K, HIDDEN), work, ())
        assert got[:, 0].tolist() == [1.0 + layer * EXPERTS + e for e in range(EXPERTS)]

    def forward(self) -> None:
        """Guesses that are right in time, late, wrong, and too many for the slots."""
        self.run(0, (0, 1), guess=(2, 3))
        self.run(1, (2, 4), guess=(5, 6))
        self.run(2, (0, 7))
        self.runtime.note_layers([(2, [0, 7], 0.0)], 0.0)
        self.prompt(0)
        self.runtime.resize(SLOTS - 1)

    def settle(self) -> None:
        self.runtime.prefetch.drain()
        self.cache.check_integrity(idle=True)
        listed = {ExpertId(i, e): at for i in range(LAYERS) for e, at in enumerate(self.table.row(i)) if at}
        residents = self.cache.residents().items()
        assert listed == {expert: self.slots.record(slot).data_ptr() for expert, slot in residents}


def interrupt_everywhere(policy: str, files: tuple[str, ...], plain: bool = True) -> int:
    """A new world for each line that is executed, until a forward passes undisturbed; returns how many there were."""
    at, happened = 0, True
    while happened:
        world = World(policy, plain)
        with Interruption(files, at) as interruption, contextlib.suppress(KeyboardInterrupt):
            world.forward()
        happened = interruption.happened
        at += 1
        world.settle()
        world.forward()
        world.settle()
        world.runtime.close()
    return at


def test_after_an_interruption_while_reads_are_booked_the_next_forward_works():
    assert interrupt_everywhere("analog", BOOKING, plain=False) > 100


@pytest.mark.slow
@pytest.mark.parametrize("policy", policy_names())
def test_after_an_interruption_anywhere_the_next_forward_works(policy):
    assert interrupt_everywhere(policy, ALL) > 1000


@pytest.mark.slow
def test_after_an_interruption_anywhere_in_the_compiled_cache_the_next_forward_works():
    assert interrupt_everywhere("analog", (*ALL, "offload.native_cache"), plain=False) > 500


def test_an_interrupted_recovery_is_made_up_for_before_the_next_forward(monkeypatch):
    world = World("analog")
    world.kernels.interrupt = True
    with monkeypatch.context() as patch:
        patch.setattr(world.cache, "recover", interrupted)
        with pytest.raises(KeyboardInterrupt):
            world.run(0, (0, 1), guess=(2, 3))
        patch.setattr(world.runtime, "prefetch", NoPrefetch())
        assert not world.runtime.may_run_alone
    world.kernels.interrupt = False
    with pytest.raises(AssertionError, match="are arriving"):
        world.cache.check_integrity(idle=True)
    world.forward()
    world.settle()
    world.runtime.close()


@pytest.mark.parametrize("capacity", [SLOTS - 1, SLOTS])
def test_after_a_resize_that_was_interrupted_anywhere_there_are_as_many_slots_as_the_cache_gives_out(capacity):
    at, happened = 0, True
    while happened:
        world = World("analog", plain=False)
        world.runtime.resize(2 * SLOTS - 1 - capacity)
        with (
            Interruption(("offload.runtime", "offload.tiers", "cache.manager"), at) as interruption,
            contextlib.suppress(KeyboardInterrupt),
        ):
            world.runtime.resize(capacity)
        happened = interruption.happened
        at += 1
        assert world.slots.capacity == world.cache.capacity
        world.prompt(0)
        world.settle()
        world.runtime.close()
    assert at > 10


def test_forgetting_guesses_that_is_interrupted_and_done_again_counts_none_twice(monkeypatch):
    world = World("analog")
    stats, ahead = world.runtime.stats, Prefetcher(world.cache, world.slots, ManualTransfers(), world.runtime.stats)
    world.runtime.prefetch.drain()
    ahead.request(1, [2, 3, 4])
    count = stats.record_prefetch

    def interrupted_behind(layer, outcome):
        count(layer, outcome=outcome)
        interrupted()

    with monkeypatch.context() as patch:
        patch.setattr(stats, "record_prefetch", interrupted_behind)
        with pytest.raises(KeyboardInterrupt):
            ahead.forget()
    ahead.forget()
    assert stats.total("prefetch_cancelled") == stats.total("prefetch_issued") == 3
    world.runtime.close()


def test_who_was_resident_stays_after_an_interruption():
    world = World("analog")
    world.forward()
    before = world.cache.residents()
    world.kernels.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        world.run(1, (2, 4))
    assert len(before.items() & world.cache.residents().items()) >= len(before) - TOP_K
    world.runtime.close()


def interrupted() -> None:
    raise KeyboardInterrupt
