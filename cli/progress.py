"""Progress of something long on stderr: bars on a terminal, elsewhere a line for a stage that takes its time."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..cache.units import format_bytes
from .console import has_colour, has_cursor, say, without_controls

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from ..offload.source import Progress


def amount(done: float, total: float, unit: str, per_second: float | None = None) -> str:
    """Progress in words: `1.2 GB of 3.4 GB, 512 MB/s` for bytes, `12 of 240 experts` for what is counted."""
    if unit != "bytes":
        return f"{done:.0f} of {total:.0f} {unit}" if total else f"{done:.0f} {unit}"
    text = f"{format_bytes(done)} of {format_bytes(total)}" if total else format_bytes(done)
    return f"{text}, {format_bytes(per_second)}/s" if per_second else text


class StageProgress:
    """Shows `Progress` events by stage. Use as a context manager; `update` may be called from any thread.

    Without a terminal nothing is redrawn: a stage that is still going after `patience` seconds is named once.
    """

    def __init__(self, patience: float = 2.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience, self._clock = patience, clock
        self._lock = Lock()
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._named: set[str] = set()

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bars off the screen; the next update brings them back."""
        with self._lock:
            if self._bars is not None:
                self._bars.stop()
                self._bars = None
                self._tasks.clear()

    def update(self, progress: Progress) -> None:
        with self._lock:
            started = self._started.setdefault(progress.stage, self._clock())
            if has_cursor():
                self._update_bar(progress)
            elif progress.stage not in self._named and self._clock() - started >= self._patience:
                self._named.add(progress.stage)
                say(f"{progress.stage}: {amount(progress.done, progress.total, progress.unit)}")

    def notice(self, text: str) -> None:
        """One line that stays, above the bars."""
        if self._bars is None:
            say(text)
        else:
            self._bars.console.print(without_controls(text), style="dim", soft_wrap=True)

    def _update_bar(self, progress: Progress) -> None:
        if (bars := self._bars) is None:
            bars = self._bars = _bars()
            bars.start()
        total = progress.total or None
        task = self._tasks.get(progress.stage)
        if task is None:
            task = self._tasks[progress.stage] = bars.add_task(without_controls(progress.stage), total=total, amount="")
        bars.update(task, completed=progress.done, total=total)
        speed = next((shown.speed for shown in bars.tasks if shown.id == task), None)
        bars.update(task, amount=amount(progress.done, progress.total, progress.unit, speed))


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    options: dict[str, Any] = {} if has_colour() else {"color_system": None}
    console = Console(stderr=True, markup=False, highlight=False, emoji=False, **options)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[amount]}", markup=False),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        redirect_stdout=False,  # stdout belongs to the answer
    )
