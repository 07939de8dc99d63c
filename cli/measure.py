"""`pocketmoe bench MODEL`: what this machine does with a model, for a table that can be shown to others."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from ..cache.units import as_option, format_bytes
from ..offload.errors import MemoryBudgetError, PocketMoEError
from .chat import display_name
from .console import say
from .progress import StageProgress

FORMAT_VERSION = 1
_WIDTH = 80
_BENCHMARK = "pocketmoe.offload.benchmark"


@dataclass(frozen=True)
class Measuring:
    """What is measured. Budgets are bytes; none = three that are chosen for the model."""

    ram: Sequence[int] = ()
    vram: int | None = None
    context: int | None = None
    prompt_tokens: int = 256
    tokens: int = 128
    warmup: int = 32
    rounds: int = 3


def find_store(model: str, **options: Any) -> Path:
    """`pocketmoe.offload.loading.find_store`, imported late because `--help` needs none of it."""
    from ..offload.loading import find_store

    return find_store(model, **options)


def run_apart(function: str, arguments: dict[str, Any], **watch: Any) -> Any:
    """`pocketmoe.offload.apart.run_apart`, likewise."""
    from ..offload.apart import run_apart

    return run_apart(function, arguments, **watch)


def measure(model: str, what: Measuring) -> dict[str, Any]:
    """Measure a model, downloaded and converted if need be; JSON-serialisable, sizes in bytes, rates per second.

    Raises:
        UsageError, DataError, MemoryBudgetError: as `load` does; a budget that is too small is only said when others
            are not, and so is any error once something has been measured.
    """
    with StageProgress() as progress:
        watch: dict[str, Any] = {"on_progress": progress.update, "on_notice": progress.notice}
        store = find_store(model, ram=max(what.ram, default=None), **watch)
        of_all = {"store": str(store), "budgets": list(what.ram), "context": what.context, "vram": what.vram}
        expected = run_apart(f"{_BENCHMARK}:expect", of_all, what="the plan", **watch)
        results, refusals = [], []
        counts = {"prompt_tokens": what.prompt_tokens, "tokens": what.tokens, "warmup": what.warmup}
        for number, planned in enumerate(expected["planned"], 1):
            of = f"{number} of {len(expected['planned'])}"
            progress.notice(f"measuring with --ram {as_option(planned['ram_budget_bytes'])} ({of})")
            options = {"ram": planned["ram_budget_bytes"], "context": what.context, "vram": what.vram}
            request = {"store": str(store), "options": options, "rounds": what.rounds, **counts}
            try:
                measured = run_apart(f"{_BENCHMARK}:measure", request, what="the measurement", **watch)
            except PocketMoEError as error:
                if not (results or isinstance(error, MemoryBudgetError)):
                    raise
                refusals.append(error)
                continue
            results.append(
                measured
                | {"ram_budget_bytes": planned["ram_budget_bytes"]}
                | {f"planned_{name}": planned[name] for name in ("tokens_per_second", "hit_rate")}
            )
    if not results:
        raise refusals[0]
    for refusal in refusals:
        say(f"left out: {refusal}")
    return {
        "version": FORMAT_VERSION,
        "simulated": False,
        "model": display_name(model),
        "store": str(store),
        "formats": expected["formats"],
        "machine": _machine(store) | {"ram_bytes_per_s": expected["rates"]["ram"]},
        "software": _software(),
        "settings": {**counts, "rounds": what.rounds, "context": what.context, "vram_budget_bytes": what.vram},
        "planned_with": {"rates": expected["rates"], "hit_curve": expected["hit_curve"]},
        "results": results,
    }


def _machine(store: Path) -> dict[str, Any]:
    import psutil

    from ..offload import probe

    try:
        disk = probe.file_system(store).kind
    except OSError:
        disk = None
    cores = psutil.cpu_count(logical=False) or os.cpu_count()
    return {"cpu": probe.processor(), "cores": cores, "ram": psutil.virtual_memory().total, "file_system": disk}


def _software() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    names = ("pocketmoe", "torch", "transformers")
    return {"python": platform.python_version(), "system": platform.system(), **{name: version(name) for name in names}}


def as_lines(data: dict[str, Any]) -> list[str]:
    """What is above the table: the model, the machine and how it was measured."""
    machine, formats, settings, size = data["machine"], data["formats"], data["settings"], format_bytes
    peaks = [result["disk_peak_bytes_per_s"] for result in data["results"] if result["disk_peak_bytes_per_s"]]
    disk = f"{machine['file_system'] or 'disk'} {size(max(peaks))}/s" if peaks else machine["file_system"] or "disk"
    same = formats["experts"] == formats["trunk"]
    what = formats["experts"] if same else f"{formats['experts']}, trunk {formats['trunk']}"
    kernels = data["results"][0]["kernels"]
    parts = (
        f"{machine['cpu']}, {machine['cores']} cores, {kernels}",
        f"RAM {size(machine['ram'])} {size(machine['ram_bytes_per_s'])}/s",
        disk,
        f"{data['model']}, {what}, {size(formats['total'])}",
    )
    how = (
        f"pocketmoe {data['software']['pocketmoe']}: median of {settings['rounds']} answers of {settings['tokens']} "
        f"tokens to prompts of {settings['prompt_tokens']}, after {settings['warmup']} tokens of warm-up"
    )
    return [*wrap(" | ".join(parts), _WIDTH), *wrap(how, _WIDTH)]


def print_table(data: dict[str, Any]) -> None:
    """The results on stdout, at most 80 columns."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    print("\n".join(as_lines(data)))
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    tokens = ("tokens/s", "plan", "prefill")
    for head in ("--ram", "in RAM", *tokens, "hits", "plan", "a token", "of disk", "bound by"):
        table.add_column(head, justify="right", no_wrap=True)
    for result in data["results"]:
        slots, total = result["slots"], result["experts"]
        table.add_row(
            as_option(result["ram_budget_bytes"]),
            f"{slots / total:.0%}" if slots and total else "?",
            _with_spread(result["decode_tokens_per_second"], _rate),
            _rate(result["planned_tokens_per_second"]),
            _with_spread(result["prefill_tokens_per_second"], lambda value: f"{value:.0f}"),
            _share(result["hit_rate"]),
            _share(result["planned_hit_rate"]),
            "-" if result["disk_bytes_per_token"] is None else format_bytes(result["disk_bytes_per_token"]),
            _share(result["disk_use"]),
            result["bound_by"] or "?",
        )
    Console(width=_WIDTH).print(table)
    least, curve = data["results"][0], data["planned_with"]["hit_curve"]
    print("\n".join(wrap(f"With --ram {as_option(least['ram_budget_bytes'])}: {least['verdict']}", _WIDTH)))
    notes = (
        f"prefill: prompt tokens/s; plan: what `pocketmoe plan` expects, hits as in {curve}; a token: read from disk"
    )
    print("\n".join(wrap(notes, _WIDTH)))


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _with_spread(found: dict[str, Any], number: Callable[[float], str]) -> str:
    """The median, and half of the way from the slowest to the fastest."""
    return f"{number(found['median'])} ±{number((found['max'] - found['min']) / 2)}"
