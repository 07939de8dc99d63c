"""The estimates of the eviction policy `analog`, compiled: an `Estimates` of cache/analog.py. It needs no torch."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import inf
from typing import Any

from .native_library import NativeError, NativeLibrary, check


class NativeEstimates:
    """Ranks are those of the plain estimates, bit for bit. A deep copy is a new one, that knows nothing.

    Args:
        experts: of each layer.
        cycle: experts of one token.
    """

    def __init__(self, library: NativeLibrary, experts: Sequence[int], cycle: int) -> None:
        self._made_of = library, experts, cycle
        counts, ranks = array("i", experts), array("d", [inf]) * sum(experts)
        ends = list(accumulate(experts))
        whole: Any = memoryview(ranks)
        self._ranks = [whole[end - count : end] for end, count in zip(ends, experts, strict=True)]
        self._handle = library.c.pm_estimates_create(
            len(counts), counts.buffer_info()[0], cycle, ranks.buffer_info()[0]
        )
        if not self._handle:
            raise NativeError(f"estimates for {len(counts)} layers: out of memory")
        weakref.finalize(self, library.c.pm_estimates_destroy, self._handle)
        c = library.c
        self._use, self._after, self._tick = c.pm_estimates_use, c.pm_estimates_after, c.pm_estimates_tick

    def __deepcopy__(self, memo: object) -> NativeEstimates:
        return NativeEstimates(*self._made_of)

    def use(self, layer: int, experts: Sequence[int]) -> bool:
        numbers = array("i", experts)
        begins = self._use(self._handle, layer, numbers.buffer_info()[0], len(numbers))
        if begins < 0:
            check(-begins, f"pm_estimates_use of {list(experts)} in layer {layer}")
        return begins > 0

    def leave(self, layer: int, expert: int) -> None:
        ranks = self._ranks[layer]
        if ranks[expert] == inf:
            raise KeyError(expert)
        ranks[expert] = inf

    def after(self, layer: int, expert: int = -1) -> tuple[int, float] | None:
        found = self._after(self._handle, layer, expert)
        return None if found < 0 else (found, self._ranks[layer][found])

    def layers(self) -> Iterable[int]:
        return range(len(self._ranks))

    def tick(self) -> None:
        check(self._tick(self._handle), "pm_estimates_tick")
