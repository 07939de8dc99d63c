"""Which of a prompt's experts stay on a device after it."""

from __future__ import annotations

from .runtime import Assignment

_LAST_TOKENS = 32
"""What they chose, the answer will want."""


def who_stays(work: Assignment, share: int) -> set[int]:
    """As many experts of a layer as its share of the slots, those first that the prompt's last tokens chose."""
    last = len(work.places) - _LAST_TOKENS
    recent = {
        expert: int((work.rows[work.starts[i] : work.starts[i + 1]] >= last).sum())
        for i, expert in enumerate(work.experts)
    }
    count = {expert: work.starts[i + 1] - work.starts[i] for i, expert in enumerate(work.experts)}
    return set(sorted(work.experts, key=lambda e: (-recent[e], -count[e], e))[:share])
