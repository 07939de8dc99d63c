"""The hot path with a GPU: experts in VRAM are computed there, the others where they are done sooner.

Three tiers: slots on the device, slots in (pinned) RAM below them, the store at the bottom. A miss whose record is in
RAM is copied up or computed by the CPU while the device computes the hits, whichever ends first by the costs measured
so far (`cache/hybrid.py` decides). A miss on disk goes to RAM first. The outputs are summed in expert order on the
device. A prompt streams every expert that it needs through the device, a few at a time.

The caller waits for the device once a layer, to learn what the router has chosen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..cache.device_stats import DeviceStats
from ..cache.expert import ExpertId, Lookup
from ..cache.hybrid import Measured, TierCosts, Worth, split_misses, upload_budget, worth_admitting
from ..cache.manager import ExpertCache
from ..quant.kernels import ExpertKernels
from .device import Device
from .reads import Reads
from .recorder import NoRecorder
from .recovery import recovering
from .runtime import Assignment, ExpertRuntime, combine
from .tiers import DeviceSlots
from .uploads import Uploads

_LAST_TOKENS = 32
"""Of a prompt: what they chose, the answer will want."""

_DISK = 1.5e9
"""Bytes per second of a disk that nobody has measured yet."""


@dataclass
class _Step:
    """One layer of one forward."""

    layer: int
    work: Assignment
    hidden: torch.Tensor
    """float32 [T, H], on the device."""
    rows: torch.Tensor
    """`work.rows`, on the device."""
    parts: torch.Tensor
    """float32 [R, H], on the device: the experts' outputs."""
    on_host: torch.Tensor | None
    """`hidden` in RAM, for a single token that the CPU may work on."""
    keep: set[int] | None
    """Of a prompt: experts that stay on the device after it. None: all."""


class DeviceRuntime:
    """Runs the MoE layers of a model whose trunk is on a device.

    Args:
        cache: who is in which slot of the device.
        ram: the tier below, whose kernels compute on the CPU.
        kernels: one per MoE layer, for tensors of the device.
        deterministic: every expert is computed on the device, so that answers do not depend, to the bit, on what lies
            where: the CPU's kernels round differently.
        learns: correct the costs by what copies and the CPU really take.
    """

    def __init__(
        self,
        device: Device,
        cache: ExpertCache,
        slots: DeviceSlots,
        ram: ExpertRuntime,
        kernels: Sequence[ExpertKernels],
        costs: TierCosts,
        deterministic: bool = False,
        learns: bool = True,
    ) -> None:
        self.device, self.cache, self.slots, self.ram, self.kernels = device, cache, slots, ram, kernels
        self.costs, self.deterministic, self._learns = costs, deterministic, learns
        self._records = not isinstance(ram.recorder, NoRecorder)
        self.stats = DeviceStats(cache.layers, slots.record_bytes, cache.capacity)
        self.worth = Worth()
        self._read_s = slots.record_bytes / _DISK
        """What the read of one record takes."""
        self.uploads = Uploads(device, slots, ram.cache, ram.slots)
        self._below = _Below(ram, self.uploads)
        self._wave = max(1, cache.floor // 2)
        top_k = ram.cache.floor
        self._zeros = device.empty((top_k,), torch.int32)
        device.put(self._zeros, torch.zeros(top_k, dtype=torch.int32))
        self._from_cpu = torch.empty(0, 0)
        self._kept: tuple[torch.Tensor, ...] = ()  # what `device.put` still reads
        self.in_order = True

    # One layer

    @recovering
    def run_layer(
        self, layer: int, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of each token's experts; see `ExpertRuntime.run_layer`. All tensors are the device's."""
        ram, single = self.ram, hidden_states.shape[0] == 1
        guess = None
        if single and ram.predictor is not None and self.wants_guesses:
            guess = ram.predictor.predict(layer + 1)
        hidden = hidden_states.float().contiguous()
        wanted = {"chosen": top_k_index, "guess": guess, "hidden": hidden if single else None}
        wanted["weights"] = top_k_weights if self._records else None
        asked = {name: tensor for name, tensor in wanted.items() if tensor is not None}
        got = dict(zip(asked, self.device.to_host(list(asked.values())), strict=True))
        if self._records:
            traced = {name: tensor.clone() for name, tensor in got.items()}
            ram.recorder.record(layer, traced["chosen"], traced["weights"], traced.get("guess"))
        work = Assignment.of(got["chosen"])
        step = self._step(layer, work, hidden, got.get("hidden"))
        self._run_experts(step, got["guess"].reshape(-1).tolist() if "guess" in got else ())
        if layer == self.cache.layers - 1:
            self._tick(single)
        places, order = (self._put(index) for index in (work.places, work.order))
        self.device.join()
        summed = combine(step.parts, work._replace(places=places, order=order), top_k_weights)
        return summed.to(hidden_states.dtype)

    def _tick(self, single: bool) -> None:
        """One token is done, or a piece of a prompt."""
        if single and self.ram.predictor is not None:
            self.ram.test_prefetch()
        for part in (self.cache, self.ram.cache, self.worth):
            part.tick()
        reads = self.ram.stats.total("demand_reads") + self.ram.stats.total("prefetch_reads")
        if reads:
            self._read_s = self.ram.stats.read_busy_s / reads

    @property
    def wants_guesses(self) -> bool:
        """Whether there is anything left to read ahead from disk."""
        return self.ram.wants_guesses

    def _step(self, layer: int, work: Assignment, hidden: torch.Tensor, on_host: torch.Tensor | None) -> _Step:
        self._kept = ()  # the device has caught up: `to_host` waited for it
        count = len(work.rows)
        single = on_host is not None and count <= len(self._zeros)
        rows = self._zeros[:count] if single else self._put(work.rows)
        parts = self.device.empty((count, hidden.shape[1]), torch.float32)
        if single and not self.deterministic and self._from_cpu.shape != (len(self._zeros), hidden.shape[1]):
            self._from_cpu = torch.empty(len(self._zeros), hidden.shape[1])
        keep = None if on_host is not None else self._worth_keeping(work)
        return _Step(layer, work, hidden, rows, parts, on_host, keep)

    def _run_experts(self, step: _Step, guess: Sequence[int]) -> None:
        layer, work, ram = step.layer, step.work, self.ram
        for seconds in self.uploads.settle():
            self.stats.record_copy(seconds)
            if self._learns:
                self.costs = self.costs.corrected(copy=Measured(1, seconds))
        single = step.on_host is not None
        ram.prefetch.settle(layer, set(work.experts))
        wanted = self.cache.lookup(layer, work.experts, promote=single)
        below = ram.cache.lookup(layer, [expert.index for expert in wanted.misses], promote=single)
        late = sum(map(ram.cache.is_arriving, below.misses))
        everything = Lookup(wanted.hits + below.hits, below.misses)
        ahead = ram.prefetch.first_uses(below.hits)
        ram.note_missing(layer, len(below.misses) + ahead)
        ram.stats.record(layer, everything, late, ahead)
        if single:
            self.worth.use(wanted.hits + wanted.misses)
            ram.history.record(layer, everything.hits + everything.misses)
        reads = Reads(self._below, layer, below, keep=None if single else ram.worth_keeping(layer, work))
        try:
            reads.start()
            if guess:
                below_it = [index for index in guess if self.cache.slot_of(ExpertId(layer + 1, index)) is None]
                ram.prefetch.request(layer + 1, below_it)
            here, arriving = self._arrivals(wanted.hits, wait=not single or self.deterministic)
            self.stats.record(layer, len(wanted.hits), len(work.experts))
            self._on_device(step, here)
            self._misses(step, below.hits, len(here), arriving)
            reads.release(below.hits)
            while ready := reads.next():
                self._misses(step, ready)
                reads.release(ready)
        finally:
            reads.close()

    def _arrivals(self, hits: Sequence[ExpertId], wait: bool) -> tuple[list[ExpertId], list[tuple[float, ExpertId]]]:
        """Those of the hits that have arrived, or are waited for in any case, and the others with the seconds until
        each arrives."""
        due = {expert: 0 if wait else self.uploads.position(expert) for expert in hits}
        late = sorted((place, expert) for expert, place in due.items() if place)
        here = [expert for expert, place in due.items() if not place]
        return here, [(place * self.costs.copy.each, expert) for place, expert in late]

    def _misses(
        self,
        step: _Step,
        experts: Sequence[ExpertId],
        hits: int = 0,
        arriving: Sequence[tuple[float, ExpertId]] = (),
    ) -> None:
        """Experts that lie in RAM, and some that are on their way up, while the device computes `hits` others."""
        if not experts and not arriving:
            return
        if step.on_host is None or self.deterministic:
            self._stream(step, experts)
            return
        busy = len(self.uploads) * self.costs.copy.each
        order = self.worth.ordered(experts)
        copied, on_cpu = split_misses(hits, order, self.costs, arriving=arriving, link_busy=busy, most=self.cache.floor)
        self._on_device(step, [expert for _, expert in arriving if expert not in on_cpu])
        self._stream(step, copied)
        self._on_cpu(step, on_cpu)
        self.stats.record_cpu(step.layer, len(on_cpu), late=sum(expert in on_cpu for _, expert in arriving))
        self._admit(step.layer, [expert for expert in on_cpu if self.cache.slot_of(expert) is None])

    # The two ways to compute

    def _on_device(self, step: _Step, experts: Sequence[ExpertId]) -> None:
        """Queue one kernel for these experts; it begins when all of them have arrived."""
        if not experts:
            return
        slots = [self._slot(expert) for expert in experts]
        jobs = [
            step.work.job(self.slots.record(slot), expert.index) for slot, expert in zip(slots, experts, strict=True)
        ]
        kernel = self.kernels[step.layer]
        self.uploads.use(slots)
        self.device.launch(lambda: kernel.run(step.hidden, step.rows, jobs, step.parts))
        self.uploads.used(slots)

    def _on_cpu(self, step: _Step, experts: Sequence[ExpertId]) -> None:
        """Compute from RAM, and send the results to the device."""
        if not experts:
            return
        assert step.on_host is not None
        begin = self.device.clock()
        jobs = []
        for expert in experts:
            slot = self.ram.cache.slot_of(expert)
            assert slot is not None, expert
            jobs.append(step.work.job(self.ram.slots.record(slot), expert.index))
        self.ram.kernels[step.layer].run(step.on_host, step.work.rows, jobs, self._from_cpu[: len(step.parts)])
        seconds = self.device.clock() - begin
        for job in jobs:
            rows = slice(job.start, job.start + job.count)
            self.device.put(step.parts[rows], self._from_cpu[rows])
        self.ram.stats.record_compute(seconds)
        if self._learns and not len(self.uploads):
            self.costs = self.costs.corrected(cpu=Measured(len(experts), seconds))

    # Who comes up

    def _stream(self, step: _Step, experts: Sequence[ExpertId]) -> None:
        """Copy experts up and compute them, a wave at a time: the next one travels while the last one is computed."""
        waves: deque[list[ExpertId]] = deque()
        held = 0
        try:
            for start in range(0, len(experts), self._wave):
                wave = list(experts[start : start + self._wave])
                while waves and held + len(wave) > self.cache.floor:
                    held -= len(waves[0])
                    self.cache.unlock(waves.popleft())
                waves.append([])
                for expert in wave:
                    stays = step.keep is None or expert.index in step.keep
                    self._bring(expert, transient=not stays)
                    self.cache.lock((expert,))
                    waves[-1].append(expert)
                    held += 1
                self.stats.record_copied(step.layer, len(wave))
                self._on_device(step, wave)
        finally:
            for wave in waves:
                self.cache.unlock(wave)

    def _admit(self, layer: int, computed: Sequence[ExpertId]) -> None:
        """Bring up those of the experts that the CPU has computed which are worth more than who would leave."""
        for expert in computed[: upload_budget(self.costs, len(self.uploads) * self.costs.copy.each)]:
            victim = self.cache.next_victim(layer)
            on_disk = victim is not None and self.ram.cache.slot_of(victim) is None
            gain = self.worth.gain(expert, victim, self.costs.dearness(self._read_s) if on_disk else 1.0)
            if worth_admitting(gain, self.costs):
                self._bring(expert, transient=False)
                self.stats.record_admitted(layer)

    def _bring(self, expert: ExpertId, transient: bool) -> None:
        victim = self.cache.next_victim(expert.layer)
        passing = victim is not None and self.cache.is_transient(victim)
        admission = self.cache.admit(expert, transient)
        assert admission is not None, (expert, self.cache.capacity)
        try:
            if admission.evicted is not None:
                self.uploads.emptied(admission.slot)
                if not passing:  # who only passed through with a prompt is not wanted more than before
                    self.ram.cache.promote(admission.evicted)
            self.uploads.start(expert, admission.slot)
        except BaseException:
            self.cache.abandon(expert)
            raise
        self.cache.arrived(expert)  # for whoever computes it later on: the kernel waits, not the caller
        if not transient:
            self.ram.cache.demote(expert)  # two copies are one too many where RAM is short

    def _worth_keeping(self, work: Assignment) -> set[int]:
        """A prompt's experts that stay on the device: a fair share of slots, those that its last tokens chose first."""
        share = max((self.cache.capacity - 2 * self._wave) // self.cache.layers, 1)
        last = len(work.places) - _LAST_TOKENS
        recent = {
            expert: int((work.rows[work.starts[i] : work.starts[i + 1]] >= last).sum())
            for i, expert in enumerate(work.experts)
        }
        count = {expert: work.starts[i + 1] - work.starts[i] for i, expert in enumerate(work.experts)}
        return set(sorted(work.experts, key=lambda e: (-recent[e], -count[e], e))[:share])

    def _slot(self, expert: ExpertId) -> int:
        slot = self.cache.slot_of(expert)
        assert slot is not None, expert
        return slot

    def _put(self, source: torch.Tensor) -> torch.Tensor:
        """A small tensor of the caller's, on the device."""
        target = self.device.empty(tuple(source.shape), source.dtype)
        self.device.put(target, source)
        self._kept = (*self._kept, source)
        return target

    # The whole

    @recovering
    def shrink(self, slots: int) -> int:
        """Give the memory of that many slots, or a few more, back to the device. Between forwards only.

        Returns:
            How many were given back; 0 when the tier is as small as it can be.
        """
        self.uploads.drain()
        before = self.cache.capacity
        left = self.slots.shrink(slots, least=self.cache.layers * self.cache.floor)
        for expert, slot in self.cache.resize(left):
            self.uploads.forget(slot)
            self.ram.cache.promote(expert)
        self.stats.slots = left
        return before - left

    def drain(self) -> None:
        self.uploads.drain()
        self.ram.prefetch.drain()

    def recover(self) -> None:
        """Stop every copy and read, and free what they hold."""
        self.device.mark().wait()  # no kernel reads a slot any more, whether it was remembered or not
        self.uploads.recover()
        self.cache.recover()
        self.ram.recover()

    def close(self) -> None:
        self.uploads.recover()
        self.ram.close()
        self.ram.slots.unpin()


class _Below:
    """The RAM tier as `Reads` wants it; there, room can also be made by waiting for an upload."""

    def __init__(self, ram: ExpertRuntime, uploads: Uploads) -> None:
        self.cache, self.slots, self.transfers = ram.cache, ram.slots, ram.transfers
        self.prefetch, self.stats, self.prompt_reads = ram.prefetch, ram.stats, ram.prompt_reads
        self._uploads = uploads

    def make_room(self) -> bool:
        return self._uploads.wait_for_one() or self.prefetch.make_room()
