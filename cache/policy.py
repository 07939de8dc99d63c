"""Eviction policies: in which order residents should leave. They know neither slots nor locks nor floors."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from .expert import ExpertId
from .forecast import Forecast
from .order import Ranked
from .published import FIFO, LFRU, LFU, LRU, LRU2, SLRU, WTinyLFU


class EvictionPolicy(Protocol):
    """An order of residents. All methods but `resize` and `tick` cost constant or near-constant time."""

    stale: set[int]
    """Layers of which somebody other than the latest inserted has another place or rank since the caller last cleared
    the set; the policy only adds to it."""

    def insert(self, expert: ExpertId) -> None:
        """`expert` was requested and is resident from now on. It must not be inserted twice."""
        ...

    def touch(self, experts: Sequence[ExpertId]) -> None:
        """These residents of one layer were requested again, in this order."""
        ...

    def remove(self, expert: ExpertId) -> None:
        """The resident `expert` is gone."""
        ...

    def victims(self, layer: int | None = None) -> Iterator[Ranked]:
        """Residents (of one layer, or of all) in the order in which they should leave, by ascending rank.

        Lazy, and may be left early. The policy must not be changed while it is iterated.
        """
        ...

    def reconsider(self, expert: ExpertId) -> bool:
        """The resident `expert` is about to leave. True if its place or rank has changed now that it was looked at
        again: then whoever is first must be asked. Asked twice in a row, the second answer is no."""
        ...

    def resize(self, capacity: int) -> None:
        """The cache has `capacity` slots from now on."""
        ...

    def tick(self) -> None:
        """One token is done; for policies that forget."""
        ...


def _analog(capacity: int, cycle: int) -> EvictionPolicy:
    from .analog import Analog  # with numpy, which nobody needs who only asks for the names

    return Analog(capacity, cycle)


_POLICIES: dict[str, Callable[[int, int], EvictionPolicy]] = {
    "analog": _analog,
    "forecast": Forecast,
    "lru": LRU,
    "lfu": LFU,
    "slru": SLRU,
    "lru2": LRU2,
    "lfru": LFRU,
    "wtinylfu": WTinyLFU,
    "fifo": FIFO,
}


def policy_names() -> tuple[str, ...]:
    """Names that `get_policy` knows, the default first."""
    return tuple(_POLICIES)


def get_policy(name: str, capacity: int, cycle: int) -> EvictionPolicy:
    """A new policy for `capacity` slots of a model that touches `cycle` = layers x top-k experts per token.

    Raises ValueError with one sentence that names the known policies and the nearest to an unknown name.
    """
    if name not in _POLICIES:
        near = difflib.get_close_matches(str(name).lower(), _POLICIES, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown eviction policy {name!r}: choose one of {', '.join(_POLICIES)}.{hint}")
    return _POLICIES[name](capacity, cycle)
