"""Measuring a model: a tiny one, really loaded, and the plan's word on it."""

from __future__ import annotations

import tiny
from pocketmoe.offload import device, survey
from pocketmoe.offload.benchmark import expect, measure


def test_answers_of_the_length_asked_for_are_measured_and_the_warm_up_is_not(tmp_path, monkeypatch):
    store = str(tiny.make_chat_store(tmp_path, "qwen3_moe"))
    stages: list[str] = []
    found = measure(store, {}, 8, tokens=6, warmup=3, rounds=2, on_progress=lambda step: stages.append(step.stage))
    assert found["answer_tokens"] == 2 * 6  # random weights end an answer whenever they like
    assert list(dict.fromkeys(stages))[-3:] == ["warm-up", "round 1 of 2", "round 2 of 2"]
    for name in ("decode_tokens_per_second", "prefill_tokens_per_second"):
        rates = found[name]
        assert len(rates["each"]) == 2
        assert 0 < rates["min"] <= rates["median"] <= rates["max"]
    assert 0 < found["hit_rate"] <= 1

    surveyed, asked = survey.survey(store), []
    monkeypatch.setattr(survey, "survey", lambda *_args, vram, **_options: asked.append(vram) or surveyed)
    monkeypatch.setattr(device, "default_device", lambda: "cpu")
    planned = expect(store, [], vram=10**9)["planned"]
    assert asked == [None]  # the plan, too, is for the machine as it is
    budgets = [one["ram_budget_bytes"] for one in planned]
    assert budgets == sorted(set(budgets)) and all(one["tokens_per_second"] > 0 for one in planned)
    [refused] = expect(store, [10**8])["planned"]
    assert refused == {"ram_budget_bytes": 10**8, "tokens_per_second": None, "hit_rate": None}
