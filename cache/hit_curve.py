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
    "decodes of gpt-oss-20b, replayed with the policy analog",
    # docs/notes/cache-policies.md says what held-out.npz is and how it was made; the numbers are those of
    # pocketmoe replay held-out.npz --warm --policy analog --slots 12.5%,15%,20%,25%,30%,40%,50%,60%,80%
    _beyond_cycle(
        {
            0.125: 0.424,
            0.15: 0.564,
            0.20: 0.656,
            0.25: 0.727,
            0.30: 0.783,
            0.40: 0.869,
            0.50: 0.925,
            0.60: 0.959,
            0.80: 0.991,
        },
        0.125,
    ),
)


def even_hits(slots: float, experts: int) -> float:
    """The share of hits when every expert is as likely as any other at every token: the worst that routing can do."""
    return min(max(slots, 0) / experts, 1.0)
