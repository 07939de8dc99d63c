"""A conversion of a checkpoint that is killed anywhere goes on where it was, and ends with the same bytes."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fakes_store import journaled, tree
from pocketmoe.offload import convert as convert_module
from pocketmoe.offload.checkpoint import CheckpointSource
from pocketmoe.offload.convert import JOURNAL, convert
from pocketmoe.offload.manifest import MANIFEST

POINTS = 50
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class CountingSource(CheckpointSource):
    """Counts the experts that are read."""

    reads = 0

    def expert(self, layer, index):
        self.reads += 1
        return super().expert(layer, index)


@contextmanager
def at_every_call(action: Callable[[], object]) -> Iterator[None]:
    """Before and after every function of `convert.py`, and every function that these call."""
    inside = convert_module.__file__
    sys.setprofile(lambda frame, *_: frame.f_code.co_filename == inside and action())
    try:
        yield
    finally:
        sys.setprofile(None)


@pytest.fixture(scope="module", params=["experts in one file", "in files of three"])
def reference(request, checkpoints, tmp_path_factory):
    """(checkpoint, bytes of its store, number of calls that converting it takes)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_module, "SYNC_BYTES", 1)  # the journal grows with every expert
        if "three" in request.param:
            patch.setattr(convert_module, "FILE_BYTES", 3 * 16384)
        counts, checkpoint = [0], checkpoints / "mixtral"

        def count() -> None:
            counts[0] += 1

        source, dest = CheckpointSource(checkpoint), tmp_path_factory.mktemp("whole") / "store"
        with at_every_call(count):
            convert(source, dest)
        yield checkpoint, tree(dest), counts[0]


def convert_and_die(checkpoint: Path, dest: Path, point: int) -> bool:
    """Convert in a process that is killed at that call; returns whether it was."""
    child = os.fork()
    if child == 0:
        calls = iter(range(point))
        try:
            source = CheckpointSource(checkpoint)
            with at_every_call(lambda: next(calls, None) is None and os.kill(os.getpid(), signal.SIGKILL)):
                convert(source, dest)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def points(total: int, seed: int, count: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(total), count))


def check(checkpoint: Path, want: dict[str, bytes], dest: Path, point: int) -> None:
    killed, partial = convert_and_die(checkpoint, dest, point), dest.with_name(dest.name + ".partial")
    assert killed or dest.exists(), point
    source = CountingSource(checkpoint)
    total = sum(layer.num_experts for layer in source.layers())
    done = total if dest.exists() or (partial / MANIFEST).exists() else 0
    if (partial / JOURNAL).exists():
        done = max(done, journaled(dest))
    notices: list[str] = []
    convert(source, dest, on_notice=notices.append)
    assert tree(dest) == want, point
    assert source.reads == total - done, (point, notices)
    assert not any("anew" in notice for notice in notices), notices
    assert {file.name for file in dest.parent.iterdir()} <= {dest.name, f".{dest.name}.lock"}


@pytest.mark.parametrize("seed", range(3))
def test_killed_anywhere_it_goes_on_where_it_was(reference, tmp_path, seed):
    checkpoint, want, total = reference
    [point] = points(total, seed, 1)
    check(checkpoint, want, tmp_path / "store", point)


@pytest.mark.slow
def test_killed_at_each_of_many_random_points_it_goes_on_where_it_was(reference, tmp_path):
    checkpoint, want, total = reference
    for point in points(total, 100, POINTS):
        check(checkpoint, want, tmp_path / str(point) / "store", point)


def test_killed_again_and_again_it_ends_with_the_same_bytes(reference, tmp_path):
    checkpoint, want, total = reference
    dest, generator = tmp_path / "store", random.Random(0)
    while convert_and_die(checkpoint, dest, generator.randrange(total // 3, total)):
        pass
    assert tree(dest) == want
