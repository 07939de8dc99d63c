"""The report of a run on a terminal or in a pipe, with the disk's peak measured on the way."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..offload.errors import PocketMoEError
from .console import may_style

if TYPE_CHECKING:
    from ..cache.sections import Section
    from ..cache.stats import RunStats

MOST_COLUMNS = 120
"""Wider lines are hard to follow."""


def report_of(stats: RunStats) -> dict[str, Any]:
    """The report's data. Reads from the run's store for half a second, if it is still there."""
    from ..cache.report import report
    from ..offload.disk_speed import measure_disk
    from ..offload.replaying import native_replayer

    try:
        disk = measure_disk(Path(stats.store)) if stats.store and stats.total("bytes_read") else None
    except PocketMoEError:
        disk = None  # the store has been moved or deleted since: the report says that the peak was not measured
    return report(stats, disk, replayer=native_replayer())


def show_live_report(stats: RunStats, stream: TextIO) -> None:
    """Print the whole report of a model that is loaded. The disk's peak is not measured: its buffers would come on top
    of the memory budget."""
    from ..cache.report import report
    from ..cache.sections import sections
    from ..offload.replaying import native_replayer

    show_sections(sections(report(stats, replayer=native_replayer())), stream)


def show_sections(sections: Sequence[Section], stream: TextIO) -> None:
    """Print them to `stream`, in colour where that can be shown."""
    from ..cache.report_text import as_text

    width = shutil.get_terminal_size((80, 24)).columns if stream.isatty() else 80
    coding = (getattr(stream, "encoding", None) or "ascii").lower()
    text = as_text(sections, min(width, MOST_COLUMNS), may_style(stream), not coding.startswith("utf"))
    print(text, file=stream, flush=True)
