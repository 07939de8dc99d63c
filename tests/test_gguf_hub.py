"""GGUF files on the hub: which is meant, what is asked for before it fits, and plans by their headers alone."""

from __future__ import annotations

from pathlib import Path

import fake_hub
import pytest
from fake_hub import refusal
from gguf_models import write_model
from huggingface_hub import constants
from pocketmoe.offload import gguf_hub, hub, loading
from pocketmoe.offload.hub_name import parse_name
from pocketmoe.offload.manifest import Manifest, is_store, read_identity
from pocketmoe.offload.outline_reader import read_outline
from pocketmoe.offload.survey import survey
from test_gguf import mixed, small_model, split_in_parts

NAME = "some-org/Tiny-GGUF"
FILES = {
    "m-Q2_K.gguf": 2_000_000,
    "m-Q4_K_M.gguf": 4_000_000,
    "m-UD-Q4_K_XL.gguf": 4_100_000,
    "Q8_0/m-Q8_0-00001-of-00002.gguf": 4_000_000,
    "Q8_0/m-Q8_0-00002-of-00002.gguf": 4_000_000,
    "mmproj-F16.gguf": 1,
}
SPLIT = ["Q8_0/m-Q8_0-00001-of-00002.gguf", "Q8_0/m-Q8_0-00002-of-00002.gguf"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository of a whole file, one in parts, and one that is damaged; without its checkpoint."""
    path = tmp_path_factory.mktemp("gguf")
    stock = small_model("mixtral", tmp_path_factory.mktemp("stock"), vocab_size=120)
    whole = write_model(path / "tiny-Q4_K_M.gguf", "mixtral", stock, mixed)
    parts = path / "Q8_0"
    parts.mkdir()
    (parts / "tiny-Q8_0.gguf").write_bytes(whole.read_bytes())
    split_in_parts(parts / "tiny-Q8_0.gguf", 3)
    (parts / "tiny-Q8_0.gguf").unlink()
    (path / "tiny-IQ1_S.gguf").write_bytes(b"GGUF" + bytes(100))
    (path / "README.md").write_text("not needed")
    return path


@pytest.fixture
def asked(server, repository, here):
    server.models[NAME] = repository
    return server


def whole_files(asked):
    return [file for file in asked.fetched() if file.endswith(".gguf")]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a/b", ("a/b", "")),
        ("a/b:Q4_0", ("a/b", "Q4_0")),
        ("hf.co/a/b:latest", ("a/b", "")),
        ("https://huggingface.co/a/b", ("a/b", "")),
        ("https://huggingface.co/a/b/tree/main", ("a/b", "")),
        ("https://huggingface.co/a/b/blob/main/x.gguf", ("a/b", "x.gguf")),
        ("https://huggingface.co/a/b/resolve/main/c/x%20y.gguf?download=true", ("a/b", "c/x y.gguf")),
        ("a/b/blob/main/x.gguf", ("a/b", "blob/main/x.gguf")),
        ("a/b/c.gguf", ("a/b", "c.gguf")),
        ("a/b/c/d-00001-of-00002.gguf", ("a/b", "c/d-00001-of-00002.gguf")),
        ("a/b/c", None),
        ("./a/b.gguf", None),
        ("a/b/../c.gguf", None),
        ("a/b:", None),
        ("b.gguf", None),
    ],
)
def test_a_name_says_the_repository_and_what_of_it(text, found):
    assert parse_name(text) == found


def test_an_address_of_another_revision_is_refused_with_what_to_write():
    message = refusal(parse_name, "https://huggingface.co/a/b/blob/v2/x.gguf")
    assert message == "the address names revision v2 of a/b: write a/b/x.gguf, and --revision v2 where a command has it"


@pytest.mark.parametrize(
    ("wanted", "parts"),
    [
        ("", ["m-Q4_K_M.gguf"]),
        ("q2_k", ["m-Q2_K.gguf"]),
        ("Q4_K_XL", ["m-UD-Q4_K_XL.gguf"]),
        ("Q8_0", SPLIT),
        (SPLIT[1], SPLIT),
        ("m-Q2_K.gguf", ["m-Q2_K.gguf"]),
    ],
)
def test_a_quantisation_or_a_file_chooses_all_parts_of_one_model(wanted, parts):
    assert gguf_hub.choose(NAME, FILES, wanted) == parts


def test_the_only_model_needs_no_name_and_what_there_is_is_said():
    assert gguf_hub.choose(NAME, {"gpt-oss-20b-mxfp4.gguf": 1, "mmproj.gguf": 1}) == ["gpt-oss-20b-mxfp4.gguf"]
    others = {name: size for name, size in FILES.items() if "Q4_K_M" not in name}
    assert refusal(gguf_hub.choose, NAME, others) == (
        f"{NAME} has no Q4_K_M; it has Q2_K (2.0 MB), UD-Q4_K_XL (4.1 MB), Q8_0 (8.0 MB): ask for {NAME}:Q2_K"
    )
    twice = refusal(gguf_hub.choose, NAME, {"a/m-Q4_K_M.gguf": 1, "b/m-Q4_K_M.gguf": 1})
    assert f"has several Q4_K_M: name one as {NAME}/a/m-Q4_K_M.gguf" in twice
    unnamed = {"sub/foo.gguf": 1, "sub/bar.gguf": 2}
    assert refusal(gguf_hub.choose, NAME, unnamed).endswith(f"ask for {NAME}/sub/foo.gguf")
    assert gguf_hub.choose(NAME, unnamed, "sub/foo.gguf") == ["sub/foo.gguf"]
    assert "has no GGUF file of a model" in refusal(gguf_hub.choose, NAME, {"mmproj.gguf": 1})


def test_a_file_is_fetched_once_and_converted_and_then_nobody_is_asked(asked, monkeypatch):
    store = loading.find_store(NAME)
    assert whole_files(asked) == ["tiny-Q4_K_M.gguf"]
    assert f"some-org--Tiny-GGUF-tiny-Q4_K_M-{fake_hub.COMMIT[:12]}-int4-g32" in store.name
    manifest = Manifest.read(store)
    assert manifest.source == f"{NAME}/tiny-Q4_K_M.gguf" and read_identity(store)["revision"] == fake_hub.COMMIT
    asked.requests.clear()
    for name in (NAME, f"hf.co/{NAME}:Q4_K_M", f"{NAME}/tiny-Q4_K_M.gguf"):
        assert loading.find_store(name) == store
    assert not asked.requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(loading.find_store, f"{NAME}:Q8_0")


def test_a_file_whose_content_the_cache_has_lost_is_not_here(asked):
    snapshot = Path(hub.cache_folder(), "models--some-org--Tiny-GGUF", "snapshots", fake_hub.COMMIT)
    snapshot.mkdir(parents=True)
    for file in ("tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf"):
        (snapshot / file).symlink_to(snapshot / "blob")
    assert hub.find_cached_ggufs(NAME, fake_hub.COMMIT) is None
    (snapshot / "tiny-Q2_K.gguf").write_bytes(b"GGUF")
    here = hub.find_cached_ggufs(NAME, fake_hub.COMMIT)
    assert here is not None and here.weights == {"tiny-Q2_K.gguf": 4}


def test_a_file_in_parts_is_fetched_whole(asked, tmp_path):
    dest = loading.convert_model(f"{NAME}:q8_0", tmp_path / "store")
    assert is_store(dest)
    assert whole_files(asked) == [f"tiny-Q8_0-0000{number}-of-00003.gguf" for number in (1, 2, 3)]


def test_a_branch_that_moves_after_the_look_up_changes_nothing(asked, monkeypatch, tmp_path):
    list_files = hub.list_files

    def list_and_move(*arguments):
        found = list_files(*arguments)
        asked.commits = {"main": "f" * 40, "before": fake_hub.COMMIT}
        return found

    monkeypatch.setattr(hub, "list_files", list_and_move)
    formats = {"codec": None, "trunk": None, "dest": str(tmp_path), "to_run": None}
    model = hub.HubModel(**gguf_hub.fetch_gguf(NAME, None, "Q8_0", **formats))
    assert (model.commit, Path(model.folder).name) == (fake_hub.COMMIT, fake_hub.COMMIT)
    assert model.is_complete and model.first_file.name == "tiny-Q8_0-00001-of-00003.gguf"
    assert gguf_hub.find_cached(NAME, None, "Q8_0") == model


def test_files_of_the_same_name_in_two_folders_have_stores_of_their_own(asked, repository, tmp_path):
    asked.models[NAME], found = tmp_path, []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.gguf").write_bytes((repository / "tiny-Q4_K_M.gguf").read_bytes())
        found.append(loading.find_store(f"{NAME}/{folder}/same.gguf"))
    assert "-a--same-" in found[0].name and "-b--same-" in found[1].name


def test_what_cannot_fit_or_be_read_is_refused_by_its_header(asked):
    assert "budget is 200 MB, but this model needs at least" in refusal(loading.find_store, NAME, ram=200_000_000)
    assert "GGUF" in refusal(loading.find_store, f"{NAME}:IQ1_S")
    assert "leave out --no-keep-source" in refusal(loading.find_store, NAME, keep_source=False)
    assert "has no Q3_K; it has IQ1_S" in refusal(loading.find_store, f"{NAME}:Q3_K")
    assert not whole_files(asked)


def test_a_plan_is_of_the_revision_that_was_named(asked):
    asked.commits = {"main": "f" * 40, "before": fake_hub.COMMIT}
    for name in (NAME, fake_hub.NAME):
        survey(name, ram=4 * 10**9, revision="before")
    asked_for = [path.split("/resolve/")[1].split("/")[0] for _, path, _ in asked.requests if "/resolve/" in path]
    assert asked_for and set(asked_for) <= {"before", fake_hub.COMMIT}
    assert not whole_files(asked)


def test_a_plan_by_the_header_is_that_of_the_file_and_what_conversion_makes(asked, repository, tmp_path):
    there = survey(NAME, ram=4 * 10**9).outline
    assert not whole_files(asked)
    here = read_outline(repository / "tiny-Q4_K_M.gguf")
    made = Manifest.read(loading.convert_model(repository / "tiny-Q4_K_M.gguf", tmp_path / "store"))
    for what in ("num_experts", "codec", "record_bytes"):
        assert getattr(there, what) == getattr(here, what) == getattr(made, what), what
    assert there.chosen.trunk == here.chosen.trunk == made.trunk_bytes
    assert (there.formats, there.cpu.trunk) == (here.formats, here.cpu.trunk)
    shipped = next(form for form in here.formats if form.ships and form.experts_as == "Q4_0")
    assert shipped.trunk_as == "Q8_0"
    assert 0 < Path(repository, "tiny-Q4_K_M.gguf").stat().st_size - shipped.total < 20_000  # its metadata
