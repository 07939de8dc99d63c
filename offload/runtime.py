"""The hot path: one MoE layer of one forward, its experts in slots or on their way.

`run_layer` decides nothing about eviction and computes nothing itself: the cache says who is where, the transfers bring
what is missing, the kernels compute from the slots, and the parts are summed in expert order, so that the result does
not depend on what was cached, prefetched or how large the budget is.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..cache.expert import ExpertId, Lookup
from ..cache.history import History
from ..cache.manager import ExpertCache
from ..cache.self_test import SelfTest
from ..cache.stats import RunStats
from ..quant.kernels import ExpertJob, ExpertKernels
from .predictor import RouterPredictor
from .prefetch import Prefetch
from .ram_table import RamTable
from .reads import Reads
from .recorder import NoRecorder, Recorder
from .recovery import recovering
from .tiers import DeviceSlots, RamSlots
from .transfer import Transfers


class Assignment(NamedTuple):
    """Which tokens each expert of a layer serves: T tokens, k experts each, R = T * k rows sorted by expert."""

    experts: list[int]
    """Distinct experts, ascending."""
    starts: list[int]
    """First row of each expert; one more entry, R, at the end."""
    rows: torch.Tensor
    """int32 [R]: the token of each row."""
    places: torch.Tensor
    """int64 [T, k]: each token's rows, ascending by expert: the fixed order of summation."""
    order: torch.Tensor
    """int64 [T, k]: the column of `top_k_index` that each place belongs to."""

    @classmethod
    def of(cls, top_k_index: torch.Tensor) -> Assignment:
        tokens, k = top_k_index.shape
        ranked, order = torch.sort(top_k_index, dim=1)
        if tokens == 1:
            experts = ranked[0].tolist()
            if len(set(experts)) == k:  # as every top-k router gives; anything else takes the general way
                return cls.of_token(experts)._replace(order=order)
        flat, by_expert = torch.sort(ranked.reshape(-1), stable=True)
        experts_t, counts = torch.unique_consecutive(flat, return_counts=True)
        starts = [0, *counts.cumsum(0).tolist()]
        places = torch.empty(tokens * k, dtype=torch.int64)
        places[by_expert] = torch.arange(tokens * k)
        rows = (by_expert // k).to(torch.int32)
        return cls(experts_t.tolist(), starts, rows, places.reshape(tokens, k), order)

    @classmethod
    def of_token(cls, experts: list[int]) -> Assignment:
        """One token's distinct experts, ascending."""
        k = len(experts)
        starts, rows, places = _one_token(k)
        return cls(experts, starts, rows, places, places)

    def jobs(self, experts: Sequence[ExpertId], tier: RamSlots | DeviceSlots, slots: Sequence[int]) -> list[ExpertJob]:
        """What kernels are given of some of the experts, which lie in these slots of a tier."""
        return [self._job(tier.record(slot), expert.index) for slot, expert in zip(slots, experts, strict=True)]

    def _job(self, record: torch.Tensor, expert: int) -> ExpertJob:
        at = self.experts.index(expert)
        return ExpertJob(record, self.starts[at], self.starts[at + 1] - self.starts[at])


@functools.cache
def _one_token(k: int) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """What every assignment of one token to k experts shares: starts, rows and places."""
    return list(range(k + 1)), torch.zeros(k, dtype=torch.int32), torch.arange(k).reshape(1, k)


def combine(
    parts: torch.Tensor, places: torch.Tensor, order: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Each token's experts, weighted and summed in expert order: float32 [T, H].

    Args:
        parts: float32 [R, H], the experts' outputs by row.
        places, order: as in `Assignment`.
        top_k_weights: [T, k], in the router's order.
    """
    weights = top_k_weights.float().gather(1, order)
    rows = iter(parts.split(1)) if len(places) == 1 else (parts[place] for place in places.T)  # a token's are in order
    total = next(rows) * weights[:, :1]
    for i, row in enumerate(rows, 1):
        total.addcmul_(row, weights[:, i : i + 1])
    return total


class ExpertRuntime:
    """Runs the MoE layers of a model over a cache of slots.

    Args:
        kernels: one per MoE layer.
        table: that of `cache`; None = the kernels cannot find experts by themselves.
    """

    prompt_reads = 12
    """Reads in flight while a prompt streams through: enough to keep the disk busy, few enough that the experts which
    the answer will want stay where they are."""

    def __init__(
        self,
        cache: ExpertCache,
        slots: RamSlots,
        transfers: Transfers,
        kernels: Sequence[ExpertKernels],
        stats: RunStats,
        prefetch: Prefetch,
        predictor: RouterPredictor | None,
        recorder: Recorder | None = None,
        table: RamTable | None = None,
    ) -> None:
        self.cache, self.slots, self.transfers, self.kernels = cache, slots, transfers, kernels
        self.stats, self.prefetch, self.predictor = stats, prefetch, predictor
        self.recorder = recorder or NoRecorder()
        self.table = table
        self.history = History(cache.layers)
        self.in_order = True
        self.self_test = SelfTest()
        self._token_began, self._missing = 0.0, 0

    def run_layer(
        self, layer: int, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of each token's experts.

        Args:
            hidden_states: [T, H].
            top_k_index, top_k_weights: [T, k], from the router.

        Returns:
            [T, H], in the dtype of `hidden_states`.
        """
        guess = None
        if hidden_states.shape[0] == 1 and self.predictor is not None and self.wants_guesses:
            guess = self.predictor.predict(layer + 1)
        self.recorder.record(layer, top_k_index, top_k_weights, guess)
        work = Assignment.of(top_k_index)
        hidden = hidden_states.float().contiguous()
        parts = self.run_experts(layer, hidden, work, () if guess is None else guess.reshape(-1).tolist())
        return combine(parts, work.places, work.order, top_k_weights).to(hidden_states.dtype)

    @property
    def wants_guesses(self) -> bool:
        """Whether to read ahead: there is something left to read, and it has not turned out to cost time."""
        total = self.stats.total_experts
        return self.predictor is not None and (total is None or len(self.cache) < total) and self.self_test.on

    @recovering
    def run_experts(
        self, layer: int, hidden: torch.Tensor, work: Assignment, guess: Sequence[int], began: float | None = None
    ) -> torch.Tensor:
        """Each chosen expert's output for each of its tokens.

        Args:
            hidden: float32 [T, H], contiguous.
            guess: experts of the next layer to read ahead.
            began: when the token's step began, if that is known; else, a token begins with its first such layer.

        Returns:
            float32 [R, H], by row of `work`, unweighted.
        """
        begin = time.perf_counter()
        single = hidden.shape[0] == 1
        wanted, late, ahead = self._ask(layer, work.experts, single, begin if began is None else began)
        parts = torch.empty(len(work.rows), hidden.shape[1])
        if wanted.misses or guess:
            compute_s = self._compute_and_read(layer, wanted, guess, hidden, work, parts)
        else:  # nothing can be evicted meanwhile
            compute_s = self._compute(layer, wanted.hits, hidden, work, parts)
        self.stats.record(layer, wanted, late, ahead, compute_s, time.perf_counter() - begin)
        self._end(layer, single)
        return parts

    @property
    def may_run_alone(self) -> bool:
        """Whether kernels may run whole layers for a token whose experts they find in the table. Nothing may arrive or
        leave meanwhile, nothing be waiting for what a layer chooses, and no interruption be left to recover from."""
        return self.table is not None and self.in_order and self.prefetch.idle

    @recovering
    def note_layers(self, layers: Sequence[tuple[int, list[int], float]], began: float) -> None:
        """Do the books of layers that a token went through alone.

        Args:
            layers: at least one, in their order: layer, experts ascending, the kernels' seconds.
            began: when the token's step began.
        """
        begin = time.perf_counter()
        for layer, experts, _ in layers:
            self.prefetch.settle(layer, experts)
        numbers, chosen, kernels_s = zip(*layers, strict=True)
        found = self.cache.use(list(zip(numbers, chosen, strict=True)))
        ahead = [self.prefetch.first_uses(hits) for hits in found]
        self.note_missing(numbers[0], sum(ahead), began)
        self.history.extend(numbers[0], found)
        books_s = time.perf_counter() - begin
        if any(ahead):
            for layer, hits, used, seconds in zip(numbers, found, ahead, kernels_s, strict=True):
                self.stats.record(layer, Lookup(hits, ()), 0, used, seconds, seconds + books_s / len(layers))
        else:
            self.stats.record_hits(numbers, found, kernels_s, books_s)
        self._end(numbers[-1], True)

    def _ask(self, layer: int, experts: list[int], single: bool, began: float) -> tuple[Lookup, int, int]:
        """Who is there, how many are on their way, and how many of those who are there came by prefetch."""
        self.prefetch.settle(layer, experts)
        wanted = self.cache.lookup(layer, experts, promote=single)
        late = sum(map(self.cache.is_arriving, wanted.misses))
        ahead = self.prefetch.first_uses(wanted.hits)
        self.note_missing(layer, len(wanted.misses) + ahead, began)
        if single:
            self.history.record(layer, wanted.hits + wanted.misses)
        return wanted, late, ahead

    def _end(self, layer: int, single: bool) -> None:
        if layer == self.cache.layers - 1:
            self.cache.tick()
            if single and self.predictor is not None:
                self.test_prefetch()

    def note_missing(self, layer: int, count: int, began: float) -> None:
        """A token began at `began`; without prefetch, `count` of this layer's experts would have to be read. For
        `test_prefetch`."""
        if layer == 0:
            self._token_began, self._missing = began, 0
        self._missing += count

    def test_prefetch(self) -> None:
        """A token is through the layers: say how long that took."""
        tests = self.self_test.tests
        self.self_test.step(time.perf_counter() - self._token_began, self._missing)
        if self.self_test.tests > tests:
            self.stats.prefetch = self.self_test.state

    def _compute_and_read(
        self,
        layer: int,
        wanted: Lookup,
        guess: Sequence[int],
        hidden: torch.Tensor,
        work: Assignment,
        parts: torch.Tensor,
    ) -> float:
        """Hits at once, misses as they arrive, guesses behind them. Returns the kernels' seconds."""
        reads = Reads(self, layer, wanted, keep=self.worth_keeping(layer, work) if hidden.shape[0] > 1 else None)
        try:
            reads.start()
            if guess:
                self.prefetch.request(layer + 1, guess)  # queued behind what we wait for
            seconds = self._compute(layer, wanted.hits, hidden, work, parts)  # while misses travel
            reads.release(wanted.hits)
            while ready := reads.next():
                seconds += self._compute(layer, ready, hidden, work, parts)
                reads.release(ready)
        finally:
            reads.close()
        return seconds

    def _compute(
        self, layer: int, experts: Sequence[ExpertId], hidden: torch.Tensor, work: Assignment, parts: torch.Tensor
    ) -> float:
        if not experts:
            return 0.0
        start = time.perf_counter()
        jobs = work.jobs(experts, self.slots, self.cache.slots_of(experts))
        self.kernels[layer].run(hidden, work.rows, jobs, parts)
        return time.perf_counter() - start

    def worth_keeping(self, layer: int, work: Assignment) -> set[int]:
        """Those of a prompt's experts that an answer will want: the layer's fair share of slots, most tokens first."""
        share = max((self.cache.capacity - self.prompt_reads) // self.cache.layers, self.cache.floor)
        counts = sorted(range(len(work.experts)), key=lambda i: (work.starts[i] - work.starts[i + 1], i))
        return {work.experts[i] for i in counts[:share]}

    def make_room(self) -> bool:
        return self.prefetch.make_room()

    @recovering
    def resize(self, capacity: int) -> None:
        """Use the first `capacity` slots only, and give the memory of the others back. Between forwards only."""
        self.prefetch.drain()
        for expert, _slot in self.cache.resize(capacity):
            self.prefetch.evicted(expert)
        self.slots.resize(capacity)

    def recover(self) -> None:
        """Stop every read, and free the slots that wait for one."""
        self.transfers.drain()
        self.prefetch.forget()
        self.slots.resize(self.cache.capacity)  # which an interrupted `resize` has not come to
        self.cache.recover()

    def close(self) -> None:
        self.recover()
        self.transfers.close()
        if self.predictor is not None:
            self.predictor.close()
