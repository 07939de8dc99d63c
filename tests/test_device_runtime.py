"""The hot path with a device: whatever lies where, arrives when, or runs out, each token gets its own experts."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from fakes_runtime import EXPERTS, HIDDEN, LAYERS, RECORD, TOP_K, FakeKernels, FakeReader, Interruption, found_jobs
from pocketmoe.cache.expert import ExpertId
from pocketmoe.cache.hybrid import Cost, TierCosts
from pocketmoe.cache.plain_cache import PlainCache
from pocketmoe.cache.policy import get_policy
from pocketmoe.cache.stats import RunStats
from pocketmoe.cache.trace import TraceWriter
from pocketmoe.offload.device_runtime import DeviceRuntime
from pocketmoe.offload.errors import DeviceMemoryError
from pocketmoe.offload.prefetch import Prefetcher
from pocketmoe.offload.recorder import Recorder, RoutingRecorder
from pocketmoe.offload.runtime import ExpertRuntime
from pocketmoe.offload.simulated_device import SimulatedDevice, Speeds
from pocketmoe.offload.tiers import DeviceSlots, RamSlots
from pocketmoe.offload.transfer import SyncTransfers, ThreadedTransfers

EVEN = TierCosts(copy=Cost(0.0, 1e-4), cpu=Cost(0.0, 1e-4), gpu=Cost(0.0, 1e-5))
COPY_ONLY = replace(EVEN, cpu=Cost(1.0, 1.0))
CPU_ONLY = replace(EVEN, copy=Cost(1.0, 1.0), cpu_slowdown=0.5)
SLOW_LINK = TierCosts(copy=Cost(0.0, 2e-4), cpu=Cost(0.0, 1e-5), gpu=Cost(0.0, 1e-7))
ALL = LAYERS * EXPERTS


class FindingKernels(FakeKernels):
    """The same, told of records by their addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.slots: DeviceSlots | None = None
        self.found: list[int] = []

    def run_resident(self, hidden, chosen, addresses, out):
        assert self.slots is not None and chosen.dtype is addresses.dtype is torch.int64
        jobs = found_jobs(self.slots, chosen, addresses)
        self.found.append(len(jobs))
        if jobs:
            self.run(hidden, torch.zeros(len(chosen), dtype=torch.int32), jobs, out)


class World:
    def __init__(
        self,
        slots: int = LAYERS * TOP_K,
        ram: int = ALL,
        device: SimulatedDevice | None = None,
        costs: TierCosts = EVEN,
        deterministic: bool = False,
        threaded: bool = False,
        finds: bool = True,
        recorder: Recorder | None = None,
        learns: bool = False,
    ) -> None:
        self.device = device or SimulatedDevice()
        self.stats = RunStats(LAYERS, RECORD)
        below, pool = PlainCache(ram, get_policy("lru", ram, LAYERS * TOP_K), LAYERS, TOP_K), RamSlots(ram, RECORD)
        self.reader, self.on_cpu = FakeReader(), FakeKernels()
        self.finder = FindingKernels()
        self.on_device = self.finder if finds else FakeKernels()
        transfers = (ThreadedTransfers if threaded else SyncTransfers)(self.reader, self.stats)
        ahead = Prefetcher(below, pool, transfers, self.stats)
        self.ram = ExpertRuntime(below, pool, transfers, [self.on_cpu] * LAYERS, self.stats, ahead, None, recorder)
        self.cache = PlainCache(slots, get_policy("lru", slots, LAYERS), LAYERS, max(1, min(TOP_K, slots // LAYERS)))
        on_device = self.finder.slots = DeviceSlots(self.device, slots, RECORD)
        self.runtime = DeviceRuntime(
            self.device,
            self.cache,
            on_device,
            self.ram,
            [self.on_device] * LAYERS,
            [EXPERTS] * LAYERS,
            costs,
            deterministic,
            learns,
        )

    def run(self, layer: int, index: torch.Tensor) -> torch.Tensor:
        hidden = torch.arange(1.0, 1 + index.shape[0])[:, None].expand(-1, HIDDEN)
        return self.runtime.run_layer(layer, hidden, index, torch.full(index.shape, 0.5))

    def check(self) -> None:
        self.check_books()
        self.stats.check()
        self.runtime.stats.check()

    def check_books(self) -> None:
        """Caches and table agree, and the device's memory holds what the table says."""
        self.runtime.drain()
        self.cache.check_integrity(idle=True)
        self.ram.cache.check_integrity(idle=True)
        assert self.runtime.table.residents() == set(self.cache.residents())
        self.device.join()
        for layer in range(LAYERS):
            for index, address in enumerate(self.runtime.table.row(layer).tolist()):
                slot = self.cache.slot_of(ExpertId(layer, index))
                assert address == (0 if slot is None else self.runtime.slots.record(slot).data_ptr()), (layer, index)


def wanted(layer: int, index: torch.Tensor) -> torch.Tensor:
    numbers = (1.0 + layer * EXPERTS + index).sum(1) * 0.5
    return (numbers * torch.arange(1.0, 1 + index.shape[0]))[:, None].expand(-1, HIDDEN)


def choices(seed: int, count: int) -> list[tuple[int, torch.Tensor]]:
    """Forwards of single tokens, and now and then a prompt."""
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        tokens = rng.choice((1, 1, 1, 1, 5, 12))
        for layer in range(LAYERS):
            rows = [rng.sample(range(EXPERTS), TOP_K) for _ in range(tokens)]
            out.append((layer, torch.tensor(rows)))
    return out


def test_hits_are_computed_on_the_device_and_misses_where_they_are_done_sooner():
    token = torch.tensor([[5, 2]])
    for costs, on_device, on_cpu in ((COPY_ONLY, 2, 0), (CPU_ONLY, 0, 2)):
        world = World(costs=costs)
        assert torch.equal(world.run(0, token), wanted(0, token))
        assert (sum(map(len, world.on_device.calls)), sum(map(len, world.on_cpu.calls))) == (on_device, on_cpu)
        assert torch.equal(world.run(0, token), wanted(0, token))
        counters = world.runtime.stats.per_layer[0]
        assert (counters.hits, counters.copied, counters.on_cpu) == (on_device, on_device, 2 * on_cpu)
        world.check()


def test_misses_are_divided_when_neither_way_is_free():
    world = World(slots=ALL)
    token = torch.tensor([[5, 2]])
    assert torch.equal(world.run(0, token), wanted(0, token))
    assert [len(call) for call in (*world.on_device.calls, *world.on_cpu.calls)] == [1, 1]
    world.check()


def test_what_the_cpu_computes_often_comes_up_in_the_link_s_idle_time():
    world = World(device=SimulatedDevice(speeds=Speeds(host=1e-4)), costs=SLOW_LINK)
    for _ in range(6):
        for layer in range(LAYERS):
            token = torch.tensor([[1, 6]])
            assert torch.equal(world.run(layer, token), wanted(layer, token))
    assert world.runtime.stats.total("admitted") > 0
    assert world.runtime.stats.total("hits") > 0
    world.check()


def test_an_expert_on_its_way_is_computed_by_the_cpu_where_that_is_sooner():
    costs = TierCosts(copy=Cost(0.0, 0.5), cpu=Cost(0.0, 1e-5), gpu=Cost(0.0, 1e-7))
    world = World(device=SimulatedDevice(speeds=Speeds(link=RECORD / 0.5)), costs=costs)
    token = torch.tensor([[1, 6]])
    for _ in range(3):
        assert torch.equal(world.run(0, token), wanted(0, token))
    counters = world.runtime.stats.per_layer[0]
    assert counters.admitted and not counters.hits and counters.on_cpu == 6
    came_up = counters.admitted
    world.runtime.drain()
    assert torch.equal(world.run(0, token), wanted(0, token))
    assert world.runtime.stats.per_layer[0].hits == came_up
    world.check()


@pytest.mark.parametrize("finds", [False, True])
def test_costs_follow_what_copies_the_cpu_and_the_device_really_take(finds):
    speeds = Speeds(link=RECORD / 1e-3, latency=0.0, kernel=2e-3)
    world = World(device=SimulatedDevice(speeds=speeds), costs=COPY_ONLY, finds=finds, learns=True)
    for i in range(150):
        for layer in range(LAYERS):
            token = torch.tensor([[1, 6]] if layer or i % 2 else [[2, 5]])
            assert torch.equal(world.run(layer, token), wanted(layer, token))
    assert min(world.runtime.stats.copies, world.runtime.stats.total("hits")) > 100
    costs = world.runtime.costs
    assert costs.copy.each == pytest.approx(1e-3, rel=0.1)
    assert costs.gpu.of(2) == pytest.approx(2e-3, rel=0.1)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("finds", [False, True])
@pytest.mark.parametrize("slots", [LAYERS, LAYERS * TOP_K, LAYERS * TOP_K + 5, ALL])
@pytest.mark.parametrize("ram", [LAYERS * TOP_K, LAYERS * TOP_K + 3, ALL])
def test_every_token_gets_its_experts_on_every_schedule(slots, ram, finds, deterministic):
    for seed in range(12):
        speeds = Speeds(link=random.Random(seed).choice((1e7, 1e8, 1e10)), jitter=10.0, kernel=2e-5)
        world = World(slots, ram, SimulatedDevice(seed, speeds), deterministic=deterministic, finds=finds)
        for layer, index in choices(seed, 15):
            assert torch.equal(world.run(layer, index), wanted(layer, index)), f"seed {seed}"
        if deterministic:
            assert not world.on_cpu.calls
        world.check()


def test_reads_from_disk_on_other_threads_change_nothing():
    world = World(ram=LAYERS * TOP_K, device=SimulatedDevice(3, Speeds(link=1e7, jitter=3.0)), threaded=True)
    for layer, index in choices(3, 40):
        assert torch.equal(world.run(layer, index), wanted(layer, index))
    world.check()
    world.runtime.close()


@pytest.mark.slow
def test_thousands_of_random_schedules():
    for seed in range(1500):
        rng = random.Random(seed)
        speeds = Speeds(link=10 ** rng.uniform(6, 10), jitter=rng.uniform(0, 20), kernel=10 ** rng.uniform(-6, -3))
        slots, ram = rng.randint(LAYERS, ALL), rng.randint(LAYERS * TOP_K, ALL)
        deterministic, finds = rng.random() < 0.5, rng.random() < 0.7
        world = World(slots, ram, SimulatedDevice(seed, speeds), deterministic=deterministic, finds=finds)
        for layer, index in choices(seed, 20):
            assert torch.equal(world.run(layer, index), wanted(layer, index)), f"seed {seed}"
        world.check()


def _sabotaged(world: World, name: str) -> World:
    """A mistake that a real device punishes only now and then."""
    uploads, table = world.runtime.uploads, world.runtime.table
    if name == "kernels do not wait for copies":
        uploads.use = lambda slots: None
    elif name == "copies do not wait for the last use":
        uploads.used = lambda slots, mark=None: None
    elif name == "sources are let go while they travel":
        start = uploads.start

        def start_and_let_go(expert, slot):
            start(expert, slot)
            world.ram.cache.unlock((expert,))
            world.ram.cache.lock(())

        def let_go_again():
            uploads._taken.append(uploads._flying.popleft().arrived.seconds())

        uploads.start, uploads._let_go = start_and_let_go, let_go_again
    elif name == "the CPU's results are written over while they travel":
        on_cpu = world.runtime._on_cpu

        def compute_and_write_over(step, experts):
            on_cpu(step, experts)
            world.runtime._from_cpu.fill_(torch.nan)

        world.runtime._on_cpu = compute_and_write_over
    elif name == "entries stay when their experts leave":
        table.remove = lambda expert: None
    elif name == "entries are set before their records arrive":
        start_copy = uploads.start

        def start_and_enter(expert, slot):
            start_copy(expert, slot)
            table.enter(expert, world.runtime.slots.record(slot))

        uploads.start = start_and_enter
    elif name == "entries are set though somebody else has the slot by now":
        let_go = uploads._let_go

        def let_go_and_enter():
            copy = uploads._flying[0]
            table.enter(copy.expert, world.runtime.slots.record(copy.slot))
            return let_go()

        uploads._let_go = let_go_and_enter
    elif name == "entries are noted but not set":
        table._set = lambda expert, address: None
    return world


@pytest.mark.parametrize(
    "mistake",
    [
        "kernels do not wait for copies",
        "copies do not wait for the last use",
        "sources are let go while they travel",
        "the CPU's results are written over while they travel",
        "entries stay when their experts leave",
        "entries are set before their records arrive",
        "entries are set though somebody else has the slot by now",
        "entries are noted but not set",
    ],
)
def test_a_missing_wait_or_a_wrong_entry_gives_wrong_numbers(mistake):
    wrong = 0
    for seed in range(20):
        device = SimulatedDevice(seed, Speeds(link=1e8, jitter=10.0, kernel=1e-4))
        world = World(LAYERS, LAYERS * TOP_K, device, deterministic=True)
        if "entries" in mistake or "CPU" in mistake:  # uploads that nobody waits for, and that are slow
            device = SimulatedDevice(seed, Speeds(link=1e7, jitter=3.0, host=1e-5))
            world = World(LAYERS * TOP_K, device=device, costs=SLOW_LINK)
        _sabotaged(world, mistake)
        for layer, index in choices(seed, 20):
            try:
                wrong += not torch.equal(world.run(layer, index), wanted(layer, index))
            except AssertionError:  # the table has somebody whom the cache does not know
                wrong += 1
    assert wrong


def everything_resident(finds: bool = True) -> World:
    """A world after a prompt that chose every expert of every layer."""
    world = World(slots=ALL, deterministic=True, finds=finds)
    for _ in range(2):  # what stays after the first comes up beside the rest in the second
        for layer in range(LAYERS):
            world.run(layer, torch.arange(EXPERTS).reshape(-1, TOP_K))
    world.runtime.drain()
    return world


def tokens(seed: int, count: int) -> list[tuple[int, torch.Tensor]]:
    rng = random.Random(seed)
    return [(layer, torch.tensor([rng.sample(range(EXPERTS), TOP_K)])) for _ in range(count) for layer in range(LAYERS)]


def test_with_everything_on_the_device_the_caller_waits_once_a_token_and_misses_nothing():
    books, waits = [], []
    for finds in (True, False):
        world = everything_resident(finds)
        assert world.runtime.table.full
        before = world.device.waits
        for layer, index in tokens(1, 10):
            assert torch.equal(world.run(layer, index), wanted(layer, index))
        waits.append(world.device.waits - before)
        runtime = world.runtime
        books.append(
            (
                runtime.stats.to_dict(),
                world.stats.uses,
                runtime.admissions.renewal._worth._uses,
                world.ram.history.copy(),
            )
        )
        world.check()
    assert waits == [10, 10 * LAYERS]
    assert books[0][:3] == books[1][:3]
    assert books[0][3].__dict__ == books[1][3].__dict__


def test_a_token_that_fails_is_not_heard_of_later(monkeypatch):
    world = everything_resident()
    world.runtime.stats.reset()
    first, second, *_ = said = tokens(5, 2)
    world.run(*first)
    with monkeypatch.context() as patch:
        patch.setattr(world.device, "launch", out_of_memory)
        with pytest.raises(DeviceMemoryError):
            world.run(*second)
    assert world.runtime.table.full
    for layer, index in said[LAYERS:]:
        assert torch.equal(world.run(layer, index), wanted(layer, index))
    assert [counters.requests for counters in world.runtime.stats.per_layer] == [TOP_K] * LAYERS
    world.check()


def out_of_memory(*_: object) -> None:
    raise DeviceMemoryError("full")


def test_the_device_finds_what_the_caller_calls_hits_later():
    world = World(slots=LAYERS * TOP_K, deterministic=True)
    for token in ([5, 2], [5, 1]):
        index = torch.tensor([token])
        assert torch.equal(world.run(0, index), wanted(0, index))
        world.runtime.drain()
    assert world.finder.found == [0, 1]
    world.check()


def test_slots_that_are_given_back_are_found_no_more():
    world = everything_resident()
    world.runtime.shrink(4)
    assert not world.runtime.table.full
    for layer, index in tokens(2, 10):
        assert torch.equal(world.run(layer, index), wanted(layer, index))
    world.check()


def test_when_slots_are_given_back_those_leave_who_are_worth_least():
    world = everything_resident()
    for layer in range(LAYERS):
        for pair in ([6, 7], [4, 5]):
            world.run(layer, torch.tensor([pair]))
    while world.runtime.shrink(1):
        pass
    assert world.cache.capacity <= LAYERS * 4
    last = [ExpertId(layer, index) for layer in range(LAYERS) for index in (6, 7, 4, 5)]  # as they were used
    assert set(world.cache.residents()) == set(last[-world.cache.capacity :])
    for layer in range(LAYERS):
        token = torch.tensor([[4, 5]])
        assert torch.equal(world.run(layer, token), wanted(layer, token))
    world.check()


def test_who_records_hears_of_every_layer_of_every_token(tmp_path):
    heard = []

    class Listening(RoutingRecorder):
        def record(self, layer, top_k_index, top_k_weights, guess):
            heard.append((layer, top_k_index.tolist()))

    writer = TraceWriter(tmp_path / "trace.npz", LAYERS, EXPERTS, TOP_K, None)
    world = World(slots=ALL, deterministic=True, recorder=Listening(writer, LAYERS, TOP_K))
    for _ in range(2):
        for layer in range(LAYERS):
            world.run(layer, torch.arange(EXPERTS).reshape(-1, TOP_K))
    world.runtime.drain()
    assert world.runtime.table.full
    heard.clear()
    said = tokens(3, 4)
    for layer, index in said:
        assert torch.equal(world.run(layer, index), wanted(layer, index))
    assert heard == [(layer, index.tolist()) for layer, index in said]


def test_a_prompt_leaves_what_its_last_tokens_chose():
    world = World(slots=LAYERS * 4)
    head = [[a, b] for a in range(EXPERTS) for b in range(EXPERTS) if a != b]  # everything, often
    prompt = torch.tensor(head + [[6, 7]] * 32)
    for layer in range(LAYERS):
        assert torch.equal(world.run(layer, prompt), wanted(layer, prompt))
    for layer in range(LAYERS):
        assert world.cache.slot_of(ExpertId(layer, 6)) is not None
        assert world.cache.slot_of(ExpertId(layer, 7)) is not None
    world.check()


def test_slots_can_be_given_back_between_forwards():
    world = World(slots=ALL, deterministic=True)
    for layer, index in choices(1, 5):
        world.run(layer, index)
    before = world.device.allocated_bytes
    freed = world.runtime.shrink(4)
    assert 4 <= freed < ALL and world.device.allocated_bytes <= before - freed * RECORD
    for layer, index in choices(2, 5):
        assert torch.equal(world.run(layer, index), wanted(layer, index))
    world.check()
    while world.runtime.shrink(1):
        pass
    assert world.cache.capacity == LAYERS * TOP_K
    world.check()


@pytest.mark.parametrize("before", ["nothing", "wait_for_one", "drain", "recover"])
def test_statistics_that_begin_anew_while_copies_are_under_way_add_up(before):
    world = World(device=SimulatedDevice(speeds=Speeds(link=1e7)), costs=COPY_ONLY)
    for layer, index in choices(7, 6):
        world.run(layer, index)
    assert len(world.runtime.uploads)
    if before == "recover":
        world.runtime.recover()
    elif before != "nothing":
        getattr(world.runtime.uploads, before)()
    for _ in range(2):
        world.stats.reset()
        world.runtime.stats.reset()
    for layer, index in choices(8, 6):
        world.run(layer, index)
    world.check()
    world.runtime._settle()
    stats = world.runtime.stats
    assert stats.copies == stats.total("copied") + stats.total("admitted") > 0


def test_an_error_in_a_layer_leaves_nothing_locked():
    world = World(ram=LAYERS * TOP_K, deterministic=True)
    world.reader.broken.add(ExpertId(1, 3))
    token = torch.tensor([[3, 4]])
    with pytest.raises(OSError, match="cannot be read"):
        world.run(1, token)
    world.reader.broken.clear()
    world.check()
    assert torch.equal(world.run(1, token), wanted(1, token))
    world.check()


@pytest.mark.parametrize("file", ["uploads", pytest.param("device_runtime", marks=pytest.mark.slow)])
def test_after_an_interruption_anywhere_the_next_forward_works(file):
    at, happened = 0, True
    while happened:
        world = World(slots=LAYERS * TOP_K + 3, ram=LAYERS * TOP_K + 3, deterministic=at % 2 == 0, threaded=True)
        steps = choices(1, 1)
        with Interruption((f"offload.{file}",), at) as interruption:
            try:
                for layer, index in steps:
                    world.run(layer, index)
                world.runtime.shrink(1)
            except KeyboardInterrupt:
                pass
        happened = interruption.happened
        for layer, index in steps:
            assert torch.equal(world.run(layer, index), wanted(layer, index))
        world.check()
        world.runtime.close()
        at += 1
    assert at > 30


def test_a_copy_that_cannot_be_queued_leaves_table_and_caches_in_step():
    for at in range(4):
        world = World(slots=LAYERS, deterministic=True)
        copy_in, calls = world.device.copy_in, []

        def fails_once(target, source, after, at=at, calls=calls, copy_in=copy_in):
            calls.append(target)
            if len(calls) == at + 1:
                raise DeviceMemoryError("full")
            return copy_in(target, source, after)

        world.device.copy_in = fails_once
        failed = 0
        for token in (torch.tensor([[3, 4]]), torch.tensor([[4, 5]]), torch.tensor([[3, 6]])):
            try:
                world.run(1, token)
            except DeviceMemoryError:
                failed += 1
                world.check()
            assert torch.equal(world.run(1, token), wanted(1, token))
        assert failed == 1
        world.check()


def test_memory_that_runs_out_at_any_allocation_leaves_a_runtime_that_goes_on():
    fails = 0
    for at in range(1, 200):
        device = SimulatedDevice(at)
        world = World(device=device, deterministic=at % 2 == 0)
        start = device.allocations
        device.fail_at = {start + at}
        for layer, index in choices(at, 4):
            try:
                assert torch.equal(world.run(layer, index), wanted(layer, index))
            except DeviceMemoryError:
                fails += 1
                world.runtime.drain()
                assert torch.equal(world.run(layer, index), wanted(layer, index))
        world.check()
        if device.allocations < start + at:
            break
    assert fails > 10
