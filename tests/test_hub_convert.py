"""From a model's name to its store: what is checked before anything is downloaded, and what is left at the end."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import fake_hub
import pytest
import tiny
from fake_hub import NAME, look_up, refusal, shards
from pocketmoe.offload import fit, hub, hub_source, loading
from pocketmoe.offload.checkpoint import CheckpointSource
from pocketmoe.offload.convert import convert
from pocketmoe.offload.manifest import is_store, read_identity

CODEC: dict[str, Any] = {"codec": "int4-g32", "trunk": "int8-g32"}


@pytest.fixture(scope="module")
def expected(published, tmp_path_factory):
    """The store that a local conversion of the same files writes: its data files' contents."""
    local = tmp_path_factory.mktemp("local")
    for file in published.iterdir():
        if file.is_file() and file.name != "consolidated.safetensors":
            (local / file.name).write_bytes(file.read_bytes())
    return content(convert(CheckpointSource(local), local / "store", **CODEC))


def content(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in store.iterdir() if file.name != "pocketmoe.json"}


def listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("keep", [True, False])
def test_a_name_becomes_the_same_store_as_its_files_would(server, here, expected, published, tmp_path, keep):
    notices = []
    dest = tmp_path / "stores" / "it"
    loading.convert_model(NAME, dest, **CODEC, keep_source=keep, on_notice=notices.append)
    assert content(dest) == expected
    assert read_identity(dest)["revision"] == fake_hub.COMMIT
    assert json.loads((dest / "pocketmoe.json").read_text())["source"] == NAME
    weights = [file for file in server.fetched() if file.endswith(".safetensors")]
    assert sorted(weights) == shards(published)  # each once, and no other
    assert not {"README.md", "pytorch_model.bin", "plot.png", "model.pth"} & set(server.fetched())
    assert {path.parts[0] for path in map(Path, listing(tmp_path / "stores"))} == {"it"}
    cached = {file.name for file in Path(look_up().folder).iterdir()}
    assert (set(shards(published)) <= cached) == keep and (keep or not set(shards(published)) & cached)


def test_few_shards_are_held_at_a_time_and_as_many_as_was_said(server, here, published, tmp_path):
    model, private, most, held = look_up(), tmp_path / "private", 0, 0
    source = hub_source.HubSource(model, private)
    for layer, of in enumerate(source.layers()):
        for index in range(of.num_experts):
            source.expert(layer, index)
            held = max(held, sum(file.suffix == ".safetensors" for file in private.iterdir() if file.is_file()))
            most = max(most, sum(file.stat().st_size for file in private.rglob("*.safetensors")))
    for _ in source.trunk():
        most = max(most, sum(file.stat().st_size for file in private.rglob("*.safetensors")))
    assert 1 <= held <= 2 < len(shards(published))
    room_for_headers = 1.2
    assert most <= source.shards.most_bytes() * room_for_headers
    source.discard()
    assert not private.exists()


def test_an_interrupted_conversion_fetches_only_what_it_still_needs(
    server, here, expected, published, tmp_path, monkeypatch
):
    dest, original, left = tmp_path / "it", hub_source.HubSource.expert, [20]

    def expert(self, layer, index):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return original(self, layer, index)

    monkeypatch.setattr(hub_source.HubSource, "expert", expert)
    with pytest.raises(KeyboardInterrupt):
        loading.convert_model(NAME, dest, **CODEC, keep_source=False)
    before = [file for file in server.fetched() if file.endswith(".safetensors")]
    assert 1 <= len(before) < len(shards(published))
    notices = []
    loading.convert_model(NAME, dest, **CODEC, keep_source=False, on_notice=notices.append)
    assert "resuming after 19 of 24 experts" in notices
    assert content(dest) == expected
    assert sorted(file for file in server.fetched() if file.endswith(".safetensors")) == shards(published)
    assert [path.name for path in tmp_path.iterdir() if "it" in path.name] == ["it"]


def test_shards_in_the_users_cache_are_read_there_and_stay(server, here, expected, published, tmp_path):
    model, (first, *others) = look_up(), shards(published)
    hub.fetch(NAME, model.commit, {first: 0})
    loading.convert_model(NAME, tmp_path / "it", **CODEC, keep_source=False)
    assert content(tmp_path / "it") == expected
    assert (Path(model.folder) / first).is_file()
    assert sorted(file for file in server.fetched() if file.endswith(".safetensors")) == [first, *others]


def test_what_cannot_fit_or_be_read_is_refused_before_the_first_byte_of_weights(
    server, here, published, tmp_path, monkeypatch
):
    def find(**options):
        return refusal(loading.find_store, NAME, **options)

    assert "budget is 200 MB, but this model needs at least" in find(ram=200_000_000)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(fit.shutil, "disk_usage", lambda _: usage(0, 0, 100_000))
    assert f"{NAME} needs " in find() and "has 100 kB free; free some space, or keep only" in find()
    assert "--no-keep-source" not in find(keep_source=False)


def test_a_dense_model_is_refused_by_its_config(server, here, tmp_path):
    path = tmp_path / "dense"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(tiny.config("mixtral").to_dict() | {"model_type": "llama"}))
    (path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    server.models["some-org/dense"] = path
    assert "is dense" in refusal(loading.find_store, "some-org/dense")
    assert "model.safetensors" not in server.fetched()


def test_what_is_here_is_used_and_nobody_asked(server, here, tmp_path):
    store = loading.find_store(NAME, **CODEC)
    server.requests.clear()
    assert loading.find_store(NAME, **CODEC) == store
    assert f"some-org--Tiny-MoE.v1-{fake_hub.COMMIT[:12]}-int4-g32" in store.name
    loading.convert_model(NAME, tmp_path / "again", **CODEC)
    assert loading.find_store(NAME, revision=fake_hub.COMMIT, **CODEC) == store
    assert not server.requests


def test_a_store_is_enough_when_its_source_was_not_kept(server, here):
    store = loading.find_store(NAME, keep_source=False, **CODEC)
    server.requests.clear()
    assert loading.find_store(NAME, **CODEC) == store
    assert not server.requests


def test_a_damaged_store_whose_source_is_gone_is_made_again(server, here):
    store = loading.find_store(NAME, keep_source=False, **CODEC)
    (store / "pocketmoe.json").write_text("{")
    assert loading.find_store(NAME, keep_source=False, **CODEC) == store
    assert is_store(store) and read_identity(store)


def test_a_branch_that_is_named_is_asked_for_and_may_have_moved(server, here):
    before = loading.find_store(NAME, **CODEC)
    server.commits["main"] = moved = "f" * 40
    assert loading.find_store(NAME, **CODEC) == before
    after = loading.find_store(NAME, revision="main", **CODEC)
    assert after != before and read_identity(after)["revision"] == moved


def test_a_directory_of_that_name_wins_and_a_wrong_path_asks_nobody(server, published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some-org").mkdir()
    (tmp_path / NAME).symlink_to(published)
    assert "has no revisions" in refusal(loading.find_store, NAME, revision="main")
    for path in ("models/deep/qwen", "./qwen", "/no/qwen", "~/qwen", "qwen"):
        assert "there is no file or directory" in refusal(loading.find_store, path)
        assert "as ORGANISATION/NAME" in refusal(loading.convert_model, path, tmp_path / "it")
    assert not server.requests


def test_a_place_that_is_taken_is_refused_before_the_download(server, here, tmp_path):
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "thesis.tex").touch()
    assert "exists already and is something else" in refusal(loading.convert_model, NAME, tmp_path / "it")
    assert not [file for file in server.fetched() if file.endswith(".safetensors")]


def test_a_git_lfs_pointer_on_the_hub_is_named(server, here, published, tmp_path):
    broken = Path(shutil.copytree(published, tmp_path / "broken"))
    (broken / shards(published)[2]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    server.models["some-org/broken"] = broken
    message = refusal(loading.convert_model, "some-org/broken", tmp_path / "it")
    assert shards(published)[2] in message and "damaged file of weights, or a pointer in its place" in message


def test_all_of_it_works_in_processes_of_their_own(server, expected):
    notices, stages = [], []
    store = loading.find_store(
        NAME, on_notice=notices.append, on_progress=lambda step: stages.append(step.stage), keep_source=False, **CODEC
    )
    assert content(store) == expected
    assert list(dict.fromkeys(stages)) == ["headers", "download", "experts", "trunk"]
    assert any("each removed once it is converted: at most" in notice for notice in notices)
