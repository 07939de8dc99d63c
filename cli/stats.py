"""`pocketmoe stats`: the statistics that the last chat, run or demo has left."""

from __future__ import annotations

import json as jsonlib
from typing import Annotated

import typer

from ..offload.errors import DataError
from .console import without_controls
from .loading import last_run_path


def stats(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the statistics of the last chat, run or demo."""
    from ..cache.report import report
    from ..cache.stats import RunStats

    path = last_run_path()
    if not path.exists():
        raise DataError(f"There are no statistics yet in {path}: they are kept when a chat, run or demo ends.")
    try:
        values = RunStats.load(path).to_dict()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} can not be read ({error}); the next run writes it anew.") from None
    print(jsonlib.dumps(values, ensure_ascii=False) if json else without_controls(report(values)))
