"""The table of docs/what-fits.md: published models on usual machines, planned from their config.json alone.

python -m benchmarks.what_fits > docs/what-fits.md        about two minutes; no weights, no network, no GPU
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from pocketmoe.offload.errors import MemoryBudgetError
from pocketmoe.offload.estimate import Rates
from pocketmoe.offload.outline import Outline
from pocketmoe.offload.outline_reader import read_outline
from pocketmoe.offload.outlook import Fit, Machine, fit

PUBLISHED = Path(__file__).with_name("published_models.json")
VRAM, RAM = (None, 8, 16, 24), (16, 32, 64)
RATES = Rates(ram=40e9, disk=3.5e9, vram=300e9)
PROGRAM = 450_000_000
RAM_SHARE, VRAM_SHARE = 0.85, 0.95
CONTEXT = 4096

HEAD = f"""# What fits where

Which published Mixture-of-Experts models run on which machine, and about how fast. Made by

    python -m benchmarks.what_fits > docs/what-fits.md

from the values of each model's `config.json` that decide sizes (`benchmarks/published_models.json`, which says how far
each was checked), without weights, with what `pocketmoe plan` uses: **estimates, not measurements.** For your own
machine: `pocketmoe plan MODEL`, for another one `pocketmoe plan MODEL --vram 8GB --ram 27GB --disk 3.5GB/s`.

Assumed: RAM read at {RATES.ram / 1e9:.0f} GB/s, the disk at {RATES.disk / 1e9:.1f}, VRAM at {RATES.vram / 1e9:.0f};
{RAM_SHARE:.0%} of the RAM and {VRAM_SHARE:.0%} of the VRAM for pocketmoe, 400 MB of the latter for CUDA; experts in
the default format (INT4, or MXFP4 where they ship so), the trunk in INT8; a context of {CONTEXT:,} tokens, and a
conversation at its beginning; hits as in recorded decodes of gpt-oss-20b (`cache/hit_curve.py`). Without a GPU the
formula gives 0.96 to 1.13 of the speeds that were measured (`tests/test_estimate.py`); with one it has not been
compared with anything yet.

Cells are tokens per second. *Slanted*: some experts are read from the disk. `c`: the trunk does not fit into that GPU,
so the CPU computes all. A dash: it does not fit, not even with experts on the disk."""


def models() -> dict[str, dict[str, Any]]:
    """The values of config.json that decide sizes, by repository."""
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))["models"]


def outline(name: str, config: dict[str, Any]) -> Outline:
    """The outline of one of `models()`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(config), encoding="utf-8")
        return read_outline(path, name=name)


def place(model: Outline, vram: int | None, ram: int) -> Fit | None:
    """A model on a machine of that many GB; None when it does not fit."""
    budget = None if vram is None else int(vram * 1e9 * VRAM_SHARE)
    try:
        return fit(model, Machine(RATES, PROGRAM, int(ram * 1e9 * RAM_SHARE), budget), min(CONTEXT, model.longest))
    except MemoryBudgetError:
        return None


def cell(placed: Fit | None) -> str:
    if placed is None:
        return "–"
    speed = placed.tokens_per_second
    text = f"{speed:.0f}" if speed >= 10 else f"{speed:.1f}"
    if placed.read.disk:
        text = f"*{text}*"
    return f"{text} c" if placed.without_gpu else text


def table(vram: int | None, outlines: dict[str, Outline]) -> list[str]:
    """Markdown: a row for each model, a column for each amount of RAM."""
    title = "Without a GPU" if vram is None else f"{vram} GB of VRAM"
    lines = [f"## {title}", "", "| model | store, GB | " + " | ".join(f"{ram} GB RAM" for ram in RAM) + " |"]
    lines.append("|---|---|" + "---|" * len(RAM))
    for name, model in outlines.items():
        cells = [cell(place(model, vram, ram)) for ram in RAM]
        lines.append(f"| {name.partition('/')[2]} | {model.chosen.total / 1e9:.0f} | " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    outlines = {name: outline(name, config) for name, config in models().items()}
    outlines = dict(sorted(outlines.items(), key=lambda item: item[1].chosen.total))
    print("\n".join([HEAD, *(line for vram in VRAM for line in ("", *table(vram, outlines)))]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
