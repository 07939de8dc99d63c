"""How fast a checkpoint becomes a store, and how much memory that takes.

    python -m benchmarks.conversion [--layers 2] [--codec int4-g32-zp] [--rounds 3] [--folder DIR] [--json]

Writes a bfloat16 checkpoint of Qwen3-30B-A3B's shapes with the names that it is published under (one tensor per
expert, the real vocabulary of 151,936), converts it in a fresh process each round, the source read from the disk, and
prints MB of source per second and the process's peak resident memory. Everything is removed in the end. The weights
are random; the work does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

import torch
from pocketmoe.offload import hf
from pocketmoe.offload.tensorfile import header_bytes

from .machine import describe, drop_from_page_cache
from .shapes import SHAPES

VOCABULARY = 151936
PROGRAM = """
import json, re, sys, time
from pathlib import Path
from pocketmoe.offload.loading import convert_checkpoint
experts_done = []
def watch(progress):
    if progress.stage == "experts":
        experts_done.append(time.perf_counter())
start = time.perf_counter()
convert_checkpoint(sys.argv[1], sys.argv[2], sys.argv[3], on_progress=watch)
seconds = time.perf_counter() - start
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
experts = (experts_done[-1] - experts_done[0]) / (len(experts_done) - 1)
print(json.dumps({"seconds": seconds, "seconds_per_expert": experts, "peak": peak}))
"""


def write_source(folder: Path, layers: int) -> None:
    """A checkpoint of `layers` layers in one shard each and one for the rest."""
    folder.mkdir()
    config = {**SHAPES["qwen3-30b-a3b"].config_json(layers), "vocab_size": VOCABULARY, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    skeleton = hf.build_skeleton(hf.read_config(folder), torch.bfloat16)
    shards: dict[str, dict[str, tuple[int, ...]]] = {
        "rest": {n: skeleton.full_state[n].shape for n in skeleton.trunk_names()}
    }
    for site in skeleton.sites:
        parts = site.layer.shape.parts().items()
        shards[str(site.index)] = {
            f"{site.name}.{expert}.{part}.weight": size
            for expert in range(site.layer.num_experts)
            for part, size in parts
        }
    weights = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16().view(torch.uint8)
    index: dict[str, str] = {}
    for shard, tensors in shards.items():
        file, entries, position = f"model-{shard}.safetensors", {}, 0
        for name, size in tensors.items():
            entries[name] = ("BF16", tuple(size), position, position := position + prod(size) * 2)
            index[name] = file
        with open(folder / file, "wb") as out:
            out.write(header_bytes(entries, 1 << 20, {"format": "pt"}))
            while position:
                position -= out.write(weights[:position].numpy().data)
            os.fsync(out.fileno())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")


def run(source: Path, store: Path, codec: str) -> dict[str, Any]:
    """One conversion in a process of its own."""
    drop_from_page_cache(source)
    command = [sys.executable, "-c", PROGRAM, str(source), str(store), codec]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    shutil.rmtree(store)
    hidden, inner = 2048, 768
    return {
        "source_bytes": size,
        "mb_per_second": size / 1e6 / result["seconds"],
        "experts_mb_per_second": 3 * hidden * inner * 2 / 1e6 / result["seconds_per_expert"],
        "seconds": result["seconds"],
        "peak_bytes": result["peak"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--codec", default="int4-g32-zp")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the files go for a while (2.5 GB and more)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    print(describe())
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder) / "source"
        write_source(source, options.layers)
        rounds = []
        for _ in range(options.rounds):
            rounds.append(run(source, Path(folder) / "store", options.codec))
            r = rounds[-1]
            print(
                f"{r['source_bytes'] / 1e9:.2f} GB in {r['seconds']:.1f} s: {r['mb_per_second']:.0f} MB/s with start "
                f"and trunk, experts alone {r['experts_mb_per_second']:.0f} MB/s; peak {r['peak_bytes'] / 1e9:.2f} GB",
                flush=True,
            )
            time.sleep(1)
    if options.json:
        print(json.dumps({"codec": options.codec, "layers": options.layers, "rounds": rounds}))


if __name__ == "__main__":
    main()
