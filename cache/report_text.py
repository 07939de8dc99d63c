"""The report as text: 80 columns are enough, and colours only repeat what characters say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import StringIO

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table as RichTable
from rich.text import Text

from .sections import Bar, HeatMap, Section, Table, printable

_GLYPHS = {"time": "█", "hit": "█", "ahead": "▓", "late": "▒", "miss": "░"}
_ASCII_GLYPHS = {"time": "#", "hit": "#", "ahead": "+", "late": "-", "miss": "."}
_COLOURS = {"time": "cyan", "hit": "green", "ahead": "blue", "late": "yellow", "miss": "red"}
_NAMES = {"hit": "hit", "ahead": "hit thanks to prefetch", "late": "late", "miss": "missed"}
_RAMP = " .:-=+*#%@"
_RAMP_COLOURS = ("default", *(f"color({n})" for n in (17, 18, 19, 20, 26, 32, 38, 44, 50)))
_LABEL = 6  # characters before a row of a heat map


def as_text(sections: Sequence[Section], width: int = 80, colour: bool = False, ascii_only: bool = False) -> str:
    """All sections, one below the other. `ascii_only` is for terminals without UTF-8."""
    out = StringIO()
    console = Console(
        file=out,
        width=max(40, width),
        color_system="256" if colour else None,
        force_terminal=colour,
        no_color=not colour,
        legacy_windows=False,
        markup=False,
        highlight=False,
        emoji=False,
        _environ={},
    )
    glyphs = _ASCII_GLYPHS if ascii_only else _GLYPHS
    for number, section in enumerate(sections):
        console.print(Group(*_section(section, console.width, glyphs, lead=number == 0)))
    text = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
    return text.encode("ascii", "replace").decode() if ascii_only else text


def _section(section: Section, width: int, glyphs: dict[str, str], lead: bool) -> Iterable[RenderableType]:
    if not lead:
        yield Text()
    yield Text(printable(section.title), style="bold")
    for i, line in enumerate(section.lines):
        yield Padding(Text(printable(line), style="bold" if lead and i == 0 else ""), (0, 0, 0, 2))
    if section.table is not None:
        yield Padding(_table(section.table, width - 2, glyphs), (0, 0, 0, 2))
    if section.heat is not None:
        yield from _heat(section.heat, width - 2)
    for line in section.notes:
        yield Padding(Text(printable(line), style="dim"), (0, 0, 0, 2))


def _table(table: Table, width: int, glyphs: dict[str, str]) -> RenderableType:
    drawn = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False, header_style="dim")
    for i, name in enumerate(table.columns):
        drawn.add_column(printable(name), justify="right" if i else "left", no_wrap=True, overflow="fold")
    widths = [max(len(cell) for cell in column) for column in zip(table.columns, *table.rows, strict=True)]
    room = min(40, width - sum(widths) - 2 * len(widths))
    if table.bars:
        drawn.add_column("", no_wrap=True)
    for i, row in enumerate(table.rows):
        cells: list[RenderableType] = [Text(printable(cell)) for cell in row]
        if table.bars:
            cells.append(_bar(table.bars[i], max(4, room), glyphs))
        drawn.add_row(*cells, style="bold" if i == table.strong else None)
    kinds = dict.fromkeys(kind for bar in table.bars for kind, _ in bar if kind in _NAMES)
    if not kinds:
        return drawn
    legend = Text("bar: ", style="dim").append("  ".join(f"{glyphs[kind]} {_NAMES[kind]}" for kind in kinds))
    return Group(drawn, legend)


def _bar(bar: Bar, room: int, glyphs: dict[str, str]) -> Text:
    """Segments rounded so that together they have the length of their sum."""
    text, share, drawn = Text(), 0.0, 0
    for kind, part in bar:
        share += part
        end = round(share * room)
        text.append(glyphs[kind] * (end - drawn), style=_COLOURS[kind])
        drawn = end
    return text


def _heat(heat: HeatMap, width: int) -> Iterable[RenderableType]:
    """A character for each expert; where they are too many for a row, for a few side by side."""
    columns = max(map(len, heat.values), default=0)
    room = width - _LABEL - 2
    per_cell = max(1, -(-columns // room))
    styles = [Style.parse(colour) for colour in _RAMP_COLOURS]
    marked = [style + Style(underline=True) for style in styles]
    segments = [Segment("  " + f"{heat.row_name:>{_LABEL - 1}} "), Segment(f"{heat.column_name}s 0 to {columns - 1}\n")]
    for row, values in enumerate(heat.values):
        segments.append(Segment(f"  {row:>{_LABEL - 1}} "))
        for first in range(0, len(values), per_cell):
            level = _level(max(values[first : first + per_cell]))
            inside = not heat.marked[row].isdisjoint(range(first, first + per_cell))
            segments.append(Segment(_RAMP[level], (marked if inside else styles)[level]))
        segments.append(Segment("\n"))
    yield Segments(segments)
    several = f"; a character stands for {per_cell} {heat.column_name}s" if per_cell > 1 else ""
    yield Padding(Text(f"from none to the most: '{_RAMP}'{several}", style="dim"), (0, 0, 0, 2))


def _level(value: float) -> int:
    """0 only for nothing at all."""
    return min(len(_RAMP) - 1, 1 + int(value * (len(_RAMP) - 1))) if value > 0 else 0
