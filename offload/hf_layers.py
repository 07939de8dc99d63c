"""What the decoder layers of well-known families consist of, so that `lean.py` can run them without their modules.

Their attention is the same but for norms, biases, sinks, windows and the rotary width, which are read off the modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..quant.activations import Activation, apply
from ..quant.linear import linear_weight
from ..quant.native_step import Norm, Rotation, Router
from .hf import MoeSite, Skeleton

FAMILIES = (
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
)
"""Model types whose decoder layers are compared with transformers' own in the tests."""


class UnfitError(Exception):
    """A model that looked as if it could take the fast path and cannot; says why."""


@dataclass(frozen=True)
class AttentionParts:
    """Attention whose keys and values are cached per head."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    query_norm: Norm | None
    key_norm: Norm | None
    sinks: torch.Tensor | None
    head_dim: int
    clip: float


@dataclass(frozen=True)
class LatentParts:
    """Multi-head latent attention."""

    query_down: nn.Module | None
    query_norm: Norm | None
    query: nn.Module
    latent_down: nn.Module
    latent_norm: Norm
    key_value_up: nn.Module
    """[heads * (plain + value_dim), latent]"""
    heads: int
    plain: int
    """Width of a head's queries and keys that is not turned."""
    rotation: Rotation


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

    attention: AttentionParts | LatentParts
    output: nn.Module
    scaling: float
    input_norm: Norm
    output_norm: Norm
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
    norm: Norm
    """The last one."""
    head: nn.Module


def read_decoder(skeleton: Skeleton) -> DecoderParts | None:
    """The parts of a loaded model; None when its family is not one of `FAMILIES`."""
    config = skeleton.config
    if config.model_type not in FAMILIES:
        return None
    base: Any = skeleton.model.base_model
    head: Any = skeleton.model.get_output_embeddings()
    sites = {id(site.experts): site for site in skeleton.sites}
    layers = [_read_layer(layer, sites, config) for layer in base.layers]
    return DecoderParts(base.embed_tokens, base.rotary_emb, layers, _norm(base.norm), head)


def _read_layer(layer: Any, sites: dict[int, MoeSite], config: Any) -> LayerParts:
    attention, block = layer.self_attn, layer.mlp
    site = sites.get(id(getattr(block, "experts", None)))
    dense = block if site is None else getattr(block, "shared_experts", getattr(block, "shared_expert", None))
    share = getattr(block, "shared_expert_gate", None)
    return LayerParts(
        attention=(_latent if hasattr(attention, "kv_b_proj") else _attention)(attention, config),
        output=attention.o_proj,
        scaling=attention.scaling,
        input_norm=_norm(layer.input_layernorm),
        output_norm=_norm(layer.post_attention_layernorm),
        site=site,
        router=None if site is None else _router(site.router),
        mlp=None if dense is None else _mlp(dense, share),
    )


def _attention(module: Any, config: Any) -> AttentionParts:
    return AttentionParts(
        query=module.q_proj,
        key=module.k_proj,
        value=module.v_proj,
        query_norm=_norm(module.q_norm) if hasattr(module, "q_norm") else None,
        key_norm=_norm(module.k_norm) if hasattr(module, "k_norm") else None,
        sinks=getattr(module, "sinks", None),
        head_dim=module.head_dim,
        clip=getattr(config, "clip_qkv", None) or 0.0,
    )


def _latent(module: Any, config: Any) -> LatentParts:
    rotation = Rotation.INTERLEAVED
    if hasattr(config, "rope_interleave"):
        rotation = Rotation.SORTED if config.rope_interleave else Rotation.HALVES
    return LatentParts(
        query_down=module.q_a_proj,
        query_norm=None if module.q_a_proj is None else _norm(module.q_a_layernorm),
        query=module.q_proj if module.q_a_proj is None else module.q_b_proj,
        latent_down=module.kv_a_proj_with_mqa,
        latent_norm=_norm(module.kv_a_layernorm),
        key_value_up=module.kv_b_proj,
        heads=module.num_heads,
        plain=module.qk_nope_head_dim,
        rotation=rotation,
    )


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def _router(module: Any) -> Router:
    correction = getattr(module, "e_score_correction_bias", None)
    method = getattr(module, "topk_method", "")  # deepseek_v2's
    return Router(
        weight=module.weight,
        top_k=module.top_k,
        bias=getattr(module, "bias", None),
        correction=correction,
        sigmoid=correction is not None,
        # Where nothing is said, weights are a softmax over the chosen alone, which is the same as normalising.
        normalize=getattr(module, "norm_topk_prob", not method),
        groups=0 if method == "greedy" else getattr(module, "num_group", None) or 0,
        top_groups=getattr(module, "topk_group", None) or 0,
        group_best=1 if method else 2,
        scale=getattr(module, "routed_scaling_factor", 1.0),
    )


def _mlp(module: Any, share: nn.Module | None) -> MlpParts:
    x = torch.linspace(-8, 8, 65)
    candidates = (Activation("silu"), Activation("gelu_tanh"))
    with torch.no_grad():
        want = module.act_fn(x)
    found = [a for a in candidates if torch.allclose(apply(a, x, torch.ones_like(x)), want, rtol=1e-6, atol=1e-6)]
    if not found:
        raise UnfitError(f"activation {type(module.act_fn).__name__} of the dense blocks")
    weights = None if share is None else linear_weight(share).reshape(-1)
    return MlpParts(module.gate_proj, module.up_proj, module.down_proj, found[0], weights)
