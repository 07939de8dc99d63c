"""Our own eviction policy: Belady's rule on an estimate of the next use, part of which is what followed similar tokens.

A token that chooses much the same experts as an earlier one is mostly followed by what followed that one, too: analog
forecasting, as Lorenz named it in 1969. So each token is compared with the latest WINDOW, and the NEAREST vote with the
experts of their next tokens. An expert's pace, in uses per token, is what `forecast` makes of its uses alone, and VOTE
times its share of the votes; its next use is expected 1 / pace tokens after its layer's turn.

When a token is done, the next turns of all layers are estimated at once; a layer's estimates hold from its turn to its
next one. The constants were chosen on every second sequence of a collection of gpt-oss-20b routing and tested on the
others (docs/notes/cache-policies.md); none of them is critical.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections.abc import Iterator, Sequence
from math import exp, sqrt
from typing import Any

import numpy as np

from .expert import ExpertId
from .forecast import DOUBT, HALF_LIFE, SPAN
from .order import Order, Ranked

WINDOW, NEAREST, VOTE = 512, 8, 2.0  # tokens, tokens, uses per token where all agree
COMPARED = 128  # experts of a token, at most
AFTER = np.arange(2, 6)  # which tokens after a similar one vote: the first after it is like the one that comes now
WEIGHTS = 0.5 ** np.arange(len(AFTER))
FADE = 2.0 ** (-1 / HALF_LIFE)
ROOM = 512  # columns that are added at once
INSTANT = 1e-6  # tokens between two requests: no two are at the same time
Array = np.ndarray[Any, Any]
Turn = tuple[float, "array[float]"]
"""A token, and by column how soon after it each expert is expected: minus the tokens until then."""


class Lookback:
    """The experts of the latest tokens, and what came after those that were most like the last.

    An expert is a column number, from 1; 0 is none. `cycle`: the experts of one token.
    """

    def __init__(self, cycle: int) -> None:
        self._chosen = np.zeros((WINDOW, cycle), np.intp)  # a ring
        self._used = np.zeros((0, WINDOW), np.uint8)  # the same by expert: 1 where it was chosen
        self._tokens = 0
        self._stride = -(-cycle // COMPARED) or 1
        sharpness = 2.0 / sqrt(cycle // self._stride or 1)  # overlaps spread like the root of what can overlap
        self._weights = np.array([exp(-sharpness * fewer) for fewer in range(COMPARED + 1)])

    def shares(self, chosen: Array, columns: int) -> Array:
        """A token has chosen these: each expert's share, 0 to 1, of the votes for what comes after the next one."""
        self._add(chosen, columns)
        now = (self._tokens - 1) % WINDOW
        likeness = self._used[chosen[:: self._stride]].sum(axis=0, dtype=np.uint16)
        likeness[[now, now - 1]] = 0  # nothing that votes has come after them
        nearest = np.argsort(likeness, kind="stable")[-NEAREST:]
        alike = likeness[nearest]
        weights = self._weights[alike[-1] - alike] * (alike > 0)
        known = ((now - nearest) % WINDOW)[:, None] >= AFTER
        votes = weights[:, None] * WEIGHTS * known
        voters = self._chosen[(nearest[:, None] + AFTER) % WINDOW]
        total = votes.cumsum()[-1]  # in this order, as `Lookback` in csrc/analog.h has it
        each = np.repeat(votes / max(total, 1e-9), self._chosen.shape[1])
        return np.bincount(voters.ravel(), each, columns)

    def _add(self, chosen: Array, columns: int) -> None:
        if columns > len(self._used):
            self._used = np.concatenate([self._used, np.zeros((columns - len(self._used), WINDOW), np.uint8)])
        now = self._tokens % WINDOW
        self._used[self._chosen[now], now] = 0
        self._chosen[now] = 0
        self._chosen[now, : len(chosen)] = chosen
        self._used[chosen, now] = 1
        self._tokens += 1


class Estimates:
    """How soon each expert is expected to be used. Experts are numbered as they come: their columns, from 1."""

    def __init__(self, cycle: int) -> None:
        self.experts = [ExpertId(-1, -1)]  # by column; 0 is none
        self.columns: dict[ExpertId, int] = {}
        self.now: Turn = 0.0, array("d")  # for who is not chosen in this token
        self._chosen = array("d")  # the same for who is
        self._used: list[int] = []  # in this token
        self._cycle = cycle
        self._lookback = Lookback(cycle)
        self._count = self._last = np.zeros(0)  # decayed uses, and the token of the last one

    def use(self, experts: Sequence[ExpertId]) -> Turn:
        """These are chosen in this token. Returns the token."""
        (_, soon), chosen, used, columns = self.now, self._chosen, self._used, self.columns
        for expert in experts:
            column = columns[expert]
            soon[column] = INSTANT * len(used) + chosen[column]
            used.append(column)
        return self.now

    def end_token(self) -> None:
        chosen, token = np.array(self._used, np.intp), self.now[0]
        votes = 0.0
        if 0 < len(chosen) <= self._cycle:  # more are those of a prompt, which is like no token
            votes = VOTE * self._lookback.shares(chosen, len(self._count))
        self._count *= FADE
        self._count[chosen] += 1.0
        self._last[chosen] = token + INSTANT * np.arange(len(chosen))
        later = self._count * FADE + DOUBT
        self._chosen = _soon((later + 1.0) / SPAN + votes)
        self.now = token + 1.0, _soon(later / (SPAN * np.sqrt(token + 2.0 - self._last)) + votes)
        self._used = []

    def number(self, expert: ExpertId) -> int:
        """A column for an expert that was never used."""
        if len(self.experts) >= len(self._count):
            size = len(self._count) + ROOM
            for soon, unused in (self.now[1], -1e6), (self._chosen, -1.0 / ((1.0 + DOUBT) / SPAN)):
                soon.extend([unused] * (size - len(soon)))  # what an interruption left is made whole
            new = np.zeros(ROOM), np.full(ROOM, -1e6)
            self._count, self._last = map(np.concatenate, zip((self._count, self._last), new, strict=True))
        self.experts.append(expert)
        self.columns[expert] = column = len(self.experts) - 1
        return column


def _soon(paces: Array) -> array[float]:
    """Uses per token as minus the tokens until the next. An array, because a list of floats takes longer to make."""
    return array("d", (-1.0 / paces).tobytes())


class Analog(Order[list[int]]):
    """The expert whose next use is expected last leaves first: of each layer as its latest turn expected it."""

    def __init__(self, capacity: int = 0, cycle: int = 0) -> None:
        super().__init__()  # a layer is a list of columns
        self._estimates = Estimates(cycle)
        self._turns: dict[int, Turn] = {}  # each layer's latest
        self._unsorted: set[int] = set()

    def insert(self, expert: ExpertId) -> None:
        layer, estimates = expert[0], self._estimates
        column = estimates.columns.get(expert) or estimates.number(expert)
        turn = estimates.use((expert,))
        if self._turns.get(layer) is not turn:
            self._turn(layer, turn)
        if layer in self._unsorted:
            self._layers.setdefault(layer, []).append(column)
        else:
            insort(self._layers[layer], column, key=turn[1].__getitem__)

    def touch(self, experts: Sequence[ExpertId]) -> None:
        if experts:
            self._turn(experts[0][0], self._estimates.use(experts))

    def remove(self, expert: ExpertId) -> None:
        self._layers[expert[0]].remove(self._estimates.columns[expert])
        self.stale.add(expert[0])

    def resize(self, capacity: int) -> None:
        pass

    def tick(self) -> None:
        self._estimates.end_token()

    def _turn(self, layer: int, turn: Turn) -> None:
        self._turns[layer] = turn
        self._unsorted.add(layer)
        self.stale.add(layer)

    def _of_layer(self, layer: int) -> Iterator[Ranked]:
        (token, soon), order, experts = self._turns[layer], self._layers[layer], self._estimates.experts
        if layer in self._unsorted:
            order.sort(key=soon.__getitem__)
            self._unsorted.remove(layer)
        for column in order:
            yield experts[column], soon[column] - token
