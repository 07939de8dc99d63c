"""What a forward pass needs in memory beside weights, KV cache and expert slots."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .hf import Skeleton, largest
from .hf_layers import FAMILIES

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

    @classmethod
    def of(cls, skeleton: Skeleton, native: bool, lean: bool, converts: bool) -> Workspace:
        config = skeleton.config.get_text_config()
        heads = largest(config, "num_attention_heads") or 1
        latent = largest(config, "kv_lora_rank")
        if latent:  # all keys and values are made from the latents, keys in two parts that are then put together
            plain, turned, value = (largest(config, f"{part}_head_dim") for part in ("qk_nope", "qk_rope", "v"))
            head_dim, expanded, cached = plain + turned, heads * (2 * plain + turned + value), latent + turned
            uneven = head_dim != value
        else:
            head_dim = largest(config, "head_dim") or config.hidden_size // heads
            expanded = 2 * heads * head_dim
            cached = 2 * (largest(config, "num_key_value_heads") or heads) * head_dim
            uneven = False
        eager = getattr(config, "_attn_implementation", "eager") == "eager"
        return cls(
            hidden=config.hidden_size,
            width=heads * head_dim,
            expanded_width=expanded,
            cached_width=cached if converts else 0,
            score_heads=heads if eager or uneven else 0,
            intermediate=max(site.layer.shape.intermediate for site in skeleton.sites),
            top_k=max(site.layer.top_k for site in skeleton.sites),
            vocabulary=config.vocab_size,
            native=native,
            lean=lean,
        )

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


def foresee(
    skeleton: Skeleton, native: bool, packed: bool, kv: str, on_cpu: bool = True
) -> tuple[Workspace, torch.dtype | None]:
    """What a model will need, and the dtype of its KV cache (None: as keys and values come), before it is loaded.

    Args:
        packed: some trunk matrices are, and stay so.
        kv: the option of that name.
        on_cpu: the trunk is computed there.
    """
    plain = skeleton.model.dtype == torch.float32 or packed
    lean = native and on_cpu and plain and skeleton.config.model_type in FAMILIES
    # Rounding activations to INT8 for each packed matrix loses more than float16 does in the cache.
    half = kv == "f16" or (kv == "auto" and packed and lean)
    return Workspace.of(skeleton, native, lean, converts=half), torch.float16 if half else None
