"""The hot path with fakes around it: order of work, order of sums, and nothing left half-done after an error."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from fakes_runtime import EXPERTS, HIDDEN, LAYERS, RECORD, TOP_K, FakeKernels, FakeReader
from pocketmoe.cache.expert import ExpertId
from pocketmoe.cache.plain_cache import PlainCache
from pocketmoe.cache.policy import get_policy
from pocketmoe.cache.stats import RunStats
from pocketmoe.offload.prefetch import NoPrefetch, Prefetcher
from pocketmoe.offload.runtime import Assignment, ExpertRuntime, combine
from pocketmoe.offload.tiers import RamSlots
from pocketmoe.offload.transfer import SyncTransfers, ThreadedTransfers


class World:
    def __init__(self, slots: int, prefetch: bool = False, threaded: bool = False) -> None:
        self.stats = RunStats(LAYERS, RECORD)
        self.cache = PlainCache(slots, get_policy("lru", slots, LAYERS * TOP_K), LAYERS, TOP_K)
        self.reader, self.kernels, pool = FakeReader(), FakeKernels(), RamSlots(slots, RECORD)
        make = ThreadedTransfers if threaded else SyncTransfers
        self.transfers = make(self.reader, self.stats)
        ahead = Prefetcher(self.cache, pool, self.transfers, self.stats) if prefetch else NoPrefetch()
        self.prefetch = ahead
        self.runtime = ExpertRuntime(
            self.cache, pool, self.transfers, [self.kernels] * LAYERS, self.stats, ahead, predictor=None
        )

    def run(self, layer: int, index: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
        hidden = torch.ones(index.shape[0], HIDDEN) if hidden is None else hidden
        weights = torch.full(index.shape, 0.5)
        return self.runtime.run_layer(layer, hidden, index, weights)

    def check(self) -> None:
        self.prefetch.drain()
        self.cache.check_integrity(idle=True)
        self.stats.check()


def number(layer: int, index: int) -> float:
    return 1.0 + layer * EXPERTS + index


def test_a_token_gets_the_weighted_sum_of_its_experts():
    world = World(slots=LAYERS * TOP_K)
    out = world.run(1, torch.tensor([[5, 2]]))
    assert out.tolist() == [[0.5 * number(1, 5) + 0.5 * number(1, 2)] * HIDDEN]
    world.check()


def test_hits_are_computed_before_misses_are_waited_for():
    world = World(slots=12)
    world.run(0, torch.tensor([[3, 1]]))
    world.kernels.calls.clear()
    world.run(0, torch.tensor([[0, 3]]))
    assert world.kernels.calls == [[3], [0]]


def test_hits_are_computed_while_misses_travel(monkeypatch):
    world = World(slots=12, threaded=True)
    world.run(0, torch.tensor([[3, 1]]))
    world.reader.gate = threading.Event()
    computed: list[bool] = []
    run = world.kernels.run

    def open_gate_after_hits(*args):
        assert world.reader.gate is not None
        computed.append(world.reader.gate.is_set())
        run(*args)
        world.reader.gate.set()

    monkeypatch.setattr(world.kernels, "run", open_gate_after_hits)
    world.run(0, torch.tensor([[0, 3]]))  # would hang if the miss were waited for first
    assert computed == [False, True]
    world.runtime.close()


def test_a_prompt_that_needs_more_experts_than_there_are_slots_goes_through_in_waves():
    world = World(slots=LAYERS * TOP_K)
    index = torch.arange(EXPERTS).reshape(EXPERTS // 2, 2)
    for layer in range(LAYERS):
        out = world.run(layer, index)
        want = [(number(layer, 2 * t) + number(layer, 2 * t + 1)) / 2 for t in range(EXPERTS // 2)]
        assert out[:, 0].tolist() == want
    world.check()


def test_a_prompt_leaves_each_layer_its_most_used_experts():
    world = World(slots=LAYERS * 4 + 4)
    world.runtime.prompt_reads = 4
    index = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [5, 7], [7, 5], [2, 7]])
    for layer in range(LAYERS):
        world.run(layer, index)
    for layer in range(LAYERS):
        residents = {e.index for e in world.cache.residents() if e.layer == layer}
        assert {2, 5, 7} <= residents, (layer, residents)


def test_a_read_that_fails_raises_and_leaves_nothing_locked_or_arriving():
    for threaded in (False, True):
        world = World(slots=LAYERS * TOP_K, threaded=threaded)
        world.run(0, torch.tensor([[3, 1]]))
        world.reader.broken.add(ExpertId(0, 2))
        with pytest.raises(OSError, match="cannot be read"):
            world.run(0, torch.tensor([[2, 4]]))
        world.cache.check_integrity(idle=True)
        world.reader.broken.clear()
        assert world.run(0, torch.tensor([[2, 4]]))[0, 0] == (number(0, 2) + number(0, 4)) / 2
        world.cache.check_integrity(idle=True)
        world.runtime.close()


def test_an_interrupt_while_computing_leaves_nothing_locked_or_arriving():
    world = World(slots=LAYERS * TOP_K, threaded=True)
    world.kernels.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        world.run(0, torch.tensor([[2, 4]]))
    world.cache.check_integrity(idle=True)
    world.kernels.interrupt = False
    assert world.run(0, torch.tensor([[2, 4]]))[0, 0] == (number(0, 2) + number(0, 4)) / 2
    world.runtime.close()


def test_a_failed_guess_does_not_harm_the_answer_that_follows():
    world = World(slots=LAYERS * TOP_K, prefetch=True, threaded=True)
    world.reader.broken.add(ExpertId(1, 6))
    world.prefetch.request(1, [6, 7])
    world.prefetch.drain()
    world.reader.broken.clear()
    assert world.run(1, torch.tensor([[6, 7]]))[0, 0] == (number(1, 6) + number(1, 7)) / 2
    world.check()
    world.runtime.close()


def test_random_steps_with_guesses_always_give_the_right_sum():
    """2,000 steps at the floor and above, decode and prompts, right and wrong guesses, real threads."""
    for seed, slots in ((1, LAYERS * TOP_K), (2, LAYERS * TOP_K + 1), (3, 13)):
        rng, world = random.Random(seed), World(slots, prefetch=True, threaded=True)
        for _ in range(700):
            layer, tokens = rng.randrange(LAYERS), rng.choice((1, 1, 1, 1, 5))
            index = torch.tensor([rng.sample(range(EXPERTS), TOP_K) for _ in range(tokens)])
            hidden = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
            if rng.random() < 0.7:
                world.prefetch.request(rng.randrange(LAYERS), rng.sample(range(EXPERTS), TOP_K))
            got = world.run(layer, index, hidden)
            scale = torch.tensor([sum(number(layer, e) for e in row) / 2 for row in index.tolist()])
            torch.testing.assert_close(got, hidden * scale[:, None])
        world.check()
        world.runtime.close()


def test_assignment_covers_every_token_and_expert_once():
    generator = torch.Generator().manual_seed(0)
    for tokens, k in ((1, 1), (1, 6), (2, 2), (33, 6)):
        index = torch.stack([torch.randperm(16, generator=generator)[:k] for _ in range(tokens)])
        work = Assignment.of(index)
        assert work.experts == sorted(set(index.flatten().tolist()))
        assert work.starts[-1] == tokens * k == len(work.rows)
        assert sorted(work.places.flatten().tolist()) == list(range(tokens * k))
        for i, expert in enumerate(work.experts):
            rows = work.rows[work.starts[i] : work.starts[i + 1]].tolist()
            assert rows == [t for t in range(tokens) if expert in index[t]]


def test_sums_are_in_expert_order_whatever_the_router_order():
    parts = {e: torch.randn(HIDDEN, generator=torch.Generator().manual_seed(e)) * 10**e for e in range(6)}
    weights = torch.rand(6, generator=torch.Generator().manual_seed(9))
    results = []
    for seed in range(5):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        work = Assignment.of(order[None])
        results.append(
            combine(torch.stack([parts[e] for e in work.experts]), work.places, work.order, weights[order][None])
        )
    assert all(torch.equal(result, results[0]) for result in results)


def test_shrinking_gives_slots_back_and_the_answers_stay_right():
    world = World(slots=20)
    for layer in range(LAYERS):
        world.run(layer, torch.arange(6).reshape(3, 2))
    world.runtime.resize(LAYERS * TOP_K)
    assert world.cache.capacity == LAYERS * TOP_K
    assert world.run(2, torch.tensor([[6, 1]]))[0, 0] == (number(2, 6) + number(2, 1)) / 2
    world.check()
