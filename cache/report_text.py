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

from .sections import Bar, HeatMap, Section, Table, printable, unbroken

LEAST_COLUMNS = 80

_GLYPHS = {"gap": " ", "wait": "▓", "time": "█", "hit": "█", "ahead": "▓", "late": "▒", "miss": "░"}
_ASCII_GLYPHS = {"gap": " ", "wait": "▓", "time": "#", "hit": "#", "ahead": "+", "late": "-", "miss": "."}
_COLOURS = {
    "gap": "",
    "wait": "yellow",
    "time": "cyan",
    "hit": "green",
    "ahead": "blue",
    "late": "yellow",
    "miss": "red",
}
_NAMES = {"hit": "hit", "ahead": "hit thanks to prefetch", "late": "late", "miss": "missed"}
_RAMP = " .:-=+*#%@"
_RAMP_COLOURS = ("default", *(f"color({n})" for n in (17, 18, 19, 20, 26, 32, 38, 44, 50)))
_LABEL = 6  # characters before a row of a heat map


def as_text(sections: Sequence[Section], width: int = 80, colour: bool = False, ascii_only: bool = False) -> str:
    """All sections, one below the other. `ascii_only` is for terminals without UTF-8.

    A narrower terminal than of LEAST_COLUMNS breaks the lines: numbers that were cut off would be wrong ones.
    """
    out = StringIO()
    console = Console(
        file=out,
        width=max(LEAST_COLUMNS, width),
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
        console.print(Group(*_section(section, console.width, glyphs, colour, lead=number == 0)))
    text = "\n".join(line.rstrip() for line in out.getvalue().replace("\N{NO-BREAK SPACE}", " ").splitlines())
    return text.encode("ascii", "replace").decode() if ascii_only else text


def _section(
    section: Section, width: int, glyphs: dict[str, str], colour: bool, lead: bool
) -> Iterable[RenderableType]:
    if not lead:
        yield Text()
    yield Text(printable(section.title), style="bold")
    for i, line in enumerate(section.lines):
        yield _prose(line, "bold" if lead and i == 0 else "")
        if i == 0 and section.facts:
            yield _prose(", ".join(f"{name} {value}" for name, value in section.facts))
    if section.table is not None:
        yield Padding(_table(section.table, width - 2, glyphs), (0, 0, 0, 2))
    if section.heat is not None:
        yield from _heat(section.heat, width - 2, colour)
    for line in section.notes:
        yield _prose(line, "dim")


def _prose(text: str, style: str = "") -> RenderableType:
    return Padding(Text(unbroken(printable(text)), style=style), (0, 0, 0, 2))


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


def _heat(heat: HeatMap, width: int, colour: bool) -> Iterable[RenderableType]:
    """A character for each expert, layers one way and experts the other, the longer one across; where they are too
    many for a row, a character for a few side by side."""
    layers, experts = len(heat.counts), max(map(len, heat.counts))
    across = layers > experts
    columns, rows = (layers, experts) if across else (experts, layers)
    room = width - _LABEL - 2
    per_cell = max(1, -(-columns // room))
    styles = [Style.parse(colour) for colour in _RAMP_COLOURS]
    held = [style + Style(underline=True) for style in styles]
    down_name, across_name = ("expert", "layer") if across else ("layer", "expert")
    segments = [Segment(f"  {down_name:>{_LABEL - 1}} "), Segment(f"{across_name}s 0 to {columns - 1}\n")]
    for row in range(rows):
        segments.append(Segment(f"  {row:>{_LABEL - 1}} "))
        for first in range(0, columns, per_cell):
            group = range(first, min(columns, first + per_cell))
            cells = [(column, row) if across else (row, column) for column in group]
            level = heat.level(max(heat.counts[layer][expert] for layer, expert in cells), len(_RAMP) - 1)
            inside = heat.resident is not None and any(expert in heat.resident[layer] for layer, expert in cells)
            segments.append(Segment(_RAMP[level], (held if inside else styles)[level]))
        segments.append(Segment("\n"))
    yield Segments(segments)
    several = f"; a character stands for {per_cell} {across_name}s" if per_cell > 1 else ""
    underlined = "; underlined: in a slot at the end" if colour and heat.resident is not None else ""
    key = f"from never to most often: '{_RAMP}'{several}{underlined}"
    yield _prose(key, "dim")
