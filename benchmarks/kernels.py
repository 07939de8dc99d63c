"""How near the native CPU kernels come to what the machine can do.

    python -m benchmarks.kernels            a table
    python -m benchmarks.kernels --json     the same, and one JSON line at the end

decode   one MoE layer at batch 1 (Qwen3-30B-A3B's shape: 2048 x 768, top-8), experts drawn at random from a pool that
         no cache can hold, as a share of a pure streaming read of as many bytes by the same threads
gap      the same after 0.3 ms of other work, as attention would take: the worker threads have gone to sleep
trunk    one row through INT8 matrices of attention's size, cold, likewise
prefill  one expert with many rows against three torch bf16 linears and the activation, on the dequantised weights

Contenders take turns in random order within a round, because the machine's speed moves between rounds. Printed are
medians, the middle half of the rounds, and the median of the ratios within the rounds. torch uses AMX where the
processor has it; ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 in the environment shows what it does on one without.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pocketmoe.quant import int8
from pocketmoe.quant.activations import Activation
from pocketmoe.quant.codecs import (
    ExpertShape,
    RecordLayout,
    Weight,
    decode_expert,
    encode_expert,
    get_codec,
    record_layout,
)
from pocketmoe.quant.int8 import Int8Format
from pocketmoe.quant.kernels import ExpertJob
from pocketmoe.quant.mxfp4 import Mxfp4Matrix
from pocketmoe.quant.native import NativeKernels, NativeMatrix, NativePool, default_threads, load_native, why_missing

SHAPE, TOP_K = ExpertShape(2048, 768), 8
WARM_UP = 3


def huge_pages(nbytes: int) -> torch.Tensor:
    """Zeroed memory, uint8 [nbytes], in huge pages where the system has them."""
    # Private: shared anonymous memory is a file in memory to Linux, which gets no huge pages by default.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, nbytes, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def measure(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    before: Callable[[str], object] = lambda name: None,
    gap: float = 0.0,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round; `before(name)` and a busy gap precede each, unmeasured."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(1).shuffle
    for round_ in range(rounds + WARM_UP):
        shuffle(order)
        for name in order:
            before(name)
            resume = time.perf_counter() + gap
            while time.perf_counter() < resume:
                pass
            begin = time.perf_counter()
            contenders[name]()
            elapsed = time.perf_counter() - begin
            if round_ >= WARM_UP:
                times[name].append(elapsed)
    return times


def result(what: str, name: str, times: dict[str, list[float]], baseline: str, amount: float, unit: str) -> dict:
    """One line of the report: `amount` bytes or operations per call, compared with the baseline round by round."""
    low, middle, high = statistics.quantiles(times[name], n=4)
    ratio = statistics.median(b / t for b, t in zip(times[baseline], times[name], strict=True))
    numbers = {"us": middle * 1e6, "us_quartiles": [low * 1e6, high * 1e6], "rate": amount / middle / 1e9, "unit": unit}
    return {"what": what, "kernel": name, **numbers, "baseline": baseline, "ratio": ratio}


def show(results: list[dict]) -> None:
    for r in results:
        low, high = r["us_quartiles"]
        times = f"{r['us']:8.0f} us ({low:.0f}..{high:.0f})"
        rate = f"{r['rate']:7.1f} {r['unit']:8} {r['ratio']:5.2f} x {r['baseline']}"
        print(f"{r['what']:30} {r['kernel']:11}{times:28} {rate}")


def random_expert(codec_name: str) -> tuple[RecordLayout, torch.Tensor]:
    layout = record_layout(get_codec(codec_name), SHAPE)
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Weight] = {}
    for name, (rows, cols) in SHAPE.parts().items():
        if codec_name == "mxfp4":
            blocks = torch.randint(256, (rows, cols // 32, 16), generator=generator, dtype=torch.uint8)
            weights[name] = Mxfp4Matrix(blocks, torch.full((rows, cols // 32), 120, dtype=torch.uint8))
        else:
            weights[name] = torch.randn(rows, cols, generator=generator) / 30
    return layout, encode_expert(get_codec(codec_name), layout, weights)


def bench_decode(pool: NativePool, isas: list[str], codec: str, nbytes: int, rounds: int, gap: float) -> list[dict]:
    layout, record = random_expert(codec)
    slots = huge_pages(nbytes // layout.nbytes * layout.nbytes).view(-1, layout.nbytes)
    slots[:] = record
    hidden, out = torch.randn(1, SHAPE.hidden), torch.empty(TOP_K, SHAPE.hidden)
    rows = torch.zeros(TOP_K, dtype=torch.int32)
    kernels = NativeKernels(codec, layout, SHAPE, Activation("silu"), pool=pool)
    draw, chosen = random.Random(0), []

    def before(name: str) -> None:
        pool.isa = name if name in isas else isas[0]
        chosen[:] = [slots[i] for i in draw.sample(range(len(slots)), TOP_K)]

    contenders: dict[str, Callable[[], object]] = {"read": lambda: pool.stream(chosen)}
    for isa in isas:
        contenders[isa] = lambda: kernels.run(hidden, rows, [ExpertJob(r, i, 1) for i, r in enumerate(chosen)], out)
    times = measure(contenders, rounds, before, gap)
    what = f"decode {codec}" + (f" after {gap * 1e3:g} ms" if gap else "")
    return [result(what, name, times, "read", TOP_K * layout.nbytes, "GB/s") for name in times]


def bench_trunk(pool: NativePool, isas: list[str], rounds: int) -> list[dict]:
    shape, fmt = (4096, 2048), Int8Format(32)
    packed = int8.pack(*int8.quantize(torch.randn(shape), fmt), fmt)
    slots = huge_pages((1 << 30) // packed.nbytes * packed.nbytes).view(-1, packed.nbytes)
    slots[:] = packed
    matrices = [NativeMatrix(pool, slot, *shape, fmt) for slot in slots]
    x, out = torch.randn(1, shape[1]), torch.empty(1, shape[0])
    draw, chosen = random.Random(0), [0]

    def before(name: str) -> None:
        pool.isa = name if name in isas else isas[0]
        chosen[0] = draw.randrange(len(matrices))

    views = list(slots)
    contenders: dict[str, Callable[[], object]] = {"read": lambda: pool.stream([views[chosen[0]]])}
    for isa in isas:
        contenders[isa] = lambda: matrices[chosen[0]](x, out)
    times = measure(contenders, rounds, before)
    return [result(f"linear int8 {shape}", name, times, "read", packed.nbytes, "GB/s") for name in times]


def bench_prefill(pool: NativePool, isas: list[str], codec: str, count: int, rounds: int) -> list[dict]:
    layout, record = random_expert(codec)
    dense = decode_expert(get_codec(codec), layout, record, torch.bfloat16)
    hidden, out = torch.randn(count, SHAPE.hidden), torch.empty(count, SHAPE.hidden)
    rows, jobs = torch.arange(count, dtype=torch.int32), [ExpertJob(record, 0, count)]
    hidden_bf16 = hidden.bfloat16()
    kernels = NativeKernels(codec, layout, SHAPE, Activation("silu"), pool=pool)

    def torch_bf16() -> torch.Tensor:
        gate, up = F.linear(hidden_bf16, dense["gate_proj"]), F.linear(hidden_bf16, dense["up_proj"])
        return F.linear(F.silu(gate) * up, dense["down_proj"])

    def before(name: str) -> None:
        pool.isa = name if name in isas else isas[0]

    contenders: dict[str, Callable[[], object]] = {"torch bf16": torch_bf16}
    for isa in isas:
        contenders[isa] = lambda: kernels.run(hidden, rows, jobs, out)
    times = measure(contenders, rounds, before)
    operations = 2 * 3 * SHAPE.hidden * SHAPE.intermediate * count
    what = f"{count} rows an expert, {codec}"
    return [result(what, name, times, "torch bf16", operations, "GFLOP/s") for name in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["decode", "gap", "trunk", "prefill"]
    parser.add_argument("--json", action="store_true", help="one JSON line at the end")
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--threads", type=int, default=default_threads(), help="default: the physical cores")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--codec", nargs="+", default=["int4-g32-zp"])
    parser.add_argument("--isa", nargs="+", help="default: all that this machine has, except portable")
    parser.add_argument("--count", nargs="+", type=int, default=[256], help="rows an expert in prefill")
    parser.add_argument("--pool-gb", type=float, default=3.0, help="memory for the experts; more than any cache")
    options = parser.parse_args()
    library = load_native()
    if library is None:
        raise SystemExit(why_missing())
    isas = options.isa or [isa for isa in library.isas if isa != "portable"] or ["portable"]
    torch.set_num_threads(options.threads)
    pool = NativePool(options.threads)
    results = []
    for codec in options.codec:
        nbytes = int(options.pool_gb * 1e9)
        if "decode" in options.only:
            results += bench_decode(pool, isas, codec, nbytes, options.rounds, gap=0.0)
        if "gap" in options.only:
            results += bench_decode(pool, isas, codec, nbytes, options.rounds, gap=0.0003)
        if "prefill" in options.only:
            for count in options.count:
                results += bench_prefill(pool, isas, codec, count, max(8, options.rounds // 8))
    if "trunk" in options.only:
        results += bench_trunk(pool, isas, options.rounds)
    print(f"{options.threads} threads, torch {torch.__version__}, {options.rounds} rounds")
    show(results)
    if options.json:
        limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
        print(json.dumps({"threads": options.threads, "onednn_max_cpu_isa": limit, "results": results}))


if __name__ == "__main__":
    main()
