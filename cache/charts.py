"""The map of experts and curves as SVG, in pixels, with titles that a pointer or a screen reader finds without scripts.

Colours come from classes: a style sheet says what they are in a light and in a dark scheme.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from .sections import Curve, HeatMap, printable

LEVELS = 8
MOST_WIDTH, CELLS = 850, (6, 18)
"""Of a map, and the least and the most of a cell: a map that is wider still scrolls."""
_LEFT, _TOP = 42, 34
_TICKS = 8  # rows or columns from one number to the next
_WIDTH, _HEIGHT = 380, 210
_FRAME = (46, 26, 364, 172)  # left, top, right, bottom of a curve's plot


def heat_svg(heat: HeatMap) -> Iterator[str]:
    """Layers one way and experts the other, the longer one across. A layer's cells are a path for each level."""
    layers, experts = len(heat.counts), max(map(len, heat.counts))
    across = layers > experts  # whether layers are columns
    columns, rows = (layers, experts) if across else (experts, layers)
    cell = max(CELLS[0], min(CELLS[1], MOST_WIDTH // columns))
    wide, high = _LEFT + columns * cell, _TOP + rows * cell
    yield f'<svg class="heat" width="{wide}" height="{high}" viewBox="0 0 {wide} {high}" role="img">'
    yield f"<title>{layers} layers with {experts} experts each, darker where they were asked for more often</title>"
    across_name, down_name = ("layer", "expert") if across else ("expert", "layer")
    yield f'<text x="{_LEFT}" y="12">{across_name} →</text>'
    yield f'<text x="12" y="{_TOP}" text-anchor="end" transform="rotate(-90 12 {_TOP})">← {down_name}</text>'
    for column in range(0, columns, _TICKS if columns > 16 else 1):
        yield f'<text x="{_LEFT + column * cell + cell / 2:g}" y="28" text-anchor="middle">{column}</text>'
    for row in range(0, rows, _TICKS if rows > 16 else 1):
        yield f'<text x="{_LEFT - 5}" y="{_TOP + row * cell + cell / 2 + 4:g}" text-anchor="end">{row}</text>'
    yield f'<path class="never" d="M{_LEFT} {_TOP}h{columns * cell}v{rows * cell}h-{columns * cell}z"/>'
    yield f'<g stroke-width="{cell - 1}">'
    for layer, counts in enumerate(heat.counts):
        along, shift = layer * cell + (cell - 1) / 2, f"v{cell - 1}" if across else f"h{cell - 1}"
        x, y = (_LEFT + along, _TOP) if across else (_LEFT, _TOP + along)
        yield f'<g transform="translate({x:g} {y:g})"><title>{escape(_layer_title(heat, layer))}</title>'
        paths: dict[str, list[str]] = {}
        for expert, count in enumerate(counts):
            if level := heat.level(count, LEVELS):
                disk = heat.resident is not None and expert not in heat.resident[layer]
                at = f"0 {expert * cell}" if across else f"{expert * cell} 0"
                paths.setdefault(f"{'disk' if disk else 'ram'} l{level}", []).append(f"M{at}{shift}")
        yield from (f'<path class="{kind}" d="{"".join(parts)}"/>' for kind, parts in paths.items())
        yield "</g>"
    yield "</g></svg>"


def _layer_title(heat: HeatMap, layer: int) -> str:
    counts = heat.counts[layer]
    most = sorted(range(len(counts)), key=lambda expert: -counts[expert])[:3]
    held = f", {len(heat.resident[layer])} in a slot at the end" if heat.resident else ""
    used = ", ".join(f"{expert} ({counts[expert]:,})" for expert in most)
    return f"layer {layer}: {sum(map(bool, counts))} of {len(counts)} experts asked for{held}; most often {used}"


def curve_svg(curve: Curve) -> Iterator[str]:
    """From 0 to 100 % across, from 0 up. Points carry titles; the present one is labelled."""
    left, top, right, bottom = _FRAME
    highest, step = _scale([y for _, y in curve.points])

    def place(x: float, y: float) -> tuple[float, float]:
        return round(left + x * (right - left), 1), round(bottom - y / highest * (bottom - top), 1)

    yield f'<svg class="curve" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
    said = "; ".join(f"{where}: {value}" for where, value in zip(curve.places, curve.values, strict=True))
    yield f"<title>{_safe(curve.title)} by share of the experts that fit. {_safe(said)}</title>"
    yield f'<text x="{left}" y="13" class="name">{_safe(curve.title)}</text>'
    for line in range(round(highest / step) + 1):
        _, y = place(0, line * step)
        yield f'<path class="grid" d="M{left} {y}H{right}"/>'
        yield f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{line * step:g}</text>'
    for percent in (0, 25, 50, 75, 100):
        x, _ = place(percent / 100, 0)
        yield f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{percent}</text>'
    yield f'<text x="{right}" y="{_HEIGHT - 5}" text-anchor="end">share of the experts that fit, %</text>'
    places = [place(x, y) for x, y in curve.points]
    yield f'<path class="line" d="M{"L".join(f"{x} {y}" for x, y in places)}"/>'
    for i, (x, y) in enumerate(places):
        kind, radius = ("point now", 5) if i == curve.at else ("point", 3)
        title = f"<title>{_safe(curve.places[i])}: {_safe(curve.values[i])}</title>"
        yield f'<circle class="{kind}" cx="{x}" cy="{y}" r="{radius}">{title}</circle>'
    x, y = places[curve.at]
    rising = curve.points[-1][1] > curve.points[0][1]
    after = x < (left + right) / 2 or (not rising and x < right - 70)
    x, y = x + (9 if after else -9), y + (16 if rising and after else -8)
    said = f"now {_safe(curve.values[curve.at])}"
    yield f'<text class="now" x="{x}" y="{y}" text-anchor="{"start" if after else "end"}">{said}</text>'
    yield "</svg>"


def _scale(values: Sequence[float]) -> tuple[float, float]:
    """The highest number of an axis and the step between its numbers, 1, 2 or 5 times a power of ten."""
    most = max(*values, 1e-9)
    power = 10.0
    while power > most / 2:
        power /= 10
    while most / power > 20:
        power *= 10
    step = next(power * factor for factor in (1, 2, 5, 10) if most / (power * factor) <= 5)
    return step * -(-most // step), step


def _safe(text: str) -> str:
    return escape(printable(text))
