"""`pocketmoe replay`: what each eviction policy would have hit on a recorded routing, beside the optimum."""

from __future__ import annotations

import json as jsonlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..cache.policy import policy_names
from ..offload.errors import DataError, UsageError
from .console import say

if TYPE_CHECKING:
    from ..cache.replay import Requests, Result
    from ..cache.trace import Trace

FORMAT_VERSION = 1
_SLOTS = re.compile(r"(\d{1,9})|(\d{1,3}(?:\.\d{1,6})?)%", re.ASCII)


def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A file of --trace.", show_default=False)],
    slots: Annotated[str, typer.Option(help="Slots of the cache: shares of all experts, or numbers.")] = "25%,40%,60%",
    policy: Annotated[str, typer.Option(metavar="|".join(("all", *policy_names())), help="One, or some by comma.")] = (
        "all"
    ),
    warm: Annotated[bool, typer.Option("--warm", help="Keep the cache from one sequence to the next.")] = False,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="A pool for each layer instead of one for all.")] = (
        False
    ),
    jobs: Annotated[int | None, typer.Option(min=1, help="Replays at a time. Default: one per core.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare eviction policies on recorded routing.

    Beside them stands Belady's optimum, which no policy can exceed.
    """
    names = _policies(policy)
    from ..cache.replay import OPTIMUM, Case, Requests, compare, lru_curve
    from ..cache.trace import read_trace
    from ..offload.replaying import native_replayer

    try:
        recorded = read_trace(trace)
    except OSError as error:
        raise DataError(f"{trace} can not be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise DataError(str(error)) from None
    requests = Requests(recorded, warm)
    sizes = _sizes(slots, requests)
    if not requests.total:
        raise DataError(f"{trace} holds no decoded token: record an answer of at least two tokens.")
    if not json:
        say(_title(recorded, requests, warm, per_layer))
    cases, replayer = [Case(name, n) for n in sizes for name in (OPTIMUM, *names)], native_replayer(say)
    results = list(compare(requests, cases, per_layer, jobs, replayer))
    curve = [] if per_layer else lru_curve(requests, replayer)
    if json:
        print(jsonlib.dumps(_as_data(trace, recorded, requests, results, curve, warm, per_layer)))
        return
    print("\n".join([*_table(requests, results, sizes), "", *_curve_lines(requests, curve)]).rstrip())


def _policies(text: str) -> list[str]:
    names = list(policy_names()) if text == "all" else list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in policy_names():
            raise UsageError(f"--policy must be all, or some of {', '.join(policy_names())}, not {name!r}.")
    return names


def _sizes(text: str, requests: Requests) -> list[int]:
    """Numbers of slots, ascending. Raises UsageError for what is none, or is below the floor or above all experts."""
    sizes, cycle = [], requests.layers * requests.top_k
    for part in text.split(","):
        match = _SLOTS.fullmatch(part.strip())
        if match is None:
            raise UsageError(f"--slots must be shares or numbers, as 25%,40% or 192, not {part.strip()!r}.")
        count, share = match.groups()
        size = int(count) if count else int(float(share) / 100 * requests.experts + 1e-6)
        if not cycle <= size <= requests.experts:
            raise UsageError(
                f"--slots {part.strip()} is {size}, but this trace takes {cycle} ({requests.layers} layers x top-"
                f"{requests.top_k}) to {requests.experts} (all experts)."
            )
        sizes.append(size)
    return sorted(dict.fromkeys(sizes))


def _title(trace: Trace, requests: Requests, warm: bool, per_layer: bool) -> str:
    start = "one warm cache" if warm else f"a cold start for each sequence ({len(requests.sequences):,})"
    return (
        f"{trace.model or 'unknown model'}: {trace.layers} layers x {trace.num_experts} experts, top-{trace.top_k}; "
        f"{requests.tokens:,} decoded tokens, {requests.total:,} requests\n"
        f"{start}, {'a pool per layer' if per_layer else 'one pool for all layers'}, without prefetch"
    )


def _table(requests: Requests, results: list[Result], sizes: list[int]) -> list[str]:
    """Hit rates, best policy first, and below what the misses of the best are due to."""
    by_policy: dict[str, list[Result]] = {}
    for result in results:
        by_policy.setdefault(result.policy, []).append(result)
    optimum, *rest = by_policy.values()
    rest.sort(key=lambda of_policy: -sum(result.hits for result in of_policy))
    heads = [f"{size} ({size / requests.experts:.0%})" for size in sizes]
    lines = [_row("hit rate, % | slots", heads)]
    lines += [
        _row(of_policy[0].policy, [f"{100 * r.hits / r.requests:.1f}" for r in of_policy])
        for of_policy in (optimum, *rest)
    ]
    lines += ["", _row(f"misses of {rest[0][0].policy}", heads)]
    parts = [_misses(requests, result, best.hits) for result, best in zip(rest[0], optimum, strict=True)]
    for name in ("compulsory", "capacity", "policy"):
        lines.append(_row(name, [f"{100 * part[name] / requests.total:.1f}" for part in parts]))
    return lines


def _row(name: str, cells: list[str]) -> str:
    return f"{name:20}" + "".join(f"{cell:>12}" for cell in cells)


def _misses(requests: Requests, result: Result, best: int) -> dict[str, int]:
    """Misses by cause: the first request of an expert, what the optimum misses beside, the rest."""
    compulsory = requests.compulsory
    return {
        "compulsory": compulsory,
        "capacity": result.requests - best - compulsory,
        "policy": best - result.hits,
    }


def _curve_lines(requests: Requests, curve: list[int]) -> list[str]:
    """LRU at shares of all experts, as far as the curve is valid."""
    cycle = requests.layers * requests.top_k
    shares = [share for share in range(5, 101, 5) if share * requests.experts // 100 >= cycle]
    rates = [100 * curve[share * requests.experts // 100] / requests.total for share in shares if curve]
    pairs = [f"{share}%: {rate:.1f}" for share, rate in zip(shares, rates, strict=False)]
    rows = [", ".join(pairs[at : at + 6]) for at in range(0, len(pairs), 6)]
    return ["LRU's hit rate by share of the experts, %", *rows] if rows else []


def _as_data(
    path: Path,
    trace: Trace,
    requests: Requests,
    results: list[Result],
    curve: list[int],
    warm: bool,
    per_layer: bool,
) -> dict[str, Any]:
    best = {result.slots: result.hits for result in results if result.policy == results[0].policy}
    cycle = requests.layers * requests.top_k
    return {
        "version": FORMAT_VERSION,
        "trace": str(path),
        "model": trace.model,
        "layers": trace.layers,
        "experts_per_layer": trace.num_experts,
        "top_k": trace.top_k,
        "sequences": len(requests.sequences),
        "tokens": requests.tokens,
        "warm": warm,
        "per_layer": per_layer,
        "results": [
            {
                "policy": result.policy,
                "slots": result.slots,
                "share": result.slots / requests.experts,
                "requests": result.requests,
                "hits": result.hits,
                "hit_rate": result.hit_rate,
                "misses": _misses(requests, result, best[result.slots]),
                "misses_by_layer": result.misses_by_layer,
            }
            for result in results
        ],
        "lru_curve": [{"slots": slots, "hits": curve[slots]} for slots in range(cycle, len(curve))],
    }
