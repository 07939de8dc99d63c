"""The routed experts inside a transformers model: where they are, and their weights in our layout and in its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..quant.activations import Activation, apply
from ..quant.codecs import ExpertShape, Weight
from .errors import DataError
from .hf_families import ExpertsForm, experts_form
from .source import MoeLayer

_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k", "moe_top_k")


@dataclass
class MoeSite:
    """One MoE layer inside a transformers model, its expert parameters dropped."""

    index: int
    name: str
    experts: Any
    form: ExpertsForm
    router: nn.Module | None
    layer: MoeLayer
    params: dict[str, tuple[tuple[int, ...], torch.dtype]]
    """The dropped parameters of the experts module: name -> ([experts, ...] shape, dtype)."""
    norm: nn.Module | None = None
    """The norm whose output the router reads, once `find_router_norms` has run."""
    router_dims: int = 2
    predictable: bool = False
    """Whether the router can be run on a guess: it takes hidden states alone and returns indices."""

    def split(self, params: Mapping[str, Weight]) -> dict[str, Weight]:
        """One expert in the module's own layout -> the parts of `ExpertShape.parts()`, Linear order [out, in].

        MXFP4 matrices are in Linear order already.
        """
        parts: dict[str, Weight] = {}
        for name, tensor in params.items():
            part = self.form.parts[name]
            if isinstance(tensor, torch.Tensor) and name in self.form.transposed:
                tensor = tensor.T
            if part.startswith("gate_up_proj"):
                suffix, half = part.removeprefix("gate_up_proj"), tensor.shape[0] // 2
                parts["gate_proj" + suffix] = tensor[0::2] if self.form.interleaved else tensor[:half]
                parts["up_proj" + suffix] = tensor[1::2] if self.form.interleaved else tensor[half:]
            else:
                parts[part] = tensor
        return {name: parts[name].contiguous() for name in self.layer.shape.parts()}

    def join(self, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse of `split`: one expert in the module's own layout."""
        params = {}
        for name, part in self.form.parts.items():
            if part.startswith("gate_up_proj"):
                suffix = part.removeprefix("gate_up_proj")
                both = parts["gate_proj" + suffix], parts["up_proj" + suffix]
                tensor = torch.stack(both, 1).flatten(0, 1) if self.form.interleaved else torch.cat(both)
            else:
                tensor = parts[part]
            params[name] = tensor.T if name in self.form.transposed else tensor
        return params

    def apply_gate(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        """The module's own activation on separate gate and up, [rows, intermediate] each."""
        return self.form.apply_gate(gate, up)

    def activation(self) -> Activation | None:
        """The activation by name, found by comparing outputs; None when no native kernel has it."""
        module = self.experts
        limit = next(
            (v for n in ("limit", "swiglu_limit") if isinstance(v := getattr(module, n, None), (int, float))), 0.0
        )
        alpha = float(getattr(module, "alpha", 0.0) or 0.0)
        up = torch.linspace(-12, 12, 97).reshape(1, -1)
        gate = up.flip(-1) * 0.9 + 0.1 if self.layer.shape.has_gate else None
        with torch.no_grad():
            want = self.apply_gate(gate, up)
        candidates = (
            [
                Activation("silu"),
                Activation("silu_clamp", 0.0, float(limit)),
                Activation("gpt_oss", alpha, float(limit)),
            ]
            + [Activation("gelu_tanh")]
            if gate is not None
            else [Activation("relu2")]
        )
        for candidate in candidates:
            if torch.allclose(apply(candidate, gate, up), want, rtol=1e-6, atol=1e-6):
                return candidate
        return None


def find_sites(model: PreTrainedModel, left_out: list[str]) -> Iterator[MoeSite]:
    """The MoE layers of a model on the meta device, in order; drops their experts' parameters.

    Args:
        left_out: modules that are not looked into.

    Raises:
        DataError: experts of a form that is not supported.
    """
    index = 0
    for name, module in list(model.named_modules()):
        if name.startswith(tuple(f"{part}." for part in left_out)):
            continue
        block: Any = model.get_submodule(name.rpartition(".")[0])
        form = experts_form(module, block)
        if form is None:
            continue
        own = {part: param for param, part in form.parts.items()}
        has_gate, has_bias = "up_proj" not in own or "gate_proj" in own, "down_proj_bias" in own
        known = {"gate_up_proj", "down_proj"} if "gate_up_proj" in own else {"gate_proj", "up_proj", "down_proj"}
        known -= set() if has_gate else {"gate_proj"}
        known |= {f"{part}_bias" for part in known} if has_bias else set()
        if own.keys() != known:
            raise DataError(f"{name}: expert parameters {sorted(own)} are not supported, expected {sorted(known)}")
        num_experts, *sizes = form.shapes[own["down_proj"]]
        hidden, intermediate = reversed(sizes) if own["down_proj"] in form.transposed else sizes
        near = (getattr(holder, name, None) for holder in (block, module) for name in ("gate", "router"))
        router = next((found for found in near if isinstance(found, nn.Module)), None)
        top_k = getattr(router, "top_k", None) or getattr(block, "top_k", None) or _config_top_k(model.config)
        params = {}
        for param in form.parts:
            holder = module.get_submodule(param.rpartition(".")[0])
            params[param] = (form.shapes[param], holder.get_parameter(leaf := param.rpartition(".")[2]).dtype)
            holder._parameters[leaf] = None  # never materialised: their bytes live in slots
            holder._is_hf_initialized = True  # type: ignore[assignment]
        if not block._non_persistent_buffers_set:  # some initialise their experts' parameters themselves
            block._is_hf_initialized = True
        layer = MoeLayer(name, num_experts, int(top_k), ExpertShape(hidden, intermediate, has_gate, has_bias))
        yield MoeSite(index, name, module, form, router, layer, params)
        index += 1


def _config_top_k(config: Any) -> int:
    text = config.get_text_config()
    for name in _TOP_K_NAMES:
        if isinstance(value := getattr(text, name, None), int):
            return value
    raise DataError(f"model type {config.model_type!r} does not say how many experts a token uses")
