"""Measuring a model on this machine: tokens per second at several budgets, beside what the plan expected of them.

`expect` and `measure` are to be run apart, each budget in a process of its own: memory that one load has taken would be
there for the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from ..cache.report import report
from ..cache.stats import RunStats
from .errors import MemoryBudgetError, UsageError
from .replaying import native_replayer
from .source import OnNotice, OnProgress, Progress

SHARES = (0.25, 0.5, 1.0)
"""Of a model's experts, that the budgets which are measured by default have room for."""
ROOM = 16 << 20
"""What a budget leaves beside a plan's sum, because loading counts once more."""
_TEXT = """A library in a small town kept its catalogue on cards. Each card named one book, the shelf where it stood and
who had borrowed it last. When more people came than the reading room had chairs, the librarian noticed that most of
them asked for the same few shelves, and she moved those next to the door. After a week the walking had halved. Then a
school began a project about rivers, and the shelves by the door were the wrong ones: she wrote down what was asked for,
hour by hour, and found that an hour told more about the next hour than a month did. Explain what she should keep by the
door, how many shelves are worth the space, and how she could know before anyone asks. """


def expect(
    store: str,
    budgets: Sequence[int],
    context: int | None = None,
    vram: int | None = None,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
) -> dict[str, Any]:
    """What the plan says of a store on this machine.

    Args:
        budgets: of RAM in bytes; none = those for SHARES of the experts, as far as the machine goes.
        vram: of this machine's GPU, in bytes; nothing where it has none.

    Returns:
        "rates" in bytes per second; "formats" of experts and trunk, "total" bytes; "planned": for each budget its
        "ram_budget_bytes", and "tokens_per_second" and "hit_rate", None where it does not fit.

    Raises:
        MemoryBudgetError: no budget was given, and not even all that is free suffices.
    """
    from .device import default_device
    from .outlook import fit
    from .survey import survey

    found = survey(Path(store), context=context, vram=None if default_device() == "cpu" else vram)
    if not budgets:
        if found.fit is None:
            raise MemoryBudgetError(found.refusal)
        plan = found.fit.ram
        slots = {min(plan.slots, max(plan.needs.floor, int(share * plan.needs.experts))) for share in SHARES}
        budgets = [plan.needs.fixed_in_answers + count * plan.needs.record + ROOM for count in sorted(slots)]
    planned = []
    for budget in budgets:
        try:
            fitted = fit(found.outline, replace(found.machine, ram=budget), context)
            expected = {"tokens_per_second": fitted.tokens_per_second, "hit_rate": fitted.hits.vram + fitted.hits.ram}
        except MemoryBudgetError:
            expected = {"tokens_per_second": None, "hit_rate": None}
        planned.append({"ram_budget_bytes": budget, **expected})
    chosen = found.outline.chosen
    return {
        "rates": found.machine.rates._asdict(),
        "formats": {"experts": chosen.experts_as, "trunk": chosen.trunk_as, "total": chosen.total},
        "hit_curve": found.curve.origin,
        "planned": planned,
    }


def measure(
    store: str,
    options: dict[str, Any],
    prompt_tokens: int,
    tokens: int,
    warmup: int,
    rounds: int,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
) -> dict[str, Any]:
    """Load a store and answer prompts with it, each a conversation of its own.

    Args:
        options: of `load`.
        prompt_tokens: of each prompt, a text in English.
        tokens: of each answer, whatever ends it otherwise.
        warmup: tokens of an answer that is not counted, before.
        rounds: how many answers.

    Returns:
        See `summarised`.
    """
    from .disk_speed import measure_disk
    from .loading import load

    counted: list[RunStats] = []
    with load(store, warm_start=False, on_progress=on_progress, on_notice=on_notice, **options) as model:
        if prompt_tokens + max(tokens, warmup) > model.context:
            raise UsageError(
                f"{prompt_tokens:,} + {max(tokens, warmup):,} tokens do not fit into a context of {model.context:,}: "
                "measure fewer, or give it --context"
            )
        text = model.encode(_TEXT)
        for number in range(rounds + 1):
            ids = [text[(i + 17 * number) % len(text)] for i in range(prompt_tokens)]  # not twice the same
            sampling = {"seed": number, "temperature": 0.8, "ignore_eos": True}  # at 0, small models go in circles
            most = tokens if number else warmup
            for chunk in model.answer(model.new_sequence(), ids, [], max_tokens=most, **sampling):
                if on_progress is not None:
                    stage = f"round {number} of {rounds}" if number else "warm-up"
                    on_progress(Progress(stage, chunk.tokens, most, "tokens"))
            if number:
                counted.append(model.stats(advice=number == rounds))
            else:
                model.reset_stats()
    return summarised(counted, report(counted[-1], measure_disk(Path(store)), replayer=native_replayer()))


def summarised(counted: Sequence[RunStats], found: dict[str, Any]) -> dict[str, Any]:
    """What was measured, as JSON can hold it.

    Args:
        counted: statistics after each round, since the first one began.
        found: `report` of the last.
    """
    before = [RunStats(counted[0].layers), *counted]
    decode, prefill = [], []
    for earlier, later in zip(before, counted, strict=False):
        decode.append((later.answer.steps - earlier.answer.steps) / (later.answer.seconds - earlier.answer.seconds))
        prefill.append((later.prompt.tokens - earlier.prompt.tokens) / (later.prompt.seconds - earlier.prompt.seconds))
    run, disk = counted[-1], found["links"][-1]
    return {
        "ram_budget_bytes": run.ram_budget_bytes,
        "slots": run.slots,
        "experts": run.total_experts,
        "kernels": run.kernels,
        "policy": run.policy,
        "io": run.io,
        "decode_tokens_per_second": _spread(decode),
        "prefill_tokens_per_second": _spread(prefill),
        "answer_tokens": run.answer.tokens,
        "hit_rate": found["speed"]["hit_rate"],
        "disk_bytes_per_token": disk["bytes_per_token"],
        "disk_bytes_per_s": disk["bytes_per_s"],
        "disk_peak_bytes_per_s": disk["peak_bytes_per_s"],
        "disk_use": disk["use"],
        "time_per_token": found["time_per_token"],
        "bound_by": found["bound_by"],
        "verdict": found["verdict"],
        "peak_rss_bytes": run.peak_rss_bytes,
    }


def _spread(values: list[float]) -> dict[str, Any]:
    return {"median": median(values), "min": min(values), "max": max(values), "each": values}
