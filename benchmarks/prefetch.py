"""Ways to prefetch beside each other: one model for each way, the same tokens, each token in all of them in turn.

    python -m benchmarks.prefetch STORE [--stream text|uniform|realistic] [--shares 25 40 60 80] [--ways off on tested]

A way is `off`, `on`, `tested` (on, and tests itself, as users have it), or `on` with other numbers, as in
`worth=0.7,idle_worth=0.5,depth=4,piece=8`; `piece` is that of reads, in MiB, and 0 reads records whole. Every 16
tokens the ways move on by one model, because models differ by where in memory they lie (two that did the same differed
by 5 %); the first tokens after that do not count. A round is over when every way has been on every model. Ratios are
taken within rounds: median (lowest..highest). A token counts for no way if it took one of them more than 2.5 times as
long as usual, because then the machine did something else. All ways have to give the same logits, bit for bit. Text is
sampled from the model; the other streams are made for stores of `benchmarks.synthesize`. The memory of all ways is
needed at once.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from pocketmoe.cache.self_test import SelfTest

PROMPT = "Tell me a long story about a dragon that lives by the sea."
TURN, DROPPED = 16, 2
ODD = 2.5
COUNTS = "useful", "late", "wasted", "cancelled"
NUMBERS = "depth", "worth", "idle_worth", "piece"


def way_name(text: str) -> str:
    """Raises ArgumentTypeError for a way that is not known."""
    if text not in ("off", "on", "tested"):
        for option in text.split(","):
            name, _, value = option.partition("=")
            if name not in NUMBERS or not value.replace(".", "", 1).isdecimal():
                raise argparse.ArgumentTypeError(
                    f"{text!r} is no way: use off, on, tested, or numbers as in worth=0.7,idle_worth=0.5,depth=4"
                )
    return text


class Switch:
    """Stands in for the self-test and does what it is told."""

    tests = 0
    state = None

    def __init__(self, on: bool) -> None:
        self.on = on

    def step(self, seconds: float, missing: int) -> None:
        pass


class Way:
    """How to prefetch, to be moved from model to model.

    Attributes:
        seconds: of its tokens.
        counts: of experts that were missing or would have been without prefetch, and of how guesses ended.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.self_test = SelfTest() if name == "tested" else Switch(name != "off")
        self.numbers = {k: float(v) for k, _, v in (option.partition("=") for option in name.split(",")) if v}
        self.seconds: list[float] = []
        self.counts = Counter[str]()

    def move_to(self, model: Any) -> None:
        model._runtime.self_test = self.self_test
        prefetcher, transfers = model._runtime.prefetch._inner, model._runtime.transfers
        usual = inspect.signature(type(prefetcher)).parameters
        for name in NUMBERS[:3]:
            setattr(prefetcher, f"_{name}", self.numbers.get(name, usual[name].default))
        usual = inspect.signature(type(transfers)).parameters
        piece = int(self.numbers["piece"] * 2**20) if "piece" in self.numbers else usual["piece_bytes"].default
        transfers._piece_bytes = piece or model._stats.record_bytes

    def feed(self, model: Any, sequence: Any, token: int) -> torch.Tensor:
        before = self._counts(model)
        start = time.perf_counter()
        logits = sequence.feed([token])
        self.seconds.append(time.perf_counter() - start)
        model._runtime.prefetch.drain()  # what it is still reading would slow the next one down
        self.counts += self._counts(model) - before
        return logits

    @staticmethod
    def _counts(model: Any) -> Counter[str]:
        total = model._stats.total
        missing = total("misses") + total("prefetch_hits")
        return Counter(missing=missing, **{name: total(f"prefetch_{name}") for name in COUNTS})


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


def measure(models: list[Any], ways: list[Way], stream: str, warm: int, rounds: int, limit_s: float) -> np.ndarray:
    """Seconds of the tokens that count, [ways, rounds, tokens]; at least one round, and as many as `limit_s` allows."""
    count, rng, tokens = len(ways), random.Random(0), tokens_of(models[0], stream)
    sequences = [model.new_sequence() for model in models]

    def feed(number: int, shift: int) -> None:
        places = [(i + shift) % count for i in range(count)]
        for way, place in zip(ways, places, strict=True):
            way.move_to(models[place])
        for token, then in islice(tokens, number):
            logits = [torch.empty(0)] * count
            for i in rng.sample(range(count), count):
                logits[i] = ways[i].feed(models[places[i]], sequences[places[i]], token)
            assert all(torch.equal(logits[0], other) for other in logits), f"after token {token} logits differ"
            then(logits[0])

    feed(warm, shift=0)
    for way in ways:
        way.seconds.clear()
        way.counts.clear()
    begin, done = time.perf_counter(), 0
    while done < rounds and (time.perf_counter() - begin) * (done + 1) <= limit_s * max(1, done):
        for shift in range(count):
            feed(TURN, shift)
        done += 1
    seconds = np.array([way.seconds for way in ways]).reshape(count, done, count, TURN)
    return seconds[..., DROPPED:].reshape(count, done, -1)


def ratios(seconds: np.ndarray, of: int, over: int) -> list[float]:
    """Speed of one way over that of another in each round."""
    usual = (seconds < ODD * np.median(seconds, axis=(1, 2), keepdims=True)).all(axis=0)
    total = np.where(usual, seconds, 0.0).sum(axis=2)
    return (total[over] / total[of]).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--stream", choices=["text", "uniform", "realistic"], default="text")
    parser.add_argument("--shares", type=int, nargs="+", default=[25, 40, 60, 80], help="slots, %% of the experts")
    parser.add_argument(
        "--ways", type=way_name, nargs="+", default=["off", "on", "tested"], help="ratios are over the first"
    )
    parser.add_argument("--rounds", type=int, default=20, help="at most (default 20)")
    parser.add_argument("--seconds", type=float, default=45, help="for each share; then no more rounds (default 45)")
    parser.add_argument("--warm", type=int, default=64, help="tokens before (default 64)")
    parser.add_argument("--ram", default="6GB", help="so large that only --shares counts")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    from pocketmoe.offload import load
    from pocketmoe.offload.manifest import Manifest

    experts = Manifest.read(args.store).num_experts
    context = args.warm + args.rounds * len(args.ways) * TURN + 8
    found: dict[int, dict[str, Any]] = {}
    for share in args.shares:
        slots, row, ways = experts * share // 100, found.setdefault(share, {}), [Way(name) for name in args.ways]
        with contextlib.ExitStack() as stack:
            models = [
                stack.enter_context(
                    load(args.store, slots=slots, ram=args.ram, context=context, warm_start=False, on_notice=print)
                )
                for _ in ways
            ]
            seconds = measure(models, ways, args.stream, args.warm, args.rounds, args.seconds)
        print(f"{args.stream}, {share} % ({slots} slots), {seconds.shape[1]} rounds:", flush=True)
        for i, way in enumerate(ways):
            each, rate = ratios(seconds, of=i, over=0), 1 / float(np.median(seconds[i]))
            counts = {name: round(count / len(way.seconds), 1) for name, count in way.counts.items()}
            row[way.name] = {"tokens_per_second": rate, "over_first": each, "per_token": counts}
            over = f"over {ways[0].name} {median(each):.3f} ({min(each):.2f}..{max(each):.2f})"
            print(
                f"  {way.name}: {rate:.1f} tokens/s, {over}; a token: {counts} {way.self_test.state or ''}", flush=True
            )
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
