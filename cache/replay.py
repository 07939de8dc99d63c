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
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np

from .expert import ExpertId
from .policy import EvictionPolicy, get_policy
from .trace import DECODE, Trace

OPTIMUM = "belady"
Step = tuple[ExpertId, ...]
"""The distinct experts of one layer in one token, ascending; empty where a layer chose none."""
_NOBODY = float("inf")


class Requests:
    """The decoded tokens of a trace as lists of steps, one list per sequence, L steps per token."""

    def __init__(self, trace: Trace, warm: bool = False) -> None:
        decoded = trace.phase == DECODE
        chosen, seq = np.sort(trace.experts[decoded], axis=2), trace.seq[decoded]
        self.layers, self.experts, self.top_k = trace.layers, trace.layers * trace.num_experts, trace.top_k
        self.tokens = len(chosen)
        ids = [[ExpertId(layer, index) for index in range(trace.num_experts)] for layer in range(trace.layers)]
        flat = [ids[i // trace.num_experts][i % trace.num_experts] for i in range(self.experts)]
        plain = chosen.size == 0 or (
            chosen.max() < trace.num_experts and not np.any(chosen[..., 1:] == chosen[..., :-1])
        )
        if plain:  # by far the most usual, and by far the fastest
            numbers = chosen.astype(np.int64) + np.arange(trace.layers)[:, None] * trace.num_experts
            steps = list(zip(*[map(flat.__getitem__, numbers.ravel().tolist())] * trace.top_k, strict=True))
        else:
            rows = chosen.reshape(-1, trace.top_k).tolist()
            none = trace.num_experts
            steps = [
                tuple(ids[i % trace.layers][e] for e in dict.fromkeys(row) if e < none) for i, row in enumerate(rows)
            ]
        ends = [len(chosen)] if warm else [*(np.flatnonzero(np.diff(seq)) + 1).tolist(), len(chosen)]
        starts = [0, *ends[:-1]]
        self.sequences = [steps[a * self.layers : b * self.layers] for a, b in zip(starts, ends, strict=True)]

    @classmethod
    def of_steps(cls, steps: Sequence[Step], layers: int, experts: int, top_k: int) -> Requests:
        """One sequence from its steps, L per token; `experts` of all layers together."""
        requests = cls.__new__(cls)
        requests.layers, requests.experts, requests.top_k = layers, experts, top_k
        requests.tokens, requests.sequences = len(steps) // layers, [list(steps)]
        return requests

    @property
    def total(self) -> int:
        return sum(len(step) for steps in self.sequences for step in steps)

    @property
    def compulsory(self) -> int:
        """First requests for an expert in a sequence: no cache can hit them."""
        return sum(len({expert for step in steps for expert in step}) for steps in self.sequences)


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


def replay(requests: Requests, policy: str, slots: int, per_layer: bool = False) -> Result:
    """Serve all requests with `slots` slots under the policy of that name, or OPTIMUM.

    `per_layer` gives each layer a pool of its own, of `slots // layers`. Raises ValueError when the slots are below the
    floors, or the policy is unknown.
    """
    layers, floor = requests.layers, requests.top_k
    if slots < layers * floor:
        raise ValueError(
            f"{slots} slots are too few: {layers} layers with a floor of {floor} experts need {layers * floor}."
        )
    misses = [0] * layers
    for steps in requests.sequences:
        if per_layer:
            for layer in range(layers):
                misses[layer] += sum(misses_by_step(steps[layer::layers], policy, slots // layers, 1, floor))
        else:
            by_step = misses_by_step(steps, policy, slots, layers, floor)
            misses = [count + sum(by_step[layer::layers]) for layer, count in enumerate(misses)]
    total = requests.total
    return Result(policy, slots, total, total - sum(misses), tuple(misses))


def misses_by_step(steps: Sequence[Step], policy: str, slots: int, layers: int, floor: int) -> list[int]:
    """How many experts of each step of one sequence the policy of that name, or OPTIMUM, has missed."""
    if policy == OPTIMUM:
        return _optimum(steps, slots)
    return _serve(steps, get_policy(policy, slots, layers * floor), slots, layers, floor)


def _serve(steps: Sequence[Step], policy: EvictionPolicy, slots: int, layers: int, floor: int) -> list[int]:
    """It does what `ExpertCache` does when every read arrives at once, at a third of the cost; a test holds the two
    against each other."""
    misses = [0] * len(steps)
    touch, insert, remove, victims, stale = policy.touch, policy.insert, policy.remove, policy.victims, policy.stale
    ranks, resident, free = policy.ranks, set[ExpertId](), slots
    width = 1 + max((step[0][0] for step in steps if step), default=0)  # a pool per layer has one layer's steps only
    counts = [0] * width
    heads: list[ExpertId | None] = [None] * width
    lowest: list[float] = [_NOBODY] * width  # each layer's lowest rank
    offers: list[float] = [_NOBODY] * width  # the same where the layer is above its floor
    for at, step in enumerate(steps):
        missing = []
        for expert in step:
            if expert in resident:
                touch(expert)
            else:
                missing.append(expert)
        if missing:
            layer = step[0][0]
            misses[at] = len(missing)
            stale.add(layer)  # its experts are locked now
            for expert in missing:
                if free:
                    free -= 1
                else:
                    for changed in stale:
                        for head in victims(changed):
                            if head not in step:
                                heads[changed], rank = head, ranks[head]
                                break
                        else:
                            heads[changed], rank = None, _NOBODY
                        lowest[changed], offers[changed] = rank, rank if counts[changed] > floor else _NOBODY
                    stale.clear()
                    least = min(offers)
                    victim = heads[layer] if lowest[layer] <= least else heads[offers.index(least)]
                    assert victim is not None, (expert, slots)
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


def lru_curve(requests: Requests) -> list[int]:
    """Hits of LRU with 0, 1, 2 ... slots, all from one pass: Mattson's stack (1970).

    Valid from a cycle (layers x top-k slots) on, where floors and locks never bind: whatever LRU evicts there is older
    than a whole token, and so than the latest top-k experts of every layer. Only the order of experts that are chosen
    together differs from `replay`, which touches hits before misses.
    """
    found = [0] * (requests.experts + 1)  # by the number of slots from which on a request is a hit
    for steps in requests.sequences:
        letters: dict[ExpertId, str] = {}
        stack = ""  # latest first; one letter per expert, because a string is searched at the speed of memory
        for step in steps:
            word = [letters.setdefault(expert, chr(len(letters))) for expert in step]
            places = sorted((place for letter in word if (place := stack.find(letter)) >= 0), reverse=True)
            for place in places:
                found[place + 1] += 1
                stack = stack[:place] + stack[place + 1 :]
            stack = "".join(reversed(word)) + stack
    hits, total = [], 0
    for count in found:
        total += count
        hits.append(total)
    return hits


class Case(NamedTuple):
    """One line of a comparison."""

    policy: str
    slots: int


def compare(
    trace: Trace, cases: Sequence[Case], warm: bool = False, per_layer: bool = False, jobs: int | None = None
) -> Iterator[Result]:
    """Replay all cases, `jobs` at a time (default: one per core), and yield their results in order."""
    jobs = min(jobs or os.cpu_count() or 1, len(cases))
    if jobs <= 1:
        requests = Requests(trace, warm)
        yield from (replay(requests, *case, per_layer) for case in cases)
        return
    with ProcessPoolExecutor(jobs, initializer=_prepare, initargs=(trace, warm)) as pool:
        yield from pool.map(_replay_prepared, cases, [per_layer] * len(cases))


_prepared: list[Requests] = []


def _prepare(trace: Trace, warm: bool) -> None:
    _prepared.append(Requests(trace, warm))


def _replay_prepared(case: Case, per_layer: bool) -> Result:
    return replay(_prepared[0], *case, per_layer)
