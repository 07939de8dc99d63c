"""Ratios and tables of `benchmarks.compare`, from made-up runs."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.comparison_report")


def run(part: str, engine: str, round_: int, tps: float, **more: Any) -> dict[str, Any]:
    return {
        "part": part,
        "engine": engine,
        "round": round_,
        "routing": "uniform",
        "decode_tps": tps,
        "prefill_tps": 10 * tps,
        "decode_s": [1 / tps] * 4,
        "disk_bytes": 0,
        "peak_rss": 1,
        "argmax": [1, 2, 3, 4],
        "counts": (0, 8, 4),
        **more,
    }


def pocketmoe(part: str, round_: int, tps: float, **more: Any) -> dict[str, Any]:
    counters = {"requests": 4 * 16, "record_bytes": 100, "trunk_bytes": 400, "compute_s": 0.1, "stall_s": 0.0}
    memory = {"moe_layers": 2, "bytes_read": 800, "cache_share": 0.9, "budget": 10, "peak_rss": 9, "hit_rate": 0.5}
    return run(part, "pocketmoe", round_, tps, **counters, **memory, **more)


def test_a_ratio_is_taken_within_each_round(report):
    runs = [
        run("in-ram", "llama.cpp", 0, 10),
        pocketmoe("in-ram", 0, 20),
        run("in-ram", "llama.cpp", 1, 100),
        pocketmoe("in-ram", 1, 100),
        pocketmoe("in-ram", 2, 1),  # llama.cpp failed in this round
        {"part": "in-ram", "engine": "llama.cpp", "round": 2, "routing": "uniform", "error": "killed for memory"},
    ]
    found = report.ratios(runs)["decode_in_ram_vs_llamacpp"]
    assert found == {"ratio": 1.5, "numerator": 60, "denominator": 55, "spread": [1.0, 2.0], "n": 2}


def test_memory_limited_ratios_keep_shares_and_routings_apart(report):
    name = "llama.cpp mmap, read-ahead 128 KB"
    runs = []
    for share, tps in ((40, 6), (25, 3)):
        where = {"share": share, "routing": "uniform"}
        runs += [
            run("limited", name, 0, 2, **where),
            run("limited", "llama.cpp mmap, read-ahead 8192 KB", 0, 0.1, **where),
            pocketmoe("limited", 0, tps, **where),
            {"part": "limited", "engine": "disk", "round": 0, "disk_bytes_per_s": 1500.0, **where},
        ]
    found = report.ratios(runs)
    assert found["decode_40pct_vs_llamacpp_mmap_uniform"]["ratio"] == 3
    assert found["decode_25pct_vs_llamacpp_mmap_uniform"]["ratio"] == 1.5
    assert found["read_rate_vs_disk_limit"]["ratio"] == pytest.approx(800 * 6 / 4 / 1500)
    assert found["peak_rss_vs_ram"]["ratio"] == 0.9
    assert found["cache_bytes_share"]["ratio"] == 0.9


def test_the_memory_limit_counts_a_tokens_experts_and_the_trunk(report):
    runs = [
        pocketmoe("in-ram", 0, 10),
        {"part": "limits", "engine": "stream", "round": 0, "stream_bytes_per_s": 40000.0},
    ]
    found = report.ratios(runs)
    assert found["decode_in_ram_vs_memory_limit"]["ratio"] == pytest.approx(10 / (40000 / (16 * 100 + 400)))
    assert found["overhead_ms_per_layer"]["ratio"] == pytest.approx((0.1 - 0.1 / 4 - 400 / 40000) / 2 * 1000)


def test_the_table_says_why_an_engine_has_no_numbers_and_who_agrees(report):
    runs = [
        pocketmoe("in-ram", 0, 10),
        run("in-ram", "llama.cpp", 0, 10, argmax=[1, 2, 3, 9]),
        {"part": "in-ram", "engine": "other", "round": 0, "routing": "uniform", "error": "killed for memory"},
    ]
    text = "\n".join(report.table(runs))
    assert "killed for memory" in text
    assert "75%" in text
