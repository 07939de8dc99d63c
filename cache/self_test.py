"""Whether something that can be switched is worth it: tried on and off in turns, and kept the quicker way.

Used for prefetch, which saves waiting where the disk has time to spare, and costs it where the disk is the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import fmean
from typing import NamedTuple


class _Token(NamedTuple):
    on: bool
    seconds: float
    missing: int


class SelfTest:
    """Tokens are timed by the caller, so that it may count what it likes: time passes only in `step`.

    A test is a few periods in the order on, off, off, on, so that what changes slowly counts for both sides. What a
    token takes is corrected by how many experts it was missing. Then it stays the quicker way; the other one has to
    be quicker by `margin`, and by twice the error of the measurement, to be taken instead. As long as tests agree,
    they become rarer.
    """

    period = 8
    """Tokens; the first of each is not counted, because it finds what the period before has left."""
    turns = (True, False, False, True)
    margin = 0.03
    first, rest, most_rest = 64, 256, 4096
    """Tokens before the first test, after one, and after one the longest."""

    def __init__(self) -> None:
        self._on = True
        self._rest = self.rest
        self._left = self.first
        self._test: list[_Token] = []
        self._testing = False
        self._at = 0
        self.tests = 0
        self.gain: float | None = None
        """Of the latest test: share of a token's time that being on saves; negative where it costs."""

    @property
    def on(self) -> bool:
        """Whether it is on for the next token."""
        return self.turns[self._at // self.period] if self._testing else self._on

    def step(self, seconds: float, missing: int) -> None:
        """A token took that long. `missing` of its experts were not in memory when it would have needed them; tokens
        that miss nothing do not count as rest, because there is nothing to be tested."""
        if not self._testing:
            self._left -= missing > 0
            if self._left <= 0:
                self._testing, self._at, self._test = True, 0, []
            return
        if self._at % self.period:
            self._test.append(_Token(self.on, seconds, missing))
        self._at += 1
        if self._at == self.period * len(self.turns):
            self._testing = False
            self._judge()

    def _judge(self) -> None:
        before = self._on
        corrected = _without_slope(self._test)
        on, off = (
            [s for s, token in zip(corrected, self._test, strict=True) if token.on is way] for way in (True, False)
        )
        saved = fmean(off) - fmean(on)
        error = sqrt(_variance(on) / len(on) + _variance(off) / len(off))
        self.gain = saved / fmean(off) if fmean(off) > 0 else 0.0
        clear = abs(saved) > 2 * error and abs(self.gain) > self.margin
        if clear:
            self._on = saved > 0
        self._rest = min(2 * self._rest, self.most_rest) if self._on is before else self.rest
        self._left = self._rest
        self.tests += 1

    @property
    def state(self) -> str | None:
        """A sentence for the report; None before the first test."""
        if self.gain is None:
            return None
        times = f"{self.tests} test{'' if self.tests == 1 else 's'} on and off"
        share = f"{100 * abs(self.gain):.0f} %"
        found = f"{share} of a token's time {'saved' if self.gain >= 0 else 'lost'} by it in the latest"
        return f"{'On' if self._on else 'Switched itself off'} after {times}: {found}."


def _without_slope(tokens: Sequence[_Token]) -> list[float]:
    """Seconds of each token as if it had missed as many experts as the mean."""
    mean_x, mean_y = fmean(token.missing for token in tokens), fmean(token.seconds for token in tokens)
    spread = sum((token.missing - mean_x) ** 2 for token in tokens)
    common = sum((token.missing - mean_x) * (token.seconds - mean_y) for token in tokens)
    slope = max(0.0, common / spread) if spread else 0.0
    return [token.seconds - slope * (token.missing - mean_x) for token in tokens]


def _variance(values: Sequence[float]) -> float:
    mean = fmean(values)
    return sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
