"""`pocketmoe plan`: what fits where, on described machines, without weights."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from pocketmoe.cli.main import app
from pocketmoe.offload import outline_reader
from pocketmoe.offload import survey as survey_module
from pocketmoe.offload.errors import MemoryBudgetError
from pocketmoe.offload.estimate import Rates
from pocketmoe.offload.outline_reader import read_outline
from pocketmoe.offload.outlook import Machine, changes, fit
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = json.loads((ROOT / "benchmarks/published_models.json").read_text(encoding="utf-8"))["models"]
GB = 10**9
MACHINE = Machine(Rates(ram=40e9, disk=3.5e9, vram=300e9), program=450_000_000, ram=27 * GB)
SPEEDS = ("--disk", "3.5GB/s", "--ram-speed", "40GB/s", "--vram-speed", "300GB/s")


@pytest.fixture(scope="module")
def outlines(tmp_path_factory):
    """Outlines of published models by name."""

    def get(name):
        path = tmp_path_factory.getbasetemp() / name / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(PUBLISHED[name]), encoding="utf-8")
        return read_once(path, native=True)

    return get


_made = {}


def read_once(path, codec=None, trunk=None, **options):
    """`read_outline`, whose meta model takes seconds, once for each content."""
    key = path.read_text(encoding="utf-8"), codec, trunk, *sorted(options.items())
    if key not in _made:
        _made[key] = read_outline(path, codec, trunk, **options)
    return _made[key]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(outline_reader, "read_outline", read_once)


def write(tmp_path, name, **changed):
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED[name], **changed}), encoding="utf-8")
    return str(tmp_path / "config.json")


def invoke(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_without_a_gpu_everything_shares_the_ram(outlines):
    model = outlines("openai/gpt-oss-120b")
    placed = fit(model, MACHINE)
    assert placed.vram is None
    assert placed.ram.needs.trunk == model.cpu.trunk
    assert placed.ram.slot_bytes + placed.ram.needs.fixed_in_answers <= 27 * GB
    assert placed.on_disk == model.num_experts - placed.ram.slots
    assert placed.longest >= 4096


def test_a_gpu_takes_trunk_and_cache_and_leaves_the_ram_to_experts(outlines):
    model = outlines("openai/gpt-oss-120b")
    alone, placed = fit(model, MACHINE), fit(model, replace(MACHINE, vram=8 * GB))
    assert placed.vram is not None
    assert (placed.ram.needs.trunk, placed.ram.needs.kv) == (0, 0)
    assert placed.vram.needs.trunk == model.gpu.trunk == model.cpu.trunk  # it stays packed
    assert placed.vram.slots > 0
    assert placed.ram.slots > alone.ram.slots
    assert placed.tokens_per_second > alone.tokens_per_second


def test_a_gpu_without_room_for_the_trunk_is_left_out_and_it_is_said(outlines):
    placed = fit(outlines("openai/gpt-oss-120b"), replace(MACHINE, vram=2 * GB))
    assert placed.vram is None
    assert "needs at least" in placed.without_gpu
    assert placed.tokens_per_second == fit(outlines("openai/gpt-oss-120b"), MACHINE).tokens_per_second


def test_more_of_anything_is_never_slower(outlines):
    model = outlines("openai/gpt-oss-120b")
    now = fit(model, MACHINE).tokens_per_second
    rates = MACHINE.rates
    for better in (
        replace(MACHINE, ram=54 * GB),
        replace(MACHINE, vram=48 * GB),
        replace(MACHINE, rates=rates._replace(disk=7e9)),
        replace(MACHINE, rates=rates._replace(ram=80e9)),
    ):
        assert fit(model, better).tokens_per_second > now


def test_even_routing_and_a_full_context_are_slower(outlines):
    placed = fit(outlines("openai/gpt-oss-120b"), MACHINE)
    assert placed.even > placed.seconds.total
    assert placed.full > placed.seconds.total


def test_what_does_not_fit_is_refused_and_what_would_make_it_fit_is_found(outlines):
    model = outlines("deepseek-ai/DeepSeek-V3")
    with pytest.raises(MemoryBudgetError, match="needs at least"):
        fit(model, replace(MACHINE, ram=24 * GB))
    found = changes(model, replace(MACHINE, ram=24 * GB), None, None)
    assert [change.what for change in found] == ["48.0 GB of RAM", "--trunk int4-g32"]


def test_the_best_change_comes_first_and_only_what_helps_is_named(outlines):
    model = outlines("openai/gpt-oss-120b")
    now = fit(model, MACHINE)
    found = changes(model, MACHINE, None, now)
    assert found[0].what == "54.0 GB of RAM"
    speeds = [change.tokens_per_second for change in found]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[-1] > now.tokens_per_second
    all_in_ram = replace(MACHINE, ram=200 * GB)
    more = changes(replace(model, smaller=None), all_in_ram, None, fit(model, all_in_ram))
    assert more == []


def test_the_longest_context_is_the_last_that_loading_would_accept(outlines):
    model, small = outlines("openai/gpt-oss-120b"), replace(MACHINE, ram=8 * GB)
    longest = fit(model, small).longest
    assert 4096 <= longest < model.longest
    assert fit(model, small, longest).ram.slots >= model.cycle
    with pytest.raises(MemoryBudgetError):
        fit(model, small, longest + 1024)


def test_text_fits_into_80_columns_and_says_what_it_assumes(tmp_path):
    result = invoke(write(tmp_path, "openai/gpt-oss-120b"), "--vram", "8GB", "--ram", "32GB", *SPEEDS)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    for part in (
        "mxfp4",
        "VRAM      8.0 GB = CUDA 400 MB + trunk",
        "tokens/s",
        "would help most",
        "gpt-oss-20b",
        "(given)",
    ):
        assert part in result.stdout, part


def test_json_has_a_version_and_adds_up(tmp_path):
    path = write(tmp_path, "openai/gpt-oss-120b")
    data = json.loads(invoke(path, "--vram", "8GB", "--ram", "32GB", *SPEEDS, "--json").stdout)
    assert (data["version"], data["fits"], data["refusal"]) == (1, True, None)
    assert data["machine"]["origins"] == {"ram": "given", "disk": "given", "vram": "given"}
    assert sum(data["hits"].values()) == pytest.approx(1)
    assert data["tokens_per_second"] == pytest.approx(1 / sum(data["seconds_per_token"].values()))
    experts = data["cycle"] * data["record_bytes"]
    assert data["bytes_per_token"]["disk"] == pytest.approx(data["hits"]["disk"] * experts)
    assert [form["chosen"] for form in data["formats"]].count(True) == 1


def test_what_does_not_fit_ends_with_4_and_what_would_make_it_fit(tmp_path):
    path = write(tmp_path, "deepseek-ai/DeepSeek-V3")
    result = invoke(path, "--ram", "24GB", *SPEEDS)
    assert result.exit_code == 4
    assert "It does not fit: the budget is 24.0 GB" in result.stdout
    assert "48.0 GB of RAM would make it fit" in result.stdout
    data = json.loads(invoke(path, "--ram", "24GB", *SPEEDS, "--json").stdout)
    assert (data["fits"], "ram" in data) == (False, False)


def test_a_codec_can_be_tried(tmp_path):
    path = write(tmp_path, "Qwen/Qwen3-30B-A3B")
    data = json.loads(invoke(path, "--ram", "64GB", *SPEEDS, "--codec", "bf16", "--json").stdout)
    assert (data["codec"], data["record_bytes"]) == ("bf16", 3 * 2048 * 768 * 2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--ram", "much"], "--ram: 'much' is not an amount"),
        (["--disk", "fast"], "--disk: 'fast' is no speed: write for example 3.5GB/s"),
        (["--context", "9999999"], "is more than the 40,960 tokens"),
        (["--codec", "int3"], "unknown codec 'int3'"),
        (["--revision", "v1"], "is a local path, which has no revisions; leave out --revision v1"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, options, sentence):
    result = invoke(write(tmp_path, "Qwen/Qwen3-30B-A3B"), *SPEEDS, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr


def test_what_is_not_given_is_measured_here_or_said_to_be_assumed(tmp_path, monkeypatch):
    monkeypatch.setattr(survey_module.probe, "ram_rate", lambda: 11e9)
    origins = json.loads(invoke(write(tmp_path, "Qwen/Qwen3-30B-A3B"), "--ram", "64GB", "--json").stdout)["machine"]
    assert origins["rates"]["ram"] == 11e9
    assert origins["origins"]["ram"] == "measured"
    assert origins["origins"]["disk"] == "assumed"


def test_a_model_on_the_hub_that_is_not_here_is_explained_offline():
    result = invoke("openai/gpt-oss-20b", *SPEEDS)
    assert result.exit_code == 3
    assert "nothing of a model of that name" in result.stderr


def test_the_table_has_a_row_for_every_published_model(monkeypatch, outlines):
    monkeypatch.syspath_prepend(str(ROOT))
    what_fits = importlib.import_module("benchmarks.what_fits")
    few = {name: outlines(name) for name in ("Qwen/Qwen3-30B-A3B", "deepseek-ai/DeepSeek-V3")}
    lines = what_fits.table(8, few)
    assert lines[-2].startswith("| Qwen3-30B-A3B | 18 | ")
    assert "– |" in lines[-1]
    assert what_fits.models().keys() == PUBLISHED.keys()
    written = (ROOT / "docs/what-fits.md").read_text(encoding="utf-8")
    for name in PUBLISHED:
        assert written.count(f"| {name.partition('/')[2]} |") == len(what_fits.VRAM), name
