"""Which context a model is planned for where none was asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .errors import MemoryBudgetError
from .memory import Needs

CONTEXTS = (4096, 3072, 2048, 1536, 1024)
"""The largest of these that fits is the default context."""
GROWTH = 32 << 20
"""What libraries may still load after the first plan."""
Plans = TypeVar("Plans")


def usual_contexts(context: int | None, longest: int) -> list[int]:
    """The one that was asked for, or those to be tried, longest first; none beyond what the model was made for."""
    return [context] if context else sorted({min(longest, usual) for usual in CONTEXTS}, reverse=True)


def first_that_fits(contexts: list[int], needs_of: Callable[[int], Needs], plan: Callable[[Needs], Plans]) -> Plans:
    """The plans for the first context that they can be made for. Raises the MemoryBudgetError of the last of all."""
    refusal = None
    for context in contexts:
        needs = needs_of(context)
        try:
            if context != contexts[0]:  # not so close that what libraries load later would not fit
                plan(needs._replace(program=needs.program + GROWTH))
            return plan(needs)
        except MemoryBudgetError as error:
            refusal = error  # the shortest context needs the least
    assert refusal is not None
    raise refusal
