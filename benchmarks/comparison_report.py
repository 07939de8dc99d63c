"""Single runs to a table and to the ratios that are followed over time. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

Run = dict[str, Any]
LIMITED_SLOTS = "pocketmoe, slots for 40 %"
ACCELERATE, ACCELERATE_LIMITED = "accelerate disk", "accelerate disk, 40 %"
"""The engines' names in the comparison with accelerate; the second in a cgroup of 40 % of its checkpoint."""


def table(runs: list[Run]) -> list[str]:
    """One line per engine and case: medians over the rounds, with the lowest and highest."""
    cases: dict[tuple, list[Run]] = {}
    for run in runs:
        if run["engine"] not in ("disk", "stream"):
            key = (run["part"], run.get("share"), run.get("layers"), run["routing"], run["engine"])
            cases.setdefault(key, []).append(run)
    head = (
        "case",
        "routing",
        "engine",
        "decode tok/s",
        "prefill tok/s",
        "read MB/tok",
        "hit rate",
        "peak RSS",
        "same token",
    )
    rows: list[tuple[str, ...]] = [head]
    for (part, share, layers, routing, engine), group in cases.items():
        case = part + (f" {share} %" if share else "") + (f", {layers} layers" if layers else "")
        errors = [run["error"] for run in group if "error" in run]
        good = [run for run in group if "error" not in run]
        if not good:
            rows.append((case, routing, engine, errors[0], "", "", "", "", ""))
            continue
        rows.append(
            (
                case,
                routing,
                engine + (f" ({len(errors)} failed: {errors[0]})" if errors else ""),
                _spread([run["decode_tps"] for run in good]),
                _spread([run["prefill_tps"] for run in good if "prefill_tps" in run]),
                _spread([run["disk_bytes"] / len(run["decode_s"]) / 1e6 for run in good], ".0f"),
                _spread([run["hit_rate"] for run in good if run.get("hit_rate") is not None], ".2f"),
                f"{max(run['peak_rss'] for run in good) / 1e9:.2f} GB",
                _agreement(good, runs),
            )
        )
    lines = _align(rows)
    for engine, name, unit in (("stream", "stream_bytes_per_s", "memory"), ("disk", "disk_bytes_per_s", "disk")):
        if values := [run[name] / 1e9 for run in runs if run["engine"] == engine and name in run]:
            lines.append(f"limit of the {unit}: {_spread(values, '.2f')} GB/s, n={len(values)}")
    return lines


def _spread(values: list[float], style: str = ".1f") -> str:
    if not values:
        return ""
    if len(values) == 1:
        return format(values[0], style)
    return f"{statistics.median(values):{style}} ({min(values):{style}}..{max(values):{style}})"


def _agreement(group: list[Run], runs: list[Run]) -> str:
    """How often the most likely next token is the same as pocketmoe's in the same part, routing and round."""
    same = total = 0
    for run in group:
        for other in runs:
            alike = all(run.get(k) == other.get(k) for k in ("part", "share", "layers", "routing", "round")) and (
                run.get("counts", [None])[0] == other.get("counts", [None])[0]
            )
            if alike and other["engine"] == "pocketmoe" and other is not run and "argmax" in other:
                mine, theirs = _by_place(run), _by_place(other)
                both = mine.keys() & theirs.keys()
                same += sum(mine[at] == theirs[at] for at in both)
                total += len(both)
    return f"{same / total:.0%}" if total else ""


def _by_place(run: Run) -> dict[int, int]:
    """The most likely next token by the number of tokens before it. Only alike when fed from the same place."""
    return {run["counts"][1] + i: token for i, token in enumerate(run.get("argmax", []))} if "counts" in run else {}


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def ratios(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """The followed ratios by stable name: median of the rounds' ratios, median numerator and denominator, spread, n."""
    found: dict[str, dict[str, Any]] = {}

    def pick(part: str, engine: str, **where: Any) -> dict[int, Run]:
        return {
            run["round"]: run
            for run in runs
            if run["part"] == part
            and run["engine"] == engine
            and "error" not in run
            and all(run.get(key) == value for key, value in where.items())
        }

    def add(name: str, above: dict[int, Any], below: dict[int, Any]) -> None:
        """Ratio of two numbers by round; rounds that lack one are left out."""
        rounds = [r for r in above if r in below and above[r] is not None and below[r]]
        if rounds:
            values = [above[r] / below[r] for r in rounds]
            found[name] = {
                "ratio": statistics.median(values),
                "numerator": statistics.median([above[r] for r in rounds]),
                "denominator": statistics.median([below[r] for r in rounds]),
                "spread": [min(values), max(values)],
                "n": len(values),
            }

    def each(of: dict[int, Run], value: Callable[[Run], Any]) -> dict[int, Any]:
        return {round_: value(run) for round_, run in of.items()}

    def tps(of: dict[int, Run]) -> dict[int, Any]:
        return each(of, lambda run: run.get("decode_tps"))

    def prompt(of: dict[int, Run]) -> dict[int, Any]:
        return each(of, lambda run: run.get("prefill_tps"))

    ours, llama = pick("in-ram", "pocketmoe"), pick("in-ram", "llama.cpp")
    add("decode_in_ram_vs_llamacpp", tps(ours), tps(llama))
    add("prefill512_in_ram_vs_llamacpp", prompt(ours), prompt(llama))
    stream = each(pick("limits", "stream"), lambda run: run.get("stream_bytes_per_s"))
    by_limit = {r: stream[r] / _bytes_per_token(run) for r, run in ours.items() if r in stream}
    add("decode_in_ram_vs_memory_limit", tps(ours), by_limit)
    overhead = {r: _overhead_ms(run, stream[r]) for r, run in ours.items() if r in stream}
    add("overhead_ms_per_layer", overhead, dict.fromkeys(overhead, 1))

    shares = sorted({run["share"] for run in runs if run.get("share")})
    for share in shares:
        for routing in sorted({run["routing"] for run in runs if run.get("share")}):
            where = {"share": share, "routing": routing}
            mine = pick("limited", "pocketmoe", **where)
            add(
                f"decode_{share}pct_vs_llamacpp_mmap_{routing}",
                tps(mine),
                tps(pick("limited", "llama.cpp mmap, read-ahead 128 KB", **where)),
            )
            disk = each(pick("limited", "disk", **where), lambda run: run["disk_bytes_per_s"])
            rate = each(mine, lambda run: run["bytes_read"] / sum(run["decode_s"]))
            add(f"read_rate_{share}pct_vs_disk_limit_{routing}", rate, disk)
            add(
                f"cache_bytes_share_{share}pct_{routing}",
                each(mine, lambda r: r["cache_share"]),
                dict.fromkeys(mine, 1),
            )
            add(
                f"peak_rss_vs_ram_{share}pct_{routing}",
                each(mine, lambda run: run["peak_rss"]),
                each(mine, lambda run: run["budget"]),
            )
    main = 40 if 40 in shares else (shares[0] if shares else 0)
    for name in ("read_rate_{}pct_vs_disk_limit", "cache_bytes_share_{}pct", "peak_rss_vs_ram_{}pct"):
        if (full := name.format(main) + "_uniform") in found:
            found[name.replace("_{}pct", "")] = found[full]

    stock = pick("stock", "pocketmoe")
    add("decode_in_ram_vs_transformers", tps(stock), tps(pick("stock", "transformers")))
    add("prefill512_in_ram_vs_transformers", prompt(stock), prompt(pick("stock", "transformers")))
    limited = tps(pick("stock", LIMITED_SLOTS))
    add("decode_40pct_vs_accelerate", limited, tps(pick("stock", ACCELERATE_LIMITED)))
    add("decode_40pct_vs_accelerate_with_page_cache", limited, tps(pick("stock", ACCELERATE)))
    return found


def _bytes_per_token(run: Run) -> float:
    """What a token has to read from memory: its experts and the whole trunk."""
    return run["requests"] / len(run["decode_s"]) * run["record_bytes"] + run["trunk_bytes"]


def _overhead_ms(run: Run, stream: float) -> float:
    """Time per layer and token beside the expert kernels, waits for the disk, and the trunk at the memory's limit."""
    tokens = len(run["decode_s"])
    per_token = (sum(run["decode_s"]) - run["compute_s"] - run["stall_s"]) / tokens - run["trunk_bytes"] / stream
    return per_token / run["moe_layers"] * 1e3
