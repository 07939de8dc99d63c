"""`pocketmoe bench`, called as typer calls it, and once as a process to see that a simulation never loads torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pocketmoe.cache.machine import LINKS, MACHINES
from pocketmoe.cache.strategies import strategy_names
from pocketmoe.cli import measure
from pocketmoe.cli.main import app
from pocketmoe.offload.errors import DataError, MemoryBudgetError
from test_simulate import trace_of
from typer.testing import CliRunner, Result


def invoke(*args: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, args)])


def simulated(*args: object) -> dict:
    result = invoke("--simulate", "--tokens", "10", "--json", *args)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """4 sequences of 2 layers x 4 experts, as another program may have written them."""
    import numpy as np

    made = trace_of([3, 4, 5, 6])
    np.savez(tmp_path / "run.npz", experts=made.experts, seq=made.seq)
    return tmp_path / "run.npz"


def test_the_table_has_every_strategy_and_says_that_it_is_simulated():
    result = invoke("--simulate", "--tokens", "10")
    assert result.exit_code == 0, result.stderr
    assert "simulated, not measured: gpt-oss-20b on laptop-8gb" in result.stderr
    assert "made-up routing, 10 tokens of 1 sequence\n" in result.stderr
    assert "tokens/s, simulated" in result.stdout
    first = [line.split()[0] for line in result.stdout.splitlines() if line.split()]
    assert [word for word in first if word in strategy_names()] == list(strategy_names())


def test_json_has_a_result_for_each_link_and_strategy():
    data = simulated("--link", "all")
    assert data["simulated"] is True and data["model"] == "gpt-oss-20b"
    assert [(r["link"], r["strategy"]) for r in data["results"]] == [(li, s) for li in LINKS for s in strategy_names()]
    for result in data["results"]:
        assert result["requests"] == 10 * 24 * 4
        assert result["hit_rate"] == result["hits"] / result["requests"]
        assert result["simulated_tokens_per_second"] > 0


def test_every_preset_machine_runs_and_options_change_it():
    for name in MACHINES:
        assert simulated("--machine", name)["machine"]["name"] == name
    data = simulated("--vram", "6GiB", "--ram", "24GB", "--cpu-bandwidth", "50GB/s", "--gpu-bandwidth", "300GB")
    machine = data["machine"]
    assert (machine["vram"], machine["ram"], machine["ram_bandwidth"]) == (6 * 2**30, 24 * 10**9, 50 * 10**9)
    assert data["vram_slots"] < simulated()["vram_slots"]


def test_a_small_ram_reads_from_disk():
    data = simulated("gpt-oss-120b", "--machine", "desktop-24gb", "--ram", "32GiB")
    assert all(result["from_disk"] > 0 for result in data["results"])


def test_prefetch_and_a_gpu_that_finds_its_hits_reach_the_simulation():
    assert simulated("--recall", "0.9")["prefetch_recall"] == 0.9
    hybrid = [simulated(*option)["results"][-1] for option in (("--host-finds-hits",), ())]
    assert hybrid[1]["simulated_tokens_per_second"] > hybrid[0]["simulated_tokens_per_second"]


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        ([], 2, "name a model to measure, or add --simulate"),
        (["store", "--machine", "laptop-8gb"], 2, "--machine is for --simulate"),
        (["store", "--recall", "0.5"], 2, "--recall is for --simulate"),
        (["store", "--ram", "1GB,much"], 2, "--ram: 'much' is not an amount"),
        (["store", "--ram", ""], 2, "--ram: '' is not an amount"),
        (["store", "--ram", ","], 2, "--ram: '' is not an amount"),
        (["store", "--vram", "1GB,2GB"], 2, "--vram is one budget"),
        (["--simulate", "--rounds", "5"], 2, "--rounds is for measuring"),
        (["--simulate", "--prompt-tokens", "7"], 2, "--prompt-tokens is for measuring"),
        (["gpt-oss-20", "--simulate"], 2, "did you mean 'gpt-oss-20b'?"),
        (["--simulate", "--machine", "laptop"], 2, "unknown machine 'laptop'"),
        (["--simulate", "--link", "pcie4x8,agp"], 2, "--link: 'agp' is not a link: write pcie3, pcie4 or pcie5"),
        (["--simulate", "--vram", "much"], 2, "--vram: 'much' is not an amount of memory"),
        (["--simulate", "--vram", "2GiB"], 4, "needs 96 slots"),
        (["deepseek-v3", "--simulate"], 4, "of VRAM leave 0 slots"),
        (["--simulate", "--trace", "absent.npz"], 3, "absent.npz can not be read: No such file"),
    ],
)
def test_options_that_cannot_be_are_refused(options, code, sentence):
    result = invoke(*options)
    assert (result.exit_code, result.stdout) == (code, "")
    assert sentence in result.stderr


def test_a_trace_of_another_shape_is_refused(trace):
    result = invoke("--simulate", "--trace", trace)
    assert result.exit_code == 3
    assert "has 2 layers x 4 experts, but gpt-oss-20b has 24 x 32" in result.stderr


@pytest.fixture
def measured(monkeypatch):
    """What runs in other processes is made up: the requests to them, and one budget that is too small."""
    asked: list[dict] = []

    def run_apart(function, arguments, **_watch):
        name = function.partition(":")[2]
        asked.append({"function": name, **arguments})
        if name == "expect":
            planned = [
                {"ram_budget_bytes": budget, "tokens_per_second": 11.5, "hit_rate": 0.81}
                for budget in arguments["budgets"] or [6 * 10**9, 12 * 10**9]
            ]
            formats = {"experts": "int4-g32", "trunk": "int8-g32", "total": 18 * 10**9}
            rates = {"ram": 40e9, "disk": 3.5e9, "vram": 0.0}
            return {"rates": rates, "formats": formats, "hit_curve": "recorded decodes", "planned": planned}
        if arguments["options"]["ram"] < 10**9:
            raise MemoryBudgetError("the budget is too small")
        if arguments["options"]["ram"] == 7 * 10**9:
            raise DataError("a record is damaged")
        spread = {"median": 12.3, "min": 11.9, "max": 12.7, "each": [11.9, 12.3, 12.7]}
        return {
            "ram_budget_bytes": 1, "slots": 3000, "experts": 6144, "kernels": "native-avx2", "policy": "forecast",
            "io": "direct", "decode_tokens_per_second": spread, "prefill_tokens_per_second": spread,
            "answer_tokens": 384, "hit_rate": 0.835, "disk_bytes_per_token": 150e6, "disk_bytes_per_s": 1.8e9,
            "disk_peak_bytes_per_s": 2.0e9, "disk_use": 0.9, "time_per_token": None, "bound_by": "disk",
            "verdict": "The disk is the limit.", "peak_rss_bytes": 5 * 10**9,
        }  # fmt: skip

    monkeypatch.setattr(measure, "run_apart", run_apart)
    monkeypatch.setattr(measure, "find_store", lambda model, **_: Path(model))
    return asked


def test_a_model_is_measured_at_each_budget_beside_the_plan(measured, tmp_path):
    result = invoke(tmp_path, "--ram", "6GB,12GB,500MB", "--tokens", "64", "--json")
    assert result.exit_code == 0, result.stderr
    assert "left out: the budget is too small" in result.stderr
    data = json.loads(result.stdout)
    assert (data["version"], data["simulated"], data["settings"]["tokens"]) == (1, False, 64)
    assert [r["ram_budget_bytes"] for r in data["results"]] == [6 * 10**9, 12 * 10**9]
    assert (data["results"][0]["planned_tokens_per_second"], data["results"][0]["planned_hit_rate"]) == (11.5, 0.81)
    assert [(call["function"], call.get("tokens")) for call in measured] == [("expect", None)] + [("measure", 64)] * 3


def test_an_error_at_a_later_budget_does_not_discard_what_was_measured(measured, tmp_path):
    result = invoke(tmp_path, "--ram", "6GB,7GB", "--json")
    assert (result.exit_code, len(json.loads(result.stdout)["results"])) == (0, 1)
    assert "left out: a record is damaged" in result.stderr
    assert invoke(tmp_path, "--ram", "7GB,6GB").exit_code == DataError.exit_code


def test_the_table_says_what_was_measured_on_what_in_80_columns(measured, tmp_path):
    result = invoke(tmp_path)
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80 and "…" not in result.stdout
    for part in (
        "cores, native-avx2",
        "RAM ",
        "int4-g32, trunk int8-g32, 18.0 GB",
        "12.3 ±0.4",
        "The disk is the limit.",
    ):
        assert part in " ".join(result.stdout.split()), part
    assert invoke(tmp_path, "--ram", "500MB").exit_code == 4


def test_bench_never_imports_torch():
    program = (
        "import sys\nfrom pocketmoe.cli.main import main\n"
        "try:\n    main()\nfinally:\n    print(*sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, "bench", "--simulate", "--tokens", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "hybrid" in result.stdout
    assert result.stderr.splitlines()[-1] == ""
