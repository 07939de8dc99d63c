"""`pocketmoe replay`, called as typer calls it, and once as a process to see that it never loads torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pocketmoe.cache.policy import policy_names
from pocketmoe.cache.replay import OPTIMUM, Requests, replay
from pocketmoe.cache.trace import TraceWriter, read_trace
from pocketmoe.cli.main import app
from test_replay import make_trace
from typer.testing import CliRunner, Result


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """60 tokens in 2 sequences, 3 layers x 10 experts, top-2: a cycle is 6 slots of 30."""
    trace, file = make_trace(60, layers=3, experts=10, top_k=2, sequences=2), tmp_path / "run.npz"
    writer = TraceWriter(file, 3, 10, 2, model="some/model")
    for at, experts in enumerate(trace.experts):
        if at == 30:
            writer.new_sequence()
        writer.add(experts[None], experts[None])
    writer.close()
    return file


def invoke(*args: object) -> Result:
    return CliRunner().invoke(app, ["replay", *map(str, args), "--jobs", "1"])


def test_the_table_shows_every_policy_beside_the_optimum_and_what_the_misses_are_due_to(path):
    result = invoke(path, "--slots", "20%,9")
    assert result.exit_code == 0, result.stderr
    assert "some/model: 3 layers x 10 experts, top-2; 60 decoded tokens, 360 requests" in result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0][-4:] == ["6", "(20%)", "9", "(30%)"]
    assert lines[1][0] == OPTIMUM
    assert sorted(line[0] for line in lines[2 : 2 + len(policy_names())]) == sorted(policy_names())
    rates = {line[0]: line[1:] for line in lines if len(line) == 3}
    for at in range(2):
        hits = float(rates[lines[2][0]][at])
        misses = sum(float(rates[name][at]) for name in ("compulsory", "capacity", "policy"))
        assert hits + misses == pytest.approx(100, abs=0.21)
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_json_gives_requests_hits_and_hit_rate_for_each_capacity_and_policy(path):
    result = invoke(path, "--slots", "9,50%", "--policy", "lru,forecast", "--json")
    data = json.loads(result.stdout)
    assert (data["version"], data["sequences"], data["tokens"], data["warm"]) == (1, 2, 60, False)
    requests = Requests(read_trace(path))
    want = [(name, slots, replay(requests, name, slots)) for slots in (9, 15) for name in (OPTIMUM, "lru", "forecast")]
    assert len(data["results"]) == len(want)
    for got, (name, slots, expected) in zip(data["results"], want, strict=True):
        assert (got["policy"], got["slots"], got["requests"], got["hits"]) == (name, slots, 360, expected.hits)
        assert got["hit_rate"] == expected.hits / 360
        assert sum(got["misses"].values()) == got["requests"] - got["hits"] == sum(got["misses_by_layer"])
    assert data["lru_curve"][-1] == {"slots": 30, "hits": 360 - requests.compulsory}


def test_warm_and_per_layer_reach_the_replay(path):
    for flag, requests, per_layer in (
        ("--warm", Requests(read_trace(path), warm=True), False),
        ("--per-layer", Requests(read_trace(path)), True),
    ):
        data = json.loads(invoke(path, "--slots", "12", "--policy", "lru", flag, "--json").stdout)
        assert data["results"][1]["hits"] == replay(requests, "lru", 12, per_layer).hits


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--policy", "lru,belady"], 2, "--policy must be all, or some of analog, forecast, lru, "),
        (["--slots", "x"], 2, "--slots must be shares or numbers, as 25%,40% or 192, not 'x'"),
        (["--slots", "25%,"], 2, "not ''"),
        (["--slots", "5"], 2, "--slots 5 is 5, but this trace takes 6 (3 layers x top-2) to 30 (all experts)"),
        (["--slots", "110%"], 2, "--slots 110% is 33, but"),
    ],
)
def test_options_that_cannot_be_are_refused(path, options, code, sentence):
    result = invoke(path, *options)
    assert (result.exit_code, result.stdout) == (code, "")
    assert sentence in result.stderr


def test_a_file_that_is_no_trace_is_refused(tmp_path):
    (tmp_path / "odd.npz").write_bytes(b"odd")
    for name, sentence in (("odd.npz", "is not a routing trace"), ("absent.npz", "can not be read: No such file")):
        result = invoke(tmp_path / name)
        assert result.exit_code == 3
        assert sentence in result.stderr


def test_a_trace_without_a_decoded_token_is_refused(tmp_path):
    writer = TraceWriter(tmp_path / "run.npz", 3, 10, 2, None)
    prompt = make_trace(8, layers=3, experts=10, top_k=2).experts
    writer.add(prompt, prompt)
    writer.close()
    result = invoke(tmp_path / "run.npz")
    assert result.exit_code == 3
    assert "holds no decoded token" in result.stderr


def test_replay_never_imports_torch(path):
    program = (
        "import sys\nfrom pocketmoe.cli.main import main\n"
        "try:\n    main()\nfinally:\n    print(*sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "replay", str(path), "--policy", "lru"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "lru" in result.stdout
    assert result.stderr.splitlines()[-1] == ""
