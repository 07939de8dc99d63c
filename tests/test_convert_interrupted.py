"""After any interruption, the rest gives the store that an uninterrupted conversion would have written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
from collections import namedtuple

import pytest
from fakes_store import TOTAL, FakeSource, journaled, raise_at, tree
from pocketmoe.cache.expert import ExpertId
from pocketmoe.offload import convert as convert_module
from pocketmoe.offload.convert import JOURNAL, convert
from pocketmoe.offload.errors import DataError
from pocketmoe.offload.manifest import MANIFEST, Manifest
from pocketmoe.offload.store import verify_store


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The files of an uninterrupted conversion."""
    return tree(convert(FakeSource(), tmp_path_factory.mktemp("reference") / "store"))


@pytest.fixture
def notices():
    return []


@pytest.fixture(params=[1, convert_module.SYNC_BYTES], ids=["journal every expert", "journal once"])
def _sync(request, monkeypatch):
    monkeypatch.setattr(convert_module, "SYNC_BYTES", request.param)


def resume(dest, reference, notices, done):
    """Run again: the same bytes as `reference`, and only what was not done is read."""
    source = FakeSource()
    convert(source, dest, on_notice=notices.append)
    assert tree(dest) == reference
    assert source.calls == [ExpertId(n // 4, n % 4) for n in range(done, TOTAL)]
    assert not dest.with_name(dest.name + ".partial").exists()


@pytest.mark.usefixtures("_sync")
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError], ids=lambda e: e.__name__)
@pytest.mark.parametrize("count", range(TOTAL))
def test_after_an_interruption_at_any_expert_only_the_rest_is_done(tmp_path, reference, notices, count, error):
    dest = tmp_path / "store"
    with pytest.raises(error):
        convert(FakeSource(before_expert=raise_at(count, error())), dest)
    assert not dest.exists()
    assert journaled(dest) == count
    resume(dest, reference, notices, done=count)
    assert notices == ([f"resuming after {count} of {TOTAL} experts"] if count else [])


def test_a_conversion_interrupted_again_and_again_ends_with_the_same_bytes(tmp_path, reference, notices):
    dest = tmp_path / "store"
    for _ in range(TOTAL):
        with pytest.raises(KeyboardInterrupt):
            convert(FakeSource(before_expert=raise_at(1, KeyboardInterrupt())), dest, on_notice=notices.append)
        if journaled(dest) == TOTAL - 1:
            break
    resume(dest, reference, notices, done=TOTAL - 1)
    assert all(notice.startswith("resuming") for notice in notices)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_process_killed_at_any_expert_fsync_or_rename_leaves_nothing_or_something_to_resume(
    tmp_path, reference, monkeypatch
):
    monkeypatch.setattr(convert_module, "SYNC_BYTES", 1)
    finished, point = False, 0
    while not finished:
        dest = tmp_path / str(point) / "store"
        pid = os.fork()
        if pid == 0:  # the child: count the steps and die at one of them, as by SIGKILL at that moment
            step = iter(range(1_000_000))

            def die_here(*_, step=step, point=point):
                if next(step) == point:
                    os.kill(os.getpid(), signal.SIGKILL)

            for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
                real = getattr(os, name)
                setattr(os, name, lambda *args, real=real, **kw: (die_here(), real(*args, **kw))[1])
            try:
                convert(FakeSource(before_expert=die_here), dest)
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        finished = os.WIFEXITED(status)
        assert finished or os.WTERMSIG(status) == signal.SIGKILL
        assert not finished or os.WEXITSTATUS(status) == 0
        if dest.exists():
            assert tree(dest) == reference and verify_store(dest) == []
        source, notices = FakeSource(), []
        partial = dest.with_name("store.partial")
        done = TOTAL if dest.exists() or (partial / MANIFEST).exists() else 0
        if (partial / JOURNAL).exists():
            done = max(done, journaled(dest))
        convert(source, dest, on_notice=notices.append)
        assert tree(dest) == reference, point
        assert len(source.calls) == TOTAL - done, (point, notices)
        assert not any("anew" in notice for notice in notices), notices
        assert {file.name for file in dest.parent.iterdir()} <= {"store", ".store.lock"}
        point += 1
    assert point > 3 * TOTAL, point


@pytest.mark.parametrize("cut", [1, 2, 10, 20])
def test_a_torn_journal_line_costs_one_expert_now_and_nothing_later(tmp_path, reference, notices, cut, monkeypatch):
    monkeypatch.setattr(convert_module, "SYNC_BYTES", 1)
    dest = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        convert(FakeSource(before_expert=raise_at(4, KeyboardInterrupt())), dest)
    journal = dest.with_name("store.partial") / JOURNAL
    os.truncate(journal, journal.stat().st_size - cut)
    source = FakeSource(before_expert=raise_at(2, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        convert(source, dest, on_notice=notices.append)
    assert source.calls == [(0, 3), (1, 0)]
    resume(dest, reference, notices, done=5)
    assert notices == ["resuming after 3 of 8 experts", "resuming after 5 of 8 experts"]


def _half_done(tmp_path):
    dest = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        convert(FakeSource(before_expert=raise_at(4, KeyboardInterrupt())), dest)
    return dest, dest.with_name("store.partial")


def _garbage(partial):
    (partial / JOURNAL).write_text("\x00\x01 nonsense\n[]\n")


def _binary(partial):
    (partial / JOURNAL).write_bytes(b"\xff\xfe\n")


def _empty(partial):
    (partial / JOURNAL).write_text("")


def _number(partial):
    with open(partial / JOURNAL, "a") as journal:
        journal.write("5\n")


def _too_many(partial):
    with open(partial / JOURNAL, "a") as journal:
        journal.write(json.dumps(["0" * 16] * 10) + "\n")


def _no_experts(partial):
    (partial / "experts-00001.safetensors").unlink()


def _short_experts(partial):
    file = partial / "experts-00001.safetensors"
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize(
    "damage", [_garbage, _binary, _empty, _number, _too_many, _no_experts, _short_experts], ids=lambda d: d.__name__
)
def test_a_partial_directory_that_is_no_use_is_started_anew_and_says_so(tmp_path, reference, notices, damage):
    dest, partial = _half_done(tmp_path)
    damage(partial)
    resume(dest, reference, notices, done=0)
    [notice] = notices
    assert "cannot be resumed" in notice and "starting anew" in notice and str(partial) in notice


def test_a_changed_source_starts_anew_and_says_so(tmp_path, notices):
    dest, _ = _half_done(tmp_path)
    source = FakeSource(seed=1)
    convert(source, dest, on_notice=notices.append)
    assert len(source.calls) == TOTAL and len(notices) == 1 and "another checkpoint" in notices[0]
    assert tree(dest) == tree(convert(FakeSource(seed=1), tmp_path / "other"))


def test_another_codec_starts_anew_and_says_so(tmp_path, notices):
    dest, _ = _half_done(tmp_path)
    convert(FakeSource(), dest, "bf16", on_notice=notices.append)
    assert len(notices) == 1 and "codec" in notices[0]
    assert Manifest.read(dest).codec == "bf16" and verify_store(dest) == []


# A full disk


@contextlib.contextmanager
def file_size_limit(nbytes):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(os.name == "nt", reason="needs resource limits")
@pytest.mark.parametrize("records", [0, 3, 5.5, TOTAL])
def test_when_the_system_refuses_to_write_more_it_says_so_keeps_experts_and_resumes(
    tmp_path, reference, notices, records
):
    dest = tmp_path / "store"
    manifest = Manifest.read(convert(FakeSource(), tmp_path / "whole"))
    limit = manifest.expert_files[0].data_start + int(records * manifest.record_bytes)
    kept = int(records)
    with (
        file_size_limit(limit),
        pytest.raises(DataError, match=rf"after {kept} of {TOTAL} experts; they are kept") as e,
    ):
        convert(FakeSource(), dest)
    assert str(tmp_path) in str(e.value) and "lift the limit and run the same command again" in str(e.value)
    assert not dest.exists()
    resume(dest, reference, notices, done=kept)


@pytest.mark.usefixtures("_sync")
def test_a_disk_that_is_full_at_any_fsync_costs_nothing_that_was_durable(tmp_path, reference, monkeypatch):
    real, point, finished = os.fsync, 0, False
    while not finished:
        dest, step = tmp_path / str(point) / "store", iter(range(1_000_000))

        def full(descriptor, step=step, point=point):
            if next(step) >= point:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        try:
            convert(FakeSource(), dest)
            finished, message = True, ""
        except DataError as error:
            message = str(error)
        assert finished or ("is full" in message and str(dest.parent) in message)
        # The last fsync, of the parent, comes after the renaming: then the store is whole.
        assert not dest.exists() or tree(dest) == reference
        monkeypatch.setattr(os, "fsync", real)
        convert(FakeSource(), dest)
        assert tree(dest) == reference, point
        point += 1
    assert point > 3


def test_a_disk_without_room_is_refused_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: usage(10, 5, 5000))
    source = FakeSource()
    with pytest.raises(DataError, match=r"has 5\.0 kB free, but .* kB are needed; free some space"):
        convert(source, tmp_path / "store")
    assert source.calls == []


def test_other_errors_of_the_disk_are_one_sentence_too(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(DataError, match=r"cannot write .*store.*Input/output error"):
        convert(FakeSource(), tmp_path / "store")
