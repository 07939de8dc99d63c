"""What the cache and its reads did: counters per layer, phases, rates. Recording is cheap and safe from any thread.

What a layer did is noted while tokens are under way and counted after some dozens of them, or when somebody asks.

Rates and shares of nothing are None, never an error; counts start at 0. Seconds are wall-clock seconds.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from .counters import LayerStats, PhaseStats, Step, check, copied, outstanding
from .device_stats import DeviceStats
from .expert import ExpertId, Lookup
from .history import History
from .notes import Notes
from .saved_stats import DAMAGED, DESCRIPTION, FORMAT_VERSION, MOST_STEPS, read_saved
from .whole_file import replacing

Phase = Literal["prompt", "answer"]
Outcome = Literal["useful", "late", "wasted", "cancelled"]
MOST_NOTES = 1024
"""Of what layers did, before it is counted."""


@dataclass
class RunStats:
    """Counters of one run of a model with `layers` MoE layers whose records are `record_bytes` long.

    The runtime records through the methods and sets the descriptive fields directly. While it runs, counters are to be
    read from a snapshot.
    """

    layers: int
    record_bytes: int = 0
    slots: int | None = None
    total_experts: int | None = None
    ram_budget_bytes: int | None = None
    peak_rss_bytes: int | None = None
    time_to_first_token_s: float | None = None
    finish_reason: str | None = None
    model: str | None = None
    codec: str | None = None
    policy: str | None = None
    io: str | None = None
    kernels: str | None = None
    store: str | None = None
    """The directory that records are read from."""
    prefetch: str | None = None
    """How it stands with reading ahead, in words."""
    finished_at: float | None = None
    """Seconds since 1970."""
    read_busy_s: float = 0.0
    """Time with at least one read in flight: reads side by side count once."""
    read_wait_s: float = 0.0
    """Time that reads took, each for itself: over `read_busy_s` it is the mean number in flight."""
    pace: deque[Step] = field(default_factory=lambda: deque(maxlen=MOST_STEPS))
    """The latest steps of answers."""
    uses: Counter[ExpertId] = field(default_factory=Counter)
    """Requests for each expert."""
    residents: list[ExpertId] | None = None
    """Who was in a slot, where somebody has asked."""
    device: DeviceStats | None = None
    """The tier above RAM, where there is one."""
    history: History | None = field(default=None, repr=False, compare=False)
    """The latest tokens' routing, where somebody has asked."""
    per_layer: list[LayerStats] = field(default_factory=list)
    prompt: PhaseStats = field(default_factory=PhaseStats)
    answer: PhaseStats = field(default_factory=PhaseStats)
    clock: Callable[[], float] = field(default=time.perf_counter, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.per_layer = self.per_layer or [LayerStats() for _ in range(self.layers)]
        assert len(self.per_layer) == self.layers, f"{len(self.per_layer)} layers of counters for {self.layers} layers"
        self._lock = threading.RLock()
        self._phase = self.prompt
        self._notes = Notes()
        self._in_flight = 0
        self._in_flight_since = 0.0
        self._begin_step()

    # Recording

    def enter(self, phase: Phase) -> None:
        """What is recorded from now on belongs to `phase`."""
        with self._lock:
            self._count()
            self._begin_step()
            self._phase = self.prompt if phase == "prompt" else self.answer

    def _begin_step(self) -> None:
        self._waited, self._missing, self._missing_in = 0.0, 0, 0

    def record(
        self,
        layer: int,
        wanted: Lookup,
        late: int = 0,
        prefetch_hits: int = 0,
        kernels_s: float = 0,
        layer_s: float = 0,
    ) -> None:
        """One layer's requests. `late` of the misses were in flight, `prefetch_hits` of the hits came by prefetch; the
        expert kernels ran for `kernels_s`, and the layer's experts took `layer_s` in all."""
        self._notes.add((layer, wanted.hits, wanted.misses, late, prefetch_hits, kernels_s, layer_s, 0.0))
        if wanted.misses or prefetch_hits:
            self._missing += len(wanted.misses) + prefetch_hits
            self._missing_in |= 1 << layer
        self._count_some(layer)

    def record_hits(
        self, layers: Sequence[int], hits: Sequence[Sequence[ExpertId]], kernels_s: Sequence[float], books_s: float
    ) -> None:
        """`record` for layers in a row with nothing but hits; they took `books_s` in all beside their kernels."""
        self._notes.add_hits(layers, hits, kernels_s, [seconds + books_s / len(layers) for seconds in kernels_s])
        self._count_some(layers[-1])

    def _count_some(self, layer: int) -> None:
        if layer == self.layers - 1 and len(self._notes) >= MOST_NOTES:
            with self._lock:
                self._count()

    def _count(self) -> None:
        """Count what has been noted. Other threads may go on noting meanwhile."""
        self._notes.count(self.per_layer, self._phase, self.uses, self.prompt.requests + self.answer.requests)

    def read_started(self) -> None:
        """A read went to the disk. Each one ends in `read_paused`, `read_finished` or `read_failed`."""
        with self._lock:
            self._pass_time()
            self._in_flight += 1

    def read_paused(self, layer: int, nbytes: int) -> None:
        """A piece of `nbytes` of a record arrived, which is not the last one."""
        with self._lock:
            self.read_failed()
            self.per_layer[layer].bytes_read += nbytes
            self._phase.bytes_read += nbytes

    def read_finished(self, layer: int, nbytes: int, prefetch: bool = False) -> None:
        """A record of `layer` arrived, on demand or by prefetch; `nbytes` is all of it, or its last piece."""
        with self._lock:
            self.read_paused(layer, nbytes)
            counters = self.per_layer[layer]
            if prefetch:
                counters.prefetch_reads += 1
            else:
                counters.demand_reads += 1

    def read_failed(self) -> None:
        """A read ended without bytes."""
        with self._lock:
            assert self._in_flight > 0, "a read ended that did not start"
            self._pass_time()
            self._in_flight -= 1

    def _pass_time(self) -> None:
        """Book the time since the number of reads in flight last changed."""
        now = self.clock()
        if self._in_flight:
            self.read_busy_s += now - self._in_flight_since
            self.read_wait_s += (now - self._in_flight_since) * self._in_flight
        self._in_flight_since = now

    def record_prefetch(self, layer: int, issued: int = 0, outcome: Outcome | None = None, count: int = 1) -> None:
        """`issued` guesses were queued, or `count` of them ended with `outcome`."""
        with self._lock:
            counters = self.per_layer[layer]
            counters.prefetch_issued += issued
            if outcome is not None:
                name = f"prefetch_{outcome}"
                setattr(counters, name, getattr(counters, name) + count)

    def record_stall(self, layer: int, seconds: float) -> None:
        """Compute waited `seconds` for bytes of `layer`."""
        self._notes.add((layer, (), (), 0, 0, 0.0, 0.0, seconds))
        self._waited += seconds

    def record_compute(self, seconds: float) -> None:
        """The expert kernels ran for `seconds`."""
        with self._lock:
            self._phase.compute_s += seconds

    def record_prompt(self, tokens: int, seconds: float) -> None:
        """A prompt of `tokens` was processed in `seconds`, up to its first answer token."""
        with self._lock:
            self.prompt.tokens += tokens
            self.prompt.steps += 1
            self.prompt.seconds += seconds

    def record_answer(self, tokens: int, steps: int, seconds: float, forward_s: float = 0.0) -> None:
        """`tokens` generated; `steps` forward passes after the prompt's took `seconds`, of which they computed and
        waited `forward_s`. May be called per token."""
        with self._lock:
            self.answer.tokens += tokens
            self.answer.steps += steps
            self.answer.seconds += seconds
            self.answer.forward_s += forward_s
            if steps:
                self.pace.append(Step(seconds, self._waited, self._missing, self._missing_in))
                self._begin_step()

    # The whole

    def snapshot(self) -> RunStats:
        """A consistent deep copy; later recording does not change it. Safe while other threads record."""
        with self._lock:
            self._count()
            copy = RunStats(**{f.name: getattr(self, f.name) for f in fields(self)})
            copy.per_layer = [copied(counters) for counters in self.per_layer]
            copy.prompt, copy.answer = copied(self.prompt), copied(self.answer)
            copy.device = self.device and self.device.snapshot()
            copy.uses, copy.pace = self.uses.copy(), self.pace.copy()
            copy._phase = copy.prompt if self._phase is self.prompt else copy.answer
            copy._in_flight, copy._in_flight_since = self._in_flight, self._in_flight_since
            copy._pass_time()
            copy._in_flight = 0
            return copy

    def reset(self) -> None:
        """Counters and times back to 0; the description (slots, model and so on) stays, and so do reads in flight
        and guesses that have not ended."""
        with self._lock:
            self._notes.clear()
            in_prompt = self._phase is self.prompt
            self.per_layer = [LayerStats(prefetch_issued=outstanding(counters)) for counters in self.per_layer]
            self.prompt, self.answer = PhaseStats(), PhaseStats()
            self._phase = self.prompt if in_prompt else self.answer
            self.read_busy_s = self.read_wait_s = 0.0
            if self.device is not None:
                self.device.reset()
            self.uses = Counter()
            self.pace.clear()
            self._begin_step()
            self.time_to_first_token_s = self.finish_reason = None
            self._in_flight_since = self.clock()

    def merge(self, other: RunStats) -> None:
        """Add the counters of a later run of the same model; its description and first-token time replace ours.

        Raises ValueError when the two cannot be of one model.
        """
        theirs = other.snapshot()
        with self._lock:
            self._count()
            if (self.layers, self.record_bytes) != (theirs.layers, theirs.record_bytes):
                raise ValueError(
                    f"Statistics of different models do not add up: {self.layers} layers with records of "
                    f"{self.record_bytes} bytes here, {theirs.layers} and {theirs.record_bytes} there."
                )
            for mine, more in zip(
                [*self.per_layer, self.prompt, self.answer],
                [*theirs.per_layer, theirs.prompt, theirs.answer],
                strict=True,
            ):
                for f in fields(mine):
                    setattr(mine, f.name, getattr(mine, f.name) + getattr(more, f.name))
            self.read_busy_s += theirs.read_busy_s
            self.read_wait_s += theirs.read_wait_s
            self.uses.update(theirs.uses)
            self.pace.extend(theirs.pace)
            if self.device is not None and theirs.device is not None:
                self.device.merge(theirs.device)
            peaks = [peak for peak in (self.peak_rss_bytes, theirs.peak_rss_bytes) if peak is not None]
            for name in DESCRIPTION:
                if getattr(theirs, name) is not None:
                    setattr(self, name, getattr(theirs, name))
            self.peak_rss_bytes = max(peaks, default=None)

    def check(self) -> None:
        """Raise AssertionError, with the numbers, when the counters do not add up."""
        run = self.snapshot()
        for layer, c in enumerate(run.per_layer):
            check(layer, c, run.record_bytes)
        for name in ("requests", "hits", "bytes_read"):
            phases, total = getattr(run.prompt, name) + getattr(run.answer, name), run.total(name)
            assert phases == total, f"{name}: {phases} in the phases != {total} in the layers"
        by_layer = [0] * run.layers
        for expert, uses in run.uses.items():
            by_layer[expert.layer] += uses
        requests = [c.requests for c in run.per_layer]
        assert by_layer == requests, f"experts were used {by_layer} times by layer, but requested {requests} times"
        if run.device is not None:
            run.device.check()
        stalls, total = run.prompt.stall_s + run.answer.stall_s, run.total("stall_s")
        assert abs(stalls - total) <= 1e-6 * max(1.0, total), f"stall: {stalls} s in phases != {total} s in layers"

    def total(self, name: str) -> Any:
        """The sum of the counter `name` over all layers."""
        with self._lock:
            self._count()
        return sum(getattr(counters, name) for counters in self.per_layer)

    def report(self) -> str:
        """The whole report as text of 80 columns; with a history it takes a second or two."""
        from .report import report
        from .report_text import as_text
        from .sections import sections

        return as_text(sections(report(self)))

    def summary(self) -> str:
        """The head of the report in a few lines; it takes no time."""
        from .report import report
        from .report_text import as_text
        from .sections import summary

        return as_text(summary(report(self, replays=False)))

    @property
    def read_s(self) -> float | None:
        """Seconds of the disk's time for each record."""
        return _ratio(self.read_busy_s * self.record_bytes, self.total("bytes_read"))

    @property
    def dropped_bytes(self) -> int:
        """Bytes of records that were not read to their end."""
        return self.total("bytes_read") - self.record_bytes * (
            self.total("demand_reads") + self.total("prefetch_reads")
        )

    @property
    def compute_s(self) -> float:
        """Time in the expert kernels."""
        return self.prompt.compute_s + self.answer.compute_s

    # As data

    def to_dict(self) -> dict[str, Any]:
        """The counters, JSON-serialisable: totals named as in `LayerStats`, rates, `phases`, `per_layer`."""
        run = self.snapshot()
        totals = {f.name: run.total(f.name) for f in fields(LayerStats)}
        seconds = run.prompt.seconds + run.answer.seconds
        return {
            "version": FORMAT_VERSION,
            **{name: getattr(run, name) for name in ("layers", "record_bytes", *DESCRIPTION)},
            **totals,
            "hit_rate": _ratio(totals["hits"], totals["requests"]),
            "answer_hit_rate": _ratio(run.answer.hits, run.answer.requests),
            "prompt_tokens": run.prompt.tokens,
            "generated_tokens": run.answer.tokens,
            "prompt_tokens_per_second": _ratio(run.prompt.tokens, run.prompt.seconds),
            "tokens_per_second": _ratio(run.answer.steps, run.answer.seconds),
            "stall_share": _ratio(totals["stall_s"], seconds),
            "disk_read_bytes_per_s": _ratio(totals["bytes_read"], run.read_busy_s),
            "read_busy_s": run.read_busy_s,
            "read_wait_s": run.read_wait_s,
            "phases": {"prompt": asdict(run.prompt), "answer": asdict(run.answer)},
            "device": run.device and run.device.to_dict(),
            "per_layer": [{**asdict(c), "hit_rate": _ratio(c.hits, c.requests)} for c in run.per_layer],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict()`, pace, uses, residents and history as JSON, all or nothing, readable by its owner only.
        Raises OSError."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        run = self.snapshot()
        data = {
            **run.to_dict(),
            "pace": list(run.pace),
            "uses": [(*expert, count) for expert, count in sorted(run.uses.items())],
            "residents": None if run.residents is None else sorted(run.residents),
            "history": None if run.history is None else run.history.to_dict(),
        }
        with replacing(path) as file:
            file.write(json.dumps(data).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RunStats:
        """Read what `save` wrote. Raises OSError, or ValueError with one sentence when it holds something else."""
        try:
            run = cls(**read_saved(Path(path)))
            run.check()
            return run
        except DAMAGED as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} does not hold statistics of pocketmoe ({reason}): make a new run.") from None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
