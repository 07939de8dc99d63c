"""What the disk can give: direct reads of whole records at random, for a fraction of a second. No torch.

The buffers are on huge pages and touched before, as the runtime's slots are: into 4 KB pages the same reads ran at two
thirds of the speed (1.6 against 2.5 GB/s, interleaved). They are too many for the processor's caches, as the slots are:
into one buffer a reader, over and over, a virtual disk seemed to read at 3.0 GB/s, into any more at 2.3.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from pathlib import Path

from ..cache.cost import DiskSpeed
from .manifest import Manifest
from .pages import huge_pages

_PAGE = 4096
_UNCACHED = 128 << 20
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
        _shuffle(places)
        together = _reads_per_second(places, manifest.record_bytes, readers, seconds)
        alone = _reads_per_second(places[::-1], manifest.record_bytes, 1, seconds)
    except OSError:
        return None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return DiskSpeed(max(together, alone) * manifest.record_bytes, 1 / alone) if alone else None


def direct_read_rate(file: Path, record: int, seconds: float = 1.5, readers: int = 4, seed: int | None = None) -> float:
    """Bytes per second of random record-sized reads by a few threads: the disk's limit for this very file.

    Args:
        seed: of the places; see `_shuffle`.

    Raises:
        OSError: direct reads are refused, or this system has none.
        ValueError: the file is smaller than a record.
    """
    if not hasattr(os, "O_DIRECT") or not hasattr(os, "preadv"):
        raise OSError(f"{sys.platform} has no direct reads")
    nbytes = -(-record // _PAGE) * _PAGE
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        places = [(descriptor, i * nbytes) for i in range(os.fstat(descriptor).st_size // nbytes)]
        if not places:
            raise ValueError(f"{file} is smaller than {record:,} bytes")
        _shuffle(places, seed)
        return nbytes * _reads_per_second(places, nbytes, readers, seconds)
    finally:
        os.close(descriptor)


def _shuffle(places: list[tuple[int, int]], seed: int | None = None) -> None:
    """By default another order each time, because some records may be cached below us."""
    random.Random(time.time_ns() if seed is None else seed).shuffle(places)


def _reads_per_second(places: list[tuple[int, int]], nbytes: int, readers: int, seconds: float) -> float:
    """Whole records per second, each thread reading one after the other. Raises OSError."""
    counts, errors = [0] * readers, []
    each = -(-_UNCACHED // (readers * nbytes))
    area, start = huge_pages(readers * each * nbytes)
    buffers = memoryview(area)[start : start + readers * each * nbytes]
    buffers[::_PAGE] = bytes(len(buffers[::_PAGE]))
    deadline = time.perf_counter() + seconds

    def read(number: int) -> None:
        own = range(number * each, (number + 1) * each)
        try:
            while time.perf_counter() < deadline:
                descriptor, offset = places[(number + counts[number] * readers) % len(places)]
                first = own[counts[number] % each] * nbytes
                buffer = buffers[first : first + nbytes]
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
