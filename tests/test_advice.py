"""Advice on policies and budgets: what it says of a setting is what a run with that setting does."""

from __future__ import annotations

import pytest
import tiny
from fakes_run import COSTS, DISK, EXPERTS, LAYERS, RECORD, TOP_K, a_run, routing
from pocketmoe.cache.advice import ENOUGH_TOKENS, Advice, advise
from pocketmoe.cache.cost import Costs, stops, time_per_token
from pocketmoe.cache.expert import ExpertId
from pocketmoe.cache.history import MOST_STEPS, History
from pocketmoe.offload.disk_speed import measure_disk
from pocketmoe.offload.errors import DataError


def advice(**options) -> Advice:
    found = advise(a_run(**options), DISK)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "costs",
    [COSTS, COSTS._replace(miss=0.0008), COSTS._replace(stop=0.001), COSTS._replace(read=0.0002)],
    ids=["waiting", "misses", "stops", "quick disk"],
)
@pytest.mark.parametrize("policy", ["lru", "forecast"])
def test_what_is_said_of_another_budget_is_what_a_run_with_it_takes(policy, costs):
    disk = DISK._replace(bytes_per_s=RECORD / costs.read, read_s=costs.read)
    found = advise(a_run(1500, 24, policy=policy, costs=costs), disk)
    assert found is not None
    for setting in found.budgets:
        real = a_run(1500, setting.slots, policy=policy, costs=costs)
        counted = list(real.pace)[-found.tokens :]
        assert 1 / setting.tokens_per_second == pytest.approx(sum(s.seconds for s in counted) / len(counted), rel=0.05)
        assert setting.ram_budget_bytes == real.ram_budget_bytes


def test_the_present_setting_is_what_was_measured_and_what_the_model_makes_of_it_stands_beside_it():
    found = advice()
    present = [setting for setting in (*found.policies, *found.budgets) if setting.present]
    assert [setting.slots for setting in present] == [24, 24]
    assert all(setting.tokens_per_second == pytest.approx(found.measured) for setting in present)
    assert found.predicted == pytest.approx(found.measured, rel=0.02)
    fast = advise(a_run(), DISK._replace(bytes_per_s=DISK.bytes_per_s * 2, read_s=DISK.read_s / 2))
    assert fast is not None
    assert fast.predicted > 1.1 * fast.measured, "an error of the model is not hidden"
    assert fast.measured == found.measured
    busy = advise(a_run(), DISK._replace(bytes_per_s=DISK.bytes_per_s / 2))
    assert busy is not None
    assert busy.predicted == pytest.approx(found.predicted, rel=0.02), "what the disk gave in the run it can give"


def test_more_slots_hit_more_and_all_of_them_leave_nothing_to_miss():
    found = advice()
    rates = [setting.hit_rate for setting in found.budgets]
    assert rates == sorted(rates)
    assert found.budgets[0].slots == LAYERS * TOP_K + 4
    assert (found.budgets[-1].slots, rates[-1]) == (LAYERS * EXPERTS, 1.0)


def test_where_all_experts_fit_smaller_budgets_count_from_what_is_used_and_not_from_what_is_allowed():
    run = a_run(slots=LAYERS * EXPERTS)
    run.ram_budget_bytes, run.peak_rss_bytes = 10**12, 10**9
    found = advise(run, DISK)
    assert found is not None
    *smaller, present = found.budgets
    assert present.ram_budget_bytes == 10**12
    assert [s.ram_budget_bytes for s in smaller] == [10**9 - (LAYERS * EXPERTS - s.slots) * RECORD for s in smaller]


def test_no_policy_is_better_than_the_optimum_and_lru_is_not_shown_twice():
    found = advice(policy="fifo")
    assert [setting.policy for setting in found.policies] == ["fifo", "lru", "belady"]
    assert found.policies[-1].hit_rate > max(setting.hit_rate for setting in found.policies[:-1])
    assert [setting.policy for setting in advice().policies] == ["lru", "belady"]


def test_too_little_to_go_by_is_no_advice():
    assert advise(a_run(ENOUGH_TOKENS), DISK) is None, "the first token needs no step"
    assert advise(a_run(ENOUGH_TOKENS + 1), DISK) is not None
    too_few = LAYERS * TOP_K - 1
    damaged = ("policy", "of another version"), ("slots", too_few), ("total_experts", too_few)
    for name, value in (*((name, None) for name in ("slots", "total_experts", "policy", "history")), *damaged):
        run = a_run()
        setattr(run, name, value)
        assert advise(run, DISK) is None
    run = a_run()
    run.ram_budget_bytes = None
    found = advise(run, None)
    assert found is not None
    assert found.budgets[0].ram_budget_bytes is None


def test_what_a_miss_costs_beside_waiting_is_read_off_the_tokens():
    run = a_run(1000, costs=COSTS._replace(stop=0.0006, miss=0.0004))
    costs = Costs.of(run, DISK, list(run.pace))
    assert costs is not None
    assert costs.stop == pytest.approx(0.0006, rel=0.1)
    assert costs.miss == pytest.approx(0.0004, rel=0.1)
    assert costs.rest == pytest.approx(COSTS.rest, rel=0.05)
    assert costs.expert == pytest.approx(COSTS.expert)


def test_reads_overlap_with_the_hits_and_with_what_prefetch_has_asked_for_earlier():
    costs = Costs(rest=10, expert=1, stop=0, miss=0, read=5, latency=0)
    assert time_per_token([2, 2], [0, 0], 2, costs) == (24, 0)
    assert time_per_token([2, 2], [1, 0], 2, costs) == (24, 4), "two experts' time has passed when the read ends"
    assert time_per_token([2, 2], [1, 0], 2, costs._replace(latency=2)) == (24, 6)
    ahead = costs._replace(ahead=1.0)
    assert time_per_token([2, 2], [1, 0], 2, ahead) == (24, 0), "10 before the layer are enough for one read"
    assert time_per_token([2, 2], [1, 0], 2, ahead._replace(wrong=2.0)) == (24, 4)


def test_a_layer_that_misses_slows_the_one_behind_it_and_with_prefetch_the_one_before():
    token = [0, 0, 0, 1, 0, 0, 2]
    assert [i for i, stopped in enumerate(stops(token, 7, ahead=False)) if stopped] == [3, 4, 6]
    assert [i for i, stopped in enumerate(stops(token, 7, ahead=True)) if stopped] == [2, 3, 4, 5, 6]
    two_tokens = [0, 0, 1, 1, 0, 0]
    assert stops(two_tokens, 3, ahead=True) == [False, True, True, True, True, False], "tokens are apart"
    costs = Costs(rest=10, expert=0, stop=3, miss=0, read=0, latency=0)
    assert time_per_token([2] * 7, token, 7, costs).working == 7 * 10 + 3 * 3


def test_a_run_without_variation_is_taken_to_cost_per_stop_and_miss_what_others_did():
    run = a_run(slots=LAYERS * EXPERTS)
    costs = Costs.of(run, DISK, list(run.pace)[-100:])
    assert costs is not None
    assert (costs.stop, costs.miss) == pytest.approx((0.4 * costs.read, 0.1 * costs.read))
    assert costs.rest == pytest.approx(COSTS.rest)


def test_a_forward_that_was_cut_short_counts_for_nothing():
    made = History(LAYERS)
    for step in routing(3):
        made.record(step[0].layer, step)
    made.record(0, (ExpertId(0, 1), ExpertId(0, 2)))
    made.record(1, (ExpertId(1, 1), ExpertId(1, 2)))
    assert made.tokens == 3
    for layer in range(LAYERS):
        made.record(layer, (ExpertId(layer, 5), ExpertId(layer, 3)))
    assert made.tokens == 4
    assert made.steps()[-1] == (ExpertId(LAYERS - 1, 3), ExpertId(LAYERS - 1, 5))


def test_old_tokens_are_forgotten_in_whole_and_what_is_left_comes_back_from_data():
    made = History(LAYERS)
    for step in routing(MOST_STEPS // LAYERS + 10):
        made.record(step[0].layer, step)
    made.record(0, (ExpertId(0, 300),))
    assert made.tokens == MOST_STEPS // LAYERS
    assert [step[0].layer for step in made.steps()[:LAYERS]] == list(range(LAYERS))
    assert History.from_dict(made.to_dict()).steps() == made.steps()
    uneven = History(2)
    uneven.record(0, (ExpertId(0, 1), ExpertId(0, 400)))
    uneven.record(1, (ExpertId(1, 2),))
    assert History.from_dict(uneven.to_dict()).steps() == uneven.steps()
    with pytest.raises(ValueError):
        History.from_dict(made.to_dict() | {"top_k": 7})
    twice = History(1)
    twice.record(0, (ExpertId(0, 1), ExpertId(0, 1)))
    with pytest.raises(ValueError, match=r"layer 0 is there twice: \[1, 1\]"):
        History.from_dict(twice.to_dict())


def test_the_disk_is_measured_with_a_stores_own_records_and_not_at_all_where_there_is_none(tmp_path):
    store = tiny.make_chat_store(tmp_path / "made")
    found = measure_disk(store, seconds=0.02)
    assert found is None or (found.bytes_per_s > 0 and found.read_s > 0), "None where direct reads are refused"
    with pytest.raises(DataError):
        measure_disk(tmp_path)
