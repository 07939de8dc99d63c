"""What the expert cache's bookkeeping costs per layer and token, in microseconds. No bytes move.

    python benchmarks/cache_bookkeeping.py [--policy lru] [--tokens 100] [--plain]

One layer-step is what decoding does for one MoE layer: lookup of top-k experts, lock, admit and arrive for each miss,
unlock; and one tick per token. The shape is that of Qwen3-30B-A3B (48 layers, 128 experts, top-8).
`skewed` reuses experts about as real routing does, `uniform` hardly does, `disjoint` never while less than all fit.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from itertools import accumulate

from pocketmoe.cache.manager import ExpertCache
from pocketmoe.cache.plain_cache import PlainCache
from pocketmoe.cache.policy import get_policy, policy_names
from pocketmoe.offload.native_cache import make_cache

LAYERS, EXPERTS, TOP_K = 48, 128, 8
CYCLE, SHAPE = LAYERS * TOP_K, [EXPERTS] * LAYERS


def routing(kind: str, tokens: int, rng: random.Random) -> list[list[list[int]]]:
    """[tokens][layers] lists of TOP_K distinct experts."""
    if kind == "disjoint":
        return [[[(t * TOP_K + i) % EXPERTS for i in range(TOP_K)] for _ in range(LAYERS)] for t in range(tokens)]
    weight = [1.0 if kind == "uniform" else 1.0 / (rank + 1) for rank in range(EXPERTS)]
    cumulative = list(accumulate(weight))
    orders = [rng.sample(range(EXPERTS), EXPERTS) for _ in range(LAYERS)]

    def choose(order: list[int]) -> list[int]:
        chosen: dict[int, None] = {}
        while len(chosen) < TOP_K:
            chosen[order[rng.choices(range(EXPERTS), cum_weights=cumulative)[0]]] = None
        return list(chosen)

    return [[choose(orders[layer]) for layer in range(LAYERS)] for _ in range(tokens)]


def run(cache: ExpertCache, tokens: list[list[list[int]]]) -> tuple[list[float], int]:
    """Microseconds per layer-step, one number per token, and the hits."""
    micros, hits = [], 0
    for layers in tokens:
        start = time.perf_counter()
        for layer, indices in enumerate(layers):
            wanted = cache.lookup(layer, indices)
            with cache.locked(wanted):
                admissions = cache.admit_all(wanted.misses)
                assert len(admissions) == len(wanted.misses), f"no slots for {wanted.misses}"
                for expert in wanted.misses:
                    cache.arrived(expert)
            hits += len(wanted.hits)
        cache.tick()
        micros.append((time.perf_counter() - start) / LAYERS * 1e6)
    return micros, hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", choices=policy_names(), help="only this one (default: all)")
    parser.add_argument("--tokens", type=int, default=100, help="measured, after as many to warm up (default 100)")
    parser.add_argument("--plain", action="store_true", help="without the native library")
    args = parser.parse_args()
    print(f"{LAYERS} layers x {EXPERTS} experts, top-{TOP_K}; medians over {args.tokens} tokens")
    print(f"{'policy':7} {'slots':>6} {'routing':9} {'hits':>6} {'us/layer-step':>14} {'p90':>6}")
    for kind in ("skewed", "uniform", "disjoint"):
        tokens = routing(kind, 2 * args.tokens, random.Random(0))
        for name in [args.policy] if args.policy else policy_names():
            for capacity in (CYCLE, CYCLE + 16, 1536, 3072, LAYERS * EXPERTS):
                if args.plain:
                    cache = PlainCache(capacity, get_policy(name, capacity, CYCLE), LAYERS, TOP_K)
                else:
                    cache = make_cache(name, capacity, CYCLE, SHAPE, TOP_K)
                run(cache, tokens[: args.tokens])
                micros, hits = run(cache, tokens[args.tokens :])
                cache.check_integrity(idle=True)
                rate = hits / (args.tokens * CYCLE)
                p90 = sorted(micros)[len(micros) * 9 // 10]
                print(f"{name:7} {capacity:6} {kind:9} {rate:6.1%} {statistics.median(micros):14.1f} {p90:6.1f}")


if __name__ == "__main__":
    main()
