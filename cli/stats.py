"""`pocketmoe stats`: the report on the last chat, run or demo."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..offload.errors import DataError
from .console import say
from .loading import last_run_path
from .report import report_of, show_report


def stats(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="Statistics that were kept. Default: those of the last run.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as one HTML file.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say where the time of the last chat, run or demo went, and what would make it faster."""
    from ..cache.stats import RunStats

    path = last_run_path() if run is None else run
    if run is None and not path.exists():
        raise DataError(f"There are no statistics yet in {path}: they are kept when a chat, run or demo ends.")
    try:
        found = RunStats.load(path)
    except OSError as error:
        raise DataError(f"{path} can not be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise DataError(str(error)) from None
    if html is None and not json:
        show_report(found, sys.stdout)
        return
    report = report_of(found)
    if html is not None:
        from ..cache.report_html import as_html
        from ..cache.sections import sections

        try:
            html.write_text(as_html(sections(report)), encoding="utf-8")
        except OSError as error:
            raise DataError(f"{html} can not be written: {error.strerror or error}.") from None
        say(f"The report is in {html}.")
    if json:
        print(jsonlib.dumps(report, ensure_ascii=False, allow_nan=False))
