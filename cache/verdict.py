"""What bounds a run's speed, and the one change that is worth most, in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .units import as_option, format_bytes

MUCH_WAITING = 0.2
"""Share of a token's time from which on waiting is what bounds it."""
MOST = 0.5
"""Share of a token's time from which on waiting alone is what bounds it."""
BEHIND_LRU = 0.02
"""Hit rate by which a policy has to be worse than LRU to be blamed."""
BUSY_LINK = 0.6
"""Share of a link's peak from which on more reads at a time would not help."""
_COMPUTE = {
    "experts": "goes into the experts' kernels",
    "cache": "is the cache's own work",
    "trunk": "goes into attention, routers and head",
    "device": "is the GPU's, and what it takes to launch its work",
    "text": "goes into sampling and text",
}
WORTH = 0.1
"""Gain in speed for which advice is given."""


def verdict(report: Mapping[str, Any]) -> tuple[str | None, str]:
    """What bounds the speed ("compute", "policy", a link's source such as "disk", "latency") and one sentence.

    `report` is the data of `report.report` but for the verdict; None where there is not enough of it.
    """
    sample, split = report["sample"], report["time_per_token"]
    if not sample["enough"] or split is None:
        return None, (
            f"Not enough data for advice ({sample['answer_tokens']:,} of {sample['enough_tokens']} tokens)"
            f"{_so_far(split)}."
        )
    waiting = next(part["share"] for part in split["parts"] if part["name"] == "waiting") or 0.0
    if waiting < MUCH_WAITING:
        most = max(split["parts"][1:], key=lambda part: part["seconds"])
        remedy = "more memory would hardly help"
        if report["settings"]["kernels"] == "torch":
            remedy = "native kernels would, and pocketmoe doctor says why there are none"
        return "compute", (
            f"Compute is the limit: {100 * waiting:.0f} % of a token's time is waiting for reads, and "
            f"{100 * most['share']:.0f} % {_COMPUTE[most['name']]}; {remedy}."
        )
    what_if = report["what_if"]
    if what_if is not None:
        own, lru = (next((s for s in what_if["policies"] if test(s)), None) for test in (_is_present, _is_lru))
        if own and lru and lru["hit_rate"] - own["hit_rate"] > BEHIND_LRU:
            return "policy", (
                f"The policy is the limit: on this routing {own['policy']} hits {100 * own['hit_rate']:.0f} % and lru "
                f"{100 * lru['hit_rate']:.0f} %; try --policy lru."
            )
    link = report["links"][-1]  # nobody waits for the others: there, kernels wait for their own experts only
    source = link["name"].split()[0]
    bound_by, what = (source, f"the {source}") if (link["use"] or 1.0) >= BUSY_LINK else ("latency", "late reads")
    verb = "are" if bound_by == "latency" else "is"
    lead = f"{what} {verb} the limit" if waiting >= MOST else f"compute and {what} share the limit"
    speed = f"{format_bytes(link['bytes_per_s'] or 0)}/s"
    peak = link["peak_bytes_per_s"]
    of_peak = f" of the {format_bytes(peak)}/s that it can give" if peak and peak > (link["bytes_per_s"] or 0) else ""
    return bound_by, (
        f"{lead[0].upper()}{lead[1:]}: {100 * waiting:.0f} % of a token's time is waiting for the {source}, at "
        f"{speed}{of_peak}{_remedy(report)}."
    )


def _so_far(split: Mapping[str, Any] | None) -> str:
    """What takes most of a token's time."""
    if split is None:
        return ""
    most = max(split["parts"], key=lambda part: part["seconds"])
    return (
        f"; so far {100 * most['share']:.0f} % of a token's time {_COMPUTE.get(most['name'], 'is waiting for reads')}"
    )


def _remedy(report: Mapping[str, Any]) -> str:
    """The smallest budget that is worth it, and what it gives."""
    tier = report["tiers"][-1]
    if tier["slots"] and tier["experts"] and tier["slots"] >= tier["experts"]:
        return ", although all experts fit: these were first reads, so judge a longer run"
    choice = worthwhile(report)
    if choice is None:
        return "" if report["what_if"] is None else ", and no budget would change that much"
    return "; " + choice


def worthwhile(report: Mapping[str, Any]) -> str | None:
    """`--ram 870MB` (+70 MB) would give about 38 tokens/s instead of 28 (+36 %): the smallest budget with a gain that
    is worth it."""
    what_if = report["what_if"]
    if what_if is None:
        return None
    now = next(filter(_is_present, what_if["budgets"]))
    for setting in what_if["budgets"]:
        speed, present = setting["tokens_per_second"], now["tokens_per_second"]
        gain = speed / present - 1
        if setting["slots"] > now["slots"] and gain >= WORTH and setting["ram_budget_bytes"]:
            more = format_bytes(setting["ram_budget_bytes"] - now["ram_budget_bytes"])
            return (
                f"--ram {as_option(setting['ram_budget_bytes'])} (+{more}) would give about "
                f"{speed:.1f} tokens/s instead of {present:.1f} (+{100 * gain:.0f} %)"
            )
    return None


def _is_present(setting: Mapping[str, Any]) -> bool:
    return setting["present"]


def _is_lru(setting: Mapping[str, Any]) -> bool:
    return setting["policy"] == "lru"
