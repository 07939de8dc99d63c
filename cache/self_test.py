"""Whether something that can be switched is worth it: tried on and off in turns, and kept the quicker way.

Used for prefetch, which saves waiting where the disk has time to spare, and costs it where the disk is the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, median
from typing import NamedTuple


class _Token(NamedTuple):
    on: bool
    seconds: float
    missing: int


class SelfTest:
    """Tokens are timed by the caller, so that it may count what it likes: time passes only in `step`.

    A test is a few periods in the order on, off, off, on, so that what changes slowly counts for both sides. What a
    token takes is corrected by how many experts it was missing. One test of a few dozen tokens tells little, so what
    the tests have found is averaged: the surer ones count more, old ones less, and one that cannot be squared with
    those before it begins anew. It stays the quicker way by that. As tests agree, they become rarer, soon where the
    difference is clear.
    """

    period = 8
    """Tokens; the first of each is not counted, because it finds what the period before has left."""
    turns = (True, False, False, True)
    margin = 0.01
    """The other way has to be quicker by this, and by the error of what is known, to be taken instead."""
    first, rest, sure_rest, most_rest = 64, 32, 256, 4096
    """Tokens before the first test, after one, after one that leaves no doubt, and the longest."""
    memory = 0.9
    """What a test still counts after the next one."""
    doubt = 0.1
    """What it may well save or cost, as a share of a token's time, before the first test."""

    def __init__(self) -> None:
        self._on = True
        self._rest = self.rest
        self._left = self.first
        self._test: list[_Token] = []
        self._testing = False
        self._at = 0
        self._weight = self.doubt**-2  # of what is known: one over its squared error
        self.tests = 0
        self.gain: float | None = None
        """Share of a token's time that being on saves, by all tests; negative where it costs."""

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
        gain, error = _saved(self._test)
        known = self.gain or 0.0
        if (gain - known) ** 2 > 9 * (error**2 + 1 / self._weight):  # times have changed
            known, self._weight = 0.0, self.doubt**-2
        before, weight = self._weight * self.memory, 1 / max(error, 1e-3) ** 2
        self._weight = before + weight
        self.gain = (before * known + weight * gain) / self._weight
        self.tests += 1
        was, off_by = self._on, self._weight**-0.5
        if abs(self.gain) > max(self.margin, off_by):
            self._on = self.gain > 0
        if self._on is not was:
            self._rest = self.rest
        elif abs(self.gain) > 2 * off_by:
            self._rest = min(max(2 * self._rest, self.sure_rest), self.most_rest)
        else:
            self._rest = min(self._rest + self.rest, self.most_rest)
        self._left = self._rest

    @property
    def state(self) -> str | None:
        """A sentence for the report; None before the first test."""
        if self.gain is None:
            return None
        times = f"{self.tests} test{'' if self.tests == 1 else 's'} on and off"
        share = round(100 * abs(self.gain))
        found = (
            f"{share} % of a token's time {'saved' if self.gain >= 0 else 'lost'} by it" if share else "no difference"
        )
        return f"{'On' if self._on else 'Switched itself off'} after {times}: {found}."


def _saved(tokens: Sequence[_Token]) -> tuple[float, float]:
    """The share of a token's time that being on saves, and the error of that."""
    most = 3 * median(token.seconds for token in tokens)  # whatever else the machine has done in between
    tokens = [token._replace(seconds=min(token.seconds, most)) for token in tokens]
    slope = _seconds_per_missing(tokens)
    mean = fmean(token.missing for token in tokens)
    on, off = (
        [token.seconds - slope * (token.missing - mean) for token in tokens if token.on is way] for way in (True, False)
    )
    usual = fmean(off)
    if usual <= 0:
        return 0.0, 1.0
    return (usual - fmean(on)) / usual, sqrt(_variance(on) / len(on) + _variance(off) / len(off)) / usual


def _seconds_per_missing(tokens: Sequence[_Token]) -> float:
    """By least squares, of tokens with others of the same way; never below 0."""
    common = spread = 0.0
    for way in (True, False):
        same = [token for token in tokens if token.on is way]
        x, y = fmean(token.missing for token in same), fmean(token.seconds for token in same)
        spread += sum((token.missing - x) ** 2 for token in same)
        common += sum((token.missing - x) * (token.seconds - y) for token in same)
    return max(0.0, common / spread) if spread else 0.0


def _variance(values: Sequence[float]) -> float:
    mean = fmean(values)
    return sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
