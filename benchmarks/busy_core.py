"""What is left of the kernels' speed when another program keeps cores busy.

    python -m benchmarks.busy_core [--busy 1] [--json]

The same MoE layers (Qwen3-30B-A3B's shape, top-8, batch 1, experts from a pool that no cache holds) are computed for
half a second at a time by as many threads as there are cores, alone and beside `--busy` processes that do nothing but
count; torch's bf16 linears on one expert's shapes with as many threads take turns with them. Printed are layers per
second, medians and ranges of the rounds, and the share that is left. With n cores and b busy processes a fair
scheduler leaves n / (n + b) of the machine; a pool whose threads wait for each other at barriers falls far below that.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from pocketmoe.quant.activations import Activation
from pocketmoe.quant.kernels import ExpertJob
from pocketmoe.quant.native import NativeKernels, NativePool, default_threads

from .kernels import SHAPE, TOP_K, huge_pages, random_expert

SPIN = "while True: pass"


def native_layer(threads: int) -> Callable[[], object]:
    layout, record = random_expert("int4-g32")
    slots = huge_pages((2 << 30) // layout.nbytes * layout.nbytes).view(-1, layout.nbytes)
    slots[:] = record
    hidden, out, rows = torch.randn(1, SHAPE.hidden), torch.empty(TOP_K, SHAPE.hidden), torch.zeros(TOP_K).int()
    kernels = NativeKernels("int4-g32", layout, SHAPE, Activation("silu"), pool=NativePool(threads))
    draw = random.Random(0)

    def layer() -> None:
        chosen = draw.sample(range(len(slots)), TOP_K)
        kernels.run(hidden, rows, [ExpertJob(slots[slot], i, 1) for i, slot in enumerate(chosen)], out)

    return layer


def torch_layer(threads: int) -> Callable[[], object]:
    torch.set_num_threads(threads)
    weights = [torch.randn(size, dtype=torch.bfloat16) for size in SHAPE.parts().values() if len(size) == 2]
    inputs = [torch.randn(1, weight.shape[1], dtype=torch.bfloat16) for weight in weights]

    def layer() -> None:
        for _ in range(TOP_K):
            for weight, x in zip(weights, inputs, strict=True):
                torch.nn.functional.linear(x, weight)

    return layer


def rate(layer: Callable[[], object], seconds: float) -> float:
    begin, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begin) < seconds:
        layer()
        count += 1
    return count / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=1, help="processes that count")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    threads = default_threads()
    layers = {"pocketmoe": native_layer(threads), "torch": torch_layer(threads)}
    rates: dict[tuple[str, bool], list[float]] = {(name, busy): [] for name in layers for busy in (False, True)}
    for layer in layers.values():
        rate(layer, options.seconds)
    for _ in range(options.rounds):
        for busy in (False, True):
            others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(options.busy if busy else 0)]
            try:
                if others:
                    rate(layers["pocketmoe"], 0.2)  # the scheduler has noticed them by then
                for name, layer in layers.items():
                    rates[name, busy].append(rate(layer, options.seconds))
            finally:
                for other in others:
                    other.kill()
                    other.wait()
    fair = threads / (threads + options.busy)
    print(f"{threads} threads, {options.busy} busy processes; a fair share is {fair:.2f}")
    result: dict[str, float] = {"fair_share": fair}
    for name in layers:
        alone, beside = rates[name, False], rates[name, True]
        left = result[name] = statistics.median(b / a for a, b in zip(alone, beside, strict=True))
        print(
            f"{name:10s} layers/s alone {statistics.median(alone):6.0f} ({min(alone):.0f}..{max(alone):.0f}), "
            f"beside them {statistics.median(beside):6.0f} ({min(beside):.0f}..{max(beside):.0f}): {left:.2f} is left"
        )
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
