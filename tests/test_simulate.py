"""The simulator: its clocks on cases that can be done by hand, and the hybrid as the best strategy on every link."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from pocketmoe.cache.expert import ExpertId
from pocketmoe.cache.hybrid import Cost, TierCosts
from pocketmoe.cache.machine import GB, GIB, LINKS, MACHINES, SHAPES, Machine, ModelShape, link_speed
from pocketmoe.cache.routing import Routing, made_up, recorded, with_guesses
from pocketmoe.cache.simulate import SYNC, Setup, simulate
from pocketmoe.cache.strategies import HYBRID, get_strategy, strategy_names
from pocketmoe.cache.trace import DECODE, Trace, read_trace

COLLECTION = Path(__file__).resolve().parent.parent.parent / "shared/traces/gpt-oss-20b_decode.npz"
TINY = ModelShape("tiny", layers=2, experts=5, top_k=2, record=1000, trunk=0, dense=0, kv=1)
COSTS = TierCosts(copy=Cost(0.0, 8.0), cpu=Cost(0.0, 4.0), gpu=Cost(0.0, 1.0))
NO_OTHER = tuple(name for name in strategy_names() if name != HYBRID)


def setup_of(vram_slots: int, ram_slots: int = 10, **changes: object) -> Setup:
    machine = Machine("", 0, 0, "pcie4x8", 1.0, 1.0, 1.0, "")
    setup = Setup(TINY, machine, vram_slots, ram_slots, COSTS, trunk=0.5, head=0.25, read=100.0)
    return replace(setup, **changes)


def routing_of(*layers: tuple[int, ...], popular: tuple[int, ...] = (0, 1)) -> Routing:
    """Steps of 2 layers in turn; the experts `popular` of each layer were used before."""
    steps = [tuple(ExpertId(at % 2, index) for index in chosen) for at, chosen in enumerate(layers)]
    popularity = Counter({ExpertId(layer, index): 9 for layer in range(2) for index in popular})
    return Routing(steps, 2, 5, 2, 1, popularity)


def test_a_token_takes_its_trunks_its_experts_and_its_head():
    outcome = simulate(setup_of(4), routing_of((0, 1), (0, 1)), "static-experts")
    assert outcome.seconds == pytest.approx(2 * (0.5 + SYNC + 2 * 1.0) + 0.25)
    assert (outcome.tokens, outcome.hits, outcome.requests) == (1, 4, 4)


def test_gpu_and_cpu_compute_at_the_same_time():
    outcome = simulate(setup_of(4), routing_of((0, 2), (0, 1)), "static-experts")
    assert outcome.seconds == pytest.approx(2 * (0.5 + SYNC) + 4.0 + 2.0 + 0.25)
    assert outcome.on_cpu == 1


def test_whole_layers_need_no_word_from_the_cpu():
    outcome = simulate(setup_of(5), routing_of((2, 3), (2, 3)), "static-layers")
    assert outcome.seconds == pytest.approx(2 * 0.5 + 2 * 4.0 + 2 * 1.0 + 0.25)
    assert (outcome.hits, outcome.on_cpu) == (2, 2)  # the last layers are the resident ones


def test_a_copied_miss_is_waited_for_and_a_hit_afterwards():
    outcome = simulate(setup_of(4), routing_of((0, 2), (0, 1), (0, 2), (0, 1)), "copy-lru")
    assert outcome.seconds == pytest.approx(4 * 0.5 + (SYNC + 8 + 1) + 3 * 2.0 + 2 * 0.25)
    assert (outcome.copied, outcome.hits, outcome.link_seconds) == (1, 7, 8.0)


def test_an_upload_arrives_while_later_layers_run_and_is_a_hit_then():
    outcome = simulate(setup_of(5), routing_of(*[(0, 3), (0, 1)] * 4), "cpu-lru")
    # 8 s on the link: after layers of 2.5, 4.5, 2.5 s and a trunk it has arrived for the fourth token's first layer
    assert (outcome.uploads, outcome.on_cpu, outcome.hits) == (1, 2, 14)


def test_a_gpu_that_finds_its_hits_itself_computes_them_while_the_cpu_learns_of_them():
    def seconds(name: str, slots: int, finds: bool) -> float:
        return simulate(setup_of(slots, gpu_finds_hits=finds), routing_of((0, 2), (0, 1)), name).seconds

    for slots in (4, 10):  # the CPU computes the miss for longer than the GPU its hit, if there is a miss
        saved = seconds("cpu-lru", slots, False) - seconds("cpu-lru", slots, True)
        assert saved == pytest.approx(SYNC if slots == 4 else 2 * SYNC)
        assert seconds("static-experts", slots, True) == seconds("static-experts", slots, False)


def test_hits_that_are_done_sooner_than_the_cpu_knows_of_them_wait_for_it_unless_nothing_can_be_missing():
    quick = replace(COSTS, gpu=Cost(0.0, SYNC / 8))
    routing = routing_of((0, 1), (0, 1))
    some, everything = (simulate(setup_of(slots, costs=quick), routing, "copy-lru").seconds for slots in (4, 10))
    assert some == pytest.approx(2 * (0.5 + SYNC) + 0.25)
    assert everything == pytest.approx(2 * (0.5 + SYNC / 4) + 0.25)


def test_what_is_not_in_ram_is_read_once_and_then_computed():
    routing = routing_of((0, 1), (0, 4), (0, 1), (0, 4))
    outcome = simulate(setup_of(4, ram_slots=4), routing, "static-experts")
    assert (outcome.from_disk, outcome.on_cpu) == (1, 1)
    assert outcome.seconds == pytest.approx(4 * (0.5 + SYNC) + (100 + 4) + 4 + 2 * 2 + 2 * 0.25)


def test_uploads_take_speed_from_the_cpu():
    slowed = replace(COSTS, cpu_slowdown=0.5)
    layers = [(0, 2), (0, 3)] * 6
    times = [simulate(setup_of(5, costs=costs), routing_of(*layers), "cpu-lru").seconds for costs in (COSTS, slowed)]
    assert times[0] < times[1]


@pytest.mark.parametrize("name", strategy_names())
def test_every_request_is_served_one_way_and_the_same_run_gives_the_same_result(name):
    routing = with_guesses(made_up(2, 5, 2, tokens=50), recall=0.8)
    outcome = simulate(setup_of(5, ram_slots=5), routing, name)
    assert outcome.requests == 50 * 2 * 2
    assert outcome == simulate(setup_of(5, ram_slots=5), routing, name)


@pytest.mark.parametrize("name", strategy_names())
def test_with_room_for_everything_every_strategy_hits_everything(name):
    outcome = simulate(setup_of(10), made_up(2, 5, 2, tokens=20), name)
    assert outcome.hit_rate == 1 and outcome.link_seconds == 0


def test_the_hybrid_is_given_no_more_slots_than_the_others():
    routing = made_up(2, 5, 2, tokens=20)
    every = [ExpertId(layer, index) for layer in range(2) for index in range(5)]
    for name in strategy_names():
        strategy = get_strategy(name, 6, COSTS, routing)
        assert sum(expert in strategy for expert in every) == (5 if name == "static-layers" else 6), name


# Machines and shapes


def test_links_and_their_lanes():
    assert link_speed("pcie4x16") == 2 * link_speed("pcie4x8") == pytest.approx(25.2e9, rel=0.01)
    for link in ("pcie4", "pcie6x4", "pcie4x3", "x8"):
        with pytest.raises(ValueError, match=r"as pcie4x8"):
            link_speed(link)


def test_shapes_weigh_what_the_models_weigh():
    sizes = {name: (s.layers * (s.experts * s.record + s.trunk) + s.dense) / GB for name, s in SHAPES.items()}
    assert sizes["gpt-oss-20b"] == pytest.approx(11.4, abs=0.2)  # 20.9e9 parameters, of which 19.1e9 at 4.25 bits
    assert sizes["gpt-oss-120b"] == pytest.approx(62.5, abs=1)
    assert sizes["qwen3-30b-a3b"] == pytest.approx(17.6, abs=0.5)  # 30.5e9 at 4.5 bits and some at 8.5
    assert sizes["mixtral-8x7b"] == pytest.approx(26.9, abs=0.5)
    assert sizes["deepseek-v3"] == pytest.approx(385, abs=5)


def test_more_vram_and_less_context_leave_more_slots_and_too_little_is_refused():
    shape, machine = SHAPES["gpt-oss-20b"], MACHINES["laptop-8gb"]
    slots = [Setup.of(shape, replace(machine, vram=vram * GIB)).vram_slots for vram in (6, 8, 12, 24)]
    assert slots == sorted(slots) and slots[-1] == 24 * 32
    assert Setup.of(shape, machine, context=65536).vram_slots < Setup.of(shape, machine, context=1024).vram_slots
    with pytest.raises(ValueError, match=r"2.1 GB of VRAM leave 0 slots .* needs 96 slots, 4\.\d GB in all"):
        Setup.of(shape, replace(machine, vram=2 * GIB))
    with pytest.raises(ValueError, match=r"6.0 GB of RAM hold 75 experts, not 96"):
        Setup.of(shape, replace(machine, ram=6 * GB))


# Routing


def trace_of(lengths: list[int]) -> Trace:
    seq = np.repeat(np.arange(len(lengths)), lengths)
    chosen = np.zeros((len(seq), 2, 1), np.uint8)
    chosen[:, :, 0] = seq[:, None]
    return Trace(chosen, seq, np.full(len(seq), DECODE), 8)


def test_what_is_popular_comes_from_sequences_that_are_not_run():
    routing = recorded(trace_of([3, 4, 5, 6]), tokens=100)
    assert {expert.index for step in routing.steps for expert in step} == {1, 3}
    assert {expert.index for expert in routing.popularity} == {0, 2}
    assert (routing.tokens, routing.sequences) == (10, 2)
    assert recorded(trace_of([3, 4, 5, 6]), tokens=6).tokens == 6


def test_a_single_sequence_is_cut_in_two_and_a_single_token_refused():
    routing = recorded(trace_of([7]), tokens=100)
    assert (routing.tokens, sum(routing.popularity.values())) == (4, 6)
    with pytest.raises(ValueError, match="fewer than two decoded tokens"):
        recorded(trace_of([1]), tokens=100)


def test_guesses_are_right_as_often_as_was_asked_and_never_leave_the_token():
    routing = with_guesses(made_up(4, 64, 4, tokens=100), recall=0.75)
    pairs = list(zip(routing.steps, routing.guesses, strict=True))
    right = sum(len(set(step) & set(guess)) for step, guess in pairs) / sum(len(step) for step, _ in pairs)
    assert right == pytest.approx(0.75, abs=0.03)
    following = [guess for _, guess in routing.with_next_guesses()]
    assert all(guess == () for guess in following[3::4])
    assert all({e.layer for e in guess} == {at % 4 + 1} for at, guess in enumerate(following) if at % 4 != 3)


# The claim


def speeds(routing: Routing, shape: ModelShape, machine: Machine, link: str, context: int = 8192) -> dict[str, float]:
    setup = Setup.of(shape, replace(machine, link=link), context)
    return {name: simulate(setup, routing, name).tokens_per_second for name in strategy_names()}


def require_best(found: dict[str, float], slack: float) -> None:
    best = max(NO_OTHER, key=lambda name: found[name])
    assert found[HYBRID] >= (1 - slack) * found[best], f"hybrid {found[HYBRID]:.2f}, {best} {found[best]:.2f}"


@cache
def short_routing() -> Routing:
    return made_up(8, 32, 4, tokens=150, seed=3)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("vram", [2.6, 3.3])
def test_the_hybrid_is_no_slower_than_any_single_strategy_on_any_link(link, vram):
    shape = SHAPES["gpt-oss-20b"]._replace(layers=8)
    machine = replace(MACHINES["laptop-8gb"], vram=int(vram * GIB) + 10**9)
    require_best(speeds(short_routing(), shape, machine, link), slack=0.001)


@pytest.mark.parametrize("link", ["pcie3x4", "pcie4x16"])
def test_the_hybrid_is_no_slower_either_where_ram_is_too_small_as_well(link):
    shape = SHAPES["gpt-oss-20b"]._replace(layers=8)
    machine = replace(MACHINES["laptop-8gb"], vram=int(2.6 * GIB) + 10**9, ram=int(7 * GB))
    require_best(speeds(short_routing(), shape, machine, link), slack=0.001)


@cache
def real_routing() -> Routing:
    if not COLLECTION.exists():
        pytest.skip("the collection of real routing is not here")
    return recorded(read_trace(COLLECTION), tokens=200)


@pytest.mark.parametrize("link", LINKS)
def test_on_real_routing_too_and_at_least_1_5_times_as_fast_as_whole_layers(link):
    found = speeds(real_routing(), SHAPES["gpt-oss-20b"], MACHINES["laptop-8gb"], link)
    require_best(found, slack=0.001)
    assert found[HYBRID] > 1.5 * found["static-layers"]
