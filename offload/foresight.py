"""What a model's forward passes will need in memory, found before it is loaded."""

from __future__ import annotations

import torch

from .hf import Skeleton, largest
from .hf_layers import FAMILIES
from .workspace import Workspace


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
    return _workspace(skeleton, native, lean, converts=half), torch.float16 if half else None


def _workspace(skeleton: Skeleton, native: bool, lean: bool, converts: bool) -> Workspace:
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
    return Workspace(
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
