"""Ways to prefetch beside each other: one model for each way, the same tokens, each token in all of them in turn.

    python -m benchmarks.prefetch STORE [--stream text|uniform|realistic] [--shares 25 40 60 80] [--ways off on tested]

A way is `off`, `on`, `tested` (on, and tests itself, as users have it), or `on` with other numbers, as in
`worth=0.7,idle_worth=0.5,depth=4`. Ratios are taken within the same tokens, in eight pieces one after the other: median
(lowest..highest). A token counts for no way if it took one of them more than 2.5 times as long as usual, because then
the machine did something else. All ways have to give the same logits, bit for bit. Text is sampled from the model; the
other streams are made for stores of `benchmarks.synthesize`. The memory of all ways is needed at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

PROMPT = "Tell me a long story about a dragon that lives by the sea."
PIECES = 8
ODD = 2.5


class Switch:
    """Stands in for the self-test and does what it is told."""

    tests = 0
    state = None

    def __init__(self, on: bool) -> None:
        self.on = on

    def step(self, seconds: float, missing: int) -> None:
        pass


def go(model: Any, way: str) -> None:
    """Make a model that has just been loaded prefetch that way."""
    runtime, prefetcher = model._runtime, model._runtime.prefetch._inner
    if way != "tested":
        runtime.self_test = Switch(way != "off")
    if "=" in way:
        for option in way.split(","):
            name, _, value = option.partition("=")
            assert hasattr(prefetcher, f"_{name}"), f"the prefetcher has no {name}"
            setattr(prefetcher, f"_{name}", float(value))


def tokens_of(model: Any, stream: str) -> Iterator[tuple[int, Callable[[torch.Tensor], None]]]:
    """Ids without end, each with a function that takes the logits which follow it."""
    if stream != "text":
        from .synthetic_weights import token_stream

        for token in token_stream(stream, 1 << 16, model.transformers_model.config.vocab_size, seed=1):
            yield token, lambda logits: None
        return
    generator, token = torch.Generator().manual_seed(1), [model.tokenizer(PROMPT)["input_ids"][-1]]

    def sample(logits: torch.Tensor) -> None:
        odds = torch.softmax(logits.float().reshape(-1) / 0.9, 0)
        token[0] = int(torch.multinomial(odds, 1, generator=generator))

    while True:
        yield token[0], sample


def measure(models: list[Any], stream: str, warm: int, count: int, limit_s: float) -> np.ndarray:
    """Seconds of each of at most `count` tokens, [ways, tokens], which do not take much longer than `limit_s`."""
    sequences = [model.new_sequence() for model in models]
    rng, spent, begin = random.Random(0), [], time.perf_counter()
    for number, (token, then) in enumerate(tokens_of(models[0], stream)):
        if number == warm:
            spent.clear()
            begin = time.perf_counter()
            for model in models:
                model.reset_stats()
        if number == warm + count or (number > warm + PIECES and time.perf_counter() - begin > limit_s):
            break
        seconds, logits = [0.0] * len(models), [torch.empty(0)] * len(models)
        for i in rng.sample(range(len(models)), len(models)):
            start = time.perf_counter()
            logits[i] = sequences[i].feed([token])
            seconds[i] = time.perf_counter() - start
            models[i]._runtime.prefetch.drain()  # what it is still reading would slow the next one down
        assert all(torch.equal(logits[0], other) for other in logits), f"token {number}: logits differ"
        spent.append(seconds)
        then(logits[0])
    return np.array(spent).T


def ratios(seconds: np.ndarray, of: int, over: int) -> list[float]:
    """Speed of one way over that of another in each piece of the tokens that count."""
    usual = (seconds < ODD * np.median(seconds, axis=1, keepdims=True)).all(axis=0)
    pieces = np.array_split(seconds[:, usual], PIECES, axis=1)
    return [float(piece[over].sum() / piece[of].sum()) for piece in pieces]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--stream", choices=["text", "uniform", "realistic"], default="text")
    parser.add_argument("--shares", type=int, nargs="+", default=[25, 40, 60, 80], help="slots, %% of the experts")
    parser.add_argument("--ways", nargs="+", default=["off", "on", "tested"], help="ratios are over the first")
    parser.add_argument("--tokens", type=int, default=800, help="most of them (default 800)")
    parser.add_argument("--seconds", type=float, default=45, help="for each share; then no more tokens (default 45)")
    parser.add_argument("--warm", type=int, default=64, help="tokens before (default 64)")
    parser.add_argument("--ram", default="6GB", help="so large that only --shares counts")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    from pocketmoe.offload import load
    from pocketmoe.offload.manifest import Manifest

    experts, context = Manifest.read(args.store).num_experts, args.warm + args.tokens + 8
    found: dict[int, dict[str, Any]] = {}
    for share in args.shares:
        slots, row = experts * share // 100, found.setdefault(share, {})
        with contextlib.ExitStack() as stack:
            models = [
                stack.enter_context(load(args.store, slots=slots, ram=args.ram, context=context, warm_start=False))
                for _ in args.ways
            ]
            for model, way in zip(models, args.ways, strict=True):
                go(model, way)
            seconds = measure(models, args.stream, args.warm, args.tokens, args.seconds)
            stats = [model.stats() for model in models]
        print(f"{args.stream}, {share} % ({slots} slots), {seconds.shape[1]} tokens:", flush=True)
        for i, (way, its) in enumerate(zip(args.ways, stats, strict=True)):
            each, rate = ratios(seconds, of=i, over=0), 1 / median(seconds[i])
            counts = {name: its.total(f"prefetch_{name}") for name in ("useful", "late", "wasted", "cancelled")}
            missing = (its.total("misses") + its.total("prefetch_hits")) / seconds.shape[1]
            row[way] = {"tokens_per_second": rate, "over_first": each, "missing": missing, **counts}
            over = f"over {args.ways[0]} {median(each):.3f} ({min(each):.2f}..{max(each):.2f})"
            print(
                f"  {way}: {rate:.1f} tokens/s, {over}; missing {missing:.1f} a token; {counts}; {its.prefetch or ''}"
            )
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
