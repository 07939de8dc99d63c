"""Who comes up to VRAM: whoever saves more than its copy costs, which is little while the CPU has little to do."""

from __future__ import annotations

import pytest
from pocketmoe.cache.expert import ExpertId
from pocketmoe.cache.hybrid import Cost, TierCosts
from pocketmoe.cache.manager import ExpertCache
from pocketmoe.cache.plain_cache import PlainCache
from pocketmoe.cache.policy import get_policy
from pocketmoe.cache.renewal import Renewal

COSTS = TierCosts(copy=Cost(0.0, 1e-3), cpu=Cost(0.0, 0.25e-3), gpu=Cost(0.0, 0.05e-3), cpu_slowdown=0.4)
OFTEN, OLD, LESS, RARE = (ExpertId(0, index) for index in range(4))


def cache_of(*residents: ExpertId, slots: int = 0) -> ExpertCache:
    slots = slots or len(residents)
    cache = PlainCache(slots, get_policy("lru", slots, 1), layers=1, floor=1)
    for expert in residents:
        cache.admit(expert)
        cache.arrived(expert)
    return cache


def renewal_of(cache: ExpertCache, below: ExpertCache | None = None, cpu_s: float = 1.0) -> Renewal:
    """After 40 tokens of a second each."""
    renewal = Renewal(cache, below)
    for token in range(40):
        renewal.use([OFTEN])
        renewal.use([LESS] if token % 2 else [])
        renewal.use([OLD] if token % 5 < 2 else [])
        renewal.computed(cpu_s)
        renewal.tick(1.0)
    return renewal


def brought(renewal: Renewal, *experts: ExpertId, costs: TierCosts = COSTS, link_busy: float = 0.0) -> list[ExpertId]:
    return [expert for expert in renewal.uploads(experts, costs, link_busy) if renewal.admit(expert)]


def test_a_small_gain_pays_only_while_the_cpu_is_idle():
    assert brought(renewal_of(cache_of(OLD), cpu_s=1.0), LESS) == []
    assert brought(renewal_of(cache_of(OLD), cpu_s=0.1), LESS) == [LESS]
    assert brought(renewal_of(cache_of(LESS), cpu_s=0.0), OLD) == []  # no gain at all


def test_the_cpu_s_share_is_that_of_late_and_unknown_shares_are_taken_to_be_whole():
    renewal = Renewal(cache_of(OLD))
    assert renewal.cpu_share == 1.0
    for cpu_s, share in ((0.2, 0.2), (0.6, 0.6)):
        for _ in range(200):
            renewal.computed(cpu_s / 2)
            renewal.computed(cpu_s / 2)
            renewal.tick(1.0)
        assert renewal.cpu_share == pytest.approx(share, abs=1e-3)
    renewal.computed(100.0)
    renewal.tick()  # a prompt's piece
    renewal.tick(1.0)
    assert renewal.cpu_share == pytest.approx(0.57, abs=1e-2)


def test_the_most_worth_having_come_first_and_no_more_than_the_link_has_time_for():
    free = TierCosts(Cost(0.0, 0.0), COSTS.cpu, COSTS.gpu)
    assert brought(renewal_of(cache_of(RARE, slots=4)), OLD, LESS, OFTEN, costs=free) == []  # nothing to save
    quick = TierCosts(Cost(0.0, 0.2e-3), COSTS.cpu, COSTS.gpu)
    assert brought(renewal_of(cache_of(RARE, slots=4)), OLD, LESS, OFTEN, costs=quick) == [OFTEN]
    assert brought(renewal_of(cache_of(RARE, slots=4)), OFTEN, costs=quick, link_busy=0.3e-3) == []


def test_whoever_would_leave_and_is_nowhere_else_is_dearer_however_long_unused():
    for victim in (LESS, RARE):
        ram = cache_of(OFTEN, slots=3)
        renewal = renewal_of(cache_of(victim), ram, cpu_s=0.0)
        renewal.read_s = 1.0
        assert brought(renewal, OFTEN) == []
        ram.admit(victim)
        ram.arrived(victim)
        assert brought(renewal, OFTEN) == [OFTEN]


def test_copies_that_would_lose_somebody_worth_more_to_the_disk_are_left_to_the_cpu():
    dear_cpu = TierCosts(Cost(0.0, 1e-3), Cost(0.0, 5e-3), COSTS.gpu)
    ram = cache_of(OFTEN, LESS, OLD, slots=4)
    renewal = renewal_of(cache_of(RARE), ram)
    renewal.read_s = 1.0
    assert renewal.split(0, [LESS], dear_cpu) == ((), (LESS,))
    renewal.read_s = 1e-3
    assert renewal.split(0, [OLD, LESS], dear_cpu) == ((LESS, OLD), ())
    renewal.read_s = 1.0
    ram.admit(RARE)
    ram.arrived(RARE)
    assert renewal.split(0, [LESS], dear_cpu) == ((LESS,), ())


def test_in_ram_those_leave_first_who_are_in_vram_and_no_longer_who_has_left_it():
    vram, ram = cache_of(OLD), cache_of(OLD, LESS)
    ram.demote(OLD)
    renewal = Renewal(vram, ram)
    admission = renewal.admit(LESS)
    assert admission is not None and admission.evicted == OLD
    assert (ram.is_transient(OLD), ram.is_transient(LESS)) == (False, True)


def test_who_only_passes_through_vram_changes_nothing_in_ram():
    vram, ram = cache_of(OLD, slots=1), cache_of(LESS, RARE)
    renewal = Renewal(vram, ram)
    for passing in (LESS, RARE):
        assert renewal.admit(passing, transient=True) is not None
        vram.arrived(passing)
        ram.demote(LESS)
    assert (ram.is_transient(LESS), ram.is_transient(RARE)) == (True, False)
