"""The RAM tier below a device."""

from __future__ import annotations

from .runtime import ExpertRuntime
from .uploads import Uploads


class Below:
    """The RAM tier as `Reads` wants it; there, room can also be made by waiting for an upload."""

    def __init__(self, ram: ExpertRuntime, uploads: Uploads) -> None:
        self.cache, self.slots, self.transfers = ram.cache, ram.slots, ram.transfers
        self.prefetch, self.stats, self.prompt_reads = ram.prefetch, ram.stats, ram.prompt_reads
        self._uploads = uploads

    def make_room(self) -> bool:
        return self._uploads.wait_for_one() or self.prefetch.make_room()
