"""Random experts and what they compute, in float64 and from the weights as packed: for the tests of every kernel."""

from __future__ import annotations

import math

import torch
from pocketmoe.quant import int4, mxfp4
from pocketmoe.quant.activations import Activation, apply
from pocketmoe.quant.codecs import ExpertShape, decode_expert, encode_expert, get_codec, record_layout

SILU = Activation("silu")
ACTIVATIONS = [
    SILU,
    Activation("silu_clamp", limit=0.9),
    Activation("gpt_oss", alpha=1.702, limit=0.8),
    Activation("gelu_tanh"),
    Activation("relu2"),
]
CODECS = [*(f"int4-g{group}{suffix}" for group in int4.GROUPS for suffix in ("", "-asym", "-zp")), "mxfp4"]


def nearest_mxfp4(weight: torch.Tensor) -> torch.Tensor:
    """A matrix near `weight` that MXFP4 holds."""
    groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 32)).unflatten(1, (-1, 32))
    step = 2.0 ** (groups.abs().amax(-1, keepdim=True).log2().floor() - 3)  # the largest becomes 8 to 16 steps
    doubled = torch.tensor(mxfp4.DOUBLED[:8], dtype=torch.float32)
    nearest = doubled[((groups / step).abs().unsqueeze(-1) - doubled).abs().argmin(-1)]
    return (nearest * step).copysign(groups).flatten(1)[:, : weight.shape[1]]


def random_expert(codec: str, shape: ExpertShape, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A record and the weights it stands for, float64."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(size, generator=generator) for name, size in shape.parts().items()}
    weights = {name: w / math.sqrt(w.shape[-1]) if w.dim() == 2 else w * 0.3 for name, w in weights.items()}
    if codec == "mxfp4":
        weights = {name: nearest_mxfp4(w) if w.dim() == 2 else w for name, w in weights.items()}
    layout = record_layout(get_codec(codec), shape)
    record = encode_expert(get_codec(codec), layout, weights)
    return record, {name: w.double() for name, w in decode_expert(get_codec(codec), layout, record).items()}


def project(weights: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ weights[name].T + weights.get(f"{name}_bias", 0.0)


def inner(weights: dict[str, torch.Tensor], activation: Activation, x: torch.Tensor) -> torch.Tensor:
    """What the down projection is applied to."""
    gate = project(weights, "gate_proj", x) if activation.has_gate else None
    return apply(activation, gate, project(weights, "up_proj", x))


def inner_error(
    weights: dict[str, torch.Tensor], activation: Activation, x: torch.Tensor, x_error: torch.Tensor
) -> torch.Tensor:
    """How far `inner` can move when each number of x moves by no more than `x_error`."""
    up, up_error = project(weights, "up_proj", x), x_error @ weights["up_proj"].abs().T
    if not activation.has_gate:
        return 2 * up.abs() * up_error + up_error**2
    # Every gate function here has a slope of at most 1.13; clamps have at most 1.
    gate_error = 1.13 * x_error @ weights["gate_proj"].abs().T
    gate = apply(
        activation._replace(limit=max(activation.limit, 1.0)), project(weights, "gate_proj", x), torch.ones_like(up)
    )
    return gate_error * (up.abs() + up_error + 1) + (gate.abs() + gate_error) * up_error
