"""`pocketmoe bench`: a model on this machine (`measure.py`), or simulated machines, by a model of time."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..cache.machine import LINKS, MACHINES, SHAPES, Machine, ModelShape, link_speed
from ..cache.units import format_bytes, parse_bytes
from ..offload.errors import DataError, MemoryBudgetError, UsageError, require_known
from .console import say
from .measure import Measuring, measure, print_table

if TYPE_CHECKING:
    from ..cache.routing import Routing
    from ..cache.simulate import Outcome, Setup

FORMAT_VERSION = 1
SIMULATED = "gpt-oss-20b"


@dataclass(frozen=True)
class MachineOptions:
    """A preset, and what is different; fields but the first two are those of `Machine`."""

    machine: Annotated[
        str | None, typer.Option(metavar="|".join(MACHINES), help="The machine to simulate. Default: laptop-8gb.")
    ] = None
    link: Annotated[
        str | None, typer.Option(help="Links of the GPU by comma, as pcie4x8, or all. Default: the machine's.")
    ] = None
    vram: Annotated[
        str | None,
        typer.Option(
            help="Of the GPU, as 8GiB. To measure: its budget, where there is a GPU. "
            "Default: the machine's, here and below."
        ),
    ] = None
    ram: Annotated[
        str | None, typer.Option(help="Of the machine, as 32GiB. To measure: budgets by comma. Default: three of use.")
    ] = None
    cpu_bandwidth: Annotated[str | None, typer.Option(help="Of the RAM by its specification, per second.")] = None
    gpu_bandwidth: Annotated[str | None, typer.Option(help="Of the VRAM by its specification, per second.")] = None
    disk: Annotated[str | None, typer.Option(help="What the disk reads, as 3.5GB per second.")] = None

    def amounts(self, name: str) -> list[int]:
        """The bytes of an option that may hold several, by comma."""
        try:
            return [] if (text := getattr(self, name)) is None else [parse_bytes(part) for part in text.split(",")]
        except ValueError as error:
            raise UsageError(f"--{name}: {error}") from None

    def described(self) -> dict[str, str | None]:
        """What is not this machine's."""
        names = ("machine", "link", "cpu_bandwidth", "gpu_bandwidth", "disk")
        return {name.replace("_", "-"): getattr(self, name) for name in names}

    def machines(self) -> list[Machine]:
        """One for each link. Raises UsageError for what is no amount or no link."""
        name = self.machine or "laptop-8gb"
        require_known([name], list(MACHINES), "machine")
        changes: dict[str, Any] = {}
        for option, field in (
            ("vram", "vram"),
            ("ram", "ram"),
            ("cpu_bandwidth", "ram_bandwidth"),
            ("gpu_bandwidth", "gpu_bandwidth"),
            ("disk", "disk"),
        ):
            if (value := getattr(self, option)) is not None:
                try:
                    changes[field] = parse_bytes(value.removesuffix("/s"))
                except ValueError as error:
                    raise UsageError(f"--{option.replace('_', '-')}: {error}") from None
        machine = replace(MACHINES[name], **changes)
        links = [machine.link] if self.link is None else LINKS if self.link == "all" else self.link.split(",")
        for link in links:
            try:
                link_speed(link)
            except ValueError as error:
                raise UsageError(f"--link: {error}") from None
        return [replace(machine, link=link) for link in dict.fromkeys(links)]


def bench(
    machine: MachineOptions,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help=f"What `run` takes. To simulate: {', '.join(SHAPES)}; default {SIMULATED}.",
            show_default=False,
        ),
    ] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="Do not measure, but predict for a machine.")] = False,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Routing recorded by --trace; else it is made up.", show_default=False),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens to decode. Default: 128 for each answer, 1000 to simulate.")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=2, help=f"Tokens of each prompt. Default: {Measuring.prompt_tokens}.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help=f"Answers to measure. Default: {Measuring.rounds}.")] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the KV cache has room for. Default: 8192 to simulate.")
    ] = None,
    recall: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Prefetch for the next layer with this share of right guesses.", metavar="R"),
    ] = None,
    gpu_finds_hits: Annotated[
        bool,
        typer.Option(
            "--gpu-finds-hits/--host-finds-hits",
            help="Whether caches have hits computed before the CPU knows what was chosen, as pocketmoe does.",
        ),
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a model's speed at several budgets, or simulate machines.

    Measured are tokens per second at several --ram, beside what `plan` expects; simulated, machines with a GPU.
    """
    if not simulate:
        if model is None:
            raise UsageError("name a model to measure, or add --simulate.")
        host = None if gpu_finds_hits else True
        ignored = {"trace": trace, "recall": recall, "host-finds-hits": host} | machine.described()
        if given := [name for name, value in ignored.items() if value is not None]:
            raise UsageError(f"--{given[0]} is for --simulate: what is measured is this machine.")
        vram = machine.amounts("vram")
        if len(vram) > 1:
            raise UsageError("--vram is one budget where a model is measured; only --ram takes several.")
        what = Measuring(machine.amounts("ram"), next(iter(vram), None), context)
        counts = {"prompt_tokens": prompt_tokens, "tokens": tokens, "rounds": rounds}
        data = measure(model, replace(what, **{name: count for name, count in counts.items() if count is not None}))
        if json:
            print(jsonlib.dumps(data))
        else:
            print_table(data)
    else:
        for name, value in (("prompt-tokens", prompt_tokens), ("rounds", rounds)):
            if value is not None:
                raise UsageError(f"--{name} is for measuring a model: leave it out, or leave out --simulate.")
        _simulate(machine, model or SIMULATED, trace, tokens or 1000, context or 8192, recall, gpu_finds_hits, json)


def _simulate(
    machine: MachineOptions,
    model: str,
    trace: Path | None,
    tokens: int,
    context: int,
    recall: float | None,
    gpu_finds_hits: bool,
    json: bool,
) -> None:
    require_known([model], list(SHAPES), "model shape")
    from ..cache.simulate import Setup
    from ..cache.simulate import simulate as run
    from ..cache.strategies import strategy_names

    shape = SHAPES[model]
    setups = []
    for one in machine.machines():
        try:
            setups.append(Setup.of(shape, one, context, gpu_finds_hits))
        except ValueError as error:
            raise MemoryBudgetError(str(error)) from None
    routing, origin = _routing(shape, trace, tokens, recall)
    if not json:
        say("\n".join(_title(setups[0], routing, origin)))
    results = [(setup, [run(setup, routing, name) for name in strategy_names()]) for setup in setups]
    if json:
        print(jsonlib.dumps(_as_data(results, routing, origin, context)))
    else:
        _print_table(results)


def _routing(shape: ModelShape, path: Path | None, tokens: int, recall: float | None) -> tuple[Routing, str]:
    """What is decoded, and in words where it comes from. Raises DataError."""
    from ..cache.routing import made_up, recorded, with_guesses
    from ..cache.trace import read_trace

    if path is None:
        routing = made_up(shape.layers, shape.experts, shape.top_k, tokens)
        origin = "made-up routing"
    else:
        try:
            trace = read_trace(path)
            routing = recorded(trace, tokens)
        except OSError as error:
            raise DataError(f"{path} can not be read: {error.strerror or error}.") from None
        except ValueError as error:
            raise DataError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
        got, wanted = (routing.layers, routing.experts), (shape.layers, shape.experts)
        if got != wanted:
            raise DataError(
                f"{path} has {got[0]} layers x {got[1]} experts, but {shape.name} has {wanted[0]} x {wanted[1]}: "
                "name the model that was recorded, or leave --trace out."
            )
        origin = f"recorded routing of {trace.model or 'an unknown model'}"
    return (routing if recall is None else with_guesses(routing, recall)), origin


def _title(setup: Setup, routing: Routing, origin: str) -> list[str]:
    shape, machine, size = setup.shape, setup.machine, format_bytes
    total = shape.layers * shape.experts
    return [
        f"simulated, not measured: {shape.name} on {machine.name} ({machine.about}); {origin}, "
        f"{routing.tokens:,} tokens of {routing.sequences} sequence{'' if routing.sequences == 1 else 's'}",
        f"VRAM {size(machine.vram)} at {size(machine.gpu_bandwidth)}/s, {setup.vram_slots:,} of {total:,} experts of "
        f"{size(shape.record)}; RAM {size(machine.ram)} at {size(machine.ram_bandwidth)}/s, "
        f"{setup.ram_slots:,} experts",
    ]


def _print_table(results: list[tuple[Setup, list[Outcome]]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    single = len(results) == 1
    table = Table(title="tokens/s, simulated", box=box.SIMPLE_HEAD, title_justify="left", title_style="none")
    table.add_column("strategy", no_wrap=True)
    heads = [setup.machine.link for setup, _ in results]
    for head in (*heads, "in VRAM", "copied", "on CPU", "from disk", "uploads/token") if single else heads:
        table.add_column(head, justify="right")
    for row in zip(*(outcomes for _, outcomes in results), strict=True):
        cells = [f"{outcome.tokens_per_second:.1f}" for outcome in row]
        if single:
            one = row[0]
            shares = (one.hits, one.waited + one.copied, one.on_cpu, one.from_disk)
            cells += [f"{share / one.requests:.1%}" for share in shares] + [f"{one.uploads / one.tokens:.1f}"]
        table.add_row(row[0].strategy, *cells)
    Console(width=None if Console().is_terminal else 120).print(table)


def _as_data(results: list[tuple[Setup, list[Outcome]]], routing: Routing, origin: str, context: int) -> dict[str, Any]:
    first = results[0][0]
    machine = asdict(first.machine)
    del machine["link"], machine["about"]
    return {
        "version": FORMAT_VERSION,
        "simulated": True,
        "model": first.shape.name,
        "machine": machine,
        "context": context,
        "gpu_finds_hits": first.gpu_finds_hits,
        "routing": origin,
        "tokens": routing.tokens,
        "sequences": routing.sequences,
        "prefetch_recall": routing.recall if routing.guesses else None,
        "vram_slots": first.vram_slots,
        "ram_slots": first.ram_slots,
        "experts": first.shape.layers * first.shape.experts,
        "results": [
            {
                "link": setup.machine.link,
                "strategy": outcome.strategy,
                "simulated_tokens_per_second": outcome.tokens_per_second,
                "hit_rate": outcome.hit_rate,
                **{name: getattr(outcome, name) for name in ("requests", *outcome._fields[3:])},
            }
            for setup, outcomes in results
            for outcome in outcomes
        ],
    }
