"""Which of a prompt's experts stay on a device after it."""

from __future__ import annotations

import torch

from .runtime import Assignment

_LAST_TOKENS = 32
"""What they chose, the answer will want."""


def who_stays(work: Assignment, share: int) -> set[int]:
    """As many experts of a layer as its share of the slots, those first that the prompt's last tokens chose."""
    if share >= len(work.experts):
        return set(work.experts)
    last = torch.cumsum(work.rows >= len(work.places) - _LAST_TOKENS, 0).tolist()
    by_expert = [last[start - 1] if start else 0 for start in work.starts]
    wanted = {
        expert: (by_expert[i] - by_expert[i + 1], work.starts[i] - work.starts[i + 1], expert)
        for i, expert in enumerate(work.experts)
    }
    return set(sorted(work.experts, key=wanted.__getitem__)[:share])
