"""`pocketmoe plan`: what of a model would fit where, and how fast it would be, before anything large is read."""

from __future__ import annotations

import json as jsonlib
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..cache.units import format_bytes, parse_bytes
from ..offload.errors import MemoryBudgetError, UsageError
from ..offload.naming import locate
from .console import without_controls
from .options import Codec, Revision, Trunk

if TYPE_CHECKING:
    from ..offload.outlook import Fit
    from ..offload.survey import Survey

SCHEMA_VERSION = 1
_WIDTH = 80


def make_survey(model: str, revision: str | None, **options: Any) -> Survey:
    """`pocketmoe.offload.survey.survey`, imported late because `--help`, and a name of nothing, need none of it."""
    locate(model, revision)
    from ..offload.survey import survey

    return survey(model, revision=revision, **options)


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A store, a checkpoint directory, a config.json, a GGUF file, or a model's name on the hub.",
            show_default=False,
        ),
    ],
    ram: Annotated[
        str | None, typer.Option(help="Budget for the whole process, as 16GB. Default: what is free.")
    ] = None,
    vram: Annotated[
        str | None, typer.Option(help="Budget on a GPU, as 8GB. Default: what this machine's has free.")
    ] = (None),
    disk: Annotated[
        str | None, typer.Option(help="Speed of the disk, as 3.5GB/s. Default: measured or assumed.")
    ] = None,
    ram_speed: Annotated[str | None, typer.Option(help="Likewise of the RAM, as 40GB/s.")] = None,
    vram_speed: Annotated[str | None, typer.Option(help="Likewise of the GPU's memory, as 300GB/s.")] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompt and answers. Default: what fits.")
    ] = None,
    codec: Codec = None,
    trunk: Trunk = None,
    revision: Revision = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what of a model fits where and how fast it would answer.

    No weights are loaded or downloaded. Speeds are estimates whose assumptions are printed with them. Ends with 4 when
    the model does not fit.
    """
    speeds = [_rate(name, text) for name, text in (("ram", ram_speed), ("disk", disk), ("vram", vram_speed))]
    budgets = {name: _budget(name, text) for name, text in (("ram", ram), ("vram", vram))}
    from ..offload.estimate import Rates

    found = make_survey(model, revision, **budgets, rates=Rates(*speeds), context=context, codec=codec, trunk=trunk)
    print(jsonlib.dumps(as_data(found)) if json else without_controls("\n".join(as_lines(found))))
    if found.fit is None:
        raise typer.Exit(MemoryBudgetError.exit_code)


def _budget(name: str, text: str | None) -> int | None:
    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise UsageError(f"--{name}: {error}") from None


def _rate(name: str, text: str | None) -> float:
    """Bytes per second; 0 = nothing was said."""
    option = "--disk" if name == "disk" else f"--{name}-speed"
    try:
        return 0.0 if text is None else float(parse_bytes(text.strip().removesuffix("/s")))
    except ValueError:
        raise UsageError(f"{option}: {text!r} is no speed: write for example 3.5GB/s.") from None


def as_lines(survey: Survey) -> list[str]:
    """The plan for a terminal, at most 80 columns."""
    outline, fit = survey.outline, survey.fit
    layers, size = outline.layers, format_bytes
    lines = wrap(
        f"{outline.name}: {outline.model_type}, {outline.parameters / 1e9:.1f} billion parameters, {len(layers)} MoE "
        f"layers of {max(layer.experts for layer in layers)} experts, top-{max(layer.top_k for layer in layers)}",
        _WIDTH,
    )
    lines += ["", f"{'format':33}{'an expert':>11}{'experts':>11}{'trunk':>11}{'total':>11}"]
    for form in outline.formats:
        what = f"{form.experts_as}, trunk {form.trunk_as}" if form.experts_as != form.trunk_as else form.experts_as
        what = ("* " if form is outline.chosen or form == outline.chosen else "  ") + what
        lines.append(
            f"{what:33}{size(form.record):>11}{size(form.experts):>11}{size(form.trunk):>11}{size(form.total):>11}"
        )
    lines += ["* what this plan is for; the others are what it ships as, or could be", ""]
    if fit is None:
        lines += wrap(f"It does not fit: {survey.refusal.rstrip('.')}.", _WIDTH)
    else:
        lines += wrap(survey.lacking, _WIDTH)
        lines += [*_where(survey, fit), "", *_speed(survey, fit)]
    best = survey.changes[0] if survey.changes else None
    lines += _row("change", _change(best, fit))
    lines += _row("assumes", _assumptions(survey, fit))
    return lines


def _row(name: str, text: str) -> list[str]:
    lines = wrap(text, _WIDTH - 10)
    return [f"{name if i == 0 else '':10}{line}" for i, line in enumerate(lines)]


def _where(survey: Survey, fit: Fit) -> list[str]:
    ram, vram, size = fit.ram, fit.vram, format_bytes
    n, record = ram.needs, ram.needs.record
    lines: list[str] = []
    if fit.without_gpu:
        lines += _row("VRAM", f"not used: {fit.without_gpu}")
    if vram is not None:
        v = vram.needs
        lines += _row(
            "VRAM",
            f"{size(vram.budget)} = CUDA {size(v.program)} + trunk {size(v.trunk)} + KV cache {size(v.kv)} "
            f"({v.context:,} tokens) + workspace {size(v.workspace)} + {vram.slots:,} of {n.experts:,} experts "
            f"{size(vram.slot_bytes)}",
        )
    beside = "" if vram else f" + trunk {size(n.trunk)} + KV cache {size(n.kv)} ({n.context:,} tokens)"
    lines += _row(
        "RAM",
        f"{size(ram.budget)} = program {size(n.program)}{beside} + workspace {size(n.step)} + {ram.slots:,} of "
        f"{n.experts:,} experts {size(ram.slot_bytes)}",
    )
    left = f"{fit.on_disk:,} experts have no other place ({size(fit.on_disk * record)})"
    return lines + _row("disk", left if fit.on_disk else "no expert has to stay there")


def _speed(survey: Survey, fit: Fit) -> list[str]:
    read, seconds, hits = fit.read, fit.seconds, fit.hits
    lines = [f"{'a token':10}{'experts':>12}{'reads':>12}{'takes':>12}   (trunk included)"]
    tiers = [("RAM", hits.ram, read.ram, seconds.ram), ("disk", hits.disk, read.disk, seconds.disk)]
    if fit.vram is not None:
        tiers.insert(0, ("VRAM", hits.vram, read.vram, seconds.vram))
    lines += [
        f"  {name:8}{share:>12.1%}{format_bytes(count):>12}{1e3 * took:>9.1f} ms" for name, share, count, took in tiers
    ]
    lines += [f"  {'layers':8}{'':24}{1e3 * seconds.layers:>9.1f} ms", ""]
    lines += _row(
        "speed",
        f"about {_tokens(fit.tokens_per_second)} tokens/s, {_tokens(1 / fit.full)} when the context is full; "
        f"{_tokens(1 / fit.even)} if all experts were equally likely",
    )
    most = " (all that the model was made for)" if fit.longest == survey.outline.longest else ""
    return lines + _row("context", f"{fit.longest:,} tokens would fit{most}, in place of experts")


def _tokens(per_second: float) -> str:
    return f"{per_second:.0f}" if per_second >= 10 else f"{per_second:.1f}"


def _change(best: Any, fit: Fit | None) -> str:
    if best is None:
        return "nothing that is tried here would help" if fit else "none that is tried here makes it fit"
    speed = f"about {_tokens(best.tokens_per_second)} tokens/s"
    if fit is None:
        return f"{best.what} would make it fit: {speed}"
    return f"{best.what} would help most: {speed}, {best.tokens_per_second / fit.tokens_per_second - 1:+.0%}"


def _assumptions(survey: Survey, fit: Fit | None) -> str:
    rates, origins = survey.machine.rates, survey.origins
    parts = [
        f"{name} {format_bytes(rate)}/s ({origin})"
        for name, rate, origin in zip(("RAM", "disk", "VRAM"), rates, origins, strict=True)
        if rate
    ]
    if fit is not None and fit.hits.disk:
        parts.append(f"hits as in {survey.curve.origin}")
    if fit is not None and fit.vram is not None:
        parts.append(
            f"{format_bytes(fit.vram.needs.program)} for CUDA and {1e3 * fit.seconds.layers:.0f} ms for launches, "
            "neither measured"
        )
    return "; ".join(parts)


def as_data(survey: Survey) -> dict[str, Any]:
    """The plan as JSON; sizes in bytes, rates in bytes per second."""
    outline, fit = survey.outline, survey.fit
    data: dict[str, Any] = {
        "version": SCHEMA_VERSION,
        "model": outline.name,
        "model_type": outline.model_type,
        "parameters": outline.parameters,
        "moe_layers": len(outline.layers),
        "experts": outline.num_experts,
        "cycle": outline.cycle,
        "record_bytes": outline.record_bytes,
        "codec": outline.codec,
        "formats": [
            {**form._asdict(), "total": form.total, "chosen": form == outline.chosen} for form in outline.formats
        ],
        "machine": {
            "rates": survey.machine.rates._asdict(),
            "origins": survey.origins._asdict(),
            "ram": survey.machine.ram,
            "vram": survey.machine.vram,
        },
        "fits": fit is not None,
        "refusal": survey.refusal or None,
        "changes": [change._asdict() for change in survey.changes],
    }
    if fit is None:
        return data
    return data | {
        "ram": {"budget": fit.ram.budget, "slots": fit.ram.slots, **fit.ram.needs._asdict()},
        "vram": {"budget": fit.vram.budget, "slots": fit.vram.slots, **fit.vram.needs._asdict()} if fit.vram else None,
        "without_gpu": fit.without_gpu or None,
        "on_disk": fit.on_disk,
        "hit_curve": survey.curve._asdict(),
        "hits": {**fit.hits._asdict(), "disk": fit.hits.disk},
        "bytes_per_token": fit.read._asdict(),
        "seconds_per_token": fit.seconds._asdict(),
        "tokens_per_second": fit.tokens_per_second,
        "tokens_per_second_full_context": 1 / fit.full,
        "tokens_per_second_even_routing": 1 / fit.even,
        "longest_context": fit.longest,
    }
