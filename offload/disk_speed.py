"""What the disk can give: direct reads of a store's own records at random, for a fraction of a second. No torch."""

from __future__ import annotations

import mmap
import os
import random
import threading
import time
from pathlib import Path

from ..cache.cost import DiskSpeed
from .manifest import Manifest

SECONDS = 0.25
"""For each of the two measurements."""


def measure_disk(store: Path, readers: int = 4, seconds: float = SECONDS) -> DiskSpeed | None:
    """Records per second with `readers` reads at a time, and the time of one alone.

    Returns:
        None where the system has no direct reads, or they are refused: what the page cache gives says nothing of the
        disk. Also where `store` is not there, or not whole.

    Raises:
        DataError: `store` is none.
    """
    if not hasattr(os, "O_DIRECT") or not hasattr(os, "preadv"):
        return None
    manifest = Manifest.read(store)
    descriptors: list[int] = []
    try:
        for file in manifest.expert_files:
            descriptors.append(os.open(store / file.name, os.O_RDONLY | os.O_DIRECT))  # noqa: PERF401 - all are closed
        places = [
            (descriptor, file.data_start + i * manifest.record_bytes)
            for descriptor, file in zip(descriptors, manifest.expert_files, strict=True)
            for i in range(file.count)
        ]
        random.Random(time.time_ns()).shuffle(places)  # not the same records each time: some may be cached below us
        together = _reads_per_second(places, manifest.record_bytes, readers, seconds)
        alone = _reads_per_second(places[::-1], manifest.record_bytes, 1, seconds)
    except OSError:
        return None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return DiskSpeed(max(together, alone) * manifest.record_bytes, 1 / alone) if alone else None


def _reads_per_second(places: list[tuple[int, int]], nbytes: int, readers: int, seconds: float) -> float:
    """Whole records per second, each thread reading one after the other. Raises OSError."""
    deadline = time.perf_counter() + seconds
    counts, errors = [0] * readers, []

    def read(number: int) -> None:
        buffer = mmap.mmap(-1, nbytes)
        try:
            while time.perf_counter() < deadline:
                descriptor, offset = places[(number + counts[number] * readers) % len(places)]
                if os.preadv(descriptor, [buffer], offset) < nbytes:
                    raise OSError("the file ended early")
                counts[number] += 1
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(readers)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(counts) / (time.perf_counter() - begin)
