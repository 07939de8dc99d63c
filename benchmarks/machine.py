"""What the benchmarks ask of the machine: memory cgroups, read-ahead, the page cache, and its limits, measured."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pocketmoe.offload.probe import processor

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


class Cgroup:
    """A memory cgroup (v1 or v2) of `limit` bytes without swap, for child processes. Needs root.

    Use as a context manager; `enter` prefixes a command so that it runs inside.
    """

    def __init__(self, name: str, limit: int) -> None:
        self.limit = limit
        self._v2 = not (_V1 / "memory.limit_in_bytes").exists()
        self.path = (_V2 if self._v2 else _V1) / name

    def __enter__(self) -> Cgroup:
        self.path.mkdir(exist_ok=True)
        if self._v2:
            self._write("memory.max", self.limit)
            self._write("memory.swap.max", 0)
        else:
            # The larger of the two has to be set first, whichever it was before.
            with contextlib.suppress(OSError):
                self._write("memory.memsw.limit_in_bytes", -1)
            self._write("memory.limit_in_bytes", self.limit)
            with contextlib.suppress(OSError):  # no swap accounting: then there is mostly no swap
                self._write("memory.memsw.limit_in_bytes", self.limit)
        return self

    def __exit__(self, *_: object) -> None:
        for _attempt in range(50):
            try:
                self.path.rmdir()
            except OSError:  # a process inside has not quite ended
                time.sleep(0.1)
            else:
                return

    def enter(self, command: Sequence[str]) -> list[str]:
        """`command`, started inside the cgroup."""
        tasks = self.path / "cgroup.procs"
        return ["sh", "-c", f'echo $$ > "{tasks}" && exec "$@"', "sh", *command]

    def _write(self, name: str, value: int) -> None:
        (self.path / name).write_text(str(value))


def why_no_cgroup() -> str:
    """Why memory-limited runs cannot be made here; empty when they can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "a memory cgroup needs Linux and root"
    if (_V1 / "memory.limit_in_bytes").exists():
        return ""
    controllers = _V2 / "cgroup.subtree_control"
    if not controllers.exists():
        return "no memory cgroup is mounted under /sys/fs/cgroup"
    if "memory" not in controllers.read_text():
        try:
            controllers.write_text("+memory")
        except OSError as error:
            return f"the memory controller of cgroup v2 cannot be enabled: {error.strerror}"
    return ""


def read_ahead_file(path: Path) -> Path | None:
    """The read-ahead setting (KB) of the disk that holds `path`."""
    device = os.stat(path).st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not block.exists():
        return None
    block = block.resolve()
    found = next((p for p in (block, block.parent) if (p / "queue" / "read_ahead_kb").exists()), None)
    return found and found / "queue" / "read_ahead_kb"


@contextlib.contextmanager
def read_ahead(path: Path, kb: int | None) -> Iterator[None]:
    """Another read-ahead for the disk that holds `path`, restored at the end, also after SIGTERM."""
    setting = read_ahead_file(path)
    if kb is None or setting is None:
        yield
        return
    before = setting.read_text()
    previous = signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        setting.write_text(str(kb))
        yield
    finally:
        setting.write_text(before)
        signal.signal(signal.SIGTERM, previous)


def drop_from_page_cache(path: Path) -> None:
    """Clean pages of a file, or of a folder's files, leave the page cache: the next reads come from the disk."""
    for file in [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def in_quiet_session(command: Sequence[str]) -> list[str]:
    """`command` in a session of its own with the highest share of the CPU under autogroup scheduling (root only)."""
    raise_share = 'echo -20 > /proc/self/autogroup 2>/dev/null; exec "$@"'
    return ["setsid", "--wait", "sh", "-c", raise_share, "sh", *command]


def contention() -> str:
    """A warning when other programs want the cores; empty when they do not."""
    load, cores = (os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0), os.cpu_count() or 1
    if load <= 0.5 * cores:
        return ""
    return (
        f"CONTENDED: load average {load:.1f} on {cores} cores before the first run. Engines whose threads spin while "
        "they wait for each other (llama.cpp, torch) lose many times more from this than pocketmoe does, so ratios "
        "against them are not valid; run it again on an idle machine"
    )


def describe() -> str:
    """One line: processor, cores, memory, load."""
    import psutil

    memory = psutil.virtual_memory().total / 1e9
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GB, load average {load:.1f} at the start"
