"""Eviction policies for a model that runs: with compiled estimates where there is the native library."""

from __future__ import annotations

from collections.abc import Sequence

from ..cache.analog import Analog
from ..cache.policy import EvictionPolicy, get_policy
from ..quant.native_estimates import NativeEstimates
from ..quant.native_library import load_native


def make_policy(name: str, capacity: int, cycle: int, experts: Sequence[int]) -> EvictionPolicy:
    """See `get_policy`. `experts`: of each layer."""
    policy, library = get_policy(name, capacity, cycle), load_native()
    if isinstance(policy, Analog) and library is not None:
        return Analog(capacity, cycle, NativeEstimates(library, experts, cycle))
    return policy
