"""Runs that never happened: statistics as a model with given costs would leave them."""

from __future__ import annotations

import random
from itertools import accumulate

from pocketmoe.cache.cost import Costs, DiskSpeed, time_per_token
from pocketmoe.cache.expert import ExpertId, Lookup
from pocketmoe.cache.history import History
from pocketmoe.cache.replay import misses_by_step
from pocketmoe.cache.stats import RunStats

LAYERS, EXPERTS, TOP_K, RECORD = 4, 16, 2, 2_000_000
COSTS = Costs(rest=0.001, expert=0.0005, stop=0.0, miss=0.0, read=0.002, latency=0.0)
DISK = DiskSpeed(bytes_per_s=1e9, read_s=0.002)


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def routing(tokens: int, skew: float = 1.0, seed: int = 0) -> list[tuple[ExpertId, ...]]:
    """Steps of `tokens` tokens; the higher the skew the more often the same experts, 0 is uniform."""
    rng, steps = random.Random(seed), []
    cumulative = list(accumulate(1 / (rank + 1) ** skew for rank in range(EXPERTS)))
    for at in range(tokens * LAYERS):
        chosen: set[int] = set()
        while len(chosen) < TOP_K:
            chosen.add(rng.choices(range(EXPERTS), cum_weights=cumulative)[0])
        steps.append(tuple(ExpertId(at % LAYERS, (index * 5 + at % LAYERS) % EXPERTS) for index in sorted(chosen)))
    return steps


def a_run(
    tokens: int = 400, slots: int = 24, skew: float = 1.0, policy: str = "lru", costs: Costs = COSTS, seed: int = 0
) -> RunStats:
    """A prompt of 10 tokens and an answer without prefetch, every miss read on demand."""
    clock = Clock()
    budget = 10**9 + slots * RECORD
    run = RunStats(LAYERS, RECORD, slots, LAYERS * EXPERTS, ram_budget_bytes=budget, policy=policy, clock=clock)
    run.model, run.codec, run.io, run.time_to_first_token_s, run.finish_reason = "fake", "int4", "direct", 0.5, "stop"
    run.record_prompt(10, 0.5)
    run.enter("answer")
    run.record_answer(1, 0, 0.0)
    steps = routing(tokens - 1, skew, seed)
    missed = misses_by_step(steps, policy, slots, LAYERS, TOP_K)
    run.history = History(LAYERS)
    for first in range(0, len(steps), LAYERS):
        requests = [TOP_K] * LAYERS
        misses = missed[first : first + LAYERS]
        working, waiting = time_per_token(requests, misses, LAYERS, costs)
        seconds = working + waiting
        compute = TOP_K * LAYERS * costs.expert
        other = working - compute
        for step, count in zip(steps[first : first + LAYERS], misses, strict=True):
            layer = step[0].layer
            run.record(layer, Lookup(step[count:], step[:count]), layer_s=(seconds - other) / LAYERS)
            run.history.record(layer, step)
            for _ in range(count):
                run.read_started()
                clock.now += costs.read
                run.read_finished(layer, RECORD)
        run.record_stall(0, waiting)
        run.record_compute(compute)
        run.record_answer(1, 1, seconds, forward_s=seconds - other / 2)
    run.residents = sorted({expert for step in steps[-LAYERS:] for expert in step})
    return run.snapshot()
