"""The activation functions of gated (and ungated) expert feed-forwards, and their plain torch reference.

An expert computes `down_proj(apply(activation, gate_proj(x), up_proj(x)))`. This file knows that one step between the
matrices; every kernel, on whatever device, is compared with `apply`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

KINDS = ("silu", "silu_clamp", "gpt_oss", "gelu_tanh", "relu2")


class Activation(NamedTuple):
    """Which function joins an expert's gate and up projections.

    kind         result                                                        used by (transformers' name)
    silu         silu(gate) * up                                               most families
    silu_clamp   silu(min(gate, limit)) * clamp(up, -limit, limit)             deepseek_v4
    gpt_oss      g * sigmoid(alpha * g) * (clamp(up, -limit, limit) + 1)       gpt_oss, with g = min(gate, limit)
    gelu_tanh    gelu(gate, approximate="tanh") * up                           gemma
    relu2        relu(up) ** 2, no gate                                        nemotron_h

    `alpha` is read by gpt_oss only, `limit` by silu_clamp and gpt_oss.
    """

    kind: str
    alpha: float = 0.0
    limit: float = 0.0

    @property
    def has_gate(self) -> bool:
        return self.kind != "relu2"


def apply(activation: Activation, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """The activation of `gate` and `up`, both [..., intermediate] of one floating dtype.

    Args:
        gate: None for kinds without a gate (relu2).

    Raises:
        ValueError: the kind is unknown, or a gate is missing or too many.
    """
    kind, alpha, limit = activation
    if kind not in KINDS:
        raise ValueError(f"unknown activation {kind!r}; known: {', '.join(KINDS)}")
    if (gate is None) == activation.has_gate:
        raise ValueError(f"activation {kind!r} {'needs' if gate is None else 'has no'} gate projection")
    if gate is None:
        return F.relu(up).square()
    if kind == "silu":
        return F.silu(gate) * up
    if kind == "silu_clamp":
        return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    if kind == "gpt_oss":
        gate = gate.clamp(max=limit)
        return (up.clamp(-limit, limit) + 1) * (gate * torch.sigmoid(alpha * gate))
    return F.gelu(gate, approximate="tanh") * up
