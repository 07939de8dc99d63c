"""Our own eviction policy: Belady's rule, who is wanted last leaves first, on an estimate of the next use.

An expert was used `count` times, older uses counting half as much every HALF_LIFE tokens, and for the last time `age`
tokens ago. Its next use is expected `SPAN * sqrt(age + 1) / (count + DOUBT)` tokens after its layer's latest turn: the
more often it was used the sooner, and the longer it was not wanted the less its past says. SPAN is what one use per
token adds up to, and 4 tokens of doubt.

The estimates of a layer change at each of its turns. So that not all are computed each time, keys that stay keep
each layer in order: FADE tokens without use weigh as much as half the uses. The estimates decide between layers.

HALF_LIFE, the root and FADE were chosen on every second sequence of a collection of gpt-oss-20b routing and tested on
the others (docs/notes/cache-policies.md); none of them is critical.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf, log2, sqrt

from .expert import ExpertId
from .order import Ranked, SortedOrder

HALF_LIFE, SPAN, DOUBT = 48.0, 73.0, 0.5  # tokens, tokens, uses


def faded(count: float, age: float) -> float:
    """What is left of a decayed count of uses after `age` tokens without one."""
    return count * 2.0 ** (-age / HALF_LIFE)


def expected_wait(count: float, age: float) -> float:
    """Tokens until the next use of an expert whose decayed count is now `count`, `age` tokens after its last use."""
    return SPAN * sqrt(age + 1.0) / (count + DOUBT)


class Forecast(SortedOrder):
    """The expert whose next use is expected last leaves first."""

    FADE = 6.0  # tokens
    INSTANT = 1e-6  # tokens between two requests: no two are at the same time

    def __init__(self, capacity: int = 0, cycle: int = 0) -> None:
        super().__init__()
        self._token = self._now = 0.0
        self._uses: dict[ExpertId, tuple[float, float]] = {}  # decayed count at the last use, and when that was
        self._turn: dict[int, float] = {}  # each layer's latest token

    def insert(self, expert: ExpertId) -> None:
        self._now = now = self._now + self.INSTANT
        self._turn[expert[0]] = self._token
        self.stale.add(expert[0])  # a newcomer, too, changes the ranks of those behind it
        count, last = self._uses.get(expert, (0.0, now))
        count = 1.0 + count * 2.0 ** ((last - now) / HALF_LIFE)  # `faded`, without a call
        self._uses[expert] = count, now
        self.place(expert, log2(count) + now / self.FADE)

    def touch(self, experts: Sequence[ExpertId]) -> None:
        for expert in experts:
            self.insert(expert)

    def resize(self, capacity: int) -> None:
        pass

    def tick(self) -> None:
        self._token = self._now = self._token + 1.0

    def _of_layer(self, layer: int) -> Iterator[Ranked]:
        now, least = self._turn[layer], -inf  # ranks never fall along the order
        for expert in self._in_order(layer):
            count, last = self._uses[expert]
            age = now - last  # below 0 by instants in the token of the last use
            wait = expected_wait(faded(count, age), age)
            least = max(least, -now - wait)
            yield expert, least
