"""The statistics of past runs: one file each, the latest of every store, for `pocketmoe stats`."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..offload.errors import DataError, UsageError
from ..offload.naming import exists

if TYPE_CHECKING:
    from ..cache.stats import RunStats

MOST_RUNS = 20
"""Of one store."""


def runs_folder() -> Path:
    """Where they lie. Any of them may be deleted."""
    from platformdirs import user_state_path

    return user_state_path("pocketmoe") / "runs"


def keep_run(stats: RunStats) -> Path:
    """Write the statistics of a run that ends now, all or nothing, and remove the oldest beyond `MOST_RUNS`.

    Raises:
        DataError: they were not written.
    """
    folder, now = runs_folder(), time.time()
    store = hashlib.sha256(os.fsencode(stats.store or "")).hexdigest()[:8]
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now)) + f"-{int(now % 1 * 1e6):06}"
    path = folder / f"{stamp}-{os.getpid()}-{store}.json"
    stats.finished_at = now
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        stats.save(path)
        for old in sorted(folder.glob(f"*-{store}.json"))[:-MOST_RUNS]:
            old.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"The statistics of this run were not kept in {folder}: {error.strerror or error}.") from None
    return path


def kept_runs() -> list[Path]:
    """The latest first. Raises DataError when there are none."""
    runs = sorted(runs_folder().glob("[!.]*.json"), reverse=True)
    if not runs:
        raise DataError(f"There are no statistics yet in {runs_folder()}: they are kept when a chat, run or demo ends.")
    return runs


def find_run(name: str | None) -> Path:
    """A file's name or a number of the list, 1 being the latest; None is 1.

    Raises:
        DataError: nothing has been kept yet.
        UsageError: the list is shorter.
    """
    if name is not None and (not name.isdecimal() or exists(Path(name))):
        return Path(name)
    runs = kept_runs()
    number = int((name or "1")[:9])  # of more digits is none
    if not 1 <= number <= len(runs):
        raise UsageError(f"There is no run {name}: `pocketmoe stats --list` has 1 to {len(runs)}.")
    return runs[number - 1]
