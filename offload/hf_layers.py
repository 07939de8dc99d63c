"""What the decoder layers of well-known families consist of, so that `lean.py` can run them without their modules.

Their attention is the same but for norms, biases, sinks, windows and the rotary width, which are read off the modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..quant.activations import Activation, apply
from ..quant.linear import QuantLinear
from ..quant.native_step import Norm, Router
from .hf import MoeSite, Skeleton

FAMILIES = ("glm4_moe", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
"""Model types whose decoder layers are compared with transformers' own in the tests."""


@dataclass(frozen=True)
class MlpParts:
    """A feed-forward block of the trunk. `share`: weights of the sigmoid gate on its output, [hidden]."""

    gate: nn.Module
    up: nn.Module
    down: nn.Module
    activation: Activation
    share: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    input_norm: Norm
    output_norm: Norm
    query_norm: Norm | None
    key_norm: Norm | None
    sinks: torch.Tensor | None
    head_dim: int
    scaling: float
    clip: float
    site: MoeSite | None
    """The layer's routed experts; None where a dense block follows."""
    router: Router | None
    mlp: MlpParts | None
    """The shared expert, or the dense block."""


@dataclass(frozen=True)
class DecoderParts:
    """A causal language model."""

    embed: nn.Module
    rotary: Any
    """The module that gives a position's cosines and sines."""
    layers: list[LayerParts]
    norm: Any
    """The last one, a module."""
    head: nn.Module


def read_decoder(skeleton: Skeleton) -> DecoderParts | None:
    """The parts of a loaded model; None when its family is not one of `FAMILIES`."""
    config = skeleton.config
    if config.model_type not in FAMILIES:
        return None
    base: Any = skeleton.model.base_model
    head: Any = skeleton.model.get_output_embeddings()
    sites = {id(site.experts): site for site in skeleton.sites}
    clip = getattr(config, "clip_qkv", None) or 0.0
    layers = [_read_layer(layer, sites, clip) for layer in base.layers]
    return DecoderParts(base.embed_tokens, base.rotary_emb, layers, base.norm, head)


def _read_layer(layer: Any, sites: dict[int, MoeSite], clip: float) -> LayerParts:
    attention, block = layer.self_attn, layer.mlp
    site = sites.get(id(getattr(block, "experts", None)))
    dense = block if site is None else getattr(block, "shared_experts", getattr(block, "shared_expert", None))
    share = getattr(block, "shared_expert_gate", None)
    return LayerParts(
        query=attention.q_proj,
        key=attention.k_proj,
        value=attention.v_proj,
        output=attention.o_proj,
        input_norm=_norm(layer.input_layernorm),
        output_norm=_norm(layer.post_attention_layernorm),
        query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        sinks=getattr(attention, "sinks", None),
        head_dim=attention.head_dim,
        scaling=attention.scaling,
        clip=clip,
        site=site,
        router=None if site is None else _router(site.router),
        mlp=None if dense is None else _mlp(dense, share),
    )


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def _router(module: Any) -> Router:
    correction = getattr(module, "e_score_correction_bias", None)
    return Router(
        weight=module.weight,
        top_k=module.top_k,
        bias=getattr(module, "bias", None),
        correction=correction,
        sigmoid=correction is not None,
        # Where nothing is said, weights are a softmax over the chosen alone, which is the same as normalising.
        normalize=getattr(module, "norm_topk_prob", True),
        groups=getattr(module, "num_group", 0),
        top_groups=getattr(module, "topk_group", 0),
        scale=getattr(module, "routed_scaling_factor", 1.0),
    )


def _mlp(module: Any, share: nn.Module | None) -> MlpParts:
    x = torch.linspace(-8, 8, 65)
    candidates = (Activation("silu"), Activation("gelu_tanh"))
    with torch.no_grad():
        want = module.act_fn(x)
    found = [a for a in candidates if torch.allclose(apply(a, x, torch.ones_like(x)), want, rtol=1e-6, atol=1e-6)]
    if not found:
        raise NotImplementedError(f"activation {type(module.act_fn).__name__} of the dense blocks")
    return MlpParts(module.gate_proj, module.up_proj, module.down_proj, found[0], _row(share))


def _row(module: nn.Module | None) -> torch.Tensor | None:
    """The weights of a Linear with one output."""
    if module is None:
        return None
    weight = module.packed.dequantize() if isinstance(module, QuantLinear) else module.weight
    assert isinstance(weight, torch.Tensor), module
    return weight.reshape(-1)
