"""The report as one HTML file: no scripts, no network, nothing that is not escaped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape

from .charts import LEVELS, curve_svg, heat_svg
from .sections import Bar, HeatMap, Section, Table, printable, unbroken

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_KINDS = {
    "wait": "waiting",
    "time": "time",
    "hit": "hit",
    "ahead": "hit thanks to prefetch",
    "late": "late",
    "miss": "missed",
}
_OPTION = re.compile(r"--[a-z-]+(?: [\w.]+)?")
_STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #f4f6f8; --text: #1b2127; --soft: #58636e; --line: #dde2e7;
  --time: #2f6fb5; --wait: #d0851b; --hit: #2f6fb5; --ahead: #62b3c6; --late: #e2b04a; --miss: #c4503b;
  --ram: #1f62ad; --disk: #c2570c; --never: #eef1f4; }
@media screen and (prefers-color-scheme: dark) { :root { --back: #14181c; --card: #1e242a; --text: #e6eaee;
  --soft: #9aa6b2; --line: #333c45; --time: #5b9be0; --wait: #e5a33d; --hit: #4c8fd8; --ahead: #7fd0df; --late: #e8c064;
  --miss: #e0705a; --ram: #62a8f5; --disk: #f08c3e; --never: #1e242a; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 3rem;
  background: var(--back); color: var(--text); }
h1 { font-size: 1rem; font-weight: 600; color: var(--soft); margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .5rem; } p { margin: .4rem 0; max-width: 46rem; }
section { margin-top: 2.4rem; break-inside: avoid; } section.map { break-inside: auto; }
.verdict { font-size: 1.35rem; line-height: 1.4; font-weight: 600; margin: 0 0 1rem; max-width: none; }
code { font: .92em ui-monospace, monospace; background: var(--card); border-radius: 4px; padding: .05em .3em;
  white-space: nowrap; }
.note { color: var(--soft); font-size: .9rem; }
dl { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; }
dl div { flex: 1 0 auto; background: var(--card); border-radius: 8px; padding: .5rem .9rem; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; font-size: 1.1rem; font-weight: 600; white-space: nowrap; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
table.bars { width: 100%; max-width: 46rem; }
th, td { padding: .16rem .9rem .16rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.bar { width: 99%; min-width: 6rem; padding-right: 0; }
th { font-weight: normal; color: var(--soft); font-size: .9rem; }
tr.strong { font-weight: 700; background: var(--card); }
.bar > div { display: flex; height: .85rem; border-radius: 2px; overflow: hidden; }
.key { display: inline-block; width: .8rem; height: .8rem; margin: 0 .35rem 0 0; vertical-align: -.08em; }
.keys > span { display: inline-block; margin-right: 1.1rem; }
.ramp { display: inline-flex; vertical-align: -.08em; } .ramp .key { margin: 0; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem;
  max-width: 58rem; margin: .6rem 0; }
svg { display: block; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; } svg.curve { width: 100%; }
svg .name, svg .now { fill: var(--text); font-weight: 600; } svg .grid { stroke: var(--line); }
svg .line { fill: none; stroke: var(--time); stroke-width: 2; } svg .point { fill: var(--time); }
svg circle.now { fill: var(--wait); stroke: var(--back); stroke-width: 2; }
svg .never { fill: var(--never); } svg .ram { stroke: var(--ram); } svg .disk { stroke: var(--disk); }
@media (max-width: 34rem) { body { font-size: 14px; } .verdict { font-size: 1.2rem; }
  td:first-child { white-space: normal; min-width: 3.4em; }
  th, td { padding-right: .5rem; } td.bar { min-width: 4.5rem; } }
@media print { body { font-size: 11px; max-width: none; padding: 0; -webkit-print-color-adjust: exact;
  print-color-adjust: exact; } svg.heat { width: 100%; height: auto; } }
""".strip()
_SOLID = tuple(round(0.14 + 0.86 * level / LEVELS, 2) for level in range(1, LEVELS + 1))
_SHADES = "\n".join(
    f".l{level} {{ opacity: {solid}; }} .key.ram.l{level} {{ background: var(--ram); }} "
    f".key.disk.l{level} {{ background: var(--disk); }}"
    for level, solid in enumerate(_SOLID, 1)
)
_FILLS = " ".join(f".{kind} {{ background: var(--{kind}); }}" for kind in _KINDS)


def as_html(sections: Sequence[Section]) -> str:
    """A whole document. The first section gives its title."""
    body = "\n".join(line for number, section in enumerate(sections) for line in _section(section, number == 0))
    title = _safe(sections[0].title) if sections else ""
    style = "\n".join((_STYLE, _FILLS, _SHADES))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>pocketmoe: {title}</title>\n<style>\n{style}\n</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _safe(text: str) -> str:
    return escape(printable(text))


def _prose(text: str) -> str:
    """With options of the command line as code."""
    return _OPTION.sub(r"<code>\g<0></code>", _safe(unbroken(text)))


def _section(section: Section, lead: bool) -> Iterator[str]:
    lines = [_prose(line) for line in section.lines]
    if lead:
        yield f"<header>\n<h1>{_safe(section.title)}</h1>"
        yield f'<p class="verdict">{lines.pop(0)}</p>' if lines else ""
    else:
        yield f"<section{' class=map' if section.heat else ''}>\n<h2>{_safe(section.title)}</h2>"
    if section.facts:
        facts = (f"<div><dt>{_safe(name)}</dt><dd>{_safe(value)}</dd></div>" for name, value in section.facts)
        yield f"<dl>{''.join(facts)}</dl>"
    yield from (f"<p{' class=note' if lead else ''}>{line}</p>" for line in lines)
    if section.curves:
        yield '<div class="curves">'
        for curve in section.curves:
            yield from curve_svg(curve)
        yield "</div>"
    if section.table is not None:
        yield from _table(section.table, with_bars=not section.curves)
    if section.heat is not None:
        yield '<div class="wide" tabindex="0">'
        yield from heat_svg(section.heat)
        yield f"</div>\n{_heat_key(section.heat)}"
    yield from (f'<p class="note">{_prose(line)}</p>' for line in section.notes)
    yield "</header>" if lead else "</section>"


def _table(table: Table, with_bars: bool) -> Iterator[str]:
    drawn = table.bars if with_bars else ()
    head = "".join(f'<th scope="col">{_safe(name)}</th>' for name in table.columns)
    kind, bars = (' class="bars"', "<th></th>") if drawn else ("", "")
    yield f'<div class="wide" tabindex="0"><table{kind}>\n<thead><tr>{head}{bars}</tr></thead>\n<tbody>'
    for number, row in enumerate(table.rows):
        cells = "".join(f"<td>{_safe(cell)}</td>" for cell in row)
        bar = f'<td class="bar">{_bar(drawn[number])}</td>' if drawn else ""
        strong = ' class="strong"' if number == table.strong else ""
        yield f"<tr{strong}>{cells}{bar}</tr>"
    yield "</tbody>\n</table></div>"
    kinds = dict.fromkeys(kind for bar in drawn for kind, _ in bar if kind not in ("gap", "time", "wait"))
    if kinds:
        keys = "".join(f'<span><i class="key {kind}"></i>{_KINDS[kind]}</span>' for kind in kinds)
        yield f'<p class="note keys">{keys}</p>'


def _bar(bar: Bar) -> str:
    said = ", ".join(f"{_KINDS[kind]} {100 * share:.1f} %" for kind, share in bar if kind != "gap")
    parts = "".join(f'<i class="{kind}" style="width:{100 * share:.2f}%"></i>' for kind, share in bar if share)
    return f'<div role="img" aria-label="{said}" title="{said}">{parts}</div>' if bar else ""


def _heat_key(heat: HeatMap) -> str:
    kinds = (
        {"ram": "in a slot at the end", "disk": "not in a slot"} if heat.resident is not None else {"ram": "asked for"}
    )

    def ramp(kind: str) -> str:
        return "".join(f'<i class="key {kind} l{level}"></i>' for level in range(1, LEVELS + 1))

    keys = "".join(
        f'<span>{name}: 1 <span class="ramp">{ramp(kind)}</span> {heat.highest:,} times</span>'
        for kind, name in kinds.items()
    )
    return f'<p class="note keys">{keys}<span><i class="key" style="background:var(--never)"></i>never</span></p>'
