"""Prefetch on against off, in tokens per second, in turns within one process and one sequence.

    python -m benchmarks.prefetch STORE [--stream text|uniform|realistic] [--shares 25 40 60 80] [--rounds 6]

For each budget, a share of the experts in slots: tokens to fill the cache, then rounds of four periods, on, off, off,
on (off, on, on, off in every second one), in which the self-test decides nothing. A period's first two tokens, which
find what the period before has left, do not count, and what the others take is corrected by how many experts they
missed, as the self-test does. Text is sampled from the model; the streams are made for stores of
`benchmarks.synthesize`. Last come as many tokens in which prefetch tests itself, as users have it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

PROMPT = "Tell me a long story about a dragon that lives by the sea."
DROPPED = 2


class Switch:
    """Stands in for the self-test and does what it is told."""

    on = False
    tests = 0
    state = None

    def step(self, seconds: float, missing: int) -> None:
        pass


def tokens_of(model: Any, stream: str, count: int) -> Iterator[tuple[int, Callable[[torch.Tensor], None]]]:
    """`count` ids, each with a function that takes the logits which follow it."""
    if stream != "text":
        from .synthetic_weights import token_stream

        for token in token_stream(stream, count, model.transformers_model.config.vocab_size, seed=1):
            yield token, lambda logits: None
        return
    generator, token = torch.Generator().manual_seed(1), [model.tokenizer(PROMPT)["input_ids"][-1]]

    def sample(logits: torch.Tensor) -> None:
        odds = torch.softmax(logits.float().reshape(-1) / 0.9, 0)
        token[0] = int(torch.multinomial(odds, 1, generator=generator))

    for _ in range(count):
        yield token[0], sample


def missing(model: Any) -> int:
    return model._stats.total("misses") + model._stats.total("prefetch_hits")


def measure(model: Any, stream: str, warm: int, rounds: int, period: int) -> dict[str, Any]:
    """Seconds a token: (on, off) of each round, and those of tokens in which prefetch tests itself; reads and waits."""
    runtime, switch = model._runtime, Switch()
    kept, runtime.self_test = runtime.self_test, switch
    sequence = model.new_sequence()
    tokens = tokens_of(model, stream, warm + 2 * 4 * rounds * period)

    def feed(count: int) -> list[tuple[float, int]]:
        """Seconds of each token, and its experts that were missing or would have been without prefetch."""
        spent, before = [], missing(model)
        for _ in range(count):
            token, then = next(tokens)
            begin = time.perf_counter()
            logits = sequence.feed([token])
            seconds = time.perf_counter() - begin
            spent.append((seconds, missing(model) - before))
            before += spent[-1][1]
            then(logits)
        return spent

    feed(warm)
    model.reset_stats()
    pairs = []
    for number in range(rounds):
        turns = (True, False, False, True) if number % 2 == 0 else (False, True, True, False)
        spent: list[tuple[bool, float, int]] = []
        for switch.on in turns:
            spent += [(switch.on, *token) for token in feed(period)[DROPPED:]]
        misses = np.array([token[2] for token in spent]) - mean(token[2] for token in spent)
        seconds = np.array([token[1] for token in spent])
        slope = max(0.0, float(misses @ seconds / (misses @ misses))) if misses.any() else 0.0
        was_on = np.array([token[0] for token in spent])
        corrected = seconds - slope * misses
        pairs.append((float(corrected[was_on].mean()), float(corrected[~was_on].mean())))
    stats = model.stats()
    runtime.self_test = kept
    tested = [seconds for seconds, _ in feed(4 * rounds * period)]
    return {
        "pairs": pairs,
        "self_tested": mean(tested[len(tested) // 2 :]),
        "state": runtime.self_test.state,
        "hit_rate": stats.answer.hits / stats.answer.requests if stats.answer.requests else None,
        "useful_late_wasted": [stats.total(f"prefetch_{name}") for name in ("useful", "late", "wasted")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--stream", choices=["text", "uniform", "realistic"], default="text")
    parser.add_argument("--shares", type=int, nargs="+", default=[25, 40, 60, 80], help="slots, %% of the experts")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--period", type=int, default=12, help="tokens (default 12)")
    parser.add_argument("--warm", type=int, default=64, help="tokens before (default 64)")
    parser.add_argument("--ram", default="6GB", help="so large that only --shares counts")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    from pocketmoe.offload import load
    from pocketmoe.offload.manifest import Manifest

    experts = Manifest.read(args.store).num_experts
    context = args.warm + 8 * args.rounds * args.period + 8
    found = {}
    for share in args.shares:
        slots = experts * share // 100
        with load(args.store, slots=slots, ram=args.ram, context=context, warm_start=False) as model:
            result = found[share] = measure(model, args.stream, args.warm, args.rounds, args.period)
        ratios = sorted(off / on for on, off in result["pairs"])
        on, off = (median(pair[i] for pair in result["pairs"]) for i in (0, 1))
        print(
            f"{args.stream}, {share} % ({slots} slots): {1 / on:.1f} tokens/s on, {1 / off:.1f} off; on over off "
            f"{median(ratios):.3f} ({ratios[0]:.2f}..{ratios[-1]:.2f}, {len(ratios)} rounds); useful, late, wasted "
            f"{result['useful_late_wasted']}; afterwards {1 / result['self_tested']:.1f} with its self-test: "
            f"{result['state']}",
            flush=True,
        )
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
