"""Errors that a user can act on: one clear sentence each, with the exit code that the command line returns."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class PocketMoEError(Exception):
    """Base of all errors whose message is meant for the user: what, where, what to do."""

    exit_code = 1


class UsageError(PocketMoEError):
    """An option or argument that cannot be used as given."""

    exit_code = 2


class DataError(PocketMoEError):
    """A checkpoint or store that is missing, damaged, of another version or of an unsupported kind."""

    exit_code = 3


class MemoryBudgetError(PocketMoEError):
    """The budget cannot hold what has to be resident."""

    exit_code = 4


class VramBudgetError(MemoryBudgetError):
    """The same for the memory of a GPU."""


class DeviceError(PocketMoEError):
    """A device or driver that is missing or failed."""

    exit_code = 5


class DeviceMemoryError(DeviceError):
    """A device's memory has run out."""


def require_known(names: Iterable[str], known: Sequence[str], what: str) -> None:
    """Raises UsageError for a name that is not known; says the nearest one, or all of them."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise UsageError(f"unknown {what} {name!r}; {hint}")
