"""What layers did, noted while tokens are under way and counted together, after some dozens of them.

Between the kernels' calls Python's code finds cold caches, where one thing done takes as long as several in a loop.
Notes lie one behind the other in one queue: a tuple for each would stay until it is counted, and so many new objects
make Python search its heap for garbage again and again, which took longer than all the rest.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice, repeat
from operator import attrgetter
from typing import Any

from .counters import LayerStats, PhaseStats
from .expert import ExpertId

Note = tuple[int, Sequence[ExpertId], Sequence[ExpertId], int, int, float, float, float]
"""What one layer did: its number, hits, misses, how many of these were in flight and how many of those prefetched, the
seconds of its kernels, of its experts in all, and those that it waited for bytes."""
_WIDTH = 8
_IN_LAYER = "requests", "hits", "misses", "late", "prefetch_hits", "stall_s"
_IN_PHASE = "requests", "hits", "missing", "stall_s", "compute_s", "layers_s"
_of_layer, _of_phase = attrgetter(*_IN_LAYER), attrgetter(*_IN_PHASE)


class Notes:
    """Any thread may add to them at any time.

    Attributes:
        add: takes a `Note`.
    """

    def __init__(self) -> None:
        self._flat = deque[Any]()
        self._taken: list[Any] = []
        self._before: tuple[_Before, int] | None = None
        self.add: Callable[[Note], None] = self._flat.extend

    def add_hits(
        self,
        layers: Sequence[int],
        hits: Sequence[Sequence[ExpertId]],
        kernels_s: Sequence[float],
        layer_s: Sequence[float],
    ) -> None:
        """Notes of several layers with nothing but hits, none of them prefetched, in one call."""
        notes = zip(layers, hits, repeat(()), repeat(0), repeat(0), kernels_s, layer_s, repeat(0.0))
        self._flat.extend(chain.from_iterable(notes))

    def __len__(self) -> int:
        return len(self._flat) // _WIDTH

    def clear(self) -> None:
        self._flat.clear()
        self._taken.clear()
        self._before = None

    def count(self, per_layer: Sequence[LayerStats], phase: PhaseStats, uses: Counter[ExpertId], requests: int) -> None:
        """Add what has been noted to the counters of layers, of the phase that it belongs to, and of experts.

        A Ctrl-C may fall between any two lines here: what it cuts off is counted the next time. The uses are counted
        last and by a single call into C, so they say how far it had come.

        Args:
            requests: of all phases so far.
        """
        if self._before is not None:
            before, requests_before = self._before
            if sum(uses.values()) == requests_before:
                before.restore()
                requests = requests_before
            else:
                self._taken.clear()
            self._before = None
        self._taken.extend(islice(iter(self._flat.popleft, self), len(self._flat)))
        before = _Before(self._taken[::_WIDTH], per_layer, phase)
        self._before = before, requests
        chosen = tuple(chain.from_iterable(chain(self._taken[1::_WIDTH], self._taken[2::_WIDTH])))
        _count(zip(*[iter(self._taken)] * _WIDTH, strict=True), per_layer, phase)
        uses.update(chosen)
        self._taken.clear()
        self._before = None


def _count(notes: Iterable[Any], per_layer: Sequence[LayerStats], phase: PhaseStats) -> None:
    requests = hits = 0
    kernels = layers = 0.0
    for layer, hit, missed, late, prefetch_hits, kernels_s, layer_s, stall_s in notes:
        counters = per_layer[layer]
        counters.requests += len(hit) + len(missed)
        counters.hits += len(hit)
        if missed or prefetch_hits or stall_s:
            counters.misses += len(missed)
            counters.late += late
            counters.prefetch_hits += prefetch_hits
            counters.stall_s += stall_s
            phase.missing += len(missed) + prefetch_hits
            phase.stall_s += stall_s
        requests += len(hit) + len(missed)
        hits += len(hit)
        kernels += kernels_s
        layers += layer_s
    phase.requests += requests
    phase.hits += hits
    phase.compute_s += kernels
    phase.layers_s += layers


class _Before:
    """What `_count` changes, as it was before."""

    def __init__(self, layers: Iterable[int], per_layer: Sequence[LayerStats], phase: PhaseStats) -> None:
        self._layers = [(per_layer[layer], _of_layer(per_layer[layer])) for layer in set(layers)]
        self._phase, self._of_phase = phase, _of_phase(phase)

    def restore(self) -> None:
        """May itself be interrupted, and done again."""
        for counters, values in self._layers:
            for name, value in zip(_IN_LAYER, values, strict=True):
                setattr(counters, name, value)
        for name, value in zip(_IN_PHASE, self._of_phase, strict=True):
            setattr(self._phase, name, value)
