"""Models on the hub: what is asked for, what is downloaded, what is said when it fails; against a server of our own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import fake_hub
import pytest
from fake_hub import NAME, look_up, refusal, shards
from huggingface_hub import constants, file_download
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter
from pocketmoe.offload import hub
from pocketmoe.offload.checkpoint_files import INDEX_FILE
from pocketmoe.offload.hub import HubModel
from pocketmoe.offload.tensorfile import read_header


def test_a_look_up_brings_the_small_files_and_no_weights(server, published):
    model = look_up()
    assert (model.name, model.commit) == (NAME, fake_hub.COMMIT)
    assert set(model.missing()) == set(shards(published))
    assert model.missing()[shards(published)[0]] == (published / shards(published)[0]).stat().st_size
    here = {path.name for path in Path(model.folder).iterdir()}
    assert here == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        INDEX_FILE,
    }
    assert hub.find_cached(NAME) == HubModel(NAME, model.commit, model.folder, dict.fromkeys(model.weights, 0))
    assert not model.is_complete


def test_each_refusal_is_a_sentence_that_says_what_to_do(server, published):
    assert "neither a directory some-org/none here nor a model of that name" in refusal(look_up, "some-org/none")
    assert "has no revision v9" in refusal(look_up, NAME, "v9")
    server.gated.add(NAME)
    message = refusal(look_up)
    assert "is gated: accept its conditions on" in message and f"/{NAME}, then log in with `hf auth login`" in message
    for status, words in ((403, "refuses access"), (401, "log in with `hf auth login`"), (500, "answers 500")):
        server.status = status
        assert words in refusal(look_up)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["config.json", "pytorch_model.bin"], "holds pickled weights (pytorch_model.bin), which are never opened"),
        (["config.json", "README.md"], "has no *.safetensors files"),
        (["README.md"], "no checkpoint of transformers: it has no config.json"),
    ],
)
def test_a_repository_without_weights_to_use_is_refused(server, tmp_path, files, words):
    for file in files:
        (tmp_path / "other" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "other" / file).write_text("{}")
    server.models["some-org/other"] = tmp_path / "other"
    assert words in refusal(look_up, "some-org/other")


def test_offline_says_exactly_what_is_missing(server, published, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refusal(look_up)
    assert (
        f"nothing of a model of that name in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; unset it" in message
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    model, (first, *others) = look_up(), shards(published)
    hub.fetch(NAME, model.commit, {first: 0})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refusal(look_up)
    assert f"{len(others)} of {len(others) + 1} files of weights are missing in {model.folder}: {others[0]}," in message


def test_a_hub_that_cannot_be_reached_is_named_with_what_is_missing(server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = refusal(look_up)
    assert "nothing of a model of that name" in message and "http://127.0.0.1:9 cannot be reached (" in message


def test_a_connection_that_breaks_off_goes_on_where_it_was(server, published, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    model, notices, steps = look_up(), [], []
    file = shards(published)[1]
    server.cut_after += [1200, 2000]
    hub.fetch(NAME, model.commit, {file: model.weights[file]}, None, steps.append, notices.append)
    ranges = [part for method, path, part in server.requests if method == "GET" and path.endswith(file)]
    assert ranges == ["", "bytes=1000-", "bytes=3000-"]
    assert (Path(model.folder) / file).read_bytes() == (published / file).read_bytes()
    assert sum("Trying to resume download" in notice for notice in notices) == 2
    assert steps[-1] == ("download", model.weights[file], model.weights[file], "bytes")


def test_a_connection_that_is_reset_is_tried_again_a_few_times(server, published):
    model, notices = look_up(), []
    file, server.resets = shards(published)[1], True
    server.cut_after += [1200, 1200]
    hub.fetch(NAME, model.commit, {file: model.weights[file]}, None, None, notices.append)
    assert (Path(model.folder) / file).read_bytes() == (published / file).read_bytes()
    assert [f"the connection broke off at {file} (" in notice for notice in notices] == [True, True]
    server.cut_after += [1200] * hub.ATTEMPTS
    message = refusal(hub.fetch, NAME, model.commit, {shards(published)[2]: 0})
    assert "cannot be reached (" in message and "what is complete is kept: run the same command again" in message


def test_the_other_way_of_the_library_to_download_reports_its_progress_as_well():
    """Large files on the hub come in deduplicated pieces, and the library tells of them differently."""
    seen = []
    bars = XetDownloadProgressReporter(
        reconstruction_desc="", total=100, log_level=30, tqdm_class=hub._bar(seen.append)
    )
    with bars:
        for written in (10, 60):
            counts = {"total_bytes_completed": written, "total_transfer_bytes_completed": written + 5}
            rates = {"total_bytes_completion_rate": 1.0, "total_transfer_bytes_completion_rate": 1.0}
            bars.update_progress(SimpleNamespace(**counts, **rates, total_bytes=100, total_transfer_bytes=90))
    assert seen == [10, 60]


def test_a_full_disk_is_said_and_what_is_complete_stays(server, published, monkeypatch):
    model, (first, second, *_) = look_up(), shards(published)
    hub.fetch(NAME, model.commit, {first: 0})

    def full(*_args, **_options):
        raise OSError(28, "No space left on device", "/cache")

    monkeypatch.setattr(file_download, "http_get", full)
    message = refusal(hub.fetch, NAME, model.commit, {second: 0})
    assert message.startswith("the disk is full (/cache)") and "run the same command again" in message
    assert first not in model.missing() and second in model.missing()


def test_a_file_that_is_not_given_in_parts_is_refused_by_the_answers_head_alone(server, published):
    file = shards(published)[0]
    content = (published / file).read_bytes()
    remote = hub.RemoteFile(NAME, file, fake_hub.COMMIT, len(content))
    assert remote.read(100) == content[:100] and remote.read(50) == content[100:150]
    server.ignores_ranges, server.cut_after = True, [1000]  # who reads on meets the end of the connection
    assert "cannot be read in parts" in refusal(remote.read, 100)
    assert remote.content == content[:150]


def test_headers_are_read_without_the_weights(server, published):
    model = look_up()
    headers = hub.read_headers(model)
    assert server.fetched().count(shards(published)[0]) == 0
    for file in shards(published):
        want = read_header(published / file)
        assert {name: (t["dtype"], tuple(t["shape"])) for name, t in headers[file].items()} == {
            name: (t.dtype, t.shape) for name, t in want.items()
        }
