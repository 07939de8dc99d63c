"""Eviction policies over recorded routing, compiled: a `Replayer` of cache/replay.py. It needs no torch."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from .native_library import NativeLibrary, check

Array = np.ndarray[Any, Any]


class _Requests(ctypes.Structure):
    _fields_ = (
        ("chosen", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("layers", "top_k", "experts")),
    )


class NativeReplayer:
    """Misses and depths are those of the plain replayer, one for one. It may be called from several threads at a time.

    `chosen` is int32 [T, L, k] of one sequence; raises NativeError for a policy that the library does not know, or for
    fewer slots than the floors need.
    """

    def __init__(self, library: NativeLibrary) -> None:
        self._c = library.c

    def misses(self, chosen: Array, policy: str, slots: int) -> Array:
        """int32 [T, L]"""
        found = np.empty(chosen.shape[:2], np.int32)
        kept, requests = _requests(chosen)
        status = self._c.pm_replay(ctypes.byref(requests), policy.encode(), slots, found.ctypes.data)
        check(status, f"pm_replay of {policy!r} with {slots} slots for {kept.shape}")
        return found

    def lru_depths(self, chosen: Array) -> Array:
        """int32 [T, L, k]"""
        found = np.empty(chosen.shape, np.int32)
        kept, requests = _requests(chosen)
        check(self._c.pm_lru_depths(ctypes.byref(requests), found.ctypes.data), f"pm_lru_depths for {kept.shape}")
        return found


def _requests(chosen: Array) -> tuple[Array, _Requests]:
    """What the library reads, and the array that has to live as long."""
    kept = np.ascontiguousarray(chosen, np.int32)
    tokens, layers, top_k = kept.shape
    experts = int(kept.max(initial=0)) + 1
    return kept, _Requests(kept.ctypes.data, tokens, layers, top_k, experts)
