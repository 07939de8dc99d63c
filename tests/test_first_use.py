"""A conversion on first use: in a process of its own, within the budget, its errors those of the caller."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import tiny
from pocketmoe.offload import memory
from pocketmoe.offload.errors import DataError, MemoryBudgetError, UsageError
from pocketmoe.offload.loading import find_store
from pocketmoe.offload.store import verify_store

PROGRAM = """
import json, sys
from pocketmoe.offload import load
from pocketmoe.offload.loading import find_store
from pocketmoe.offload.memory import peak_resident_bytes
store = find_store(sys.argv[1], ram=int(sys.argv[2]))
heavy = sorted({"torch", "transformers", "numpy"} & set(sys.modules))
print(json.dumps({"store": str(store), "heavy": heavy, "peak": peak_resident_bytes()}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("first use") / "tiny"
    tiny.make_checkpoint(path, "qwen3_moe")
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="measures resident memory as Linux counts it")
def test_the_callers_process_stays_small_and_without_torch_while_the_child_converts(checkpoint):
    command = [sys.executable, "-c", PROGRAM, str(checkpoint), str(4 * 10**9)]
    for _ in range(2):  # converted, then found
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["heavy"] == []
        assert found["peak"] < 100e6
    assert verify_store(found["store"]) == []


def test_progress_and_notices_of_the_conversion_arrive(checkpoint):
    stages, notices = [], []
    find_store(checkpoint, on_progress=lambda step: stages.append(step.stage), on_notice=notices.append)
    assert stages.count("experts") == 3 * 8
    assert stages[-1] == "trunk"
    assert "converting" in notices[0]


def test_a_budget_that_is_too_small_for_the_conversion_is_refused_with_the_numbers_and_nothing_is_written(checkpoint):
    ram = memory.resident_bytes() + 200_000_000
    with pytest.raises(MemoryBudgetError, match=r"converting tiny takes about \d+ MB .*leaves 200 MB .*give it \d+ MB"):
        find_store(checkpoint, ram=ram)
    stores = os.path.join(os.environ["XDG_CACHE_HOME"], "pocketmoe", "stores")
    assert [name for name in os.listdir(stores) if not name.startswith(".")] == []


def test_errors_of_the_conversion_are_the_callers(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json is damaged"):
        find_store(tmp_path)
    with pytest.raises(UsageError, match="unknown codec 'int3'; known: int4-g32"):
        find_store(checkpoint, codec="int3")


def test_no_conversion_is_announced_of_what_is_no_model_and_formats_without_effect_are(checkpoint, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    notices = []
    for path, wrong in ((tmp_path / "notes.txt", "is not a directory"), (tmp_path, "has no config.json")):
        with pytest.raises(DataError, match=wrong):
            find_store(path, on_notice=notices.append)
    assert notices == []
    find_store(find_store(checkpoint), codec="bf16", on_notice=notices.append)
    assert "have no effect" in notices[-1]
