"""Our own eviction policy: Belady's rule on an estimate of the next use, part of which is what followed similar tokens.

A token that chooses much the same experts as an earlier one is mostly followed by what followed that one, too: analog
forecasting, as Lorenz named it in 1969. So at each layer's turn the present token is compared with the latest WINDOW:
by what it has chosen so far, which counts twice, and where it has not chosen yet by what the token before it chose. The
NEAREST vote with the experts that the layer chose in their next tokens. An expert's pace, in uses per token, is what
`forecast` makes of its uses alone, and VOTE times its share of the votes; its next use is expected 1 / pace tokens
after its layer's turn, and the estimates hold until the next one.

The constants were chosen on every second sequence of a collection of gpt-oss-20b routing and tested on the others
(docs/notes/cache-policies.md); none of them is critical.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import exp, inf, sqrt
from typing import Any

import numpy as np

from .expert import ExpertId
from .forecast import DOUBT, HALF_LIFE, SPAN
from .order import Order, Ranked

WINDOW, NEAREST, VOTE = 512, 8, 2.0  # tokens, tokens, uses per token where all agree
AHEAD = 4  # tokens after a similar one that vote, each half as much as the one before
SHARPNESS = 1.5  # of the weights, by experts in common
UNIT = 1 << 20  # a vote of the nearest: votes are whole numbers, which add up to the same in any order
NEVER = -1e6
INSTANT = 1e-6  # tokens between two requests: no two are at the same time
Array = np.ndarray[Any, Any]
_EXPERT = np.dtype([("rank", float), ("uses", float), ("last", float), ("share", float), ("used", np.uint8, (WINDOW,))])


class Analog(Order["_Layer"]):
    """The expert whose next use is expected last leaves first: of each layer as its latest turn expected it."""

    def __init__(self, capacity: int = 0, cycle: int = 0) -> None:
        super().__init__()
        self.estimates = Estimates(cycle, self._layers)

    def insert(self, expert: ExpertId) -> None:
        layer, index = expert
        if self.estimates.use(layer, (index,)):
            self.stale.add(layer)

    def touch(self, experts: Sequence[ExpertId]) -> None:
        if experts:
            layer = experts[0][0]
            self.estimates.use(layer, [index for _, index in experts])
            self.stale.add(layer)

    def remove(self, expert: ExpertId) -> None:
        self.estimates.leave(*expert)
        self.stale.add(expert[0])

    def resize(self, capacity: int) -> None:
        pass

    def tick(self) -> None:
        self.estimates.tick()

    def _of_layer(self, layer: int) -> Iterator[Ranked]:
        place = self.estimates.after(layer)
        while place is not None:
            index, rank = place
            yield ExpertId(layer, index), rank
            place = self.estimates.after(layer, index)


class Estimates:
    """When each resident is expected to be used next: its rank is minus that token. Experts are indices of a layer.

    Args:
        cycle: experts of one token. Tokens with more are those of a prompt, which is like no token.
        layers: those who have had residents; none yet.
    """

    def __init__(self, cycle: int, layers: dict[int, _Layer]) -> None:
        self._cycle = cycle
        self._sharpness = SHARPNESS / sqrt(max(cycle, 1))  # overlaps spread like the root of what can overlap
        self._layers = layers
        self._likeness = np.zeros(WINDOW, np.uint16)  # experts in common with each of the latest tokens
        self._tokens = 0  # that were remembered
        self._token, self._used = 0.0, 0  # the present one, and how many experts it has used

    def use(self, layer: int, experts: Sequence[int]) -> bool:
        """These distinct experts, at least one, are chosen in this token, and resident. Whether that began the layer's
        turn, which gives all its residents new ranks."""
        of, token = self._layers.get(layer) or self._layers.setdefault(layer, _Layer()), self._token
        of.make_room(max(experts) + 1)
        known = of.experts
        begins = of.turn != token
        if begins:  # the layer counts with what it chooses in this token, no longer with what it chose in the last
            self._likeness -= of.then
            known["uses"] *= 2.0 ** ((of.turn - token) / HALF_LIFE)
            of.turn = token
        chosen = [expert for expert in experts if known["last"][expert] < token]
        alike = known["used"][chosen].sum(axis=0, dtype=np.uint16)
        of.now += alike
        self._likeness += 2 * alike
        of.chosen += chosen
        known["uses"][chosen] += 1.0
        if begins:
            self._estimate(known)
        every = list(experts)  # numpy takes a tuple for dimensions
        instants = INSTANT * np.arange(self._used, self._used + len(every))
        known["last"][every] = token + instants
        known["rank"][every] = instants - _wait(known[every], SPAN) - token
        self._used += len(every)
        return begins

    def leave(self, layer: int, expert: int) -> None:
        """It is not resident any more. Raises KeyError if it was not."""
        ranks = self._ranks(layer)
        if expert >= len(ranks) or ranks[expert] == inf:
            raise KeyError(expert)
        ranks[expert] = inf

    def after(self, layer: int, expert: int = -1) -> tuple[int, float] | None:
        """Who comes next in the order of ranks, the lowest expert first of equals, and that rank; the first of all
        where no expert is given. None after the last."""
        ranks = self._ranks(layer)
        if expert >= 0:
            earlier = (ranks < ranks[expert]) | (ranks == ranks[expert]) & (np.arange(len(ranks)) <= expert)
            ranks = np.where(earlier, inf, ranks)
        first = int(ranks.argmin()) if len(ranks) else 0
        return None if not len(ranks) or ranks[first] == inf else (first, float(ranks[first]))

    def tick(self) -> None:
        """One token is done."""
        if self._used:
            self._remember(as_token=self._used <= self._cycle)
        self._token, self._used = self._token + 1.0, 0

    def _ranks(self, layer: int) -> Array:
        return self._layers[layer].experts["rank"] if layer in self._layers else np.zeros(0)

    def _estimate(self, known: Array) -> None:
        """New shares for all, new ranks for the residents, none of them chosen."""
        votes = self._votes()
        voters = np.flatnonzero(votes)
        known["share"] = known["used"][:, voters] @ votes[voters] / max(votes.sum(), 1)
        ages = self._token - known["last"]
        ranks = -_wait(known, SPAN * np.sqrt(ages + 1.0)) - self._token
        known["rank"][:] = np.where(known["rank"] == inf, inf, ranks)

    def _votes(self) -> Array:
        """How much each of the latest tokens counts for what comes next."""
        now = self._tokens % WINDOW
        order = self._likeness.astype(np.int64) * WINDOW + np.arange(WINDOW)  # of equals the one that is later in it
        order[[now, now - 1]] = 0  # nothing has come after them
        nearest = order[np.argpartition(order, -NEAREST)[-NEAREST:]].tolist()
        votes = np.zeros(WINDOW, np.int64)
        for alike, at in (divmod(token, WINDOW) for token in nearest if token >= WINDOW):
            each = round(UNIT * exp(-self._sharpness * (max(nearest) // WINDOW - alike)))
            for ahead in range(1, min(AHEAD, (now - at - 1) % WINDOW) + 1):
                votes[(at + ahead) % WINDOW] += each << (AHEAD - ahead)
        return votes

    def _remember(self, as_token: bool) -> None:
        now = self._tokens % WINDOW
        for layer in self._layers.values():
            if as_token:
                layer.experts["used"][:, now] = 0
                layer.experts["used"][layer.chosen, now] = 1
            layer.then = np.roll(layer.now, 1) if as_token else np.zeros(WINDOW, np.uint16)
            layer.now, layer.chosen = np.zeros(WINDOW, np.uint16), []
        self._likeness = sum((layer.then for layer in self._layers.values()), np.zeros(WINDOW, np.uint16))
        self._tokens += as_token


def _wait(known: Array, span: Array | float) -> Array:
    """Tokens until the next use, of which one in `span` is expected for each past one."""
    return span / (known["uses"] + DOUBT + VOTE * known["share"] * span)


class _Layer:
    """What is known of a layer's experts, by index, as far as they were used."""

    def __init__(self) -> None:
        self.experts = np.zeros(0, _EXPERT)  # `used`: 1 where one of the latest tokens has chosen it; the tokens a ring
        self.chosen: list[int] = []  # in this token
        self.now = self.then = np.zeros(WINDOW, np.uint16)  # experts in common in this token, and in the one before
        self.turn = -1.0  # the token of the latest

    def make_room(self, count: int) -> None:
        if count > len(self.experts):
            new = np.zeros(count + len(self.experts), _EXPERT)
            new["rank"], new["last"] = inf, NEVER
            new[: len(self.experts)] = self.experts
            self.experts = new
