"""The report in sections: lines, tables, bars and the map of experts, for whoever draws them."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .report import PARTS
from .units import as_option, format_bytes
from .verdict import worthwhile

MOST_ROWS = 24
"""Of a table by layers; more layers share rows."""
_UNIT = re.compile(r"(?<=[\d.]) (?=(?:%|s|ms|tokens/s|[kMGT]?B(?:/s)?)(?!\w))")
_FINISH = {"stop": "end", "length": "max tokens", "context": "context full"}

Bar = tuple[tuple[str, float], ...]
"""Segments one after the other, each of a kind and a share of the whole. Kinds: "hit", "ahead", "late", "miss", of a
token's time "wait" and "time", and "gap" for nothing."""
Report = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """The first column is text, the others are numbers. `bars` are one per row, if any."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bars: tuple[Bar, ...] = ()
    strong: int | None = None
    """The row of the present setting."""


@dataclass(frozen=True)
class HeatMap:
    """Counts by layer and expert, and who of each layer is in a slot, where that is known."""

    counts: tuple[tuple[int, ...], ...]
    resident: tuple[frozenset[int], ...] | None

    @property
    def highest(self) -> int:
        return max(map(max, self.counts))

    def level(self, count: int, levels: int) -> int:
        """0 for never, then 1 to `levels`: by the root, because a few experts are asked for far more than the rest."""
        return min(levels, 1 + int((count / self.highest) ** 0.5 * levels)) if count else 0


@dataclass(frozen=True)
class Curve:
    """Points from left to right, with words for each; the one `at` is the present setting."""

    title: str
    points: tuple[tuple[float, float], ...]
    places: tuple[str, ...]
    values: tuple[str, ...]
    at: int


@dataclass(frozen=True)
class Section:
    title: str
    facts: tuple[tuple[str, str], ...] = ()
    """Names and values."""
    lines: tuple[str, ...] = ()
    """Above the table or the map."""
    curves: tuple[Curve, ...] = ()
    """Of what the table says, for whoever can draw them."""
    table: Table | None = None
    heat: HeatMap | None = None
    notes: tuple[str, ...] = ()
    """Below it."""


def sections(report: Report) -> list[Section]:
    """All of a report's data that there is."""
    return [
        _headline(report),
        *_time(report),
        _links(report),
        *(_layers(tier) for tier in report["tiers"] if tier["requests"]),
        _prefetch(report),
        *_experts(report),
        *_policies(report),
        *_budgets(report),
        _setup(report),
    ]


def summary(report: Report) -> list[Section]:
    """The head of it, for below an answer."""
    return [_headline(report), *_time(report), _links(report)]


def _headline(report: Report) -> Section:
    speed, sample, memory = report["speed"], report["sample"], report["memory"]
    split = report["time_per_token"]
    facts = [
        ("speed", rate(speed["tokens_per_second"])),
        ("hits", in_percent(speed["hit_rate"])),
        ("waiting", in_percent(split and split["parts"][0]["share"], 0)),
        ("first token", in_seconds(speed["time_to_first_token_s"])),
        ("prompt", rate(speed["prompt_tokens_per_second"])),
    ]
    if memory["peak_bytes"] and memory["budget_bytes"]:
        facts.append(("memory", f"{format_bytes(memory['peak_bytes'])} of {format_bytes(memory['budget_bytes'])}"))
    ended = speed["finish_reason"] and f", ended by {_FINISH.get(speed['finish_reason'], speed['finish_reason'])}"
    requests = report["tiers"][0]["requests"]
    counted = (
        f"Counted: {_plural(sample['answer_tokens'], 'token')} of {_plural(sample['prompts'], 'answer')}{ended or ''}; "
        f"{sample['prompt_tokens']:,} of prompts. Warm-up included: {sample['first_reads']:,} of {requests:,} requests "
        "were the first for their expert."
    )
    return Section(report["model"] or "unknown model", tuple(facts), (report["verdict"], counted))


def _time(report: Report) -> list[Section]:
    split = report["time_per_token"]
    if split is None:
        return []
    rows, bars, before = [], list[Bar](), 0.0
    for part in split["parts"]:
        share = part["share"] or 0.0
        rows.append((PARTS[part["name"]], f"{1000 * part['seconds']:.2f}", in_percent(part["share"], 0)))
        bars.append((("gap", before), ("wait" if part["name"] == "waiting" else "time", share)))
        before += share
    whole = ("a token", f"{1000 * split['seconds']:.2f}", "100 %")
    table = Table(("", "ms", "share"), (*rows, whole), (*bars, ()))
    return [Section("Where the time of an answer goes", table=table)]


def _links(report: Report) -> Section:
    rows, notes = [], []
    for link in report["links"]:
        peak = link["peak_bytes_per_s"]
        rows.append(
            (
                link["name"],
                format_bytes(link["bytes"]),
                "-" if link["bytes_per_token"] is None else format_bytes(link["bytes_per_token"]),
                in_percent(link["busy_share"], 0),
                "-" if link["bytes_per_s"] is None else f"{format_bytes(link['bytes_per_s'])}/s",
                f"{format_bytes(peak)}/s" if peak else "-",
            )
        )
        if link["bytes"]:
            notes.append(
                f"{link['name']}: {link['on_demand']:,} records on demand, {link['ahead']:,} ahead; "
                f"{link['in_flight'] or 0:.1f} at a time while busy. "
                + (f"The peak: {link['peak_source']}." if peak else "The peak was not measured.")
            )
    if device := report["device"]:
        notes.append(
            f"Of what VRAM lacked, {device['copied']:,} were copied up to be computed there and {device['on_cpu']:,} "
            f"computed by the CPU, {device['admitted']:,} of which came up afterwards."
        )
    columns = ("link", "moved", "a token", "busy", "while busy", "peak")
    return Section("Links", table=Table(columns, tuple(rows)), notes=tuple(notes))


def _layers(tier: Mapping[str, Any]) -> Section:
    layers = tier["per_layer"]
    per_row = -(-len(layers) // MOST_ROWS)
    rows, bars = [], []
    for first in range(0, len(layers), per_row):
        group = layers[first : first + per_row]
        total = {name: sum(layer[name] for layer in group) for name in group[0]}
        last = first + len(group) - 1
        requests = total["requests"] or 1
        shares = {
            "hit": (total["hits"] - total["prefetch_hits"]) / requests,
            "ahead": total["prefetch_hits"] / requests,
            "late": total["late"] / requests,
            "miss": (total["misses"] - total["late"]) / requests,
        }
        rows.append((f"{first}" if per_row == 1 else f"{first}-{last}", *(f"{100 * s:.1f}" for s in shares.values())))
        bars.append(tuple(shares.items()))
    slots, experts = tier["slots"], tier["experts"]
    held = ""
    if slots and experts:
        size = format_bytes(slots * tier["record_bytes"])
        held = f"{slots:,} of {experts:,} experts fit ({in_percent(min(1.0, slots / experts), 0)}, {size}). "
    whole = (
        f"{held}{in_percent(tier['hit_rate'])} of {tier['requests']:,} requests found theirs there, prompts included; "
        f"{tier['prefetch_hits']:,} thanks to prefetch. Of {tier['misses']:,} misses {tier['late']:,} were on their "
        "way."
    )
    columns = ("layer", "hit %", "ahead %", "late %", "missed %")
    return Section(f"Hits in {tier['name']}, by layer", lines=(whole,), table=Table(columns, tuple(rows), tuple(bars)))


def _prefetch(report: Report) -> Section:
    found = report["prefetch"]
    lines = [found["state"]] if found["state"] else []
    if not found["issued"]:
        return Section("Prefetch", lines=(*lines, "Nothing was read ahead."))
    kinds = ("useful", "late", "wasted", "cancelled")
    meaning = ("there when it was chosen", "chosen while on its way", "never chosen", "withdrawn before it was read")
    rows = tuple(
        (f"{kind}: {what}", f"{found[kind]:,}", in_percent(found[kind] / found["issued"], 0))
        for kind, what in zip(kinds, meaning, strict=True)
    )
    notes = (
        f"Of what would have been missing {in_percent(found['recall'], 0)} was asked for ahead; of what was read ahead "
        f"{in_percent(found['precision'], 0)} was wanted.",
        f"Wasted: {format_bytes(found['wasted_bytes'])}, {in_percent(found['wasted_share'], 0)} of all that was read.",
    )
    columns = (f"{found['issued']:,} guesses", "count", "share")
    return Section("Prefetch", lines=tuple(lines), table=Table(columns, rows), notes=notes)


def _experts(report: Report) -> list[Section]:
    requests, resident = report["experts"]["requests"], report["experts"]["resident"]
    if not any(map(any, requests)):
        return []
    counts, slots = tuple(map(tuple, requests)), resident and tuple(map(frozenset, resident))
    unused = sum(count == 0 for layer in counts for count in layer)
    line = f"How often each expert was asked for, at most {max(map(max, counts)):,} times; {unused:,} never were."
    return [Section("Use of the experts", lines=(line,), heat=HeatMap(counts, slots))]


def _replayed(what_if: Mapping[str, Any]) -> str:
    return (
        f"The routing of the latest {what_if['tokens']:,} tokens, replayed after {what_if['warmup_tokens']:,} of "
        "warm-up; hits without prefetch."
    )


def _policies(report: Report) -> list[Section]:
    what_if = report["what_if"]
    if what_if is None:
        return []
    present, best = what_if["policies"][0], what_if["policies"][-1]
    rows = [
        (
            f"{s['policy']} (optimum)" if s is best else s["policy"],
            in_percent(s["hit_rate"]),
            "" if s is present else f"{100 * (s['hit_rate'] - present['hit_rate']):+.1f}",
            f"{s['tokens_per_second']:.1f}",
            "now" if s is present else _gain(s, present),
        )
        for s in what_if["policies"]
    ]
    columns = (f"policy, {present['slots']:,} slots", "hits", "points", "tokens/s", "")
    return [Section("Beside other policies", lines=(_replayed(what_if),), table=Table(columns, tuple(rows), strong=0))]


def _budgets(report: Report) -> list[Section]:
    what_if = report["what_if"]
    if what_if is None:
        return []
    settings = what_if["budgets"]
    at = next(i for i, setting in enumerate(settings) if setting["present"])
    now, experts = settings[at], report["tiers"][-1]["experts"]
    rows = [
        (
            f"--ram {as_option(s['ram_budget_bytes'])}" if s["ram_budget_bytes"] else "",
            f"{s['slots']:,}",
            in_percent(s["hit_rate"]),
            in_percent(1 - s["hit_rate"]),
            f"{s['tokens_per_second']:.1f}",
            "now" if s is now else _gain(s, now),
        )
        for s in settings
    ]
    bars: tuple[Bar, ...] = tuple((("hit", s["hit_rate"]), ("miss", 1 - s["hit_rate"])) for s in settings)
    places = tuple(
        f"{in_percent(s['slots'] / experts, 0)} of the experts, {row[0] or 'slots ' + row[1]}"
        for s, row in zip(settings, rows, strict=True)
    )
    shares = [s["slots"] / experts for s in settings]
    misses = tuple((share, 1 - s["hit_rate"]) for share, s in zip(shares, settings, strict=True))
    speeds = tuple((share, s["tokens_per_second"]) for share, s in zip(shares, settings, strict=True))
    curves = (
        Curve("misses, % of requests", tuple((x, 100 * y) for x, y in misses), places, tuple(r[3] for r in rows), at),
        Curve("tokens/s", speeds, places, tuple(r[4] for r in rows), at),
    )
    choice = worthwhile(report)
    error = what_if["predicted"] / what_if["measured"] - 1
    notes = (
        f"{choice[0].upper()}{choice[1:]}." if choice else "No larger budget would gain a tenth.",
        f"The model behind this gives {what_if['predicted']:.1f} tokens/s for the present setting, measured were "
        f"{what_if['measured']:.1f} ({signed(error)}); the others are corrected by that.",
    )
    if report["links"][-1]["peak_bytes_per_s"] is None:
        notes += (
            "What reads take is what they took in this run, often longer than they need: the disk was not measured.",
        )
    columns = ("budget", "slots", "hits", "misses", "tokens/s", "")
    table = Table(columns, tuple(rows), bars, strong=at)
    return [Section("Other budgets", lines=(_replayed(what_if),), curves=curves, table=table, notes=notes)]


def _setup(report: Report) -> Section:
    memory, settings = report["memory"], report["settings"]
    parts = [
        f"{name} {format_bytes(memory[f'{name}_bytes'])}" for name in ("budget", "peak") if memory[f"{name}_bytes"]
    ]
    named = [f"{name} {settings[name]}" for name in ("codec", "policy", "io", "kernels") if settings[name]]
    lines = [f"memory of the process: {', '.join(parts)}"] if parts else []
    if report["finished_at"] is not None:
        lines.append(time.strftime("finished %Y-%m-%d %H:%M", time.localtime(report["finished_at"])))
    return Section("Setup", lines=(*lines, *([", ".join(named)] if named else [])))


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def rate(rate: float | None) -> str:
    if rate is None:
        return "- tokens/s"
    return f"{rate:,.0f} tokens/s" if rate >= 100 else f"{rate:.1f} tokens/s"


def in_seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:,.0f} s"


def _gain(setting: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return signed(setting["tokens_per_second"] / now["tokens_per_second"] - 1)


def signed(share: float) -> str:
    return f"{round(100 * share):+d} %"


def in_percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{share * 100:.{digits}f} %"


def printable(text: str) -> str:
    """`text` on one line without control characters: names come from files."""
    return "".join(c if c.isprintable() else " " for c in text)


def unbroken(text: str) -> str:
    """`text` with no place for a line to end between a number and its unit."""
    return _UNIT.sub("\N{NO-BREAK SPACE}", text)
