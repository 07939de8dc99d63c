"""Our own eviction policy: Belady's rule on an estimate of the next use, part of which is what followed similar tokens.

A token that chooses much the same experts as an earlier one is mostly followed by what followed that one, too: analog
forecasting, as Lorenz named it in 1969. So at each layer's turn the present token is compared with the latest WINDOW:
by what it has chosen so far, which counts threefold, and where it has not chosen yet by what the token before it chose.
The NEAREST vote: for what this token will use in the layers that are still to come, with what they and the tokens after
them chose there; for what the next will use, each with one token later. An expert's pace, in uses per token, is what
`forecast` makes of its uses alone, and VOTE times its share of the votes; its next use is expected 1 / pace tokens
after its layer's turn. Residents are ranked anew at their layer's turn, by the votes of that moment, and once more when
they are about to leave: the layers' turns since then have brought better ones.

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
AHEAD = 6  # tokens from a similar one on that vote, each half as much as the one before
UNIT = 1 << 20  # a vote of the nearest: votes are whole numbers, which add up to the same in any order
NEVER = -1e6
Array = np.ndarray[Any, Any]
_EXPERT = np.dtype([("rank", float), ("uses", float), ("last", float), ("used", np.uint8, (WINDOW,))])


class Analog(Order["_Layer"]):
    """The expert whose next use is expected last leaves first."""

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

    def reconsider(self, expert: ExpertId) -> bool:
        changed = self.estimates.reconsider(*expert)
        if changed:
            self.stale.add(expert[0])
        return changed

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
        self._cycle = max(cycle, 1)
        self._spread = sqrt(self._cycle)  # of the experts in common: the root of what can be
        self._layers = layers
        self._likeness = np.zeros(WINDOW, np.uint16)  # experts in common with each of the latest tokens
        self._voters: Array = np.zeros(0, np.int64)  # the places of tokens
        self._votes: Array = np.zeros(0, np.int64)  # of each
        self._tokens = 0  # that were remembered
        self._token, self._used = 0.0, 0  # the present one, and how many experts it has used

    def use(self, layer: int, experts: Sequence[int]) -> bool:
        """These distinct experts, at least one, are chosen in this token, and resident. Whether that began the layer's
        turn, which gives all its residents new ranks."""
        of, token = self._layers.get(layer) or self._layers.setdefault(layer, _Layer()), self._token
        of.make_room(max(experts) + 1)
        known, now = of.experts, self._tokens % WINDOW
        begins = of.turn < token
        if begins:  # the layer counts with what it chooses in this token, no longer with what it chose in the last
            self._likeness -= of.then
            turn = float(self._time(self._used))
            known["uses"] *= 2.0 ** ((of.turn - turn) / HALF_LIFE)
            of.turn = turn
        chosen = [expert for expert in experts if known["last"][expert] < token]
        alike = known["used"][chosen].sum(axis=0, dtype=np.uint16)
        of.now += alike
        self._likeness += 3 * alike
        known["used"][chosen, now] = 1
        known["uses"][chosen] += 1.0
        if begins:
            self._poll()
            self._rank(of, np.flatnonzero(known["rank"] != inf))
        every = list(experts)  # numpy takes a tuple for dimensions
        known["last"][every] = self._time(np.arange(self._used, self._used + len(every)))
        self._used += len(every)
        self._rank(of, every)
        return begins

    def reconsider(self, layer: int, expert: int) -> bool:
        """Whether a resident has another rank by the votes as they are now; it has that one from now on."""
        of = self._layers[layer]
        former = of.experts["rank"][expert]
        self._rank(of, [expert])
        return bool(of.experts["rank"][expert] != former)

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

    def _time(self, used: int | Array) -> Array:
        """In tokens: the present one, and how much of it has been used."""
        return self._token + np.minimum(used, self._cycle - 1) / self._cycle

    def _rank(self, of: _Layer, experts: Array | list[int]) -> None:
        """New ranks. One use in `span` tokens is expected for each past one."""
        known = of.experts[experts]
        over = int(of.turn >= self._token)  # the layer's turn: it uses nothing more before the next token
        share = known["used"][:, (self._voters + over) % WINDOW] @ self._votes / max(self._votes.sum(), 1)
        span = SPAN * np.sqrt(of.turn - known["last"] + 1.0)
        of.experts["rank"][experts] = -span / (known["uses"] + DOUBT + VOTE * share * span) - of.turn

    def _poll(self) -> None:
        """Who votes for this token, and how much they count."""
        now = self._tokens % WINDOW
        order = self._likeness.astype(np.int64) * WINDOW + np.arange(WINDOW)  # of equals the one that is later in it
        order[now] = 0
        nearest = order[np.argpartition(order, -NEAREST)[-NEAREST:]].tolist()
        votes = np.zeros(WINDOW, np.int64)
        for alike, at in (divmod(token, WINDOW) for token in nearest if token >= WINDOW):
            each = round(UNIT * exp((alike - max(nearest) // WINDOW) / self._spread))
            for ahead in range(min(AHEAD, (now - at) % WINDOW)):
                votes[(at + ahead) % WINDOW] += each << (AHEAD - ahead)
        self._voters = np.flatnonzero(votes)
        self._votes = votes[self._voters]

    def _remember(self, as_token: bool) -> None:
        self._tokens += as_token
        self._voters = (self._voters + 1) % WINDOW
        for layer in self._layers.values():
            layer.experts["used"][:, self._tokens % WINDOW] = 0  # the next takes the oldest's place
            layer.then = np.roll(layer.now, 1) if as_token else np.zeros(WINDOW, np.uint16)
            layer.now = np.zeros(WINDOW, np.uint16)
        self._likeness = sum((layer.then for layer in self._layers.values()), np.zeros(WINDOW, np.uint16))


class _Layer:
    """What is known of a layer's experts, by index, as far as they were used."""

    def __init__(self) -> None:
        self.experts = np.zeros(0, _EXPERT)  # `used`: 1 where one of the latest tokens has chosen it; the tokens a ring
        self.now = self.then = np.zeros(WINDOW, np.uint16)  # experts in common in this token, and in the one before
        self.turn = -1.0  # when the latest began

    def make_room(self, count: int) -> None:
        if count > len(self.experts):
            new = np.zeros(count + len(self.experts), _EXPERT)
            new["rank"], new["last"] = inf, NEVER
            new[: len(self.experts)] = self.experts
            self.experts = new
