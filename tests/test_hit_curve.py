"""Hit rates to expect: between nothing and everything, rising, and what was recorded where it was recorded."""

from __future__ import annotations

import pytest
from pocketmoe.cache.hit_curve import RECORDED, even_hits

# gpt-oss-20b: 24 layers x 32 experts, top-4; the replay of docs/notes/cache-policies.md with --warm.
CYCLE, EXPERTS = 96, 768


@pytest.mark.parametrize(("slots", "rate"), [(96, 0.424), (192, 0.727), (460.8, 0.959), (768, 1.0)])
def test_at_recorded_numbers_of_slots_it_gives_the_recorded_rates(slots, rate):
    assert RECORDED.hits(slots, CYCLE, EXPERTS) == pytest.approx(rate)


def test_more_slots_never_hit_less_and_nothing_hits_nothing():
    rates = [RECORDED.hits(slots, CYCLE, EXPERTS) for slots in range(EXPERTS + 1)]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0.0, 1.0)


def test_below_a_cycle_hits_fall_in_proportion():
    assert RECORDED.hits(CYCLE / 2, CYCLE, EXPERTS) == pytest.approx(0.212)


@pytest.mark.parametrize(("cycle", "experts"), [(64, 256), (384, 6144), (480, 23040), (8, 8)])
def test_the_curve_of_another_shape_begins_at_its_own_cycle_and_ends_at_all_its_experts(cycle, experts):
    if cycle < experts:
        assert RECORDED.hits(cycle, cycle, experts) == pytest.approx(0.424)
    assert RECORDED.hits(experts, cycle, experts) == 1.0


def test_recorded_routing_hits_more_than_even_routing():
    for slots in range(CYCLE, EXPERTS, 24):
        assert RECORDED.hits(slots, CYCLE, EXPERTS) > even_hits(slots, EXPERTS)
