"""How well the next layer's experts can be guessed from recorded routing alone, with no router to ask.

    python -m benchmarks.next_layer TRACE [--guesses 8] [--penalty 20]

For each layer a linear map is fitted by ridge regression, from who was chosen before to who is chosen next, on the
sequences with an even number; recall is that of the others: the share of a layer's experts among its likeliest ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from pocketmoe.cache.trace import DECODE, Trace, read_trace

KNOWN = ("popularity", "the layer before", "two layers before", "all layers before", "those and the token before")


def chosen_matrix(experts: np.ndarray, count: int) -> np.ndarray:
    """float32 [T, count] of indices [T, k]: 1 where an expert is chosen; indices from `count` on are nobody's."""
    found = np.zeros((len(experts), count + 1), np.float32)
    np.put_along_axis(found, np.minimum(experts, count).astype(np.int64), 1.0, axis=1)
    return found[:, :count]


def recall(trace: Trace, known: str, guesses: int, penalty: float) -> list[float]:
    """Of each layer but the first."""
    decoded = trace.phase == DECODE
    experts, seq = trace.experts[decoded], trace.seq[decoded]
    by_layer = [chosen_matrix(experts[:, layer], trace.num_experts) for layer in range(trace.layers)]
    fitted, began = seq % 2 == 0, np.flatnonzero(np.diff(seq, prepend=seq[0] - 1))
    found = []
    for layer in range(1, trace.layers):
        before = {"popularity": 0, "the layer before": 1, "two layers before": 2}.get(known, layer)
        inputs = [np.ones((len(seq), 1), np.float32), *by_layer[max(0, layer - before) : layer]]
        if known == KNOWN[-1]:
            last = np.roll(by_layer[layer], 1, axis=0)
            last[began] = 0.0
            inputs.append(last)
        x, y = np.concatenate(inputs, axis=1), by_layer[layer]
        fit = x[fitted]
        weights = np.linalg.solve(fit.T @ fit + penalty * np.eye(x.shape[1], dtype=np.float32), fit.T @ y[fitted])
        likeliest = np.argsort(-(x[~fitted] @ weights), axis=1, kind="stable")[:, :guesses]
        hits = np.take_along_axis(y[~fitted], likeliest, axis=1)
        found.append(float(hits.sum() / y[~fitted].sum()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--guesses", type=int, default=8, help="for each layer (default 8)")
    parser.add_argument("--penalty", type=float, default=20.0, help="of the regression (default 20)")
    args = parser.parse_args()
    trace = read_trace(args.trace)
    print(f"{trace.layers} layers x {trace.num_experts} experts, top-{trace.top_k}, {args.guesses} guesses a layer")
    for known in KNOWN:
        layers = recall(trace, known, args.guesses, args.penalty)
        print(f"{known:26} {np.mean(layers):.3f}  ({min(layers):.2f} to {max(layers):.2f})", flush=True)


if __name__ == "__main__":
    main()
