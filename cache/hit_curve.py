"""Hit rates to expect of a number of slots, before a model has run: curves whose origin is named.

A curve is a share of hits over a share of slots. Slots count from one cycle (layers x top-k), where a cache begins to
be worth something, to all experts; below a cycle the share of hits falls to 0 in proportion.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple


class HitCurve(NamedTuple):
    """`points`: slots beyond one cycle as a share of the experts beyond one cycle, and the share of hits; to (1, 1)."""

    name: str
    origin: str
    points: tuple[tuple[float, float], ...]

    def hits(self, slots: float, cycle: int, experts: int) -> float:
        """The share of requests that find their expert among `slots` of `experts`."""
        if slots >= experts:
            return 1.0
        at_cycle = self.points[0][1]
        if slots <= cycle:
            return max(slots, 0) / cycle * at_cycle
        share = (slots - cycle) / (experts - cycle)
        shares = [point[0] for point in self.points]
        right = bisect_right(shares, share)
        (x0, y0), (x1, y1) = self.points[right - 1], self.points[right]
        return y0 + (y1 - y0) * (share - x0) / (x1 - x0)


def _beyond_cycle(rates: dict[float, float], cycle: float) -> tuple[tuple[float, float], ...]:
    """The points of a curve from hit rates by share of all experts, the first of them at a cycle."""
    return (*(((share - cycle) / (1 - cycle), rate) for share, rate in rates.items()), (1.0, 1.0))


RECORDED = HitCurve(
    "gpt-oss-20b",
    "decodes of gpt-oss-20b, replayed with the policy forecast",
    # pocketmoe replay held-out.npz --warm --policy forecast --slots ..., see docs/notes/cache-policies.md
    _beyond_cycle(
        {
            0.125: 0.424,
            0.15: 0.489,
            0.20: 0.589,
            0.25: 0.674,
            0.30: 0.742,
            0.40: 0.845,
            0.50: 0.912,
            0.60: 0.953,
            0.80: 0.990,
        },
        0.125,
    ),
)


def even_hits(slots: float, experts: int) -> float:
    """The share of hits when every expert is as likely as any other at every token: the worst that routing can do."""
    return min(max(slots, 0) / experts, 1.0)
