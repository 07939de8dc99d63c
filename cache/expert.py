"""The words that every part shares: which expert, and what a lookup found."""

from __future__ import annotations

from typing import NamedTuple


class ExpertId(NamedTuple):
    """One routed expert of one MoE layer. `layer` counts MoE layers from 0 (dense layers are skipped)."""

    layer: int
    index: int


class Lookup(NamedTuple):
    """The experts of one request set, split by where they are. Order is that of the request."""

    hits: tuple[ExpertId, ...]
    misses: tuple[ExpertId, ...]
