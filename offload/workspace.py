"""What a forward pass needs in memory beside weights, KV cache and expert slots. Its arithmetic needs no torch."""

from __future__ import annotations

from typing import NamedTuple

_FLOAT = 4
_SLACK = 32 << 20
"""What the C library holds back, huge pages that are only partly used, and what Python gathers in a long run."""


class Workspace(NamedTuple):
    """The sizes that decide it. `benchmarks/memory_budget.py` shows how the sum compares with the kernel's count."""

    hidden: int
    width: int
    """Of all query heads together."""
    expanded_width: int
    """What a cached token's keys and values take once they are there for every query head."""
    cached_width: int
    """What they take in the cache, where that is in another dtype than they are used in, else 0."""
    score_heads: int
    """Heads whose scores are kept for all tokens at once: all of them in eager attention, and where keys and values
    differ in width; else none."""
    intermediate: int
    top_k: int
    vocabulary: int
    native: bool
    """Experts run in native kernels; torch's need a whole dequantised expert beside its packed bytes."""
    lean: bool
    """Single tokens go past the model's own modules."""

    def bytes(self, tokens: int, length: int) -> int:
        """An upper bound for a forward of `tokens` tokens, the last of which is number `length`."""
        logits = 8 * _FLOAT * self.vocabulary  # with what sampling makes of them
        if tokens == 1 and self.lean and self.native:
            return logits + _SLACK
        activations = tokens * _FLOAT * (6 * self.hidden + 6 * self.width)
        experts = tokens * self.top_k * _FLOAT * (self.hidden + (1 if self.native else 3) * self.intermediate)
        if not self.native:
            experts += 5 * _FLOAT * self.hidden * self.intermediate
        # The mask and the scores where they are kept; a layer's keys and values.
        attention = tokens * length * _FLOAT * (2 + 3 * self.score_heads)
        attention += length * _FLOAT * (self.expanded_width + self.cached_width)
        return int(1.1 * (activations + experts + attention)) + logits + _SLACK
