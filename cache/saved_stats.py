"""Reading the statistics of a run from the file that `RunStats.save` wrote, which may be damaged since."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .counters import LayerStats, PhaseStats, Step, filled
from .device_stats import DeviceStats
from .expert import ExpertId
from .history import History
from .json_fields import of_kind, of_kinds

FORMAT_VERSION = 3
MOST_STEPS = 1024  # of answers, whose pace is kept
DESCRIPTION = {
    **dict.fromkeys(("slots", "total_experts", "ram_budget_bytes", "peak_rss_bytes"), int),
    "time_to_first_token_s": float,
    **dict.fromkeys(("finish_reason", "model", "codec", "policy", "io", "kernels", "store", "prefetch"), str),
    "finished_at": float,
}
"""What says of which run the counters are, each of its kind or None."""
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, RecursionError)
"""What reading a damaged file raises, and checking what was read."""
_LAST_SECOND = 253_402_300_799
"""Of the year 9999."""


def read_saved(path: Path) -> dict[str, Any]:
    """The arguments of the `RunStats` that was saved. Raises OSError or one of DAMAGED."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if data["version"] != FORMAT_VERSION:
        raise ValueError(f"version {data['version']!r} instead of {FORMAT_VERSION}")
    kinds = {name: kind for name, kind in DESCRIPTION.items() if data.get(name) is not None}
    kinds |= {"layers": int, "record_bytes": int, "read_busy_s": float, "read_wait_s": float}
    uses = [of_kinds("uses", use, int, int, int) for use in data["uses"]]
    residents = data["residents"] and [ExpertId(*of_kinds("residents", one, int, int)) for one in data["residents"]]
    found = {name: of_kind(name, data[name], kind) for name, kind in kinds.items()} | {
        "per_layer": [filled(LayerStats, counters) for counters in data["per_layer"]],
        "prompt": filled(PhaseStats, data["phases"]["prompt"]),
        "answer": filled(PhaseStats, data["phases"]["answer"]),
        "pace": deque(
            (Step(*of_kinds("pace", one, float, float, int, int)) for one in data["pace"]), maxlen=MOST_STEPS
        ),
        "uses": Counter({ExpertId(layer, index): count for layer, index, count in uses}),
        "residents": residents,
        "device": data["device"] and DeviceStats.from_dict(data["device"]),
        "history": data["history"] and History.from_dict(data["history"]),
    }
    _check(found)
    return found


def _check(found: Mapping[str, Any]) -> None:
    """Raises ValueError for what the counters' own checks do not look at."""
    layers = found["layers"]
    if any(not 0 <= layer < layers or index < 0 for layer, index in (*found["uses"], *(found["residents"] or ()))):
        raise ValueError("an expert of no layer")
    if any(found[name] and found[name].layers != layers for name in ("device", "history")):
        raise ValueError(f"not {layers} layers everywhere")
    if not 0 <= found.get("finished_at", 0) <= _LAST_SECOND:
        raise ValueError(f"finished_at is {found['finished_at']}")
