"""What bounds a run's speed, and the one change that is worth most, in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .units import as_option, format_bytes

MUCH_WAITING = 0.2
"""Share of a token's time from which on waiting is what bounds it."""
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
            f"Not enough data for advice: {sample['answer_tokens']:,} tokens were generated, and it takes "
            f"{sample['enough_tokens']}."
        )
    waiting = next(part["share"] for part in split["parts"] if part["name"] == "waiting") or 0.0
    if waiting < MUCH_WAITING:
        most = max(split["parts"][1:], key=lambda part: part["seconds"])
        return "compute", (
            f"Compute is the limit: {waiting:.0%} of a token's time is waiting for reads, and {most['share']:.0%} "
            f"{_COMPUTE[most['name']]}; more memory would hardly help."
        )
    what_if = report["what_if"]
    if what_if is not None:
        own, lru = (next((s for s in what_if["policies"] if test(s)), None) for test in (_is_present, _is_lru))
        if own and lru and lru["hit_rate"] - own["hit_rate"] > BEHIND_LRU:
            return "policy", (
                f"The policy is the limit: on this routing {own['policy']} hits {own['hit_rate']:.0%} and lru "
                f"{lru['hit_rate']:.0%}; try --policy lru."
            )
    link = report["links"][-1]  # nobody waits for the others: there, kernels wait for their own experts only
    source = link["name"].split()[0]
    lead = f"The {source} is the limit" if (link["use"] or 1.0) >= BUSY_LINK else "Late reads are the limit"
    speed = f"{format_bytes(link['bytes_per_s'] or 0)}/s"
    peak = link["peak_bytes_per_s"]
    of_peak = f" of the {format_bytes(peak)}/s that it can give" if peak and peak > (link["bytes_per_s"] or 0) else ""
    return (source if (link["use"] or 1.0) >= BUSY_LINK else "latency"), (
        f"{lead}: {waiting:.0%} of a token's time is waiting for {speed}{of_peak}{_remedy(report)}."
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
    """`--ram 870MB` (+70 MB) would give about 38 tokens/s (+36 %): the smallest budget with a gain that is worth it."""
    what_if = report["what_if"]
    if what_if is None:
        return None
    now = next(filter(_is_present, what_if["budgets"]))
    for setting in what_if["budgets"]:
        gain = setting["tokens_per_second"] / now["tokens_per_second"] - 1
        if setting["slots"] > now["slots"] and gain >= WORTH and setting["ram_budget_bytes"]:
            more = format_bytes(setting["ram_budget_bytes"] - now["ram_budget_bytes"])
            return (
                f"--ram {as_option(setting['ram_budget_bytes'])} (+{more}) would give about "
                f"{setting['tokens_per_second']:.1f} tokens/s (+{gain:.0%})"
            )
    return None


def _is_present(setting: Mapping[str, Any]) -> bool:
    return setting["present"]


def _is_lru(setting: Mapping[str, Any]) -> bool:
    return setting["policy"] == "lru"
