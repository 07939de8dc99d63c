"""Anonymous memory on huge pages, where the system has them: the processor finds its way in it faster, and so does a
disk that writes into it. No torch."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

HUGE_PAGE = 2 << 20


def huge_pages(nbytes: int) -> tuple[mmap.mmap, int]:
    """A mapping, and where in it `nbytes` bytes begin on a huge page. Pages are resident from the first write on."""
    # Private: Python's default is shared memory, which gets no huge pages and keeps its pages after MADV_DONTNEED.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    area = mmap.mmap(-1, max(nbytes, 1) + HUGE_PAGE, **private)  # maps are only page aligned: room for the rest
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages: slower, same bytes
            area.madvise(mmap.MADV_HUGEPAGE)
    return area, -ctypes.addressof(ctypes.c_char.from_buffer(area)) % HUGE_PAGE
