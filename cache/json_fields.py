"""Fields of a JSON file that may be damaged: of the kind that was written, or refused."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from typing import Any


def of_kind(name: str, value: Any, kind: type) -> Any:
    """`value` as it is. A whole number is a float too; True is no number.

    Raises:
        ValueError: it is of another kind, or not finite.
        OverflowError: it is a whole number beyond every float.
    """
    if type(value) is not kind and (kind, type(value)) != (float, int):
        raise ValueError(f"{name} is {value!r:.40}, not of type {kind.__name__}")
    if kind is not str and not isfinite(value):
        raise ValueError(f"{name} is {value}")
    return value


def of_kinds(name: str, values: Iterable[Any], *kinds: type) -> list[Any]:
    """As many values as kinds. Raises also ValueError where there are more or fewer, TypeError where there are none."""
    return [of_kind(name, value, kind) for value, kind in zip(values, kinds, strict=True)]
