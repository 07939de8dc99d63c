"""Plans that were made before are made again without the libraries that take seconds to import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest
import tiny
from pocketmoe.cli.plan import as_data
from pocketmoe.offload import outline_cache, outline_reader
from pocketmoe.offload.estimate import Rates
from pocketmoe.offload.outline import Outline
from pocketmoe.offload.outline_cache import Known, OutlineCache
from pocketmoe.offload.survey import survey

RATES = Rates(40e9, 3.5e9, 300e9)


@pytest.fixture
def fresh(monkeypatch):
    """The process of the tests has torch and much else."""
    monkeypatch.setattr("pocketmoe.offload.survey._is_fresh", lambda: True)


@pytest.fixture
def found(monkeypatch, fresh):
    """The models whose outlines had to be found."""
    models, find = [], outline_reader.read_outline
    monkeypatch.setattr(outline_reader, "read_outline", lambda *a, **k: models.append(a[0]) or find(*a, **k))
    return models


@pytest.fixture
def config(tmp_path):
    tiny.config("mixtral").save_pretrained(tmp_path / "model")
    return tmp_path / "model/config.json"


def plan(path, **options):
    return as_data(survey(path, ram=8 * 10**9, vram=4 * 10**9, rates=RATES, **options))


def kept():
    return sorted((platformdirs.user_cache_path("pocketmoe") / "plans").glob("*.json"))


def test_a_second_plan_is_the_same_and_imports_neither_torch_nor_transformers(config, fresh):
    first = plan(config)
    program = (
        "import sys, json\nfrom pathlib import Path\nfrom pocketmoe.cli.plan import as_data\n"
        "from pocketmoe.offload.estimate import Rates\nfrom pocketmoe.offload.survey import survey\n"
        f"data = as_data(survey(Path({str(config)!r}), ram=8 * 10**9, vram=4 * 10**9, rates=Rates(*{tuple(RATES)})))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'they were imported'\nprint(json.dumps(data))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(json.dumps(first))


def test_what_decides_an_outline_and_has_changed_makes_a_new_one(config, found):
    plan(config)
    assert plan(config)["codec"] != plan(config, codec="bf16")["codec"]
    content = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(content | {"num_local_experts": 16}), encoding="utf-8")
    assert plan(config)["experts"] == 3 * 16
    assert len(found) == 3


def test_a_process_that_may_hold_models_keeps_nothing_because_its_size_is_not_that_of_others(config):
    plan(config)
    assert kept() == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"outline": {"layers": [[1]]}, "program": 1}'])
def test_what_is_damaged_is_found_again_and_replaced(config, found, content):
    whole = plan(config)
    (file,) = kept()
    file.write_text(content)
    assert plan(config) == plan(config)
    assert len(found) == 2
    assert plan(config)["formats"] == whole["formats"]


def test_of_too_many_the_oldest_goes(config, fresh, monkeypatch):
    monkeypatch.setattr(outline_cache, "_MOST", 2)
    plan(config)
    known = Known(Outline.of_json(json.loads(kept()[0].read_text())["outline"]), program=1)
    caches = [OutlineCache(config, number=number) for number in range(3)]
    for cache in caches:
        cache.write(known)
    assert [cache.read() for cache in caches] == [None, known, known]


def test_where_nothing_can_be_kept_plans_are_made_all_the_same(config, found, monkeypatch):
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda _: Path("/proc/nowhere"))
    assert plan(config)["experts"] == 3 * 8
    assert len(found) == 1
