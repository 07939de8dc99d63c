"""What a conversion will take at its peak, known before it starts."""

from __future__ import annotations

from math import prod

from ..cache.units import format_bytes
from . import memory
from .config import KEEP
from .errors import MemoryBudgetError
from .source import Source

PACKED = 1.1
"""Bytes of a packed trunk weight, the scales and padding of INT8 included, at most."""
EXPERT = 16
"""Bytes for each weight of the expert in work: as read, merged and split, in float32 with its codes, and packed."""
OTHERS = 64 << 20
"""Pieces of a matrix while they are quantised, the tokenizer, and what torch loads at its first operations."""


def require_memory(source: Source, trunk: str, ram: int) -> None:
    """Raises MemoryBudgetError when converting `source` with that trunk format would take more than `ram` bytes.

    To be called when the source is open: what is resident now is part of the sum.
    """
    weights = max(sum(prod(size) for size in layer.shape.parts().values()) for layer in source.layers())
    packed = 0.0 if trunk == KEEP else PACKED
    largest = max(int(whole + packed * weights) for weights, whole in source.trunk_sizes())
    program, expert = memory.resident_bytes(), EXPERT * weights
    needed = program + max(largest, expert) + OTHERS
    if needed > ram:
        size = format_bytes
        raise MemoryBudgetError(
            f"converting {source.name} takes about {size(needed)} (program {size(program + OTHERS)}, the largest trunk "
            f"tensor {size(largest)} or one expert {size(expert)}), but the budget leaves {size(ram)} for it; give it "
            f"{size(needed - ram)} more, or have it converted once without a budget"
        )
