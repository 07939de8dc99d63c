"""How near the Triton kernels come to what the GPU's memory can do.

    python -m benchmarks.gpu_kernels            a table
    python -m benchmarks.gpu_kernels --json     the same, and one JSON line at the end

decode   48 MoE layers at batch 1 (Qwen3-30B-A3B's shape: 2048 x 768, top-8), each with other experts than the last, so
         that together they are more than any L2 cache holds; as a share of the time in which the GPU copies as many
         bytes, those read and those written counted. The goal is 0.60.
         graph: as a CUDA graph, the GPU's own time; run: called layer by layer from Python, as long as that takes
rows     the same as a graph with more than one row for each expert
prefill  16 experts with many rows each, beside torch's bfloat16 matrix products on the dequantised weights
trunk    the INT8 matrices of 48 layers' attention (Qwen3-30B-A3B's), one after the other, with bfloat16 rows: few
         beside a copy of as many bytes, as in decode, many beside torch's products with bfloat16 matrices

Times are between CUDA events. Contenders take turns in random order within a round; printed are medians, the middle
half of the rounds, and the median of the ratios within the rounds.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pocketmoe.quant.activations import Activation
from pocketmoe.quant.codecs import RecordLayout, decode_expert, get_codec, packed_format
from pocketmoe.quant.kernels import ExpertJob
from pocketmoe.quant.linear import PackedMatrix, matrix_format
from pocketmoe.quant.triton_kernels import Schedule, TritonKernels, load_triton, schedule, why_missing
from pocketmoe.quant.triton_linear import TritonLinear

from benchmarks.kernels import SHAPE, TOP_K, WARM_UP, random_expert, result, show

LAYERS, PREFILL_EXPERTS = 48, 16
ATTENTION = ((4096, 2048), (512, 2048), (512, 2048), (2048, 4096))
"""Rows and columns of queries, keys, values and output."""


def measure(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds on the GPU of each contender in each round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(1).shuffle
    for round_ in range(rounds + WARM_UP):
        shuffle(order)
        for name in order:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            contenders[name]()
            end.record()
            end.synchronize()
            if round_ >= WARM_UP:
                times[name].append(begin.elapsed_time(end) / 1e3)
    return times


def as_graph(work: Callable[[], object]) -> Callable[[], object]:
    """`work` recorded as a CUDA graph, after it ran once for what has to be compiled."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def copy_of(nbytes: int) -> Callable[[], object]:
    """A copy that reads and writes so many bytes together."""
    source, target = torch.empty(2, nbytes // 2, dtype=torch.uint8, device="cuda")
    return lambda: target.copy_(source)


def make_kernels(codec: str, layout: RecordLayout) -> TritonKernels:
    fmt = packed_format(get_codec(codec))
    if fmt is None:
        raise SystemExit(f"the Triton kernels have no codec {codec!r}, only packed INT4 and MXFP4")
    return TritonKernels(fmt, layout, SHAPE, Activation("silu"))


def bench_decode(codec: str, count: int, rounds: int) -> list[dict]:
    layout, record = random_expert(codec)
    slots = record.cuda().expand(LAYERS * TOP_K, -1).contiguous()
    order = random.Random(0).sample(range(len(slots)), len(slots))
    layers = [
        [ExpertJob(slots[i], j * count, count) for j, i in enumerate(order[at : at + TOP_K])]
        for at in range(0, len(order), TOP_K)
    ]
    kernels = make_kernels(codec, layout)
    hidden = torch.randn(count, SHAPE.hidden, device="cuda")
    rows = torch.arange(count, dtype=torch.int32, device="cuda").repeat(TOP_K)
    out = torch.empty(len(rows), SHAPE.hidden, device="cuda")
    schedules = [Schedule(table.cuda(), launches) for table, launches in map(schedule, layers)]

    def launch() -> None:
        for prepared in schedules:
            kernels.launch(hidden, rows, prepared, out)

    def run() -> None:
        for jobs in layers:
            kernels.run(hidden, rows, jobs, out)

    contenders = {"copy": copy_of(slots.nbytes), "graph": as_graph(launch)}
    if count == 1:
        contenders["run"] = run
    times = measure(contenders, rounds)
    what = f"decode {codec}" if count == 1 else f"{count} rows an expert, {codec}"
    return [result(what, name, times, "copy", slots.nbytes, "GB/s") for name in times]


def bench_prefill(codec: str, count: int, rounds: int) -> list[dict]:
    layout, record = random_expert(codec)
    slots = record.cuda().expand(PREFILL_EXPERTS, -1).contiguous()
    jobs = [ExpertJob(slot, i * count, count) for i, slot in enumerate(slots)]
    hidden = torch.randn(count, SHAPE.hidden, device="cuda")
    rows = torch.arange(count, dtype=torch.int32, device="cuda").repeat(PREFILL_EXPERTS)
    out = torch.empty(len(rows), SHAPE.hidden, device="cuda")
    kernels = make_kernels(codec, layout)
    prepared = schedule(jobs)
    prepared = Schedule(prepared.table.cuda(), prepared.launches)
    dense = decode_expert(get_codec(codec), layout, record, torch.bfloat16)
    gate, up, down = (dense[f"{name}_proj"].cuda().expand(PREFILL_EXPERTS, -1, -1) for name in ("gate", "up", "down"))
    gate, up, down = (matrices.contiguous().transpose(1, 2) for matrices in (gate, up, down))
    x = hidden.bfloat16().expand(PREFILL_EXPERTS, -1, -1).contiguous()
    times = measure(
        {
            "torch bf16": as_graph(lambda: (F.silu(x @ gate) * (x @ up)) @ down),
            "graph": as_graph(lambda: kernels.launch(hidden, rows, prepared, out)),
        },
        rounds,
    )
    operations = 2 * 3 * SHAPE.hidden * SHAPE.intermediate * len(rows)
    what = f"prefill {count} rows, {codec}"
    return [result(what, name, times, "torch bf16", operations, "GFLOP/s") for name in times]


def bench_trunk(fmt: str, count: int, rounds: int, prompt: bool) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    matrices = [PackedMatrix.pack(torch.randn(*size, generator=generator), matrix_format(fmt)) for size in ATTENTION]
    rows = {cols: torch.randn(count, cols, device="cuda").bfloat16() for _, cols in ATTENTION}
    packed = [
        TritonLinear(matrix._replace(data=matrix.data.to("cuda", copy=True)), torch.bfloat16)
        for _ in range(LAYERS)
        for matrix in matrices
    ]
    dense = [linear.packed.dequantize(torch.bfloat16) for linear in packed]

    def run() -> None:
        for linear in packed:
            linear(rows[linear.in_features])

    def plain() -> None:
        for weight in dense:
            F.linear(rows[weight.shape[1]], weight)

    nbytes = sum(linear.packed.data.nbytes for linear in packed)
    contenders = {"torch": as_graph(plain), "graph": as_graph(run)}
    what = f"trunk {fmt}, {count} rows" if count > 1 else f"trunk {fmt}"
    if prompt:
        operations = 2 * count * sum(weight.numel() for weight in dense)
        times = measure(contenders, rounds)
        return [result(what, name, times, "torch", operations, "GFLOP/s") for name in times]
    times = measure({"copy": copy_of(nbytes), **contenders, **({"run": run} if count == 1 else {})}, rounds)
    return [result(what, name, times, "copy", nbytes, "GB/s") for name in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON line at the end")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--codec", nargs="+", default=["int4-g32-zp", "mxfp4"])
    parser.add_argument("--trunk", nargs="+", default=["int8-g32"], help="formats of the trunk")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="rows an expert in decoding")
    parser.add_argument("--count", nargs="+", type=int, default=[32, 128, 512], help="rows an expert in prefill")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA GPU here; benchmarks.kernels measures the CPU kernels.")
    if load_triton() is None:
        raise SystemExit(why_missing())
    results = []
    for codec in options.codec:
        for count in options.rows:
            results += bench_decode(codec, count, options.rounds)
        for count in options.count:
            results += bench_prefill(codec, count, options.rounds)
    for fmt in options.trunk:
        for prompt, counts in ((False, options.rows), (True, options.count)):
            for count in counts:
                results += bench_trunk(fmt, count, options.rounds, prompt)
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, {options.rounds} rounds")
    show(results)
    if options.json:
        print(json.dumps({"device": device, "results": results}))


if __name__ == "__main__":
    main()
