"""What recording statistics costs per layer and token, in microseconds. Nothing is computed and no bytes move.

    python benchmarks/statistics_cost.py [--layers 48] [--top-k 8] [--misses 1] [--cold]

Tokens that call `RunStats` as the runtime does, misses among them, alternate with tokens that call something empty; the
difference is what statistics cost. `--cold` streams 20 MB through the caches before each layer, as its experts do.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import numpy as np
from pocketmoe.cache.expert import ExpertId, Lookup
from pocketmoe.cache.stats import RunStats

EXPERTS, RECORD = 128, 4096


class Nothing:
    """Answers every call of the recording and does nothing."""

    def record(self, *args: object) -> None:
        pass

    read_started = record_stall = record_answer = record

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--misses", type=int, default=1, help="of the experts of each layer (default 1)")
    parser.add_argument("--tokens", type=int, default=300, help="of each kind (default 300)")
    parser.add_argument("--cold", action="store_true", help="with caches that something else has filled")
    args = parser.parse_args()
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
