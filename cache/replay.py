"""What any policy, and the optimum, would have hit on a recorded routing. Moves no bytes, loads no model.

The rules are those of the runtime while it decodes. A request is one distinct expert of one layer in one token. The
experts that a layer chooses for a token are looked up together, touched in ascending order, hits before misses, and
are locked against each other; whatever is missed is admitted. One pool of slots serves all layers, and an admission
takes no other layer below its floor of top-k residents. Every sequence starts with an empty cache and a policy without
memory, unless `warm`. Prefill is left out, and prefetch does not count: nothing is resident that was not requested.

Belady's optimum obeys the same rules but for the floors, which it ignores: it is a bound that no policy can exceed,
with floors or without. Misses divide into compulsory ones (the first request for an expert), those of the capacity
(what the optimum misses beside), and those of the policy (the rest).
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cached_property
from itertools import cycle, repeat
from typing import Any, NamedTuple, Protocol

import numpy as np

from .expert import ExpertId
from .policy import EvictionPolicy, get_policy
from .trace import DECODE, Trace

OPTIMUM = "belady"
Array = np.ndarray[Any, Any]
Step = tuple[ExpertId, ...]
"""The distinct experts of one layer in one token, ascending; empty where a layer chose none."""
NONE = -1
_NOBODY = float("inf")


class Requests:
    """The decoded tokens of a trace.

    `chosen` is int32 [T, L, k]: the distinct experts of a layer in a token, ascending, NONE where there are fewer.
    """

    def __init__(self, trace: Trace, warm: bool = False) -> None:
        decoded = trace.phase == DECODE
        chosen, seq = np.sort(trace.experts[decoded], axis=2).astype(np.int32), trace.seq[decoded]
        again = np.zeros(chosen.shape, bool)
        again[..., 1:] = chosen[..., 1:] == chosen[..., :-1]
        self.chosen = np.where(again | (chosen >= trace.num_experts), NONE, chosen)
        self.layers, self.experts, self.top_k = trace.layers, trace.layers * trace.num_experts, trace.top_k
        self.tokens = len(chosen)
        self._starts = [] if warm else (np.flatnonzero(np.diff(seq)) + 1).tolist()

    @property
    def sequences(self) -> list[Array]:
        """`chosen` of each."""
        return np.split(self.chosen, self._starts)

    @cached_property
    def total(self) -> int:
        return int(np.count_nonzero(self.chosen != NONE))

    @cached_property
    def compulsory(self) -> int:
        """First requests for an expert in a sequence: no cache can hit them."""
        used = np.zeros((self.layers, self.experts // self.layers + 1), bool)
        count = 0
        for chosen in self.sequences:
            used[:] = False
            used[np.arange(self.layers)[:, None], chosen] = True  # NONE is the last column
            count += int(np.count_nonzero(used[:, :-1]))
        return count


def steps_of(chosen: Array) -> list[Step]:
    """[T, L, k], NONE where there are fewer, as L steps per token."""
    layers, experts = chosen.shape[1], int(chosen.max(initial=0)) + 1
    ids = [[ExpertId(layer, index) for index in range(experts)] for layer in range(layers)]
    rows = chosen.reshape(-1, chosen.shape[2]).tolist()
    return [tuple([of_layer[e] for e in row if e >= 0]) for row, of_layer in zip(rows, cycle(ids), strict=False)]


def chosen_of(steps: Sequence[Step], layers: int, top_k: int) -> Array:
    """int32 [T, L, k]: what `steps_of` undoes."""
    rows = [[*(expert[1] for expert in step), *[NONE] * (top_k - len(step))] for step in steps]
    return np.array(rows, np.int32).reshape(-1, layers, top_k)


class Replayer(Protocol):
    """Serves the requests of one sequence, `chosen` as in `Requests`, by the rules above. The floor of a layer is k."""

    def misses(self, chosen: Array, policy: str, slots: int) -> Array:
        """Integers [T, L]: how many experts of each step the policy of that name, or OPTIMUM, has missed with one pool
        of `slots` slots, L x k at least."""
        ...

    def lru_depths(self, chosen: Array) -> Array:
        """Integers [T, L, k]: for each request of a step, in order, with how many slots and more it is a hit of LRU;
        then, and where it never is, 0."""
        ...


class Result(NamedTuple):
    """Hits of one policy with one number of slots."""

    policy: str
    slots: int
    requests: int
    hits: int
    misses_by_layer: tuple[int, ...]

    @property
    def hit_rate(self) -> float | None:
        return self.hits / self.requests if self.requests else None


def replay(
    requests: Requests, policy: str, slots: int, per_layer: bool = False, replayer: Replayer | None = None
) -> Result:
    """Serve all requests with `slots` slots under the policy of that name, or OPTIMUM.

    `per_layer` gives each layer a pool of its own, of `slots // layers`. Raises ValueError when the slots are below the
    floors, or the policy is unknown.
    """
    layers, floor = requests.layers, requests.top_k
    if slots < layers * floor:
        raise ValueError(
            f"{slots} slots are too few: {layers} layers with a floor of {floor} experts need {layers * floor}."
        )
    serve = (replayer or PlainReplayer()).misses
    misses = np.zeros(layers, np.int64)
    for chosen in requests.sequences:
        if per_layer:
            misses += [serve(chosen[:, [layer]], policy, slots // layers).sum() for layer in range(layers)]
        else:
            misses += serve(chosen, policy, slots).sum(axis=0)
    total = requests.total
    return Result(policy, slots, total, total - int(misses.sum()), tuple(misses.tolist()))


def lru_curve(requests: Requests, replayer: Replayer | None = None) -> list[int]:
    """Hits of LRU with 0, 1, 2 ... slots, all from one pass: Mattson's stack (1970).

    Valid from a cycle (layers x top-k slots) on, where floors and locks never bind: whatever LRU evicts there is older
    than a whole token, and so than the latest top-k experts of every layer. Only the order of experts that are chosen
    together differs from `replay`, which touches hits before misses.
    """
    found = np.zeros(requests.experts + 1, np.int64)
    for chosen in requests.sequences:
        found += np.bincount((replayer or PlainReplayer()).lru_depths(chosen).ravel(), minlength=len(found))
    found[0] = 0
    return np.cumsum(found).tolist()


class PlainReplayer:
    """The reference, in Python."""

    def misses(self, chosen: Array, policy: str, slots: int) -> Array:
        _, layers, floor = chosen.shape
        found = misses_by_step(steps_of(chosen), policy, slots, layers, floor)
        return np.array(found, np.int32).reshape(-1, layers)

    def lru_depths(self, chosen: Array) -> Array:
        depths = np.zeros(chosen.shape, np.int32)
        letters: dict[ExpertId, str] = {}
        stack = ""  # latest first; one letter per expert, because a string is searched at the speed of memory
        for step, row in zip(steps_of(chosen), depths.reshape(-1, chosen.shape[2]), strict=True):
            word = [letters.setdefault(expert, chr(len(letters))) for expert in step]
            row[: len(word)] = [stack.find(letter) + 1 for letter in word]
            for letter in word:
                stack = letter + stack.replace(letter, "", 1)
        return depths


def misses_by_step(steps: Sequence[Step], policy: str, slots: int, layers: int, floor: int) -> list[int]:
    """How many experts of each step of one sequence the policy of that name, or OPTIMUM, has missed."""
    if policy == OPTIMUM:
        return _optimum(steps, slots)
    return _serve(steps, get_policy(policy, slots, layers * floor), slots, layers, floor)


def _serve(steps: Sequence[Step], policy: EvictionPolicy, slots: int, layers: int, floor: int) -> list[int]:
    """It does what `ExpertCache` does when every read arrives at once, at a third of the cost; a test holds the two
    against each other."""
    misses = [0] * len(steps)
    insert, remove, victims, stale = policy.insert, policy.remove, policy.victims, policy.stale
    resident, free = set[ExpertId](), slots
    counts = [0] * layers
    heads: list[ExpertId | None] = [None] * layers
    lowest: list[float] = [_NOBODY] * layers  # each layer's lowest rank
    offers: list[float] = [_NOBODY] * layers  # the same where the layer is above its floor
    for at, step in enumerate(steps):
        missing = [expert for expert in step if expert not in resident]
        policy.touch([expert for expert in step if expert in resident])
        if missing:
            layer = step[0][0]
            misses[at] = len(missing)
            stale.add(layer)  # its experts are locked now
            for expert in missing:
                if free:
                    free -= 1
                else:
                    while True:
                        for changed in stale:
                            heads[changed], rank = None, _NOBODY
                            for head, place in victims(changed):
                                if head not in step:
                                    heads[changed], rank = head, place
                                    break
                            lowest[changed], offers[changed] = rank, rank if counts[changed] > floor else _NOBODY
                        stale.clear()
                        least = min(offers)
                        victim = heads[layer] if lowest[layer] <= least else heads[offers.index(least)]
                        assert victim is not None, (expert, slots)
                        if not policy.reconsider(victim):
                            break
                    remove(victim)
                    resident.remove(victim)
                    counts[victim[0]] -= 1
                insert(expert)
                resident.add(expert)
                counts[layer] += 1
            stale.add(layer)  # and no longer
        if (at + 1) % layers == 0:
            policy.tick()
    return misses


def _optimum(steps: Sequence[Step], slots: int) -> list[int]:
    """Belady's MIN for requests that come in sets: the resident whose next use is furthest leaves, locked ones never.

    The heap holds every next use that was ever known, the furthest on top, each in one number with its expert. Those
    that have come lie in the past and so never on top.
    """
    never = len(steps)
    numbers: dict[ExpertId, int] = {}
    rows = [[numbers.setdefault(expert, len(numbers)) for expert in step] for step in steps]
    count = len(numbers)
    upcoming = [never * -count] * count
    next_uses: list[list[int]] = []
    for at in range(never - 1, -1, -1):
        row = rows[at]
        next_uses.append([upcoming[expert] + expert for expert in row])
        for expert in row:
            upcoming[expert] = at * -count
    resident, free, heap, push, pop = bytearray(count), slots, [], heapq.heappush, heapq.heappop
    misses = []
    for row in rows:
        missing = [expert for expert in row if not resident[expert]]
        for expert in missing:
            if free:
                free -= 1
            else:
                resident[pop(heap) % count] = 0
            resident[expert] = 1
        misses.append(len(missing))
        for use in next_uses.pop():
            push(heap, use)
    return misses


class Case(NamedTuple):
    """One line of a comparison."""

    policy: str
    slots: int


def compare(
    requests: Requests,
    cases: Sequence[Case],
    per_layer: bool = False,
    jobs: int | None = None,
    replayer: Replayer | None = None,
) -> Iterator[Result]:
    """Replay all cases, `jobs` at a time (default: one per core), and yield their results in order."""
    jobs = min(jobs or os.cpu_count() or 1, len(cases))
    if jobs <= 1:  # where a Ctrl-C ends it at once
        yield from (replay(requests, *case, per_layer=per_layer, replayer=replayer) for case in cases)
    elif replayer is None:  # threads would take turns in Python
        with ProcessPoolExecutor(jobs, initializer=_prepare, initargs=(requests,)) as pool:
            yield from pool.map(_replay_prepared, cases, repeat(per_layer))
    else:
        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(lambda case: replay(requests, *case, per_layer=per_layer, replayer=replayer), cases)


_prepared: list[Requests] = []


def _prepare(requests: Requests) -> None:
    _prepared.append(requests)


def _replay_prepared(case: Case, per_layer: bool) -> Result:
    return replay(_prepared[0], *case, per_layer)
