"""What a model's routing looks like to a cache: measured on a store, or read from a trace of a real model."""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

CACHED = (0.25, 0.4, 0.5, 0.6)


def measure_routing(store: Path, kind: str, tokens: int, seed: int = 1, threads: int = 2) -> dict[str, Any]:
    """Feed a token stream one token at a time and describe which experts the model's router chose."""
    from pocketmoe.cache.trace import read_trace
    from pocketmoe.offload import load

    from .synthetic_weights import token_stream

    with tempfile.TemporaryDirectory() as folder:
        trace = str(Path(folder) / "trace.npz")
        with load(store, threads=threads, context=tokens + 8, prefetch=False, verify=False, trace=trace) as model:
            sequence = model.new_sequence()
            for token in token_stream(kind, tokens, model.transformers_model.config.vocab_size, seed):
                sequence.feed([token])
        routing = read_trace(trace)
    return describe(routing.experts.astype(int), routing.num_experts, np.zeros(tokens, int))


def describe_trace(path: Path) -> dict[str, Any]:
    """The same of a trace: `experts` [tokens, layers, k] and `seq` [tokens] (which tokens follow each other)."""
    with np.load(path, allow_pickle=False) as data:
        experts, sequence = data["experts"].astype(int), data["seq"]
    return describe(experts, int(experts.max()) + 1, sequence)


def describe(chosen: np.ndarray, experts: int, sequence: np.ndarray) -> dict[str, Any]:
    """Per layer: reuse of the previous token's experts, effective experts as a share of all, LRU hit rates.

    Args:
        chosen: int [tokens, layers, k].
        sequence: int [tokens]; tokens of different sequences are not compared.
    """
    layers = range(chosen.shape[1])
    limit = 6000  # tokens for the caches: enough, and quick
    hits = {f"lru_{share:g}": [lru(chosen[:limit, i], int(share * experts)) for i in layers] for share in CACHED}
    per_layer = {
        "reuse": [reuse(chosen[:, i], sequence) for i in layers],
        "effective": [effective(chosen[:, i], experts) / experts for i in layers],
        **hits,
    }
    return {
        "tokens": len(chosen),
        "experts": experts,
        "top_k": chosen.shape[2],
        "mean": {name: float(np.mean(values)) for name, values in per_layer.items()},
        "per_layer": {name: [round(float(v), 4) for v in values] for name, values in per_layer.items()},
    }


def reuse(chosen: np.ndarray, sequence: np.ndarray) -> float:
    """The share of a token's experts that the previous token of its sequence used too."""
    together = sequence[1:] == sequence[:-1]
    now, before = chosen[1:][together], chosen[:-1][together]
    return float((now[:, :, None] == before[:, None, :]).any(-1).mean())


def effective(chosen: np.ndarray, experts: int) -> float:
    """exp(entropy) of how often each expert is used: `experts` when all are alike."""
    share = np.bincount(chosen.ravel(), minlength=experts) / chosen.size
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def lru(chosen: np.ndarray, slots: int) -> float:
    """Hit rate of an LRU cache of one layer."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for expert in chosen.ravel().tolist():
        if expert in held:
            hits += 1
            held.move_to_end(expert)
        else:
            if len(held) >= slots:
                held.popitem(last=False)
            held[expert] = None
    return hits / chosen.size


def report_lines(found: dict[str, dict[str, Any]]) -> list[str]:
    """A table of means, with the lowest and highest layer."""
    names = ["reuse", "effective", *(f"lru_{share:g}" for share in CACHED)]
    lines = [f"{'routing':10} {'top-k/experts':>13} " + " ".join(f"{name:>18}" for name in names)]
    for kind, d in found.items():
        cells = [
            f"{d['mean'][name]:.2f} ({min(d['per_layer'][name]):.2f}-{max(d['per_layer'][name]):.2f})" for name in names
        ]
        lines.append(f"{kind:10} {d['top_k']:>6}/{d['experts']:<6} " + " ".join(f"{cell:>18}" for cell in cells))
    lines.append("reuse: share of a token's experts that the previous token used; effective: exp(entropy) / experts;")
    lines.append("lru_x: hit rate of an LRU cache of that share of each layer's experts")
    return lines
