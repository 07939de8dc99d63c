"""Who comes up from RAM to a device: what `cache/renewal.py` decides, as slots and copies."""

from __future__ import annotations

from collections.abc import Sequence

from ..cache.expert import ExpertId
from ..cache.hybrid import TierCosts
from ..cache.manager import ExpertCache
from ..cache.renewal import Renewal
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
        self.renewal = Renewal(cache, below)
        self.renewal.read_s = record_bytes / _DISK

    def bring(self, expert: ExpertId, transient: bool = False) -> None:
        """Make it a resident; `transient`: among the first to leave."""
        admission = self.renewal.admit(expert, transient)
        assert admission is not None, (expert, self._cache.capacity)
        try:
            if admission.evicted is not None:
                self._uploads.emptied(admission.evicted, admission.slot)
            self._uploads.start(expert, admission.slot)
        except BaseException:
            self._cache.abandon(expert)
            self._below.promote(expert)  # which is the only place where it lies
            raise
        self._cache.arrived(expert)  # for whoever computes it later on: the kernel waits, not the caller

    def bring_worthy(self, experts: Sequence[ExpertId], costs: TierCosts) -> int:
        """Bring up those of one layer that are worth more than who would leave, as the link has time; returns how
        many."""
        brought = 0
        for expert in self.renewal.uploads(experts, costs, len(self._uploads) * costs.copy.each):
            self.bring(expert)
            brought += 1
        return brought

    def measure_reads(self, stats: RunStats) -> None:
        """Take the time of a read from what reads have taken so far."""
        if read_s := stats.read_s:
            self.renewal.read_s = read_s
