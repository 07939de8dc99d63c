"""`pocketmoe doctor`: what of this machine stands in the way, and what mends it."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated

import typer

from .console import without_controls

if TYPE_CHECKING:
    from ..offload.doctor import Row

SCHEMA_VERSION = 1
_WIDTH, _INDENT = 80, 18


def examine(store: Path | None) -> list[Row]:
    """`pocketmoe.offload.doctor.examine`, imported late because it brings torch."""
    from ..offload.doctor import examine

    return examine(store)


def doctor(
    store: Annotated[
        Path | None,
        typer.Argument(metavar="STORE", help="Also measure the disk that holds this store.", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this machine: torch, GPU, memory, kernels, disk.

    Each row is ok, warn (works, and could be better) or fail (something that is there cannot be used), with what mends
    it. Ends with 1 when a row failed.
    """
    rows = examine(store)
    failed = sum(row.status == "fail" for row in rows)
    if json:
        print(jsonlib.dumps({"version": SCHEMA_VERSION, "failed": failed, "rows": [row._asdict() for row in rows]}))
    else:
        print(without_controls("\n".join(as_lines(rows))))
    if failed:
        raise typer.Exit(1)


def as_lines(rows: list[Row]) -> list[str]:
    """The findings for a terminal, at most 80 columns but for commands, which stay whole to be copied."""
    lines = []
    for row in rows:
        first, *rest = wrap(row.text, _WIDTH - _INDENT, break_long_words=False, break_on_hyphens=False) or [""]
        lines += [f"{row.status:5} {row.name:12}{first}", *(" " * _INDENT + line for line in rest)]
        if row.remedy:
            lines.append(f"{'':6}{'to mend it:':12}{row.remedy}")
    counts = {status: sum(row.status == status for row in rows) for status in ("ok", "warn", "fail")}
    return [*lines, "", ", ".join(f"{count} {status}" for status, count in counts.items() if count)]
