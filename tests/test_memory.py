"""The plan: everything fixed first, the rest is slots, and a refusal that says what would fit."""

from __future__ import annotations

import re

import pytest
from pocketmoe.cache.units import parse_bytes
from pocketmoe.offload import memory
from pocketmoe.offload.contexts import first_that_fits
from pocketmoe.offload.errors import MemoryBudgetError
from pocketmoe.offload.memory import Needs, adjust, make_plan

MB = 1_000_000
NEEDS = Needs(
    program=350 * MB,
    trunk=100 * MB,
    kv=50 * MB,
    workspace=60 * MB,
    step=60 * MB,
    record=2 * MB,
    experts=240,
    floor=60,
    context=4096,
)


def test_slots_are_what_the_fixed_part_leaves():
    plan = make_plan(NEEDS, 800 * MB)
    assert plan.slots == 120
    assert plan.needs.fixed + plan.slot_bytes <= plan.budget


def test_prompts_borrow_their_workspace_from_the_slots():
    needs = NEEDS._replace(workspace=200 * MB, step=20 * MB)
    plan = make_plan(needs, 1000 * MB)
    assert plan.slots == 240
    assert plan.slots_beside(needs.step) == plan.slots
    assert plan.slots_beside(200 * MB) == 150
    assert "90 of them lent to prompts while they are read" in str(plan)
    with pytest.raises(MemoryBudgetError):  # the floor has to fit beside a prompt, too
        make_plan(needs, 810 * MB)
    assert make_plan(needs, 820 * MB).slots_beside(200 * MB) == needs.floor


def test_no_more_slots_than_experts():
    assert make_plan(NEEDS, 8000 * MB).slots == NEEDS.experts


def test_a_budget_below_the_floor_is_refused_with_a_budget_that_is_accepted():
    with pytest.raises(MemoryBudgetError) as refused:
        make_plan(NEEDS, 600 * MB)
    message = str(refused.value)
    for part in ("600 MB", "350 MB", "100 MB", "50 MB", "60 expert slots"):
        assert part in message, message
    suggested = re.search(r"--ram (\S+B)", message)
    assert suggested, message
    assert make_plan(NEEDS, parse_bytes(suggested[1])).slots >= NEEDS.floor


def test_a_budget_that_is_short_by_little_is_told_from_what_is_needed():
    with pytest.raises(MemoryBudgetError, match=r"the budget is 680 MB, 1 byte too little, but .* at least 680 MB"):
        make_plan(NEEDS, 680 * MB - 1)


def test_a_refusal_suggests_a_shorter_context_where_that_would_do():
    needs = NEEDS._replace(kv=400 * MB)
    with pytest.raises(MemoryBudgetError) as refused:
        make_plan(needs, 800 * MB)
    suggested = re.search(r"--context (\d+)", str(refused.value))
    assert suggested, refused.value
    shorter = int(suggested[1])
    assert make_plan(needs._replace(kv=needs.kv * shorter // needs.context, context=shorter), 800 * MB).slots >= 60


def test_where_no_usual_context_fits_the_refusal_is_that_of_the_shortest_and_its_budget_is_accepted():
    def needs_of(context: int) -> Needs:
        return NEEDS._replace(kv=100_000 * context, context=context)

    with pytest.raises(MemoryBudgetError, match="for 1,024 tokens") as refused:
        first_that_fits([4096, 1024], needs_of, lambda needs: make_plan(needs, 600 * MB))
    suggested = re.search(r"--ram (\S+B)", str(refused.value))
    assert suggested, refused.value
    found = first_that_fits([4096, 1024], needs_of, lambda needs: make_plan(needs, parse_bytes(suggested[1])))
    assert found.needs.context == 1024


def test_an_automatic_budget_leaves_memory_to_others_and_says_so(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 600 * MB)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 350 * MB)
    plan = make_plan(NEEDS, None)
    assert plan.automatic
    assert plan.budget == 350 * MB + int(600 * MB * (1 - memory.LEAVE_FREE))
    assert "(85% of what is free)" in str(plan)


def test_an_automatic_budget_takes_no_more_than_the_whole_model_needs(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 64_000 * MB)
    plan = make_plan(NEEDS, None)
    assert plan.budget == NEEDS.fixed + NEEDS.experts * NEEDS.record
    assert "(all that it can use)" in str(plan)


def test_measured_needs_only_ever_take_slots_away():
    plan = make_plan(NEEDS, 800 * MB)
    assert adjust(plan, NEEDS._replace(program=300 * MB)).slots == plan.slots
    assert adjust(plan, NEEDS._replace(program=390 * MB)).slots == 100
    with pytest.raises(MemoryBudgetError):
        adjust(plan, NEEDS._replace(program=500 * MB))


def test_an_automatic_budget_follows_measured_needs(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 64_000 * MB)
    plan = make_plan(NEEDS, None)
    grown = adjust(plan, NEEDS._replace(program=390 * MB))
    assert (grown.slots, grown.budget) == (plan.slots, plan.budget + 40 * MB)


def test_an_explicit_number_of_slots_must_fit():
    assert make_plan(NEEDS, 800 * MB, slots=61).slots == 61
    with pytest.raises(MemoryBudgetError, match="do not fit"):
        make_plan(NEEDS, 800 * MB, slots=200)


def test_the_plan_says_where_the_experts_sit():
    text = str(make_plan(NEEDS, 800 * MB))
    assert "120 fit in RAM (240 MB)" in text
    assert "120 stay on disk (240 MB)" in text
    assert len(text.splitlines()) == 2


def test_a_container_limit_counts_as_available_memory(monkeypatch, tmp_path):
    (tmp_path / "limit").write_text(str(memory.resident_bytes() + 100 * MB))
    (tmp_path / "usage").write_text(str(10**12))  # mostly page cache
    monkeypatch.setattr(memory, "_CGROUP_LIMITS", (str(tmp_path / "limit"),))
    monkeypatch.setattr(memory, "_CGROUP_USAGE", (str(tmp_path / "usage"),))
    assert memory.available_bytes() <= 110 * MB


def test_peak_memory_is_at_least_what_is_resident():
    assert memory.peak_resident_bytes() >= memory.resident_bytes() * 0.9 > 0
