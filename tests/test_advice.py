"""Advice on the budget: what it says of other numbers of slots is what they would do."""

from __future__ import annotations

import random

import pytest
from pocketmoe.cache.advice import ENOUGH_TOKENS, History, what_if
from pocketmoe.cache.expert import ExpertId
from pocketmoe.cache.report import report
from pocketmoe.cache.stats import RunStats

LAYERS, EXPERTS, TOP_K, RECORD = 4, 16, 2, 10**8


def history(tokens: int, seed: int = 0) -> History:
    """Uniform random routing: any policy hits what share of the experts it holds."""
    made, rng = History(LAYERS), random.Random(seed)
    for _ in range(tokens):
        for layer in range(LAYERS):
            made.record(layer, tuple(ExpertId(layer, i) for i in rng.sample(range(EXPERTS), TOP_K)))
    return made


def run(slots: int, wait: float = 0.06, policy: str = "lru") -> RunStats:
    """100 tokens of 0.1 s, of which compute waits `wait`."""
    stats = RunStats(LAYERS, RECORD, slots=slots, total_experts=LAYERS * EXPERTS, ram_budget_bytes=slots * RECORD)
    stats.policy = policy
    stats.enter("answer")
    stats.record_answer(100, 100, 10.0)
    stats.record_stall(0, 100 * wait)
    return stats


@pytest.mark.parametrize("policy", ["lru", "forecast"])
def test_uniform_routing_hits_the_share_of_experts_that_are_held_and_time_follows(policy):
    cases = what_if(run(slots=32, policy=policy), history(1500))
    assert [case.slots for case in cases] == [24, 32, 40, 48, 64]
    for case in cases:
        share = case.slots / (LAYERS * EXPERTS)
        assert case.hit_rate == pytest.approx(share, abs=0.06)
        assert case.ram_budget_bytes == case.slots * RECORD
        assert 1 / case.tokens_per_second == pytest.approx(0.04 + 0.06 * (1 - share) / 0.5, rel=0.08)
    assert cases[1].tokens_per_second == pytest.approx(10.0), "the present setting is what was measured"
    assert cases[-1].tokens_per_second == pytest.approx(25.0), "with all experts nothing is waited for"


def test_too_little_to_go_by_is_no_advice():
    assert what_if(run(32), history(ENOUGH_TOKENS - 1)) == []
    assert what_if(run(64), history(300)) == [], "all are resident: nothing was missed"
    bare = run(32)
    bare.ram_budget_bytes = None
    assert what_if(bare, history(300)) == []


def test_a_forward_that_was_cut_short_counts_for_nothing():
    made = history(3)
    made.record(0, (ExpertId(0, 1), ExpertId(0, 2)))
    made.record(1, (ExpertId(1, 1), ExpertId(1, 2)))
    assert made.tokens == 3
    for layer in range(LAYERS):
        made.record(layer, (ExpertId(layer, 5), ExpertId(layer, 3)))
    assert made.tokens == 4
    assert made.steps()[-1] == (ExpertId(LAYERS - 1, 3), ExpertId(LAYERS - 1, 5))


def test_old_tokens_are_forgotten_in_whole():
    made = history(10_000)
    assert made.tokens == 12_288 // LAYERS
    assert [step[0].layer for step in made.steps()[:LAYERS]] == list(range(LAYERS))


def test_the_report_names_other_budgets_beside_the_present_one():
    stats = run(32)
    stats.what_if = [case._asdict() for case in what_if(stats, history(400))]
    line = next(line for line in report(stats.to_dict()).splitlines() if line.startswith("what if"))
    assert "10.0 t/s; " in line
    assert "--ram 6.4GB 100%, about 25.0 t/s (+150%)" in line
