"""RMS norms as one operation each: transformers' modules compute one in eight, each a launch of its own on a GPU."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import nn


def fuse_norms(model: nn.Module) -> int:
    """Let torch's own kernel compute the norms of a loaded model that turn out, when tried, to be RMS norms.

    In float32 the results are the same to the bit on a CPU; in half precision they are rounded once instead of twice.

    Returns:
        How many there are.
    """
    found = [(module, eps) for module in model.modules() if (eps := _epsilon(module)) and _agrees(module, eps)]
    for module, eps in found:
        module.forward = _Fused(module, eps)
    return len(found)


class _Fused:
    """What takes the place of a norm's `forward`."""

    def __init__(self, module: nn.Module, eps: float) -> None:
        self._weights, self._eps = module._parameters, eps

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self._weights["weight"]
        assert weight is not None
        return F.rms_norm(hidden_states, weight.shape, weight, self._eps)


def _epsilon(module: nn.Module) -> float | None:
    """That of a module which may be an RMS norm, by its names."""
    weight = module._parameters.get("weight")
    alone = len(module._parameters) == 1 and weight is not None and weight.dim() == 1
    if not alone or "Norm" not in type(module).__name__ or len(inspect.signature(module.forward).parameters) != 1:
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


@torch.inference_mode()
def _agrees(module: nn.Module, eps: float) -> bool:
    """Whether it computes what `F.rms_norm` does, for rows whose mean is not zero and some for which `eps` counts."""
    weight = module._parameters["weight"]
    assert weight is not None
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, len(weight), generator=generator) + 0.5
    rows[2:] *= eps**0.5
    x = rows.to(weight.device, weight.dtype)
    want, got = module(x), _Fused(module, eps)(x)
    if not torch.is_tensor(want) or want.dtype != got.dtype:
        return False
    return torch.allclose(got.float(), want.float(), rtol=3 * torch.finfo(want.dtype).eps, atol=1e-30)
