"""The report of a run as data: what was measured, what bounds the speed, and what other settings would give.

JSON-serialisable, under a version; seconds, bytes and shares (0 to 1); `finished_at` counts from 1970. What is not
known is None. Links and tiers are lists, so that whoever shows them need not know how many there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .advice import ENOUGH_TOKENS, advise
from .cost import DiskSpeed
from .verdict import verdict

if TYPE_CHECKING:
    from .device_stats import DeviceStats
    from .replay import Replayer
    from .stats import RunStats

FORMAT, VERSION = "pocketmoe-report", 1
PARTS = {
    "waiting": "waiting for reads",
    "experts": "experts' kernels",
    "cache": "the cache's own work",
    "trunk": "attention, routers, head",
    "device": "the GPU, and launching its work",
    "text": "sampling and text",
}
"""Of a token's time, and what they are called."""


def report(
    run: RunStats, disk: DiskSpeed | None = None, replays: bool = True, replayer: Replayer | None = None
) -> dict[str, Any]:
    """Everything that there is to say about a run.

    Args:
        disk: what the disk gives when nothing else is done, measured just now.
        replays: also replay the recorded routing, which takes a second or two.
        replayer: who does that, in less time; None for the plain one.
    """
    run = run.snapshot()
    advice = advise(run, disk, replayer=replayer) if replays else None
    found: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": run.model,
        "store": run.store,
        "finished_at": run.finished_at,
        "settings": {name: getattr(run, name) for name in ("codec", "policy", "io", "kernels", "prefetch")},
        "memory": {"budget_bytes": run.ram_budget_bytes, "peak_bytes": run.peak_rss_bytes},
        "sample": {
            "prompts": run.prompt.steps,
            "prompt_tokens": run.prompt.tokens,
            "answer_tokens": run.answer.tokens,
            "first_reads": len(run.uses),
            "enough": run.answer.tokens >= ENOUGH_TOKENS,
            "enough_tokens": ENOUGH_TOKENS,
        },
        "speed": {
            "tokens_per_second": _ratio(run.answer.steps, run.answer.seconds),
            "prompt_tokens_per_second": _ratio(run.prompt.tokens, run.prompt.seconds),
            "time_to_first_token_s": run.time_to_first_token_s,
            "hit_rate": _ratio(run.answer.hits, run.answer.requests),
            "finish_reason": run.finish_reason,
        },
        "time_per_token": _time_per_token(run),
        "links": _links(run, disk),
        "tiers": _tiers(run),
        "device": run.device and {name: run.device.total(name) for name in ("copied", "on_cpu", "admitted")},
        "prefetch": _prefetch(run),
        "experts": _experts(run),
        "what_if": advice
        and {
            **advice._asdict(),
            "policies": [setting._asdict() for setting in advice.policies],
            "budgets": [setting._asdict() for setting in advice.budgets],
        },
    }
    bound_by, sentence = verdict(found)
    return found | {"bound_by": bound_by, "verdict": sentence}


def _time_per_token(run: RunStats) -> dict[str, Any] | None:
    """Where a token's time goes; the parts are of one clock, each inside the next, and add up to the whole."""
    answer = run.answer
    if not answer.steps:
        return None
    layers = max(answer.layers_s, answer.stall_s + answer.compute_s)
    forward = max(answer.forward_s, layers)
    total = max(answer.seconds, forward)
    seconds = {
        "waiting": answer.stall_s,
        "experts": answer.compute_s,
        "cache": max(0.0, layers - answer.stall_s - answer.compute_s),
        "trunk": forward - layers,
        "text": total - forward,
    }
    if run.device is not None:  # what the GPU does is not seen from here, but as the rest
        seconds["device"] = seconds.pop("cache") + seconds.pop("trunk")
        seconds["text"] = seconds.pop("text")
    parts = [{"name": name, "seconds": s / answer.steps, "share": _ratio(s, total)} for name, s in seconds.items()]
    return {"seconds": total / answer.steps, "parts": parts}


def _links(run: RunStats, disk: DiskSpeed | None) -> list[dict[str, Any]]:
    """What moved between the tiers. The peak is None where it was not measured."""
    speed, seconds = _ratio(run.total("bytes_read"), run.read_busy_s), run.prompt.seconds + run.answer.seconds
    return [
        *_link_to_device(run, seconds),
        {
            "name": "disk to RAM",
            "bytes": run.total("bytes_read"),
            "bytes_per_token": _ratio(run.answer.bytes_read, run.answer.steps),
            "on_demand": run.total("demand_reads"),
            "ahead": run.total("prefetch_reads"),
            "busy_s": run.read_busy_s,
            "busy_share": _ratio(run.read_busy_s, seconds),
            "in_flight": _ratio(run.read_wait_s, run.read_busy_s),
            "bytes_per_s": speed,
            "peak_bytes_per_s": disk and disk.bytes_per_s,
            "peak_source": "direct reads of this store, measured just now",
            "use": speed and disk and speed / disk.bytes_per_s,
        },
    ]


def _link_to_device(run: RunStats, seconds: float) -> list[dict[str, Any]]:
    """Copies to a device; they come one after the other."""
    device = run.device
    if device is None:
        return []
    tokens = run.prompt.tokens + run.answer.steps
    return [
        {
            "name": "RAM to VRAM",
            "bytes": device.bytes_copied,
            "bytes_per_token": _ratio(device.bytes_copied, tokens),
            "on_demand": device.total("copied"),
            "ahead": device.total("admitted"),
            "busy_s": device.copy_s,
            "busy_share": _ratio(device.copy_s, seconds),
            "in_flight": 1.0 if device.copies else None,
            "bytes_per_s": device.link_speed,
            "peak_bytes_per_s": device.link_peak,
            "peak_source": "copies of a record at a time, measured at the start",
            "use": device.link_speed and device.link_peak and device.link_speed / device.link_peak,
        }
    ]


def _tiers(run: RunStats) -> list[dict[str, Any]]:
    """Where requests found their experts, the fastest tier first; each is asked for what those before it lack. All
    records have one size: rates by count and by bytes are the same."""
    names = ("requests", "hits", "prefetch_hits", "late", "misses")
    if run.device is not None:
        return _tiers_below_device(run, run.device)
    return [
        {
            "name": "RAM",
            "slots": run.slots,
            "experts": run.total_experts,
            "record_bytes": run.record_bytes,
            **{name: run.total(name) for name in names},
            "hit_rate": _ratio(run.total("hits"), run.total("requests")),
            "per_layer": [{name: getattr(counters, name) for name in names} for counters in run.per_layer],
        }
    ]


def _tiers_below_device(run: RunStats, device: DeviceStats) -> list[dict[str, Any]]:
    def tier(name: str, slots: int | None, per_layer: list[dict[str, int]]) -> dict[str, Any]:
        total = {key: sum(layer[key] for layer in per_layer) for key in per_layer[0]}
        return {
            "name": name,
            "slots": slots,
            "experts": run.total_experts,
            "record_bytes": run.record_bytes,
            **total,
            "hit_rate": _ratio(total["hits"], total["requests"]),
            "per_layer": per_layer,
        }

    above, below = [], []
    for c, d in zip(run.per_layer, device.per_layer, strict=True):
        missing = d.requests - d.hits
        above.append({"requests": d.requests, "hits": d.hits, "prefetch_hits": 0, "late": 0, "misses": missing})
        ahead, late = c.prefetch_hits, c.late
        below.append(
            {"requests": missing, "hits": missing - c.misses, "prefetch_hits": ahead, "late": late, "misses": c.misses}
        )
    return [tier("VRAM", device.slots, above), tier("RAM", run.slots, below)]


def _prefetch(run: RunStats) -> dict[str, Any]:
    count = {name: run.total(f"prefetch_{name}") for name in ("issued", "useful", "late", "wasted", "cancelled")}
    right = count["useful"] + count["late"]
    wasted = count["wasted"] * run.record_bytes + run.dropped_bytes
    return {
        "state": run.prefetch,
        **count,
        "precision": _ratio(right, right + count["wasted"]),
        "recall": _ratio(right, run.answer.missing),
        "wasted_bytes": wasted,
        "wasted_share": _ratio(wasted, run.total("bytes_read")),
    }


def _experts(run: RunStats) -> dict[str, Any]:
    """Requests for each expert, [layers][experts], and the numbers of those in a slot, by layer."""
    width = max((expert.index + 1 for expert in (*run.uses, *(run.residents or ()))), default=0)
    if run.total_experts:
        width = max(width, -(-run.total_experts // run.layers))
    uses = [[0] * width for _ in range(run.layers)]
    for (layer, index), count in run.uses.items():
        uses[layer][index] = count
    resident = None
    if run.residents is not None:
        resident = [sorted(expert.index for expert in run.residents if expert.layer == i) for i in range(run.layers)]
    return {"requests": uses, "resident": resident}


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
