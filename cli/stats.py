"""`pocketmoe stats`: the report on a chat, run or demo, the list of past ones, and two of them compared."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..offload.errors import DataError, UsageError
from .console import say
from .kept_runs import find_run, kept_runs
from .report import report_of, show_sections

if TYPE_CHECKING:
    from ..cache.stats import RunStats


def stats(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="A number of --list, or a file. Default: the latest.",
            show_default=False,
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the runs that were kept.")] = False,
    against: Annotated[
        str | None, typer.Option(metavar="RUN2", help="Compare with another run.", show_default=False)
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as one HTML file.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say where the time of a run went, and what would make it faster."""
    from ..cache.past_runs import comparison, listing
    from ..cache.report import report
    from ..cache.sections import sections

    if list_:
        if run is not None or against is not None or html is not None:
            raise UsageError("--list goes with --json only.")
        entries = list_of_runs()
        if json:
            print(jsonlib.dumps({"format": "pocketmoe-runs", "version": 1, "runs": entries}, ensure_ascii=False))
        else:
            show_sections(listing(entries), sys.stdout)
        return
    found = load_run(find_run(run))
    if against is None:
        data = report_of(found)
        shown = sections(data)
    else:
        both = report(found, replays=False), report(load_run(find_run(against)), replays=False)
        data = {"format": "pocketmoe-comparison", "version": 1, "run": both[0], "against": both[1]}
        shown = comparison(*both)
    if html is not None:
        from ..cache.report_html import as_html

        try:
            html.write_text(as_html(shown), encoding="utf-8")
        except OSError as error:
            raise DataError(f"{html} can not be written: {error.strerror or error}.") from None
        say(f"The report is in {html}.")
    if json:
        print(jsonlib.dumps(data, ensure_ascii=False, allow_nan=False))
    elif html is None:
        show_sections(shown, sys.stdout)


def load_run(path: Path) -> RunStats:
    """Raises DataError when `path` cannot be read or holds something else."""
    from ..cache.stats import RunStats

    try:
        return RunStats.load(path)
    except OSError as error:
        raise DataError(f"{path} can not be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise DataError(str(error)) from None


def list_of_runs() -> list[dict[str, object]]:
    """What there is to say in a line of each run, the latest first; a damaged file is passed over, and it says so."""
    from ..cache.past_runs import entry

    entries = []
    for number, path in enumerate(kept_runs(), 1):
        try:
            entries.append(entry(number, str(path), load_run(path)))
        except DataError as error:
            say(str(error))
    return entries
