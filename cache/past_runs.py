"""Past runs side by side: a list of them, and two compared, as sections."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .report import PARTS
from .sections import Section, Table, in_percent, in_seconds, signed
from .stats import RunStats
from .units import format_bytes

Report = Mapping[str, Any]


def entry(number: int, path: str, run: RunStats) -> dict[str, Any]:
    """What a list says of a run. JSON-serialisable."""
    answer = run.answer
    return {
        "number": number,
        "path": path,
        "finished_at": run.finished_at,
        "model": run.model,
        "store": run.store,
        "tokens": answer.tokens,
        "tokens_per_second": answer.steps / answer.seconds if answer.seconds else None,
        "hit_rate": answer.hits / answer.requests if answer.requests else None,
        "ram_budget_bytes": run.ram_budget_bytes,
        "slots": run.slots,
        "experts": run.total_experts,
    }


def listing(entries: Iterable[Mapping[str, Any]]) -> list[Section]:
    """A table for each store, the latest runs first, as they come."""
    by_store: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    for run in entries:
        fit = run["slots"] / run["experts"] if run["slots"] and run["experts"] else None
        row = (
            f"{run['number']:>3}  {date(run['finished_at'])}",
            f"{run['tokens']:,}",
            "-" if run["tokens_per_second"] is None else f"{run['tokens_per_second']:.1f}",
            in_percent(run["hit_rate"]),
            "-" if run["ram_budget_bytes"] is None else format_bytes(run["ram_budget_bytes"]),
            in_percent(fit, 0),
        )
        by_store.setdefault((run["model"] or "unknown model", run["store"] or ""), []).append(row)
    columns = ("run  finished", "tokens", "tokens/s", "hits", "budget", "experts that fit")
    return [
        Section(model, lines=(store,) if store else (), table=Table(columns, tuple(rows)))
        for (model, store), rows in by_store.items()
    ]


def comparison(run: Report, other: Report) -> list[Section]:
    """`run` beside `other`: speed, where the time went, and the settings that differ. Both are data of `report`."""
    now, then = run["speed"]["tokens_per_second"], other["speed"]["tokens_per_second"]
    title = f"{run['model'] or 'unknown model'}: two runs"
    if now is None or then is None:
        lead = "One of the two has generated nothing: there is nothing to compare."
    else:
        percent = round(100 * (now / then - 1))
        change = f"{abs(percent)} % {'faster' if percent > 0 else 'slower'}" if percent else "no difference"
        lead = f"{now:.1f} tokens/s against {then:.1f}: {change}."
    columns = ("", "this run", "against", "change")
    found = [Section(title, lines=(lead,), table=Table(columns, _rows(run, other)))]
    if run["time_per_token"] and other["time_per_token"]:
        found.append(Section("Where the time of an answer goes, ms", table=Table(columns, _times(run, other))))
    differing = [
        (name, *values)
        for name, *values in zip(_NAMES, _settings(run), _settings(other), strict=True)
        if len({*values}) > 1
    ]
    if differing:
        found.append(Section("What was set otherwise", table=Table(columns[:3], tuple(differing))))
    return found


def _rows(run: Report, other: Report) -> tuple[tuple[str, ...], ...]:
    def row(name: str, pick: Sequence[str], show: Any, points: bool = False) -> tuple[str, ...]:
        values = [found[pick[0]][pick[1]] for found in (run, other)]
        shown = ["-" if value is None else show(value) for value in values]
        if None in values or not values[1]:
            return name, *shown, ""
        return (
            name,
            *shown,
            f"{100 * (values[0] - values[1]):+.1f} points" if points else signed(values[0] / values[1] - 1),
        )

    return (
        row("tokens/s", ("speed", "tokens_per_second"), "{:.1f}".format),
        row("hits", ("speed", "hit_rate"), in_percent, points=True),
        row("first token", ("speed", "time_to_first_token_s"), in_seconds),
        row("prompt, tokens/s", ("speed", "prompt_tokens_per_second"), "{:.1f}".format),
        row("memory at most", ("memory", "peak_bytes"), format_bytes),
        row("tokens counted", ("sample", "answer_tokens"), "{:,}".format),
    )


def _times(run: Report, other: Report) -> tuple[tuple[str, ...], ...]:
    ours, theirs = (
        {p["name"]: 1000 * p["seconds"] for p in found["time_per_token"]["parts"]} for found in (run, other)
    )
    return tuple(
        (
            PARTS[name],
            *(f"{parts[name]:.2f}" if name in parts else "-" for parts in (ours, theirs)),
            f"{ours.get(name, 0) - theirs.get(name, 0):+.2f}",
        )
        for name in dict.fromkeys((*ours, *theirs))
    )


_NAMES = ("model", "store", "budget", "slots", "policy", "codec", "io", "kernels", "prefetch")


def _settings(report: Report) -> list[str]:
    tier, budget, settings = report["tiers"][-1], report["memory"]["budget_bytes"], report["settings"]
    values = (
        report["model"],
        report["store"],
        budget and format_bytes(budget),
        tier["slots"] and f"{tier['slots']:,}",
        *(settings[name] for name in ("policy", "codec", "io", "kernels")),
        _prefetch(report),
    )
    return [str(value or "-") for value in values]


def _prefetch(report: Report) -> str | None:
    """How it stood at the end, without the numbers of its tests, which are never those of another run."""
    if not report["prefetch"]["issued"]:
        return None
    return (report["prefetch"]["state"] or "On").partition(" after ")[0].lower()


def date(finished_at: float | None) -> str:
    """Local time, to the minute."""
    return "-" if finished_at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(finished_at))
