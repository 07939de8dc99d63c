"""The manifest of a store: read when it is whole and of this version, refused with a reason when not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import xxhash
from fakes_store import FakeSource
from pocketmoe.offload.convert import convert
from pocketmoe.offload.errors import DataError
from pocketmoe.offload.manifest import MANIFEST, VERSION, Manifest
from pocketmoe.offload.store import ExpertStore


@pytest.fixture
def store(tmp_path):
    return convert(FakeSource(), tmp_path / "store")


def _sealed(path: Path, **changes) -> None:
    """A manifest with changed entries and a right checksum, as another program version might have written it."""
    content = {**json.loads((path / MANIFEST).read_text()), **changes}
    del content["checksum"]
    text = json.dumps(content, indent=1).removesuffix("\n}").encode()
    (path / MANIFEST).write_bytes(text + b',\n "checksum": "' + xxhash.xxh3_64_hexdigest(text).encode() + b'"\n}')


def test_a_store_of_another_version_is_refused_with_both_versions(store):
    _sealed(store)
    Manifest.read(store)
    for version in (VERSION + 1, 0, "2", None):
        _sealed(store, version=version)
        with pytest.raises(DataError, match=rf"store of version {version!r}, this program reads version {VERSION}"):
            ExpertStore(store)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "5", "\x00", "[" * 100_000, '{"format": "other"}'])
def test_a_damaged_manifest_is_refused(store, content):
    (store / MANIFEST).write_text(content)
    with pytest.raises(DataError, match=rf"{MANIFEST} is (damaged|not the manifest)"):
        ExpertStore(store)


def test_a_manifest_cut_anywhere_is_refused(store):
    whole = (store / MANIFEST).read_bytes()
    for length in range(0, len(whole), 37):
        (store / MANIFEST).write_bytes(whole[:length])
        with pytest.raises(DataError, match=MANIFEST):
            Manifest.read(store)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": []}, {"layers": 5}, {"layers": [{}]}, {"layers": None}, {"codec": "int3"}, {"codec": 5},
        {"record_bytes": 8192}, {"record_bytes": "many"}, {"record_bytes": float("inf")}, {"record_checksums": []},
        {"record_checksums": 5}, {"expert_files": []}, {"expert_files": [5]}, {"file_checksums": []},
        {"file_checksums": {"../config.json": "0"}}, {"file_checksums": {"a/b": "0"}}, {"extra": 5},
        {"expert_files": [{"name": "../x", "first": 0, "count": 8, "data_start": 4096}]},
        {"expert_files": [{"name": "/etc/passwd", "first": 0, "count": 8, "data_start": 4096}]},
        {"expert_files": [{"name": "x", "first": 0, "count": 8, "data_start": 100}]},
        {"expert_files": [{"name": "x", "first": 0, "count": 8, "data_start": -4096}]},
        {"expert_files": [{"name": "x", "first": 0, "count": -1, "data_start": 4096}]},
        {"expert_files": [{"name": "experts-00001.safetensors", "first": 0, "count": 8, "data_start": 1 << 60}]},
        {"trunk_bytes": 5}, {"trunk_bytes": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_of_nonsense_is_refused_even_with_a_right_checksum(store, change):
    _sealed(store, **change)
    with pytest.raises(DataError, match=rf"{store}.*(is damaged|has [\d,]+ bytes, expected)"):
        ExpertStore(store)


def test_an_unfinished_store_is_none(tmp_path):
    (tmp_path / "store.partial").mkdir()
    with pytest.raises(DataError, match="is not a pocketmoe store"):
        ExpertStore(tmp_path / "store.partial")
