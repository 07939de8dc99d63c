"""Replay: it measures what the runtime would do, and the optimum is one."""

from __future__ import annotations

import itertools
import threading
from functools import cache

import cachetools
import numpy as np
import pytest
from pocketmoe.cache.expert import ExpertId
from pocketmoe.cache.plain_cache import PlainCache
from pocketmoe.cache.policy import get_policy, policy_names
from pocketmoe.cache.replay import (
    OPTIMUM,
    Case,
    PlainReplayer,
    Requests,
    Step,
    chosen_of,
    compare,
    lru_curve,
    replay,
    steps_of,
)
from pocketmoe.cache.trace import DECODE, PREFILL, Trace


def make_trace(tokens: int, layers: int, experts: int, top_k: int, sequences: int = 1, seed: int = 0) -> Trace:
    """Skewed random routing; sequences of equal length."""
    rng = np.random.default_rng(seed)
    score = rng.gumbel(size=(tokens, layers, experts)) + rng.gumbel(size=(layers, experts))
    chosen = np.argsort(-score, axis=2)[..., :top_k].astype(np.uint8)
    seq = np.arange(tokens) * sequences // tokens
    return Trace(chosen, seq, np.full(tokens, DECODE), experts)


def served_by_the_runtimes_cache(trace: Trace, policy: str, slots: int) -> list[int]:
    """Misses per layer of a real `ExpertCache`, each sequence on a new one."""
    misses = [0] * trace.layers
    for number in np.unique(trace.seq):
        cycle = trace.layers * trace.top_k
        cache = PlainCache(slots, get_policy(policy, slots, cycle), trace.layers, trace.top_k)
        for token in trace.experts[trace.seq == number].tolist():
            for layer, chosen in enumerate(token):
                wanted = cache.lookup(layer, sorted(chosen))
                misses[layer] += len(wanted.misses)
                with cache.locked(wanted):
                    for expert in wanted.misses:
                        assert cache.admit(expert) is not None
                    for expert in wanted.misses:
                        cache.arrived(expert)
            cache.tick()
        cache.check_integrity(idle=True)
    return misses


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize("slots", [12, 13, 17, 24, 40, 48])
def test_replay_misses_what_the_runtimes_cache_misses(policy, slots):
    trace = make_trace(150, layers=4, experts=12, top_k=3, sequences=2)
    assert list(replay(Requests(trace), policy, slots).misses_by_layer) == served_by_the_runtimes_cache(
        trace, policy, slots
    )


def fewest_misses(steps: list[Step], slots: int) -> int:
    """By trying everything: which `slots` experts are kept after each step, those of the step among them."""

    @cache
    def from_here(at: int, resident: frozenset[ExpertId]) -> int:
        if at == len(steps):
            return 0
        missing = set(steps[at]) - resident
        others = sorted(resident - set(steps[at]))
        room = slots - len(steps[at])
        keeps = [others] if len(others) <= room else itertools.combinations(others, room)
        return len(missing) + min(from_here(at + 1, frozenset(keep) | set(steps[at])) for keep in keeps)

    return from_here(0, frozenset())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("slots", [4, 5, 6])
def test_the_optimum_is_the_fewest_misses_that_any_choice_gives(seed, slots):
    requests = Requests(make_trace(9, layers=2, experts=5, top_k=2, seed=seed))
    assert sum(replay(requests, OPTIMUM, slots).misses_by_layer) == fewest_misses(steps_of(requests.chosen), slots)


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize("per_layer", [False, True])
def test_no_policy_beats_the_optimum_and_all_are_equal_when_everything_fits(policy, per_layer):
    requests = Requests(make_trace(200, layers=4, experts=12, top_k=3, sequences=3))
    for slots in (12, 20, 36):
        assert replay(requests, policy, slots, per_layer).hits <= replay(requests, OPTIMUM, slots, per_layer).hits
    assert replay(requests, policy, 48, per_layer).hits == requests.total - requests.compulsory


def test_a_request_is_a_distinct_expert_and_none_is_not_one():
    none = 255
    chosen = np.array([[[3, 1, 3], [none, none, none]], [[1, 1, 1], [2, none, 0]]], np.uint8)
    requests = Requests(Trace(chosen, np.zeros(2), np.full(2, DECODE), 4))
    first, second = [ExpertId(0, 1), ExpertId(0, 3)], [ExpertId(1, 0), ExpertId(1, 2)]
    steps = steps_of(requests.chosen)
    assert steps == [tuple(first), (), (first[0],), tuple(second)]
    assert steps_of(chosen_of(steps, 2, 3)) == steps
    assert (requests.total, requests.compulsory) == (5, 4)
    assert replay(requests, "lru", 8).hits == 1


def test_prefill_is_left_out():
    trace = make_trace(10, layers=2, experts=6, top_k=2)
    phase = np.array([PREFILL] * 4 + [DECODE] * 6)
    mixed = Requests(Trace(trace.experts, trace.seq, phase, 6))
    alone = Requests(Trace(trace.experts[4:], trace.seq[4:], phase[4:], 6))
    assert np.array_equal(mixed.chosen, alone.chosen)
    assert mixed.tokens == 6


def test_a_sequence_starts_cold_unless_warm():
    trace = make_trace(40, layers=2, experts=6, top_k=2, sequences=2)
    twice = Trace(np.concatenate([trace.experts[:20]] * 2), trace.seq, trace.phase, 6)
    cold, warm = Requests(twice), Requests(twice, warm=True)
    for policy in (OPTIMUM, *policy_names()):
        hits = replay(cold, policy, 12).hits
        assert hits == cold.total - cold.compulsory
        assert replay(warm, policy, 12).hits == hits + warm.compulsory
        alone = Requests(Trace(trace.experts[:20], trace.seq[:20], trace.phase[:20], 6))
        assert replay(cold, policy, 6).hits == 2 * replay(alone, policy, 6).hits


def test_pools_per_layer_are_replays_of_each_layer_alone():
    trace = make_trace(100, layers=3, experts=8, top_k=2)
    together = replay(Requests(trace), "lru", 12, per_layer=True).misses_by_layer
    for layer in range(3):
        alone = Trace(trace.experts[:, [layer]], trace.seq, trace.phase, 8)
        assert replay(Requests(alone), "lru", 4).misses_by_layer == (together[layer],)


def test_the_curve_is_that_of_lru_from_a_cycle_on():
    single = make_trace(300, layers=6, experts=10, top_k=1, sequences=2)
    requests, curve = Requests(single), lru_curve(Requests(single))
    assert all(curve[slots] == replay(requests, "lru", slots).hits for slots in range(7, 61, 3))
    requests = Requests(make_trace(300, layers=6, experts=10, top_k=3, sequences=2))
    curve = lru_curve(requests)
    for slots in range(21, 61, 3):
        assert curve[slots] == pytest.approx(replay(requests, "lru", slots).hits, abs=0.005 * requests.total)
    assert curve[-1] == requests.total - requests.compulsory


def test_too_few_slots_are_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"^11 slots .* 4 layers .* 3 experts need 12"):
        replay(Requests(make_trace(5, layers=4, experts=12, top_k=3)), "lru", 11)


def test_replays_side_by_side_give_the_results_of_one_after_the_other():
    trace = make_trace(100, layers=3, experts=8, top_k=2, sequences=2)
    cases = [Case(policy, slots) for slots in (8, 14) for policy in (OPTIMUM, "lru", "forecast")]
    results = list(compare(Requests(trace), cases, jobs=1))
    assert [(result.policy, result.slots) for result in results] == cases
    assert list(compare(Requests(trace), cases, jobs=2)) == results


def test_one_replay_at_a_time_is_the_callers_own_so_that_an_interruption_ends_it():
    class Interrupted(PlainReplayer):
        def misses(self, chosen, policy, slots):
            assert threading.current_thread() is threading.main_thread()
            raise KeyboardInterrupt

    requests = Requests(make_trace(5, layers=2, experts=8, top_k=2))
    with pytest.raises(KeyboardInterrupt):
        list(compare(requests, [Case("lru", 6)], replayer=Interrupted()))
    assert list(compare(requests, [], replayer=Interrupted())) == []


@pytest.mark.parametrize("name", ["LRUCache", "FIFOCache"])
def test_with_one_layer_and_single_experts_we_are_the_textbooks_cache(name):
    requests = Requests(make_trace(2000, layers=1, experts=40, top_k=1))
    for slots in (1, 3, 10, 25):
        reference, hits = getattr(cachetools, name)(slots), 0
        for (expert,) in steps_of(requests.chosen):
            if reference.get(expert):
                hits += 1
            else:
                reference[expert] = True
        assert replay(requests, name.removesuffix("Cache").lower(), slots).hits == hits
