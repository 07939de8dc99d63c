"""The commands, called as typer calls them, on a model without weights."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakes_cli
import pocketmoe.cli.convert as convert_command
import pocketmoe.cli.demo as demo_command
import pocketmoe.cli.kept_runs as kept_runs
import pocketmoe.cli.loading as loading
import pytest
from pocketmoe.cache.past_runs import comparison
from pocketmoe.cache.report import report
from pocketmoe.cache.stats import RunStats
from pocketmoe.cli.main import app
from pocketmoe.offload.errors import DataError, UsageError
from typer.testing import CliRunner, Result

KEYS = """
    text prompt_tokens generated_tokens tokens_per_second time_to_first_token_s requests hits misses prefetch_hits
    bytes_read stall_s slots ram_budget_bytes peak_rss_bytes finish_reason model
"""


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[fakes_cli.FakeModel]:
    """The models that the commands have loaded; statistics go below tmp_path."""
    loaded: list[fakes_cli.FakeModel] = []

    def load(path: str, **options: Any) -> fakes_cli.FakeModel:
        loaded.append(fakes_cli.fake_load(path, **options))
        return loaded[-1]

    monkeypatch.setattr(loading, "load_model", load)
    monkeypatch.setattr(kept_runs, "runs_folder", lambda: tmp_path / "state")
    return loaded


def invoke(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(args), input=stdin)


def test_run_writes_the_answer_alone_on_stdout_and_the_plan_on_stderr(models):
    result = invoke("run", "fake", "hello there")
    assert (result.exit_code, result.stdout) == (0, "hello there\n")
    assert result.stderr == models[0].plan + "\n"
    assert models[0].closed


@pytest.mark.parametrize("arguments", [["run", "fake"], ["run", "fake", "-"]])
def test_run_takes_the_prompt_from_stdin_without_its_last_newline(models, arguments):
    assert invoke(*arguments, stdin="one\ntwo\n").stdout == "one | two\n"
    assert models[0].asked[0][0] == "one\ntwo"


def test_run_does_not_touch_stdin_when_the_prompt_is_an_argument(models):
    assert invoke("run", "fake", "argument", stdin="stdin").stdout == "argument\n"


def test_a_recorded_run_says_how_to_replay_it(models):
    assert "pocketmoe replay run.npz" in invoke("run", "fake", "hi", "--trace", "run.npz").stderr
    assert models[0].options["trace"] == "run.npz"


@pytest.mark.parametrize("prompt", ["", " \n "])
def test_an_empty_prompt_is_refused_before_anything_is_loaded(models, prompt):
    result = invoke("run", "fake", stdin=prompt)
    assert result.exit_code == 2
    assert result.stderr.startswith("pocketmoe: error: The prompt is empty")
    assert not models


def test_json_prints_one_object_with_the_promised_keys_and_nothing_else(models):
    result = invoke("run", "fake", "evil", "--json", "--stats")
    answer = json.loads(result.stdout)
    assert result.exit_code == 0
    assert not set(KEYS.split()) - answer.keys()
    assert (answer["text"], answer["finish_reason"], answer["model"]) == (fakes_cli.EVIL, "stop", "fake")
    assert "Counted: 1 token of 1 answer" in result.stderr


def test_thoughts_go_to_stderr_or_are_hidden_and_the_json_holds_both(models):
    shown, hidden = invoke("run", "fake", "think"), invoke("run", "fake", "think", "--hide-thinking")
    assert shown.stdout == hidden.stdout == "think\n"
    assert shown.stderr.endswith("let me see\n\n")
    assert hidden.stderr.endswith("(thinking)\n\n") and "let me" not in hidden.stderr
    answer = json.loads(invoke("run", "fake", "think", "--json").stdout)
    assert (answer["text"], answer["thinking"]) == ("think", "let me see")


def test_sampling_options_reach_the_model_and_what_is_not_given_is_left_to_it(models):
    options = "--temperature 0 --top-p 0.5 --top-k 3 --min-p 0.1 --repetition-penalty 1.1 --seed 7 --max-tokens 9"
    assert invoke("run", "fake", "hi", *options.split(), "--stop", "a", "--stop", "b\n").exit_code == 0
    assert models[0].asked[0][1] == {
        "temperature": 0.0,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "seed": 7,
        "max_tokens": 9,
        "stop": ("a", "b\n"),
        "raw": False,
    }
    invoke("run", "fake", "hi", "--system", "be brief")
    assert models[1].asked[0][1] == {"raw": False, "system": "be brief"}


def test_loading_options_reach_load_and_those_of_a_conversion_only_when_given(models):
    options = [
        "--ram",
        "4GB",
        "--context",
        "99",
        "--kv",
        "f16",
        "--policy",
        "slru",
        "--no-prefetch",
        "--no-warm-start",
        "--io",
        "mmap",
        "--kernels",
        "torch",
        "--threads",
        "2",
    ]
    expected = {"ram": "4GB", "context": 99, "kv": "f16", "policy": "slru", "prefetch": False, "io": "mmap"}
    assert invoke("run", "fake", "hi", *options).exit_code == 0
    expected |= {
        "device": "auto",
        "vram": None,
        "deterministic": False,
        "trace": None,
        "trace_tokens": False,
        "warm_start": False,
    }
    assert models[0].options == expected | {"kernels": "torch", "threads": 2}
    assert "pocketmoe replay" not in invoke("run", "fake", "hi", "--codec", "bf16", "--trunk", "keep").stderr
    assert (models[1].options["codec"], models[1].options["trunk"]) == ("bf16", "keep")
    assert "threads must be at most" in invoke("run", "fake", "hi", "--threads", "99999").stderr
    invoke("run", "some/model", "hi", "--revision", "v2", "--no-keep-source")
    assert (models[2].options["revision"], models[2].options["keep_source"]) == ("v2", False)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--temperature", "-1"], "--temperature must be"),
        (["--temperature", "nan"], "--temperature must be"),
        (["--top-p", "0"], "--top-p must be"),
        (["--top-p", "1.5"], "--top-p must be"),
        (["--top-k", "-1"], "--top-k must be"),
        (["--min-p", "2"], "--min-p must be"),
        (["--repetition-penalty", "0"], "--repetition-penalty must be"),
        (["--seed", "-1"], "--seed must be"),
        (["--max-tokens", "0"], "--max-tokens must be"),
        (["--stop", ""], "--stop must not be empty"),
        (["--ram", "4 bananas"], "bananas"),
        (["--context", "0"], "context must be"),
        (["--policy", "random"], "policy must be one of"),
        (["--io", "tape"], "io must be one of"),
        (["--raw", "--system", "x"], "--raw leaves out"),
    ],
)
def test_a_value_out_of_range_is_one_sentence_and_code_2_before_anything_is_loaded(models, options, word):
    result = invoke("run", "fake", "hi", *options)
    assert result.exit_code == 2
    assert word in result.stderr
    assert result.stderr.startswith("pocketmoe: error: ")
    assert result.stderr.count("\n") == 1
    assert not result.stdout
    assert not models


@pytest.mark.parametrize("arguments", [["run", "fake", "hi", "--seed", "x"], ["nonsense"], ["run", "--nonsense"]])
def test_usage_errors_leave_with_code_2(models, arguments):
    assert invoke(*arguments).exit_code == 2


def test_a_users_error_is_one_line_with_its_own_code_and_debug_adds_the_traceback(models):
    result = invoke("run", "missing", "hi")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith("pocketmoe: error: missing is not a store")
    assert result.stderr.count("\n") == 1
    debugged = invoke("run", "missing", "hi", "--debug")
    assert debugged.exit_code == 3
    assert "Traceback" in debugged.stderr


def test_a_bug_is_one_line_with_code_1_and_points_to_debug(models):
    result = invoke("run", "fake", "crash")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("pocketmoe: error: KeyError: 'no such thing'")
    assert "--debug" in result.stderr
    assert "Traceback" not in result.stderr
    assert models[0].closed


def test_names_are_shown_as_they_are_and_without_a_terminal_there_is_no_escape(models):
    result = invoke("run", "noisy", "hi")
    assert "converted on first use [bold]x[/bold]" in result.stderr
    assert "\x1b" not in result.output


def test_a_full_context_says_what_to_do(models):
    result = invoke("run", "fake", "full")
    assert result.stdout == "half\n"
    assert "4096 tokens is full" in result.stderr
    assert "--context" in result.stderr


def test_an_answer_that_was_cut_off_says_so(models):
    assert "--max-tokens" in invoke("run", "fake", "a b", "--max-tokens", "2").stderr


def test_statistics_of_past_runs_are_kept_for_their_owner_and_an_empty_run_is_none(models, tmp_path):
    invoke("run", "fake", "a b c")
    invoke("chat", "fake", stdin="")
    (kept,) = (tmp_path / "state").iterdir()
    assert json.loads(kept.read_text())["generated_tokens"] == 3
    if os.name == "posix":
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def test_of_each_store_the_oldest_runs_make_room(models, monkeypatch, tmp_path):
    monkeypatch.setattr(kept_runs, "MOST_RUNS", 2)
    for store in ("a", os.fsdecode(b"\xff"), "a", "a"):  # a path need not be UTF-8
        run = fakes_cli.FakeModel("fake", {}).stats()
        run.store = store
        kept_runs.keep_run(run)
    assert [RunStats.load(path).store for path in kept_runs.kept_runs()] == ["a", "a", os.fsdecode(b"\xff")]


def test_a_state_folder_that_cannot_be_written_does_not_spoil_the_answer(models, tmp_path):
    (tmp_path / "state").write_text("a file, not a folder")
    result = invoke("run", "fake", "hello")
    assert (result.exit_code, result.stdout) == (0, "hello\n")
    assert "were not kept" in result.stderr


def test_the_demo_is_built_then_answers_once_or_chats(models, monkeypatch):
    calls: list[dict[str, Any]] = []

    def build(**options: Any) -> Path:
        calls.append(options)
        options["on_notice"]("building")
        return Path("demo-store")

    monkeypatch.setattr(demo_command, "find_demo_store", build)
    assert invoke("demo", "--prompt", "hi you", "--ram", "1GB").stdout == "hi you\n"
    assert (models[0].path, models[0].options["ram"]) == ("demo-store", "1GB")
    assert invoke("demo", stdin="one\ntwo\n").stdout == "one\ntwo\n"
    assert json.loads(invoke("demo", "--json", stdin="hi").stdout)["text"] == "hi"
    assert all(call["wheel"] is None for call in calls)


def test_convert_passes_the_codec_on_and_reports_on_stderr(monkeypatch):
    calls: list[tuple[Any, ...]] = []

    def convert(source: str, dest: Path, **options: Any) -> Path:
        calls.append((source, dest, options["codec"], options["trunk"]))
        options["on_progress"](SimpleNamespace(stage="experts", done=1, total=2, unit="experts"))
        return dest

    monkeypatch.setattr(convert_command, "convert_model", convert)
    result = invoke("convert", "source", "dest", "--codec", "bf16", "--trunk", "int4-g64")
    assert (result.exit_code, result.stdout) == (0, "")
    assert calls == [("source", Path("dest"), "bf16", "int4-g64")]
    assert "pocketmoe chat dest" in result.stderr


def test_verify_lists_the_problems_and_leaves_with_3_only_when_there_are_any(monkeypatch):
    monkeypatch.setattr(convert_command, "verify_store", lambda path, on_progress: [])
    good = invoke("verify", "store")
    assert good.exit_code == 0
    assert "checksums match" in good.stdout
    monkeypatch.setattr(convert_command, "verify_store", lambda path, on_progress: ["trunk is damaged", "b is missing"])
    bad = invoke("verify", "store")
    assert (bad.exit_code, bad.stdout) == (3, "trunk is damaged\nb is missing\n")
    assert "2 problems" in bad.stderr


def test_stats_without_a_run_says_where_they_would_be(models, tmp_path):
    for arguments in (["stats"], ["stats", "--list"], ["stats", "1"], ["stats", "9" * 300]):
        result = invoke(*arguments)
        assert result.exit_code == DataError.exit_code
        assert str(tmp_path) in result.stderr


def test_stats_prints_the_report_of_the_latest_run_or_of_another_as_text_json_or_html(models, tmp_path):
    other = fakes_cli.FakeModel("fake", {})
    list(other.stream("two words"))
    kept_runs.keep_run(other.stats())
    kept_runs.keep_run(fakes_cli.FakeModel("fake", {}).stats())
    assert "(2 of 200 tokens)" not in invoke("stats").stdout
    text = invoke("stats", "2").stdout
    assert "(2 of 200 tokens)" in text
    assert "\x1b" not in text
    latest, first = kept_runs.kept_runs()
    assert invoke("stats", str(first)).stdout == text
    for beyond in ("3", "9" * 300, "9" * 5000):
        assert "has 1 to 2" in invoke("stats", beyond).stderr
    assert json.loads(invoke("stats", "--json").stdout)["format"] == "pocketmoe-report"
    page = tmp_path / "report.html"
    written = invoke("stats", "--html", str(page))
    assert (written.exit_code, written.stdout) == (0, "")
    assert page.read_text().startswith("<!DOCTYPE html>")
    latest.write_text("{")
    damaged = invoke("stats")
    assert damaged.exit_code == 3
    assert str(latest) in damaged.stderr
    listed = invoke("stats", "--list")
    assert listed.exit_code == 0
    assert "  2  20" in listed.stdout and str(latest) in listed.stderr


def test_runs_are_listed_and_two_of_them_compared(models):
    for words in ("one", "one two three"):
        invoke("run", "fake", words)
    listed = invoke("stats", "--list").stdout
    assert [line.split()[0] for line in listed.splitlines() if " 2.5 " in line] == ["1", "2"]
    runs = json.loads(invoke("stats", "--list", "--json").stdout)
    assert (runs["format"], runs["version"]) == ("pocketmoe-runs", 1)
    assert [(run["number"], run["tokens"]) for run in runs["runs"]] == [(1, 3), (2, 1)]
    assert runs["runs"][0]["tokens_per_second"] == pytest.approx(2.5)
    compared = invoke("stats", "1", "--against", "2").stdout
    assert "2.5 tokens/s against 2.5: no difference." in compared
    assert next(line for line in compared.splitlines() if "tokens counted" in line).split()[2:] == [
        "3",
        "1",
        "+200",
        "%",
    ]
    both = json.loads(invoke("stats", "1", "--against", "2", "--json").stdout)
    assert [both[name]["sample"]["answer_tokens"] for name in ("run", "against")] == [3, 1]
    assert invoke("stats", "1", "--list").exit_code == UsageError.exit_code
    assert "What was set otherwise" not in compared


def test_what_was_set_otherwise_is_settings_and_not_their_outcome():
    def reported(finished_at: float, guesses: int, state: str | None) -> dict[str, Any]:
        run = fakes_cli.FakeModel("fake", {}).stats()
        run.finished_at, run.prefetch = finished_at, state
        run.record_prefetch(0, issued=guesses)
        return report(run, replays=False)

    first, second = reported(0.0, 3, None), reported(1e9, 4, "On after 2 tests on and off: 7 % saved.")
    third = reported(1e9, 4, "Switched itself off after 1 test on and off: 3 % lost.")
    assert comparison(first, second)[-1].title != "What was set otherwise"
    section = comparison(second, third)[-1]
    assert section.table is not None
    assert section.table.rows == (("prefetch", "on", "switched itself off"),)


@pytest.mark.parametrize("command", ["run", "plan", "bench"])
@pytest.mark.parametrize(
    "model", ["n" * 300, "~nobody-of-this-name/store", "/no/such/path", "a/" + "n" * 97, "a/b.git"]
)
def test_a_name_of_nothing_is_one_sentence_before_torch_is_imported(command, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "pocketmoe.offload.survey", None)  # it imports torch
    result = invoke(command, model, *(["hi"] if command == "run" else []))
    assert result.exit_code == DataError.exit_code
    assert "there is no file or directory" in result.stderr


def test_the_version_is_printed():
    assert invoke("--version").stdout.startswith("pocketmoe 0.")
