"""Order after an interruption: a Ctrl-C may fall between any two steps of the hot path, and the next one has to work.

The hot path does not guard each step. It puts everything in order once, after the failure; and if a second Ctrl-C falls
into that, then before the next call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar


class Recoverable(Protocol):
    """Something with methods that are `recovering`."""

    in_order: bool
    """Whether no such method is under way or has failed."""

    def recover(self) -> None:
        """Stop whatever is under way, and free whatever is in use. It may be called at any time, and again."""
        ...


R = TypeVar("R", bound=Recoverable)
P = ParamSpec("P")
T = TypeVar("T")


def recovering(method: Callable[Concatenate[R, P], T]) -> Callable[Concatenate[R, P], T]:
    """The method, with `recover` called after its failure."""

    @functools.wraps(method)
    def run(self: R, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if not self.in_order:
            _recover(self)
        self.in_order = False
        try:
            result = method(self, *args, **kwargs)
        except BaseException:
            _recover(self)
            raise
        self.in_order = True
        return result

    return run


def _recover(books: Recoverable) -> None:
    books.recover()
    books.in_order = True
