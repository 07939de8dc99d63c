"""What one answer of a chat did, and what has bounded the speed so far, in two lines."""

from __future__ import annotations

from .report import report
from .sections import in_percent, in_seconds, rate
from .stats import RunStats


def answer_lines(before: RunStats, after: RunStats) -> tuple[str, str]:
    """Of the answer between two snapshots, and of the whole run."""
    old, new = before.answer, after.answer
    seconds, steps, requests = new.seconds - old.seconds, new.steps - old.steps, new.requests - old.requests
    tokens = new.tokens - old.tokens
    facts = (
        f"{tokens:,} token{'' if tokens == 1 else 's'}",
        rate(steps / seconds if seconds else None),
        f"first token {in_seconds(after.time_to_first_token_s if tokens else None)}",
        f"hits {in_percent((new.hits - old.hits) / requests if requests else None)}",
        f"waiting {in_percent((new.stall_s - old.stall_s) / seconds if seconds else None, 0)}",
    )
    return f"this answer: {', '.join(facts)}", f"so far: {report(after, replays=False)['verdict']}"
