"""Files that appear whole or not at all, and that only their owner can read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EISDIR, ENOTDIR
from pathlib import Path
from typing import IO


def require_writable(path: Path) -> None:
    """Raises OSError when `replacing` it can not work: there is no such folder, it may not be written to, or `path` is
    a folder itself."""
    folder = path.parent
    if not stat.S_ISDIR(folder.stat().st_mode):
        _refuse(ENOTDIR, folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        _refuse(EACCES, folder)
    if path.is_dir():
        _refuse(EISDIR, path)


def _refuse(code: int, path: Path) -> None:
    raise OSError(code, os.strerror(code), str(path))


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file of mode 0600, under a temporary name, that takes the place of `path` when the block has succeeded.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
