"""One engine in one fresh process: feeds given token ids, prints one line of JSON. Started by `compare`.

    python -m benchmarks.worker pocketmoe|transformers|accelerate MODEL IDS [options]

Prefill: once for warming up, then REPEATS times, each on an empty cache; then, on an empty cache, WARM ids one at a
time that do not count and DECODE ids one at a time that do. pocketmoe runs through its public API's `Sequence.feed`, so
it computes what `generate` computes, without sampling and text; the others through `model(...)` with their own KV
cache, likewise without `generate()`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT = 1024


def _proc(path: str, name: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    return -1


def measure(options: argparse.Namespace, reset: Callable[[], Any], feed: Callable[[list[int]], Any]) -> dict[str, Any]:
    """Seconds of each prefill and of each decoded token, and bytes that came from the disk while decoding."""
    ids = np.fromfile(options.ids, dtype=np.int32).tolist()
    place = 0

    def take(count: int) -> list[int]:
        nonlocal place
        place += count
        assert place <= len(ids), (place, len(ids))
        return ids[place - count : place]

    prefill: list[float] = []
    for repeat in range(options.repeats + 1 if options.prefill else 0):
        part = take(options.prefill)
        reset()
        begin = time.perf_counter()
        feed(part)
        if repeat:
            prefill.append(time.perf_counter() - begin)
    reset()
    for token in take(options.warm):
        feed([token])
    options.on_warm()
    before = _proc("/proc/self/io", "read_bytes:")
    decode, argmax = [], []
    for token in take(options.decode):
        begin = time.perf_counter()
        logits = feed([token])
        decode.append(time.perf_counter() - begin)
        argmax.append(int(logits.argmax()))
    return {
        "prefill_s": prefill,
        "decode_s": decode,
        "argmax": argmax,
        "disk_bytes": _proc("/proc/self/io", "read_bytes:") - before,
    }


def run_pocketmoe(options: argparse.Namespace) -> dict[str, Any]:
    from pocketmoe.offload import load

    settings: dict[str, Any] = {"threads": options.threads, "context": CONTEXT, "warm_start": False}
    if options.ram:
        settings["ram"] = options.ram
    if options.slots:
        settings["slots"] = options.slots
    if options.no_prefetch:
        settings["prefetch"] = False
    begin = time.perf_counter()
    with load(options.model, **settings) as model:
        loaded = time.perf_counter() - begin
        sequence = model.new_sequence()
        options.on_warm = model.reset_stats
        result = measure(options, sequence.reset, sequence.feed)
        stats, needs = model.stats(), model.plan.needs
        counters = stats.to_dict()
        after = model.plan.budget - needs.program - needs.trunk - needs.kv
        return result | {
            "load_s": loaded,
            "plan": str(model.plan),
            "bytes_read": counters["bytes_read"],
            "requests": counters["requests"],
            "hit_rate": counters["hit_rate"],
            "kernels": counters["kernels"],
            "io": counters["io"],
            "compute_s": stats.compute_s,
            "stall_s": counters["stall_s"],
            "read_busy_s": stats.read_busy_s,
            "prefetch": {k: v for k, v in counters.items() if k.startswith("prefetch")},
            "moe_layers": stats.layers,
            "slots": counters["slots"],
            "record_bytes": stats.record_bytes,
            "trunk_bytes": needs.trunk,
            "program_bytes": needs.program,
            "cache_share": model.plan.slot_bytes / after,
            "budget": model.plan.budget,
            "peak_rss": counters["peak_rss_bytes"],
        }


def run_transformers(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.offload_folder) as folder:
        placed: dict[str, Any] = {}
        if options.engine == "accelerate":
            # As generous as it gets: everything but the decoder layers stays in memory.
            resident = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
            placed = {
                "device_map": {**dict.fromkeys(resident, "cpu"), "model.layers": "disk"},
                "offload_folder": folder,
            }
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, **placed)
        model.eval()
        loaded = time.perf_counter() - begin
        cache = DynamicCache(config=model.config)

        def reset() -> None:
            nonlocal cache
            cache = DynamicCache(config=model.config)

        @torch.inference_mode()
        def feed(ids: list[int]) -> torch.Tensor:
            # Its fastest way for each: one matrix product per chosen expert, or one grouped product.
            model.set_experts_implementation("eager" if len(ids) == 1 else "grouped_mm")
            start = cache.get_seq_length()
            positions = torch.arange(start, start + len(ids))[None]
            output = model(
                input_ids=torch.tensor([ids]),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            return output.logits[0, -1]

        options.on_warm = lambda: None
        result = measure(options, reset, feed)
    return result | {"load_s": loaded, "peak_rss": _proc("/proc/self/status", "VmHWM:") * 1024}


def run_stream(options: argparse.Namespace) -> dict[str, Any]:
    """The rate at which all threads can read memory that is in no cache: the limit of every decode in RAM."""
    import torch
    from pocketmoe.quant.native import NativePool

    pool = NativePool(options.threads)
    size = 8 << 20
    slots = torch.zeros(2 << 30, dtype=torch.uint8).fill_(1).view(-1, size)
    rng, rates = np.random.default_rng(0), []
    for _ in range(60):
        buffers = [slots[i] for i in rng.choice(len(slots), 3, replace=False)]
        begin = time.perf_counter()
        pool.stream(buffers)
        rates.append(3 * size / (time.perf_counter() - begin))
    return {"stream_bytes_per_s": float(np.median(rates[5:])), "isa": pool.isa}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["pocketmoe", "transformers", "accelerate", "stream"])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("ids", nargs="?", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ram", type=int, help="bytes")
    parser.add_argument("--slots", type=int)
    parser.add_argument("--no-prefetch", action="store_true")
    parser.add_argument("--prefill", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--warm", type=int, default=8)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--offload-folder", type=Path)
    options = parser.parse_args()
    run = {"pocketmoe": run_pocketmoe, "stream": run_stream}.get(options.engine, run_transformers)
    print(json.dumps(run(options)))


if __name__ == "__main__":
    main()
