"""Reading a store: the same bytes by every way, checked on first use, and faults of the disk retried or reported."""

from __future__ import annotations

import errno
import os
import threading

import pytest
import torch
from fakes_store import FakeSource, aligned, flipped, positions
from pocketmoe.cache.expert import ExpertId
from pocketmoe.offload import convert as convert_module
from pocketmoe.offload.convert import convert
from pocketmoe.offload.errors import DataError
from pocketmoe.offload.manifest import TRUNK, Manifest, is_store
from pocketmoe.offload.store import ExpertStore
from pocketmoe.quant.codecs import ExpertShape

EXPERTS = [ExpertId(layer, index) for layer in range(2) for index in range(4)]
needs_preadv = pytest.mark.skipif(not hasattr(os, "preadv"), reason="needs preadv")
needs_direct = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="needs O_DIRECT")


@pytest.fixture
def store_path(tmp_path, monkeypatch):
    """A store of three expert files."""
    monkeypatch.setattr(convert_module, "FILE_BYTES", 3 * 12_288)
    path = convert(FakeSource(shape=ExpertShape(64, 96)), tmp_path / "store")
    assert [file.count for file in Manifest.read(path).expert_files] == [3, 3, 2]
    return path


@pytest.fixture
def opened(store_path):
    """Opens the store; closes what was opened."""
    stores = []

    def opened(io="direct", **options):
        stores.append(ExpertStore(store_path, io, **options))
        return stores[-1]

    yield opened
    for store in stores:
        store.close()


def read(store, expert, piece=None) -> bytes:
    _, view = aligned(store.record_bytes)
    for start in range(0, store.record_bytes, piece or store.record_bytes):
        store.read_into(expert, view, start, min(start + piece, store.record_bytes) if piece else None)
    return bytes(view)


def on_disk(path) -> list[bytes]:
    """The records as an independent reader finds them."""
    manifest, records = Manifest.read(path), []
    for file in manifest.expert_files:
        data = (path / file.name).read_bytes()[file.data_start :]
        records += [data[i : i + manifest.record_bytes] for i in range(0, len(data), manifest.record_bytes)]
    return records


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("io", ["direct", "buffered", "mmap"])
def test_every_way_of_reading_gives_the_bytes_on_disk(opened, store_path, io, verify):
    store, want = opened(io, verify=verify), on_disk(store_path)
    assert len(set(want)) == len(EXPERTS)
    for _ in range(2):
        assert [read(store, expert) for expert in EXPERTS] == want
        assert [read(store, expert, piece=4096) for expert in EXPERTS] == want


def test_several_threads_read_at_once_and_each_gets_its_own_expert(opened, store_path):
    store, want, start = opened(), on_disk(store_path), threading.Barrier(4)
    wrong = []

    def reader(seed):
        start.wait()
        for i in range(40):
            number = (i * 3 + seed) % len(EXPERTS)
            if read(store, EXPERTS[number]) != want[number]:
                wrong.append(number)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Damage


@pytest.mark.parametrize("io", ["direct", "buffered", "mmap"])
def test_the_first_read_of_a_record_finds_any_flipped_bit_and_names_the_expert(opened, store_path, io):
    manifest = Manifest.read(store_path)
    for number, expert in enumerate(EXPERTS):
        file = next(f for f in manifest.expert_files if f.first <= number < f.first + f.count)
        start = file.data_start + (number - file.first) * manifest.record_bytes
        for i, offset in enumerate((0, 1, 777, 2048, manifest.record_bytes - 1)):
            with flipped(store_path / file.name, start + offset, i):
                store = opened(io)
                with pytest.raises(
                    DataError, match=rf"{file.name}: expert {expert.index} of MoE layer {expert.layer} "
                ):
                    read(store, expert, piece=[None, 4096][i % 2])
                read(store, EXPERTS[number - 1])  # the others are not affected
                opened(io, verify=False).read_into(expert, aligned(manifest.record_bytes)[1])
            read(store, expert)


def test_a_flipped_bit_in_the_config_or_another_small_file_is_found_when_the_store_is_opened(opened, store_path):
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        for i, position in enumerate(positions(store_path / name, 20)):
            with flipped(store_path / name, position, i % 8):
                with pytest.raises(DataError, match=f"{name} is not as it was converted"):
                    opened()
                opened(verify=False)
    opened()


def test_a_flipped_bit_in_the_trunk_is_found_while_it_is_loaded(opened, store_path):
    store = opened()
    for i, position in enumerate([*positions(store_path / TRUNK, 30), *range(0, 700, 61)]):
        with flipped(store_path / TRUNK, position, i % 8), pytest.raises(DataError, match=TRUNK):
            list(store.trunk())
    assert [name for name, _ in store.trunk()] == [name for name, _ in FakeSource().trunk()]


def test_without_verify_the_trunk_is_read_as_it_is(opened, store_path):
    with flipped(store_path / TRUNK, (store_path / TRUNK).stat().st_size - 1):
        assert len(list(opened(verify=False).trunk())) == 5


@pytest.mark.parametrize("change", [-1, 1, -4096])
@pytest.mark.parametrize("name", ["experts-00001.safetensors", "experts-00003.safetensors", TRUNK])
def test_a_file_of_another_size_is_refused_when_the_store_is_opened(opened, store_path, name, change):
    size = (store_path / name).stat().st_size
    os.truncate(store_path / name, size + change)
    with pytest.raises(DataError, match=f"{name} has {size + change:,} bytes, expected {size:,}"):
        opened()


@pytest.mark.parametrize("name", ["experts-00002.safetensors", TRUNK, "config.json"])
def test_a_missing_file_is_refused_when_the_store_is_opened(opened, store_path, name):
    (store_path / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        opened()


def test_a_directory_is_a_store_when_it_has_a_manifest(store_path, tmp_path):
    assert is_store(store_path) and not is_store(tmp_path)


def test_a_file_cut_while_it_is_open_is_an_error_and_not_a_crash(opened, store_path):
    store = opened("buffered")
    os.truncate(store_path / "experts-00001.safetensors", 5000)
    with pytest.raises(DataError, match=r"experts-00001.*the file ended early"):
        read(store, EXPERTS[1])


# File systems


@needs_direct
def test_direct_reads_are_asked_for_and_refused_ones_fall_back_with_exactly_one_notice(opened, store_path, monkeypatch):
    real, flags, notices = os.open, [], []

    def refuse(path, flag, *args, **kwargs):
        if str(path).startswith(str(store_path)):
            flags.append(bool(flag & os.O_DIRECT))
            if flag & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flag, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    store = opened(on_notice=notices.append)
    assert flags == [True, False, False, False], "asked for once, then not again"
    assert store.io == "buffered"
    [notice] = notices
    assert str(store_path) in notice and "without direct reads" in notice
    assert [read(store, expert) for expert in EXPERTS] == on_disk(store_path)


@needs_direct
@needs_preadv
def test_a_file_system_that_refuses_direct_reads_only_at_the_first_read_falls_back_too(opened, store_path, monkeypatch):
    real_open, real_preadv, direct, notices = os.open, os.preadv, set(), []

    def note(path, flag, *args, **kwargs):
        descriptor = real_open(path, flag & ~os.O_DIRECT, *args, **kwargs)
        (direct.add if flag & os.O_DIRECT else direct.discard)(descriptor)
        return descriptor

    def refuse(descriptor, buffers, offset):
        if descriptor in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "open", note)
    monkeypatch.setattr(os, "preadv", refuse)
    store = opened(on_notice=notices.append)
    assert store.io == "buffered" and len(notices) == 1
    assert [read(store, expert) for expert in EXPERTS] == on_disk(store_path)


@pytest.mark.parametrize("error", [errno.EACCES, errno.EMFILE])
def test_a_file_that_cannot_be_opened_is_named_with_the_reason(opened, store_path, monkeypatch, error):
    real, before = os.open, len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    def refuse(path, *args, **kwargs):
        if str(path).endswith("00002.safetensors"):
            raise OSError(error, os.strerror(error))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DataError, match=rf"experts-00002\.safetensors cannot be opened: {os.strerror(error)}"):
        opened()
    if before:
        assert len(os.listdir("/proc/self/fd")) == before, "files stay open"


def test_closing_gives_the_files_back_and_may_be_repeated(opened):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    before = os.listdir("/proc/self/fd")
    for io in ("direct", "buffered", "mmap"):
        store = opened(io)
        read(store, EXPERTS[0])
        assert len(os.listdir("/proc/self/fd")) > len(before)
        store.close()
        store.close()
        assert len(os.listdir("/proc/self/fd")) == len(before), io
        with pytest.raises(AssertionError, match="closed"):
            read(store, EXPERTS[0])


# A disk with faults


class Faulty:
    """`os.preadv` that fails or falls short, by the number of the call."""

    def __init__(self, fails=(), longest=None, error=errno.EIO):
        self.real, self.fails, self.longest, self.error, self.calls = os.preadv, fails, longest, error, 0

    def __call__(self, descriptor, buffers, offset):
        self.calls += 1
        if self.calls in self.fails:
            raise OSError(self.error, os.strerror(self.error))
        [view] = buffers
        return self.real(descriptor, [view[: self.longest]], offset)


@needs_preadv
@pytest.mark.parametrize("fails", [(1,), (2,), (1, 2)])
def test_an_error_of_the_disk_that_passes_is_retried_and_counted(opened, store_path, monkeypatch, fails):
    store = opened("buffered")
    monkeypatch.setattr(os, "preadv", Faulty(fails, longest=4096))
    assert read(store, EXPERTS[5]) == on_disk(store_path)[5]
    assert store.retries == len(fails)


@needs_preadv
def test_an_error_of_the_disk_that_stays_names_file_offset_and_cause_and_the_rest_still_reads(
    opened, store_path, monkeypatch
):
    store, want = opened("buffered"), on_disk(store_path)
    file = store.manifest.expert_files[0]
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", faulty := Faulty(range(1, 100)))
        with pytest.raises(DataError) as caught:
            read(store, EXPERTS[1])
    assert faulty.calls == 3 == store.retries
    message = str(caught.value)
    assert file.name in message and f"{file.data_start + store.record_bytes:,}" in message
    assert "failed 3 times: Input/output error" in message
    assert [read(store, expert) for expert in EXPERTS] == want


@needs_preadv
@pytest.mark.parametrize("longest", [1024, 4095, 5000])
def test_short_reads_are_continued_where_they_stopped(opened, store_path, monkeypatch, longest):
    store = opened("buffered")
    monkeypatch.setattr(os, "preadv", faulty := Faulty(longest=longest))
    assert [read(store, expert) for expert in EXPERTS] == on_disk(store_path)
    assert faulty.calls >= len(EXPERTS) * (store.record_bytes / longest) and store.retries == 0


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_without_positioned_reads_the_bytes_are_the_same(opened, store_path, monkeypatch, io):
    monkeypatch.delattr(os, "preadv", raising=False)  # as on Windows
    monkeypatch.setattr("pocketmoe.offload.store._O_DIRECT", 0)
    notices = []
    store = opened(io, on_notice=notices.append)
    assert [read(store, expert) for expert in EXPERTS] == on_disk(store_path)
    assert len(notices) == (io == "direct") and store.io == "buffered"


def test_trunk_tensors_own_their_memory(opened):
    first, second = (dict(opened().trunk()) for _ in range(2))
    want = first["embed.weight"].clone()
    first["embed.weight"].zero_()
    assert torch.equal(second["embed.weight"], want)
