"""What other budgets would do: the routing that was seen, replayed with other numbers of slots."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from .replay import Requests, Step, replay
from .stats import RunStats

ENOUGH_TOKENS = 200
_MOST_STEPS = 12_288
"""Steps that are kept: 256 tokens of 48 layers, which are replayed in a second or two."""


class History:
    """The experts that the latest single tokens chose, layer by layer. A forward that was cut short is left out."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._steps: deque[Step] = deque(maxlen=max(1, _MOST_STEPS // layers) * layers)
        self._token: list[Step] = []

    def record(self, layer: int, experts: Step) -> None:
        if layer == 0:
            self._token = []
        self._token.append(experts)
        if len(self._token) == self.layers == layer + 1:
            self._steps.extend(self._token)

    def clear(self) -> None:
        self._steps.clear()

    @property
    def tokens(self) -> int:
        return len(self._steps) // self.layers

    def steps(self) -> list[Step]:
        """Steps of whole tokens, oldest first, the experts of each ascending."""
        return [tuple(sorted(step)) for step in self._steps]


class WhatIf(NamedTuple):
    """A run with another number of slots."""

    slots: int
    ram_budget_bytes: int
    hit_rate: float
    tokens_per_second: float


def what_if(stats: RunStats, history: History) -> list[WhatIf]:
    """Hit rates and answer speeds with other numbers of slots, the present one among them; fewest slots first.

    The second half of the history is counted, the first one fills the cache. Hits are those of the policy alone, so for
    the present number they differ from the run's own by what prefetch brought. Time is compute, taken as it was, and
    waiting, in proportion to the misses; experts that the history shows for the first time count for neither.

    Returns:
        Nothing where there is too little to go by: fewer than ENOUGH_TOKENS tokens, no budget, no waiting.
    """
    slots, total, budget, policy = stats.slots, stats.total_experts, stats.ram_budget_bytes, stats.policy
    answer, floor = stats.answer, _floor(history)
    if history.tokens < ENOUGH_TOKENS or not (slots and total and budget and policy) or not answer.steps:
        return []
    steps = history.steps()
    counted = history.tokens // 2 * history.layers
    before, after = steps[:-counted], steps[-counted:]
    new = len({e for step in after for e in step} - {e for step in before for e in step})
    requests = sum(map(len, after))

    def misses(slots: int) -> int:
        whole, start = (
            replay(Requests.of_steps(part, history.layers, total, floor), policy, slots) for part in (steps, before)
        )
        return (whole.requests - whole.hits) - (start.requests - start.hits) - new

    now = misses(slots)
    if now <= 0:
        return []
    second, wait = answer.seconds / answer.steps, answer.stall_s / answer.steps

    def case(other: int) -> WhatIf:
        missed = now if other == slots else misses(other)
        ram = budget + (other - slots) * stats.record_bytes
        return WhatIf(other, ram, 1 - missed / requests, 1 / (second - wait + wait * missed / now))

    fewer, missing = max(history.layers * floor, slots * 3 // 4), total - slots
    return [case(other) for other in sorted({fewer, slots, slots + missing // 4, slots + missing // 2, total})]


def _floor(history: History) -> int:
    return max((len(step) for step in history.steps()), default=0)
