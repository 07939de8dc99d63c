"""Write a checkpoint of real layer shapes with random weights, the same ones in every format.

    python -m benchmarks.synthesize OUT --shape qwen3-30b-a3b --layers 8 --formats store,gguf,hf

    OUT/store        our store, written by `pocketmoe`'s own converter
    OUT/model.gguf   Q4_0, for llama.cpp
    OUT/hf           bfloat16 safetensors, sharded by layer, for transformers (3.6 times the bytes)
    OUT/routing.json what was measured about the routing with `--measure`

How the weights are made, why they are exactly the same numbers in all three, and how one checkpoint serves uniform and
realistic routing: `synthetic_weights.py`. Peak memory is one layer of experts in Q4_0. What exists already is kept.
`--measure` runs both kinds of token streams through our runtime and reports, per layer, how often an expert of the
previous token is used again, the effective number of experts (exp of the entropy of their use), and what LRU caches of
a quarter to 60 % of the experts would hit, beside the same numbers of real decodes where `--trace FILE.npz` names some.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from pocketmoe.offload.convert import convert
from pocketmoe.offload.tensorfile import header_bytes

from .routing import describe_trace, measure_routing, report_lines
from .shapes import SHAPES
from .synthetic_gguf import write_gguf
from .synthetic_source import SyntheticSource
from .synthetic_weights import STREAMS

FORMATS = ("store", "gguf", "hf")
_HF_HEADER = 1 << 16


def write_hf(source: SyntheticSource, dest: Path) -> None:
    """The checkpoint as bfloat16 safetensors under transformers' own parameter names (experts of a layer in one
    tensor), one shard per layer and one for the rest."""
    partial = dest.with_name(dest.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    config = {**source.config, "dtype": "bfloat16"}
    (partial / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    source.copy_files(partial)
    index: dict[str, str] = {}
    sites = source.skeleton.sites
    shards = [f"model-{i + 1:05d}-of-{len(sites) + 1:05d}.safetensors" for i in range(len(sites) + 1)]
    for site, shard in zip(sites, shards, strict=False):
        tensors, position = {}, 0
        for name, (size, dtype) in site.params.items():
            nbytes = int(np.prod(size)) * 2
            assert str(dtype) == "torch.bfloat16", dtype
            tensors[f"{site.name}.{name}"] = ("BF16", size, position, position + nbytes)
            position += nbytes
        with open(partial / shard, "wb") as out:
            out.write(header_bytes(tensors, _HF_HEADER, {"format": "pt"}))
            for expert in range(site.layer.num_experts):
                joined = site.join(source.expert(site.index, expert))
                for name in site.params:
                    _, _, begin, end = tensors[f"{site.name}.{name}"]
                    share = (end - begin) // site.layer.num_experts
                    out.seek(_HF_HEADER + begin + expert * share)
                    out.write(joined[name].bfloat16().contiguous().flatten().view(torch.uint8).numpy().data)
        index |= dict.fromkeys(tensors, shard)
    tensors, position, trunk = {}, 0, dict(source.trunk())
    for name, tensor in trunk.items():
        tensors[name] = ("BF16", tuple(tensor.shape), position, position + tensor.nbytes)
        position += tensor.nbytes
    with open(partial / shards[-1], "wb") as out:
        out.write(header_bytes(tensors, 16 * _HF_HEADER, {"format": "pt"}))
        for tensor in trunk.values():
            out.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    index |= dict.fromkeys(tensors, shards[-1])
    text = json.dumps({"metadata": {}, "weight_map": index})
    (partial / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    partial.rename(dest)


def synthesize(out: Path, shape: str, layers: int, formats: tuple[str, ...], seed: int = 0) -> dict[str, Path]:
    """Write the missing formats; returns the path of each."""
    torch.set_num_threads(
        1
    )  # many small tensors: a second thread wins little and, beside other programs, loses tenfold
    out.mkdir(parents=True, exist_ok=True)
    source = SyntheticSource(SHAPES[shape], layers, seed)
    paths = {"store": out / "store", "gguf": out / "model.gguf", "hf": out / "hf"}
    for name in formats:
        begin = time.perf_counter()
        if name == "store":
            convert(source, paths[name], source.shape.codec)
        elif not paths[name].exists():
            (write_gguf if name == "gguf" else write_hf)(source, paths[name])
        size = sum(f.stat().st_size for f in [paths[name], *paths[name].rglob("*")] if f.is_file())
        print(f"{paths[name]}: {size / 1e9:.2f} GB in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    return {name: paths[name] for name in formats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="default: as many as the real model has")
    parser.add_argument("--formats", default="store", help=f"comma-separated, of {', '.join(FORMATS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--measure", action="store_true", help="measure the routing (needs the store and memory for it)"
    )
    parser.add_argument("--routing", choices=STREAMS, nargs="+", default=STREAMS, help="which streams --measure feeds")
    parser.add_argument("--tokens", type=int, default=1000, help="of each stream for --measure")
    parser.add_argument("--trace", type=Path, help="routing of a real model (.npz with `experts` and `seq`) to compare")
    options = parser.parse_args()
    formats = tuple(options.formats.split(","))
    if unknown := set(formats) - set(FORMATS):
        parser.error(f"unknown formats {', '.join(sorted(unknown))}; known: {', '.join(FORMATS)}")
    if "gguf" in formats and SHAPES[options.shape].gguf_arch is None:
        parser.error(f"no GGUF is written for {options.shape}; leave gguf out of --formats")
    layers = options.layers or SHAPES[options.shape].full_layers
    paths = synthesize(options.out, options.shape, layers, formats, options.seed)
    if options.measure:
        found = {kind: measure_routing(paths["store"], kind, options.tokens) for kind in options.routing}
        if options.trace:
            found["trace"] = describe_trace(options.trace)
        (options.out / "routing.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        print("\n".join(report_lines(found)))


if __name__ == "__main__":
    main()
