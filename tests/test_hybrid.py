"""The hybrid's decisions: the split is the best there is, and nothing is uploaded that does not pay."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import accumulate

import pytest
from pocketmoe.cache.expert import ExpertId
from pocketmoe.cache.hybrid import (
    COLDEST,
    HORIZON,
    Cost,
    Measured,
    TierCosts,
    Worth,
    ends,
    split_misses,
    upload_budget,
    worth_uploading,
)

FREE = Cost(0.0, 0.0)
LAPTOP = TierCosts(copy=Cost(10e-6, 1e-3), cpu=Cost(20e-6, 0.25e-3), gpu=Cost(10e-6, 0.05e-3), cpu_slowdown=0.2)
SOME = [ExpertId(0, index) for index in range(8)]


def random_costs(rng: random.Random) -> TierCosts:
    def cost() -> Cost:
        return Cost(rng.choice([0.0, 10 ** rng.uniform(-6, -4)]), 10 ** rng.uniform(-5, -2.5))

    return TierCosts(cost(), cost(), cost(), rng.choice([0.0, rng.uniform(0, 0.9)]))


def played(hits: int, copied: int, on_cpu: int, costs: TierCosts, late: list[float], link_busy: float) -> float:
    """The later end, event by event instead of by formula."""
    gpu = costs.gpu.of(hits)
    for arrival in late:
        gpu = max(gpu, arrival) + costs.gpu.of(1)
    arrivals = accumulate([costs.copy.of(1)] + [costs.copy.each] * (copied - 1)) if copied else []
    link = link_busy
    for arrival in arrivals:
        link = link_busy + arrival
        gpu = max(gpu, link) + costs.gpu.of(1)
    work, cpu = costs.cpu.of(on_cpu), 0.0
    if link > 0:
        cpu = min(link, work / (1 - costs.cpu_slowdown))
        work -= cpu * (1 - costs.cpu_slowdown)
    return max(gpu, cpu + max(0.0, work))


@pytest.mark.parametrize("seed", range(400))
def test_no_other_split_ends_earlier(seed):
    rng = random.Random(seed)
    costs, hits, misses = random_costs(rng), rng.randrange(9), rng.randrange(17)
    link_busy = rng.choice([0.0, rng.uniform(0, 5e-3)])
    arrivals = sorted(rng.uniform(0, link_busy) for _ in range(rng.randrange(3) if link_busy else 0))
    flying = [(arrival, 100 + i) for i, arrival in enumerate(arrivals)]
    split = split_misses(hits, range(misses), costs, arriving=flying, link_busy=link_busy)
    waited = len(arrivals) - sum(expert >= 100 for expert in split.on_cpu)
    assert sorted((*split.copied, *split.on_cpu)) == [*range(misses), *(expert for _, expert in flying[waited:])]

    def end(copied: int, waited: int) -> float:
        on_cpu = misses - copied + len(arrivals) - waited
        return played(hits, copied, on_cpu, costs, arrivals[:waited], link_busy)

    best = min(end(n, w) for n in range(misses + 1) for w in range(len(arrivals) + 1))
    assert end(len(split.copied), waited) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(100))
def test_a_copy_is_never_chosen_when_the_cpu_alone_ends_no_later(seed):
    rng = random.Random(seed)
    costs, hits, misses = random_costs(rng), rng.randrange(9), rng.randrange(1, 17)
    copied = len(split_misses(hits, range(misses), costs).copied)
    cpu_alone = max(ends(hits, 0, misses, costs))
    assert (max(ends(hits, copied, misses - copied, costs)) < cpu_alone) == (copied > 0)
    if copied:
        assert ends(hits, copied, misses - copied, costs).gpu < cpu_alone


@pytest.mark.parametrize("seed", range(60))
def test_a_faster_link_never_copies_less_and_a_faster_cpu_never_more(seed):
    rng = random.Random(seed)
    costs = replace(random_costs(rng), cpu_slowdown=0.0, gpu=FREE)
    factors = [4.0, 2.0, 1.0, 0.5, 0.25, 0.1]

    def copies(cost: str, hits: int) -> list[int]:
        return [
            len(split_misses(hits, range(8), replace(costs, **{cost: getattr(costs, cost).scaled(factor)})).copied)
            for factor in factors
        ]

    assert copies("copy", hits=2) == sorted(copies("copy", hits=2))
    assert copies("cpu", hits=2) == sorted(copies("cpu", hits=2), reverse=True)


def test_the_experts_most_worth_having_are_those_that_are_copied():
    split = split_misses(2, ["hot", "warm", "cold"], replace(LAPTOP, copy=Cost(0.0, 0.4e-3)))
    assert split.copied == ("hot",) and split.on_cpu == ("warm", "cold")


def test_a_free_link_copies_everything_where_the_gpu_is_much_faster():
    assert split_misses(4, SOME, replace(LAPTOP, copy=FREE, gpu=Cost(0.0, 1e-6))).on_cpu == ()


def test_a_slow_link_leaves_everything_to_the_cpu():
    assert split_misses(4, SOME[:4], LAPTOP).copied == ()


def test_a_link_that_is_busy_and_a_lack_of_room_both_limit_copies():
    fast = replace(LAPTOP, copy=Cost(10e-6, 0.1e-3))
    free = len(split_misses(0, SOME, fast).copied)
    assert free > 1
    assert len(split_misses(0, SOME, fast, link_busy=0.5e-3).copied) < free
    assert len(split_misses(0, SOME, fast, most=1).copied) == 1
    assert split_misses(0, SOME, fast, most=0).copied == ()


def test_a_copy_in_flight_is_waited_for_only_where_the_cpu_is_not_quicker():
    assert split_misses(2, [], LAPTOP, arriving=[(0.1e-3, "soon"), (5e-3, "late")], link_busy=5e-3).on_cpu == ("late",)


def test_of_two_equal_ways_the_one_with_fewer_copies_is_taken():
    assert split_misses(0, SOME[:1], TierCosts(Cost(0.0, 1.0), Cost(0.0, 1.0), FREE)).copied == ()


def test_no_miss_is_no_work():
    assert split_misses(4, [], LAPTOP) == ((), ())
    assert ends(0, 0, 0, LAPTOP) == (0, 0)


def test_uploads_behind_the_copies_slow_the_cpu_and_delay_no_copy():
    costs = TierCosts(copy=Cost(0.0, 1.0), cpu=Cost(0.0, 1.0), gpu=FREE, cpu_slowdown=0.5)
    assert ends(0, 1, 3, costs, behind=2.0) == (1, 4.5)


def test_a_copy_slows_the_cpu_only_while_it_lasts():
    costs = TierCosts(copy=Cost(0.0, 1.0), cpu=Cost(0.0, 1.0), gpu=FREE, cpu_slowdown=0.5)
    assert ends(0, 0, 3, costs).cpu == 3
    assert ends(0, 1, 3, costs).cpu == 3.5
    assert ends(0, 8, 3, costs).cpu == 6  # done before the copies are


def test_corrections_approach_what_is_measured_and_one_odd_value_moves_little():
    costs, real = LAPTOP, LAPTOP.copy.scaled(1.5)
    for count in [1, 2, 3] * 40:
        costs = costs.corrected(copy=Measured(count, real.of(count)))
    assert costs.copy.each == pytest.approx(real.each, rel=0.01)
    assert (costs.cpu, costs.gpu) == (LAPTOP.cpu, LAPTOP.gpu)
    odd = LAPTOP.corrected(cpu=Measured(4, 10.0), gpu=Measured(1, 1e-9), weight=0.1)
    assert odd.cpu.each == pytest.approx(LAPTOP.cpu.each * 1.3)
    assert odd.gpu.each == pytest.approx(LAPTOP.gpu.each * 0.925)


@pytest.mark.parametrize("measured", [Measured(0, 1.0), Measured(2, 0.0), None])
def test_a_measurement_that_says_nothing_changes_nothing(measured):
    assert LAPTOP.corrected(copy=measured, cpu=measured, gpu=measured) == LAPTOP
    free = replace(LAPTOP, copy=FREE)
    assert free.corrected(copy=Measured(1, 1.0)) == free


def worth_of(uses: dict[ExpertId, list[int]], tokens: int) -> Worth:
    worth = Worth()
    for token in range(tokens):
        worth.use(expert for expert, when in uses.items() if token in when)
        worth.tick()
    return worth


def test_worth_grows_with_uses_and_fades_with_time_and_is_a_rate():
    often, seldom, once, long_ago = SOME[:4]
    worth = worth_of({often: [*range(100)], seldom: [*range(0, 100, 5)], once: [99], long_ago: [1]}, 100)
    assert worth.ordered([long_ago, once, seldom, often]) == [often, seldom, once, long_ago]
    assert 0.5 < worth.rate(often) <= 1
    assert COLDEST == worth.rate(SOME[7]) == worth.rate(long_ago) < worth.rate(seldom)


def test_gain_is_what_the_newcomer_brings_beyond_its_victim():
    often, seldom = SOME[:2]
    worth = worth_of({often: [*range(50)], seldom: [10, 20]}, 50)
    assert worth.gain(often, None) == HORIZON * worth.rate(often)
    assert worth.gain(often, seldom) == -worth.gain(seldom, often) > 0


def test_a_victim_that_would_have_to_be_read_from_disk_is_dearer():
    often, seldom = SOME[:2]
    worth = worth_of({often: [*range(50)], seldom: [*range(0, 50, 4)]}, 50)
    dearness = LAPTOP.dearness(3e-3)
    assert dearness > 10 and LAPTOP.dearness(0.0) == 1
    assert worth.gain(often, seldom) > 0 > worth.gain(often, seldom, dearness)
    assert worth.gain(often, None, dearness) == worth.gain(often, None)


def test_an_upload_pays_above_a_number_of_hits_that_grows_with_what_the_cpu_loses():
    def least(costs: TierCosts, cpu_share: float) -> float:
        return next(n / 100 for n in range(1000) if worth_uploading(n / 100, costs, cpu_share))

    assert 1 < least(LAPTOP, 1.0) < least(replace(LAPTOP, cpu_slowdown=0.4), 1.0)
    assert 0 < least(LAPTOP, 0.0) < least(LAPTOP, 0.5) < least(LAPTOP, 1.0)
    assert not worth_uploading(0.0, LAPTOP, 0.0) and not worth_uploading(-1.0, LAPTOP, 0.0)


def test_nothing_is_uploaded_where_a_hit_is_no_faster_than_a_miss():
    slow_gpu = replace(LAPTOP, gpu=Cost(0.0, 1.0))
    assert not worth_uploading(100.0, slow_gpu, 1.0) and not worth_uploading(100.0, slow_gpu, 0.0)


def test_an_upload_is_queued_behind_less_than_one_copy_only():
    assert [upload_budget(LAPTOP, busy) for busy in (0.0, 0.4e-3, 0.99e-3, 1e-3, 5e-3)] == [1, 1, 1, 0, 0]
    assert upload_budget(replace(LAPTOP, copy=FREE), 0.0, most=3) == 3
    assert upload_budget(LAPTOP, 0.0, most=0) == 0
