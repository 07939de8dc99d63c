"""The report as one HTML file: no scripts, no network, nothing that is not escaped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from .sections import Bar, HeatMap, Section, Table, printable

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_KINDS = {
    "time": "time",
    "hit": "hit",
    "ahead": "hit thanks to prefetch",
    "late": "late",
    "miss": "missed",
}
_LEVELS = 10
_CELL = 8  # SVG units
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --time: #3b82c4; --hit: #3f9f5f; --ahead: #3b6fd4; --late: #d9a520;
  --miss: #cf5648; --heat: #1f6fb4; --mark: #d9730d; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
.verdict { font-weight: 600; border-left: 4px solid var(--mark); padding-left: .8rem; }
.note { opacity: .75; font-size: .9rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .1rem .8rem .1rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: normal; opacity: .75; } tr.strong { font-weight: 600; }
.bar { display: flex; width: 18rem; height: .8rem; }
.time { background: var(--time); } .hit { background: var(--hit); } .ahead { background: var(--ahead); }
.late { background: var(--late); } .miss { background: var(--miss); }
.key { display: inline-block; width: .8rem; height: .8rem; margin: 0 .3rem 0 1rem; }
svg { width: 100%; height: auto; max-width: 60rem; } svg path.cells { fill: var(--heat); }
svg path.marked { fill: none; stroke: var(--mark); stroke-width: .8; } svg text { font-size: 7px; fill: currentColor; }
""".strip()


def as_html(sections: Sequence[Section]) -> str:
    """A whole document. The first section gives its title."""
    body = "\n".join(line for number, section in enumerate(sections) for line in _section(section, number == 0))
    title = _safe(sections[0].title) if sections else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>pocketmoe: {title}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _safe(text: str) -> str:
    return escape(printable(text))


def _section(section: Section, lead: bool) -> Iterator[str]:
    tag = "h1" if lead else "h2"
    yield f"<{tag}>{_safe(section.title)}</{tag}>"
    for number, line in enumerate(section.lines):
        yield f'<p class="verdict">{_safe(line)}</p>' if lead and number == 0 else f"<p>{_safe(line)}</p>"
    if section.table is not None:
        yield from _table(section.table)
    if section.heat is not None:
        yield from _heat(section.heat)
    for line in section.notes:
        yield f'<p class="note">{_safe(line)}</p>'


def _table(table: Table) -> Iterator[str]:
    head = "".join(f"<th>{_safe(name)}</th>" for name in table.columns)
    bars = "<th></th>" if table.bars else ""
    yield f"<table>\n<thead><tr>{head}{bars}</tr></thead>\n<tbody>"
    for number, row in enumerate(table.rows):
        cells = "".join(f"<td>{_safe(cell)}</td>" for cell in row)
        bar = f"<td>{_bar(table.bars[number])}</td>" if table.bars else ""
        strong = ' class="strong"' if number == table.strong else ""
        yield f"<tr{strong}>{cells}{bar}</tr>"
    yield "</tbody>\n</table>"
    kinds = dict.fromkeys(kind for bar in table.bars for kind, _ in bar if kind != "time")
    if kinds:
        keys = "".join(f'<span class="key {kind}"></span>{_KINDS[kind]}' for kind in kinds)
        yield f'<p class="note">{keys}</p>'


def _bar(bar: Bar) -> str:
    said = ", ".join(f"{_KINDS[kind]} {share:.1%}" for kind, share in bar)
    parts = "".join(f'<span class="{kind}" style="width:{100 * share:.2f}%"></span>' for kind, share in bar if share)
    return f'<div class="bar" role="img" aria-label="{said}" title="{said}">{parts}</div>' if bar else ""


def _heat(heat: HeatMap) -> Iterator[str]:
    """Cells of one shade are one path: a map of 48 x 128 takes 100 kB, not a megabyte."""
    columns = max(map(len, heat.values), default=0)
    shades: list[list[str]] = [[] for _ in range(_LEVELS)]
    marks = []
    for row, values in enumerate(heat.values):
        for column, value in enumerate(values):
            if value > 0:
                shades[min(_LEVELS - 1, int(value * _LEVELS))].append(f"M{column * _CELL} {row * _CELL}h8v8h-8z")
            if column in heat.marked[row]:
                marks.append(f"M{column * _CELL + 1} {row * _CELL + 1}h6v6h-6z")
    label = f"{len(heat.values)} {heat.row_name}s from above, {columns} {heat.column_name}s from the left"
    wide, high = columns * _CELL, len(heat.values) * _CELL
    yield f'<svg viewBox="-24 -12 {wide + 24} {high + 12}" role="img" aria-label="{_safe(label)}">'
    yield f'<text x="0" y="-4">{_safe(heat.column_name)} 0 to {columns - 1}</text>'
    for row in range(0, len(heat.values), 4):
        yield f'<text x="-22" y="{row * _CELL + 7}">{row}</text>'
    for level, cells in enumerate(shades):
        if cells:
            yield f'<path class="cells" opacity="{(level + 1) / _LEVELS:.1f}" d="{"".join(cells)}"/>'
    if marks:
        yield f'<path class="marked" d="{"".join(marks)}"/>'
    yield "</svg>"
