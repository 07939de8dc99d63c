"""Statistics as text: pure functions from `RunStats.to_dict()` to lines for a terminal, without colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .units import format_bytes

ENOUGH_TOKENS = 50  # fewer say more about the start than about the run
MUCH_STALL = 0.3
_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = ".:-=+*#@"
_MOST_BARS = 64  # fits into 80 columns
_FINISH = {"stop": "end", "length": "max tokens", "context": "context full"}

Stats = Mapping[str, Any]


def report(stats: Stats, ascii_only: bool = False) -> str:
    """A run in about 15 lines: speed, hits, reads, memory, prefetch, and a verdict that ends in a decision.

    `stats` is `RunStats.to_dict()`; missing keys and None are unknown. `ascii_only` is for terminals without UTF-8.
    """
    rows = [
        ("speed", _speed(stats)),
        ("time", _time(stats)),
        ("hits", _hits(stats)),
        *_layers(stats, ascii_only),
        ("reads", _reads(stats)),
        ("prefetch", _prefetch(stats)),
        ("slots", _slots(stats)),
        ("what if", _what_if(stats)),
        ("memory", _memory(stats)),
        ("setup", _setup(stats)),
    ]
    lines = [f"{name:9} {text}" for name, text in rows if text]
    return "\n".join([*lines, "", verdict(stats)])


def one_line(stats: Stats) -> str:
    """A run in one line, for below an answer."""
    parts = [
        f"prompt {_count(stats, 'prompt_tokens')} tok {_rate(stats, 'prompt_tokens_per_second')}",
        f"gen {_count(stats, 'generated_tokens')} tok {_rate(stats, 'tokens_per_second')}",
        f"TTFT {_seconds(stats.get('time_to_first_token_s'))}",
        f"hit {_percent(stats.get('hit_rate'))}",
        f"stall {_seconds(_number(stats, 'stall_s'))} ({_percent(stats.get('stall_share'), 0)})",
        f"{format_bytes(_number(stats, 'bytes_read'))} read",
    ]
    reason = stats.get("finish_reason")
    if reason:
        parts.append(f"stop: {_FINISH.get(reason, reason)}")
    return " | ".join(parts)


def verdict(stats: Stats) -> str:
    """One sentence on what limits the run and what to do about it."""
    tokens, speed = _number(stats, "generated_tokens"), stats.get("tokens_per_second")
    if tokens < ENOUGH_TOKENS:
        return (
            f"Not enough data for advice: {tokens:,} tokens were generated; let it generate {ENOUGH_TOKENS} or more "
            "before changing a setting."
        )
    slots, total, record = (_number(stats, name) for name in ("slots", "total_experts", "record_bytes"))
    share = stats.get("stall_share") or 0.0
    all_fit = total > 0 and slots >= total
    if _number(stats, "requests") > 0 and _number(stats, "misses") == 0:
        return "Every request was a hit: memory is sufficient and compute is the limit, so more --ram would not help."
    if share > MUCH_STALL and all_fit:
        return (
            f"Waiting for reads took {share:.0%} of the time although all experts fit: these were first reads, so "
            "keep the settings and judge a longer run."
        )
    if share > MUCH_STALL and total > slots > 0 and record > 0:
        missing = (total - slots) * record
        budget = stats.get("ram_budget_bytes")
        to_hold_all = f"--ram {_as_option(budget + missing)}" if budget else f"{format_bytes(missing)} more --ram"
        return (
            f"Waiting for reads took {share:.0%} of the time with room for {slots / total:.0%} of the experts: "
            f"{to_hold_all} would hold all of them, and each further GB holds {10**9 // record:,} more."
        )
    if share > MUCH_STALL:
        return f"Waiting for reads took {share:.0%} of the time: give it more --ram."
    without = f" (at most {speed / (1 - share):.1f} tokens/s without any waiting)" if speed else ""
    return (
        f"Waiting for reads took only {share:.0%} of the time{without}: compute is the limit, so leave --ram as it is."
    )


def _speed(stats: Stats) -> str:
    return (
        f"answer {_rate(stats, 'tokens_per_second')} ({_count(stats, 'generated_tokens')} tokens), "
        f"prompt {_rate(stats, 'prompt_tokens_per_second')} ({_count(stats, 'prompt_tokens')} tokens), "
        f"first token after {_seconds(stats.get('time_to_first_token_s'))}"
    )


def _time(stats: Stats) -> str:
    split = stats.get("time_s") or {}
    total = _number(split, "total")
    if not total:
        return ""
    names = (("reads", "waiting for reads"), ("experts", "experts"), ("rest", "everything else"))
    parts = (f"{label} {_seconds(_number(split, name))} ({_number(split, name) / total:.0%})" for name, label in names)
    return f"{_seconds(total)}: " + ", ".join(parts)


def _hits(stats: Stats) -> str:
    text = f"{_percent(stats.get('hit_rate'))} ({_count(stats, 'hits')} of {_count(stats, 'requests')} requests"
    if _number(stats, "late"):
        text += f"; {_count(stats, 'late')} misses were in flight already"
    answer = stats.get("answer_hit_rate")
    return text + ")" + (f", {_percent(answer)} in answers" if answer is not None else "")


def _layers(stats: Stats, ascii_only: bool) -> list[tuple[str, str]]:
    rates = [layer.get("hit_rate") for layer in stats.get("per_layer") or ()]
    known = [(rate, layer) for layer, rate in enumerate(rates) if rate is not None]
    if not known:
        return []
    low, high = min(known), max(known, key=lambda pair: (pair[0], -pair[1]))
    per_bar = -(-len(rates) // _MOST_BARS)
    what = "one bar a layer" if per_bar == 1 else f"one bar for {per_bar} layers"
    span = (
        f"layer {low[1]} lowest {_percent(low[0])}, layer {high[1]} highest {_percent(high[0])}; {what}, full is 100 %"
    )
    return [("", _bars(rates, per_bar, _ASCII_BARS if ascii_only else _BARS)), ("", span)]


def _bars(rates: Sequence[float | None], per_bar: int, ramp: str) -> str:
    bars = []
    for start in range(0, len(rates), per_bar):
        known = [rate for rate in rates[start : start + per_bar] if rate is not None]
        mean = sum(known) / len(known) if known else None
        bars.append(" " if mean is None else ramp[min(len(ramp) - 1, int(mean * len(ramp)))])
    return "".join(bars)


def _reads(stats: Stats) -> str:
    speed = stats.get("disk_read_bytes_per_s")
    at = f" at {format_bytes(speed)}/s" if speed else ""
    tokens = _number(stats, "prompt_tokens") + _number(stats, "generated_tokens")
    each = f", {format_bytes(_number(stats, 'bytes_read') / tokens)} a token" if tokens else ""
    return (
        f"{format_bytes(_number(stats, 'bytes_read'))}{at}{each} "
        f"({_count(stats, 'demand_reads')} on demand, {_count(stats, 'prefetch_reads')} by prefetch); "
        f"compute waited {_seconds(_number(stats, 'stall_s'))} ({_percent(stats.get('stall_share'), 0)})"
    )


def _prefetch(stats: Stats) -> str:
    if not _number(stats, "prefetch_issued"):
        return "none issued"
    names = ("issued", "useful", "late", "wasted", "cancelled")
    return ", ".join(f"{_count(stats, f'prefetch_{name}')} {name}" for name in names)


def _slots(stats: Stats) -> str:
    slots, total, record = (_number(stats, name) for name in ("slots", "total_experts", "record_bytes"))
    if not slots:
        return ""
    of_all = f" of {total:,} experts ({min(1.0, slots / total):.0%})" if total else ""
    return f"{slots:,}{of_all}" + (f", {format_bytes(slots * record)}, {format_bytes(record)} each" if record else "")


def _what_if(stats: Stats) -> str:
    """Other budgets: hits of the policy alone, and the speed that they would give."""
    cases = stats.get("what_if") or ()
    now = next((case for case in cases if case["slots"] == stats.get("slots")), None)
    if now is None:
        return ""
    parts = [f"now {_percent(now['hit_rate'], 0)} hits without prefetch, {_rate(now, 'tokens_per_second')}"]
    for case in cases:
        if case is not now:
            change = case["tokens_per_second"] / now["tokens_per_second"] - 1
            parts.append(
                f"--ram {_as_option(case['ram_budget_bytes'])} {_percent(case['hit_rate'], 0)}, "
                f"about {_rate(case, 'tokens_per_second')} ({change:+.0%})"
            )
    return "; ".join(parts)


def _memory(stats: Stats) -> str:
    budget, peak = stats.get("ram_budget_bytes"), stats.get("peak_rss_bytes")
    parts = [f"budget {format_bytes(budget)}"] if budget else []
    return ", ".join(parts + ([f"peak {format_bytes(peak)}"] if peak else []))


def _setup(stats: Stats) -> str:
    named = (("", "model"), ("", "codec"), ("policy ", "policy"), ("io ", "io"), ("kernels ", "kernels"))
    return ", ".join(f"{label}{stats[name]}" for label, name in named if stats.get(name))


def _number(stats: Stats, name: str) -> Any:
    return stats.get(name) or 0


def _count(stats: Stats, name: str) -> str:
    return f"{_number(stats, name):,}"


def _rate(stats: Stats, name: str) -> str:
    rate = stats.get(name)
    if rate is None:
        return "- t/s"
    return f"{rate:,.0f} t/s" if rate >= 100 else f"{rate:.1f} t/s"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:,.0f} s"


def _percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{share * 100:.{digits}f}%"


def _as_option(nbytes: int) -> str:
    return f"{-(-nbytes // 10**8) / 10:g}GB"  # rounded up: the amount must suffice
