"""A GPU's memory: trunk and KV cache first, slots in the rest, and a refusal that says what would fit."""

from __future__ import annotations

import re

import pytest
from pocketmoe.cache.units import parse_bytes
from pocketmoe.offload.errors import MemoryBudgetError
from pocketmoe.offload.placement import CUDA_CONTEXT, VramNeeds, longest_context, plan_vram

MB = 1_000_000
NEEDS = VramNeeds(trunk=1500 * MB, kv=400 * MB, workspace=200 * MB, record=2 * MB, experts=6144, context=4096)


def test_slots_are_what_trunk_kv_cache_workspace_and_cuda_leave():
    plan = plan_vram(NEEDS, 8000 * MB)
    assert plan.slots == (8000 - 1500 - 400 - 200 - CUDA_CONTEXT // MB) // 2
    assert plan.needs.fixed + plan.slot_bytes + plan.left == plan.budget
    assert 0 <= plan.left < NEEDS.record


def test_no_more_slots_than_experts():
    assert plan_vram(NEEDS, 80_000 * MB).slots == NEEDS.experts


def test_no_slots_at_all_are_enough_unless_there_is_a_floor():
    assert plan_vram(NEEDS, NEEDS.fixed).slots == 0
    with pytest.raises(MemoryBudgetError, match=r"and 8 expert slots \(16 MB\)"):
        plan_vram(NEEDS._replace(floor=8), NEEDS.fixed)


def test_a_budget_below_the_fixed_part_is_refused_with_one_that_is_accepted():
    with pytest.raises(MemoryBudgetError) as refused:
        plan_vram(NEEDS._replace(kv=0), 2000 * MB)
    suggested = re.search(r"--vram (\S+B)", str(refused.value))
    assert suggested, refused.value
    assert "--context" not in str(refused.value)
    assert plan_vram(NEEDS._replace(kv=0), parse_bytes(suggested[1])).slots >= 0


def test_a_refusal_suggests_a_shorter_context_where_that_would_do():
    with pytest.raises(MemoryBudgetError) as refused:
        plan_vram(NEEDS, 2300 * MB)
    suggested = re.search(r"--context (\d+)", str(refused.value))
    assert suggested, refused.value
    shorter = int(suggested[1])
    needs = NEEDS._replace(kv=NEEDS.kv * shorter // NEEDS.context, context=shorter)
    assert plan_vram(needs, 2300 * MB).slots >= 0


def test_an_explicit_number_of_slots_must_fit():
    assert plan_vram(NEEDS, 8000 * MB, slots=5).slots == 5
    with pytest.raises(MemoryBudgetError, match="at most 2750 do"):
        plan_vram(NEEDS, 8000 * MB, slots=2751)


def test_the_plan_is_one_line_that_adds_up():
    line = str(plan_vram(NEEDS, 8000 * MB))
    assert line == (
        "VRAM: 8.0 GB = CUDA 400 MB + trunk 1.5 GB + KV cache 400 MB (4,096 tokens) + workspace 200 MB "
        "+ 2,750 experts 5.5 GB"
    )


@pytest.mark.parametrize(("room", "tokens"), [(100, 0), (256, 256), (1000, 768), (9_999, 9_984), (10_000, 10_000)])
def test_the_longest_context_is_the_last_one_that_fits(room, tokens):
    assert longest_context(lambda context: context, room, 10_000) == tokens
