"""The hot path with a GPU: experts in VRAM are computed there, the others where they are done sooner.

Three tiers: slots on the device, slots in (pinned) RAM below them, the store at the bottom. A miss whose record is in
RAM is copied up or computed by the CPU while the device computes the hits, whichever ends first by the costs measured
so far (`cache/hybrid.py` decides). A miss on disk goes to RAM first. The outputs are summed in expert order on the
device. A prompt streams every expert that it needs through the device, a few at a time.

The caller waits for the device once a layer, to learn what the router has chosen. A single token's hits need no such
word: the device finds them in a table of addresses (`resident_table.py`) and computes them meanwhile. While every
expert of the model lies there, the caller waits once a token, in the last layer, and learns of all layers together.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..cache.device_stats import DeviceLayerStats, DeviceStats
from ..cache.expert import ExpertId, Lookup
from ..cache.hybrid import Measured, TierCosts
from ..cache.manager import ExpertCache
from ..quant.kernels import ExpertKernels, ResidentKernels
from .admissions import Admissions
from .after_prompt import who_stays
from .below import Below
from .choices import Choices, Told
from .device import Device, Mark
from .reads import Reads
from .recovery import recovering
from .resident_table import ResidentTable
from .runtime import Assignment, ExpertRuntime, combine
from .tiers import DeviceSlots
from .uploads import Uploads


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
    found: set[ExpertId]
    """Experts that a kernel has computed, having found them itself."""
    keep: set[int] | None
    """Of a prompt: experts that stay on the device after it. None: `Renewal.stays` says who."""
    counts: DeviceLayerStats = field(default_factory=DeviceLayerStats)


class DeviceRuntime:
    """Runs the MoE layers of a model whose trunk is on a device.

    Args:
        cache: who is in which slot of the device.
        ram: the tier below, whose kernels compute on the CPU.
        kernels: one per MoE layer, for tensors of the device. Those of the kind `ResidentKernels` find hits themselves.
        experts: how many each layer has.
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
        experts: Sequence[int],
        costs: TierCosts,
        deterministic: bool = False,
        learns: bool = True,
    ) -> None:
        self.device, self.cache, self.slots, self.ram, self.kernels = device, cache, slots, ram, kernels
        self.costs, self.deterministic, self._learns = costs, deterministic, learns
        self.choices = Choices(device, ram.recorder)
        self._finders = [kernel if isinstance(kernel, ResidentKernels) else None for kernel in kernels]
        self.stats = DeviceStats(cache.layers, slots.record_bytes, cache.capacity)
        self.table = ResidentTable(device, experts)
        self.uploads = Uploads(device, slots, ram.cache, ram.slots, self.table)
        self.admissions = Admissions(cache, ram.cache, self.uploads, slots.record_bytes)
        self._below = Below(ram, self.uploads)
        self._wave = max(1, cache.floor // 2)
        self._kept: tuple[torch.Tensor, ...] = ()  # what `device.put` still reads
        top_k = ram.cache.floor
        self._zeros = self._put(torch.zeros(top_k, dtype=torch.int32))
        self._ascending = self._put(torch.arange(top_k)[None])
        self._from_cpu = torch.empty(0, 0)
        self._timed: tuple[int, Mark] | None = None
        self._began = device.clock()
        self.in_order = True

    # One layer

    @recovering
    def run_layer(
        self, layer: int, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of each token's experts; see `ExpertRuntime.run_layer`. All tensors are the device's."""
        if layer == 0:
            self._began = self.device.clock()
        hidden = hidden_states.float().contiguous()
        parts = self.device.empty((top_k_index.numel(), hidden.shape[1]), torch.float32)
        run = self._run_token if hidden.shape[0] == 1 else self._run_prompt
        places, order = run(layer, hidden, top_k_index, top_k_weights, parts)
        if layer == self.cache.layers - 1:
            self._tick(hidden.shape[0] == 1)
        self.device.join()
        return combine(parts, places, order, top_k_weights).to(hidden_states.dtype)

    def _run_token(
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, parts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Have a single token's `parts` filled; returns `places` and `order` of its assignment, on the device."""
        tells = not self._knows_enough(layer)
        if tells:
            self.choices.ask(layer, index, weights, hidden, self._guess(layer))
        self._settle()
        chosen, order = torch.sort(index, dim=1)
        end = self._find(layer, hidden, chosen[0], parts)  # while the choice travels
        if tells:
            told = self._wait()
            work = Assignment.of(told.chosen)
            found = set() if end is None else self._found(layer, work, end)
            rows = self._zeros[: len(work.rows)]
            self._run_experts(_Step(layer, work, hidden, rows, parts, told.hidden, found, keep=None), told.guess)
        else:
            self.choices.put_off(layer, chosen[0])
        return self._ascending[:, : index.shape[1]], order

    def _run_prompt(
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, parts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for many tokens."""
        self.choices.ask(layer, index, weights)
        self._settle()
        work = Assignment.of(self._wait().chosen)
        share = max((self.cache.capacity - 2 * self._wave) // self.cache.layers, 1)
        keep = who_stays(work, share)
        self._run_experts(_Step(layer, work, hidden, self._put(work.rows), parts, None, set(), keep), ())
        return self._put(work.places), self._put(work.order)

    def _knows_enough(self, layer: int) -> bool:
        """Whether the caller can queue this layer of a token without a word from its router."""
        last = layer == self.cache.layers - 1
        return self.table.full and not last and not self.choices.recorded and self._finders[layer] is not None

    def _guess(self, layer: int) -> torch.Tensor | None:
        """Of the next layer, where there is anything left to read ahead from disk."""
        wanted = not self.table.full and self.ram.wants_guesses
        return self.ram.predictor.predict(layer + 1) if wanted and self.ram.predictor is not None else None

    def _settle(self) -> None:
        for seconds in self.uploads.settle():
            self.stats.record_copy(seconds)
            if self._learns:
                self.costs = self.costs.corrected(copy=Measured(1, seconds))
        if self._timed is not None and self._timed[1].passed():
            (count, end), self._timed = self._timed, None
            self.costs = self.costs.corrected(gpu=Measured(count, end.seconds()))

    def _find(self, layer: int, hidden: torch.Tensor, chosen: torch.Tensor, parts: torch.Tensor) -> Mark | None:
        """Queue a kernel for those of the chosen experts that are in the table; None where it could not find them."""
        finder, addresses = self._finders[layer], self.table.row(layer)
        if finder is None:
            return None
        return self._launch(layer, lambda: finder.run_resident(hidden, chosen, addresses, parts))

    def _found(self, layer: int, work: Assignment, end: Mark) -> set[ExpertId]:
        """Those that the kernel has found which ends before `end`; nothing may have changed the table since."""
        found = [expert for index in work.experts if (expert := ExpertId(layer, index)) in self.table]
        self.uploads.used(self.cache.slots_of(found), end)
        if self._is_timed(layer):
            self._timed = len(found), end
        return set(found)

    def _wait(self) -> Told:
        told = self.choices.wait()
        self._kept = ()
        for layer, indices in told.earlier:  # every request was a hit
            wanted = self.cache.lookup(layer, indices)
            experts = wanted.hits + wanted.misses
            self.stats.record(layer, DeviceLayerStats(len(experts), len(experts)))
            self.ram.stats.record(layer, Lookup(experts, ()))
            self._note_uses(layer, experts)
        return told

    def _note_uses(self, layer: int, experts: tuple[ExpertId, ...]) -> None:
        self.admissions.renewal.use(experts)
        self.ram.history.record(layer, experts)

    def _tick(self, single: bool) -> None:
        """One token is done, or a piece of a prompt."""
        if single and self.ram.predictor is not None and not self.table.full:
            self.ram.test_prefetch()
        for part in (self.cache, self.ram.cache):
            part.tick()
        self.admissions.renewal.tick(self.device.clock() - self._began if single else 0.0)
        self.admissions.measure_reads(self.ram.stats)

    def _run_experts(self, step: _Step, guess: Sequence[int]) -> None:
        layer, work, ram = step.layer, step.work, self.ram
        single = step.on_host is not None
        ram.prefetch.settle(layer, work.experts)
        wanted = self.cache.lookup(layer, work.experts, promote=single)
        below = ram.cache.lookup(layer, [expert.index for expert in wanted.misses], promote=single)
        late = sum(map(ram.cache.is_arriving, below.misses))
        everything = Lookup(wanted.hits + below.hits, below.misses)
        ahead = ram.prefetch.first_uses(below.hits)
        ram.note_missing(layer, len(below.misses) + ahead, time.perf_counter())
        step.counts = DeviceLayerStats(len(work.experts), len(wanted.hits))
        if single:
            self._note_uses(layer, everything.hits + everything.misses)
        reads = Reads(self._below, layer, below, keep=None if single else ram.worth_keeping(layer, work))
        try:
            reads.start()
            if guess:
                below_it = [index for index in guess if self.cache.slot_of(ExpertId(layer + 1, index)) is None]
                ram.prefetch.request(layer + 1, below_it)
            here, arriving = self._hits(step, wanted.hits)
            self._misses(step, below.hits, here, arriving)
            reads.release(below.hits)
            while ready := reads.next():
                self._misses(step, ready)
                reads.release(ready)
        finally:
            reads.close()
        self.stats.record(layer, step.counts)  # of a layer that fails, nothing is counted
        ram.stats.record(layer, everything, late, ahead)

    def _hits(self, step: _Step, hits: Sequence[ExpertId]) -> tuple[int, list[tuple[float, ExpertId]]]:
        """Have the device compute those that have arrived, unless it has found them, and the others if it has to.

        Returns:
            How many have arrived; and those that may still be computed elsewhere, with the seconds until they do.
        """
        due = {expert: self.uploads.position(expert) for expert in hits if expert not in step.found}
        self._on_device(step, [expert for expert, place in due.items() if not place])
        late = sorted((place * self.costs.copy.each, expert) for expert, place in due.items() if place)
        if step.on_host is None or self.deterministic:
            self._on_device(step, [expert for _, expert in late])
            return len(hits), []
        return len(hits) - len(late), late

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
        copied, on_cpu = self.admissions.renewal.split(
            hits, experts, self.costs, arriving=arriving, link_busy=busy, most=self.cache.floor
        )
        self._on_device(step, [expert for _, expert in arriving if expert not in on_cpu])
        self._stream(step, copied)
        self._on_cpu(step, on_cpu)
        step.counts.on_cpu += len(on_cpu)
        step.counts.hits -= sum(expert in on_cpu for _, expert in arriving)
        below = [expert for expert in on_cpu if self.cache.slot_of(expert) is None]
        step.counts.admitted += self.admissions.bring_worthy(below, self.costs)

    # The two ways to compute

    def _on_device(self, step: _Step, experts: Sequence[ExpertId]) -> None:
        """Queue one kernel for these experts; it begins when all of them have arrived."""
        if not experts:
            return
        slots = self.cache.slots_of(experts)
        jobs = step.work.jobs(experts, self.slots, slots)
        kernel = self.kernels[step.layer]
        self.uploads.use(slots)
        end = self._launch(step.layer, lambda: kernel.run(step.hidden, step.rows, jobs, step.parts))
        self.uploads.used(slots, end)
        if step.on_host is not None and self._is_timed(step.layer):
            self._timed = len(experts), end

    def _launch(self, layer: int, work: Callable[[], object]) -> Mark:
        """Queue a kernel; returns its end."""
        if self._is_timed(layer):
            return self.device.timed(work)
        self.device.launch(work)
        return self.device.mark()

    def _is_timed(self, layer: int) -> bool:
        """One kernel of each token says enough."""
        return self._learns and layer == self.cache.layers - 1

    def _on_cpu(self, step: _Step, experts: Sequence[ExpertId]) -> None:
        """Compute from RAM, and send the results to the device."""
        if not experts:
            return
        assert step.on_host is not None
        if self._from_cpu.shape[1] != step.on_host.shape[1]:
            self._from_cpu = self.device.host_buffer((len(self._zeros), step.on_host.shape[1]), torch.float32)
        begin = self.device.clock()
        jobs = step.work.jobs(experts, self.ram.slots, self.ram.cache.slots_of(experts))
        self.ram.kernels[step.layer].run(step.on_host, step.work.rows, jobs, self._from_cpu[: len(step.parts)])
        seconds = self.device.clock() - begin
        for job in jobs:
            rows = slice(job.start, job.start + job.count)
            self.device.put(step.parts[rows], self._from_cpu[rows])
        self.ram.stats.record_compute(seconds)
        self.admissions.renewal.computed(seconds)
        if self._learns and not len(self.uploads):
            self.costs = self.costs.corrected(cpu=Measured(len(experts), seconds))

    # Who comes up

    def _stream(self, step: _Step, experts: Sequence[ExpertId]) -> None:
        """Copy experts up and compute them, a wave at a time: the next one travels while the last one is computed."""
        waves: deque[list[ExpertId]] = deque()
        renewal, held = self.admissions.renewal, 0
        try:
            for start in range(0, len(experts), self._wave):
                wave = list(experts[start : start + self._wave])
                while waves and held + len(wave) > self.cache.floor:
                    held -= len(waves[0])
                    self.cache.unlock(waves.popleft())
                waves.append([])
                for expert in wave:
                    stays = renewal.stays(expert, self.costs) if step.keep is None else expert.index in step.keep
                    self.admissions.bring(expert, transient=not stays)
                    self.cache.lock((expert,))
                    waves[-1].append(expert)
                    held += 1
                step.counts.copied += len(wave)
                self._on_device(step, wave)
        finally:
            for wave in waves:
                self.cache.unlock(wave)

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
        self.device.trim()
        before = self.cache.capacity
        left = self.slots.without(slots, least=self.cache.layers * self.cache.floor)
        for expert, slot in self.cache.resize(left, self.uploads.move):
            self.uploads.forget(expert, slot)
            self.ram.cache.promote(expert)
        self.device.mark().wait()
        self.slots.release(left)
        self.stats.slots = left
        return before - left

    def drain(self) -> None:
        self.uploads.drain()
        self.ram.prefetch.drain()

    def recover(self) -> None:
        """Stop every copy and read, and free what they hold."""
        self.device.mark().wait()  # no kernel reads a slot any more, whether it was remembered or not
        self.choices.recover()
        self.cache.recover()
        self.uploads.recover(self.cache.residents())
        self.stats.forget_copies()
        self.ram.recover()

    def close(self) -> None:
        self.uploads.wait_for_all()
        self.ram.close()
        self.ram.slots.unpin()
