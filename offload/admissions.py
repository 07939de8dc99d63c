"""Who comes up from RAM to a device, and who leaves it for that."""

from __future__ import annotations

from collections.abc import Sequence

from ..cache.expert import ExpertId
from ..cache.hybrid import TierCosts, Worth, upload_budget, worth_admitting
from ..cache.manager import ExpertCache
from ..cache.stats import RunStats
from .uploads import Uploads

_DISK = 1.5e9
"""Bytes per second of a disk that nobody has measured yet."""


class Admissions:
    """Gives experts of RAM a slot on the device and starts their copies.

    Args:
        cache, below: the caches of the device and of RAM.
    """

    def __init__(self, cache: ExpertCache, below: ExpertCache, uploads: Uploads, record_bytes: int) -> None:
        self._cache, self._below, self._uploads = cache, below, uploads
        self.worth = Worth()
        self._read_s = record_bytes / _DISK
        """What the read of one record takes."""

    def bring(self, expert: ExpertId, transient: bool) -> None:
        """Make it a resident; `transient`: among the first to leave."""
        victim = self._cache.next_victim(expert.layer)
        passing = victim is not None and self._cache.is_transient(victim)
        admission = self._cache.admit(expert, transient)
        assert admission is not None, (expert, self._cache.capacity)
        try:
            if admission.evicted is not None:
                self._uploads.emptied(admission.evicted, admission.slot)
                if not passing:  # who only passed through with a prompt is not wanted more than before
                    self._below.promote(admission.evicted)
            self._uploads.start(expert, admission.slot)
        except BaseException:
            self._cache.abandon(expert)
            raise
        self._cache.arrived(expert)  # for whoever computes it later on: the kernel waits, not the caller
        if not transient:
            self._below.demote(expert)  # two copies are one too many where RAM is short

    def bring_worthy(self, experts: Sequence[ExpertId], costs: TierCosts) -> int:
        """Bring up those of one layer that are worth more than who would leave, as the link has time; returns how
        many."""
        brought = 0
        for expert in experts[: upload_budget(costs, len(self._uploads) * costs.copy.each)]:
            victim = self._cache.next_victim(expert.layer)
            on_disk = victim is not None and self._below.slot_of(victim) is None
            gain = self.worth.gain(expert, victim, costs.dearness(self._read_s) if on_disk else 1.0)
            if worth_admitting(gain, costs):
                self.bring(expert, transient=False)
                brought += 1
        return brought

    def measure_reads(self, stats: RunStats) -> None:
        """Take the time of a read from what reads have taken so far."""
        reads = stats.total("demand_reads") + stats.total("prefetch_reads")
        if reads:
            self._read_s = stats.read_busy_s / reads
