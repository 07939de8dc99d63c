"""What recording statistics costs per layer and token, in microseconds, and as a share of a model's tokens; or a trace.

    python benchmarks/statistics_cost.py [--layers 48] [--top-k 8] [--misses 1] [--cold]
    python -m benchmarks.statistics_cost --store STORE [--tokens 1000] [--trace]

Tokens that call `RunStats` as the runtime does, misses among them, alternate with tokens that call something empty; the
difference is what statistics cost. `--cold` streams 20 MB through the caches before each layer, as its experts do.
With a store, tokens of a real model, all experts in RAM, are decoded with and without recording in turns; with --trace,
with and without a trace of their routing. Both do part of their work after some dozens of tokens, so turns are as long.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from pocketmoe.cache.expert import ExpertId, Lookup
from pocketmoe.cache.stats import RunStats

EXPERTS, RECORD = 128, 4096
TURN = 32
"""Tokens."""


class Nothing:
    """Answers every call of the recording and does nothing."""

    def record(self, *args: object) -> None:
        pass

    read_started = record_stall = record_answer = record_hits = extend = record

    def read_finished(self, *args: object) -> None:
        pass


def token(stats: RunStats | Nothing, layers: list[Lookup], evict: np.ndarray | None) -> float:
    """Seconds of one token's calls."""
    spent = 0.0
    for layer, wanted in enumerate(layers):
        if evict is not None:
            evict += 1
        begin = time.perf_counter()
        for _ in wanted.misses:
            stats.read_started()
            stats.read_finished(layer, RECORD)
        if wanted.misses:
            stats.record_stall(layer, 1e-4)
        stats.record(layer, wanted, 0, 0, 1e-3, 1e-3)
        spent += time.perf_counter() - begin
    begin = time.perf_counter()
    stats.record_answer(1, 1, 0.05, 0.05)
    return spent + time.perf_counter() - begin


def of_model(store: Path, tokens: int, trace: str | None) -> None:
    """Prints the median of neighbouring turns' ratio, with over without; the order alternates."""
    from pocketmoe.offload import load
    from pocketmoe.offload.recorder import NoRecorder

    from .synthetic_weights import token_stream

    nothing, turns = Nothing(), tokens // TURN
    with load(store, ram="6GB", context=2 * tokens + 64, warm_start=False, trace=trace) as model:
        runtime, sequence = model._runtime, model.new_sequence()
        stats, history, recorder = runtime.stats, runtime.history, runtime.recorder
        ids = iter(token_stream("uniform", 2 * tokens + 64, model.transformers_model.config.vocab_size, seed=1))

        def switch(recorded: bool) -> None:
            if trace:
                runtime.recorder = recorder if recorded else NoRecorder()
                return
            for target, name in ((stats, "record"), (stats, "record_hits"), (history, "record"), (history, "extend")):
                if recorded:
                    target.__dict__.pop(name, None)
                else:
                    setattr(target, name, getattr(nothing, name))

        def decode(recorded: bool) -> float:
            switch(recorded)
            begin = time.perf_counter()
            for _ in range(TURN):
                sequence.feed([next(ids)])
                if recorded or trace:
                    stats.record_answer(1, 1, 0.05, 0.05)
            return time.perf_counter() - begin

        for _ in range(64 // TURN):
            decode(True)
        ratios = []
        for number in range(turns):
            first = decode(number % 2 == 0)
            second = decode(number % 2 == 1)
            ratios.append(first / second if number % 2 == 0 else second / first)
        misses, layers = stats.total("misses"), stats.layers
    # The mean of the two orders' medians: a pair's second token is a little quicker whatever it does.
    halves = [statistics.median(ratios[i::2]) for i in (0, 1)]
    error = 1.25 * statistics.stdev(sorted(ratios)[turns // 10 : -turns // 10]) / turns**0.5
    print(f"{layers} layers, {misses} misses: {100 * (statistics.mean(halves) - 1):+.2f} % (+-{100 * error:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--misses", type=int, default=1, help="of the experts of each layer (default 1)")
    parser.add_argument("--tokens", type=int, default=300, help="of each kind (default 300)")
    parser.add_argument("--cold", action="store_true", help="with caches that something else has filled")
    parser.add_argument("--store", type=Path, help="measure a real model instead")
    parser.add_argument("--trace", action="store_true", help="and what a trace costs it")
    args = parser.parse_args()
    if args.store:
        with tempfile.TemporaryDirectory() as folder:
            of_model(args.store, args.tokens, f"{folder}/run.npz" if args.trace else None)
        return
    rng, evict = random.Random(0), np.zeros(20 << 20, np.uint8) if args.cold else None
    run, nothing = RunStats(args.layers, RECORD), Nothing()
    run.enter("answer")
    micros: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(args.tokens):
        layers = []
        for layer in range(args.layers):
            chosen = tuple(ExpertId(layer, i) for i in sorted(rng.sample(range(EXPERTS), args.top_k)))
            layers.append(Lookup(chosen[args.misses :], chosen[: args.misses]))
        for name, stats in (("with", run), ("without", nothing)):
            micros[name].append(token(stats, layers, evict) / args.layers * 1e6)
    run.check()
    difference = [a - b for a, b in zip(micros["with"], micros["without"], strict=True)]
    print(
        f"{args.layers} layers, top-{args.top_k}, {args.misses} missed; us per layer over {args.tokens} tokens of each"
    )
    for name, values in (*micros.items(), ("difference", difference)):
        low, _, high = statistics.quantiles(values, n=4)
        print(f"{name:10} {statistics.median(values):6.2f} (quartiles {low:.2f}..{high:.2f})")


if __name__ == "__main__":
    main()
