"""What other policies and budgets would do: the routing that was seen, replayed, and the speed that would follow.

The first half of the recorded tokens fills the cache, the second one is counted. Hits are those of the policy alone,
so for the present setting they differ from the run's own by what prefetch has brought. Experts that the record shows
for the first time count for nobody: whether they were resident is not known. Speeds are those of the cost model: its
work and its waiting, each scaled by what it is off there at the present setting. What it makes of that setting is given
beside what was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from .cost import Costs, DiskSpeed, TokenTime, time_per_token
from .counters import Step
from .history import History
from .policy import policy_names
from .replay import OPTIMUM, PlainReplayer, Replayer, chosen_of

if TYPE_CHECKING:
    from .stats import RunStats

ENOUGH_TOKENS = 200
SIZES = (0.5, 0.75, 1.25, 1.5, 2.0, 4.0)
"""Times the slots of the run."""

CREDIT = 0.1
"""Share of a token's time that is taken to be waited for as the model says, so that a little waiting, foretold or not,
does not change by a multiple what is said of much."""


class Setting(NamedTuple):
    """What the counted tokens would have done with it. `ram_budget_bytes` is None where the run's is not known."""

    policy: str
    slots: int
    ram_budget_bytes: int | None
    hit_rate: float
    tokens_per_second: float
    present: bool


class Advice(NamedTuple):
    """The comparison. `measured` and `predicted` are tokens per second of the counted tokens as they were set."""

    tokens: int
    warmup_tokens: int
    measured: float
    predicted: float
    policies: list[Setting]
    """The run's own, LRU and the optimum."""
    budgets: list[Setting]
    """The run's own policy with fewer and with more slots, ascending."""


class _Replays:
    """The record, cut into warm-up and what is counted."""

    def __init__(self, history: History, replayer: Replayer) -> None:
        steps, self.layers, self.floor = history.steps(), history.layers, history.top_k
        self._chosen, self._replayer = chosen_of(steps, self.layers, self.floor), replayer
        self.tokens = history.tokens // 2
        self._from = len(steps) - self.tokens * self.layers
        self.requests = [len(step) for step in islice(steps, self._from, None)]
        seen, first = set[tuple[int, int]](), []
        for step in steps:
            first.append(len(step) - len(seen.intersection(step)))
            seen.update(step)
        self._first = first[self._from :]

    def misses(self, policy: str, slots: int) -> list[int]:
        """Of each counted step."""
        found = self._replayer.misses(self._chosen, policy, slots).ravel().tolist()[self._from :]
        return [missed - first for missed, first in zip(found, self._first, strict=True)]


def advise(
    run: RunStats, disk: DiskSpeed | None, also: Iterable[int] = (), replayer: Replayer | None = None
) -> Advice | None:
    """What other settings would give, among them these numbers of slots.

    Args:
        replayer: None for the plain one.

    Returns:
        None where there is too little to go by: fewer than ENOUGH_TOKENS tokens on record, no slots known or fewer than
        they need, or a policy that is not known here, as in a file of another version.
    """
    history, slots, total, policy = run.history, run.slots, run.total_experts, run.policy
    if history is None or history.tokens < ENOUGH_TOKENS or not (slots and total):
        return None
    if policy not in policy_names() or not 0 < history.layers * history.top_k <= min(slots, total):
        return None
    replays = _Replays(history, replayer or PlainReplayer())
    latest = list(run.pace)[-replays.tokens :]
    costs = Costs.of(run, disk, latest)
    if costs is None or not sum(replays.requests):
        return None
    requests, measured = sum(replays.requests), len(latest) / sum(step.seconds for step in latest)
    now = replays.misses(policy, slots)

    def predict(misses: list[int]) -> TokenTime:
        return time_per_token(replays.requests, misses, replays.layers, costs)

    own = predict(now)
    slower, later = _errors(own, latest)
    budget = run.ram_budget_bytes
    needed = min(budget, run.peak_rss_bytes) if budget and run.peak_rss_bytes and slots >= total else budget
    # A budget that holds all experts may be far larger than what they take.

    def setting(name: str, size: int) -> Setting:
        present = (name, size) == (policy, slots)
        misses = now if present else replays.misses(name, size)
        ram = budget if present else needed and needed + (size - slots) * run.record_bytes
        found = predict(misses)
        speed = measured if present else 1 / (found.working * slower + found.waiting * later)
        return Setting(name, size, ram, 1 - sum(misses) / requests, speed, present)

    least = replays.layers * replays.floor
    sizes = {min(total, max(least, int(slots * size))) for size in SIZES} | {slots, total, *also}
    return Advice(
        tokens=replays.tokens,
        warmup_tokens=history.tokens - replays.tokens,
        measured=measured,
        predicted=1 / own.seconds,
        policies=[setting(name, slots) for name in dict.fromkeys((policy, "lru", OPTIMUM))],
        budgets=[setting(policy, size) for size in sorted(sizes)],
    )


def _errors(model: TokenTime, steps: Sequence[Step]) -> tuple[float, float]:
    """Measured over modelled time of a token: work, waiting."""
    measured = sum(step.seconds for step in steps) / len(steps)
    waiting = sum(step.stall_s for step in steps) / len(steps)
    credit = CREDIT * measured
    working = (measured - waiting) / model.working if model.working else 1.0
    return working, (waiting + credit) / (model.waiting + credit)
