"""What single families of transformers need beyond the general way: the only place where they are named.

Most experts modules carry the library's experts interface or hold the same parameters, and need nothing here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

ALIASES = {"kimi_k2": "deepseek_v3"}
"""Model types that ship with code of their own and are the same as one that the library has."""

STEPWISE = ("jamba",)
"""Model types whose recurrent layers, in the library, take a prompt in one piece and then single tokens only: several
tokens after others would be computed as if nothing came before them."""

OWN_CACHE = {"minimax": "MiniMaxCache"}
"""Model types that take no other KV cache than one of this class, which is defined beside the model."""

LEFT_OUT = ("vision_moe",)
"""Modules inside a language model that are for images only: ernie4_5_vl_moe has experts of their own for them."""

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k]) -> each token's experts, weighted, summed [T, H]."""


@dataclass(frozen=True)
class ExpertsForm:
    """How a module keeps its routed experts, and how ours are put in their place."""

    parts: dict[str, str]
    """Its own parameters -> `gate_up_proj` or `gate_proj` and `up_proj`, `down_proj`, with `_bias` or without."""
    shapes: dict[str, tuple[int, ...]]
    """Its own parameters -> [experts, ...]."""
    transposed: frozenset[str]
    """Those that hold matrices as [in, out]."""
    apply_gate: Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor]
    """The activation of gate (None without one) and up, [rows, intermediate] each."""
    install: Callable[[Run], None]
    """Let the model call this function instead of its experts."""
    interleaved: bool = False
    """`gate_up_proj` holds rows of gate and up in turns, instead of one after the other."""
    post_norm: nn.Module | None = field(default=None, compare=False)
    """Applied to each expert's output before it is weighted."""


def experts_form(module: Any, block: Any) -> ExpertsForm | None:
    """The form of a module's routed experts; None when it holds none.

    Args:
        block: the module around it.
    """
    if type(module).__name__ == "DbrxExperts":
        return _dbrx(module)
    if type(module).__name__ == "JetMoeMoE":
        return _jetmoe(module, block)
    params = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    up = "gate_up_proj" if "gate_up_proj" in params else "up_proj"
    if any(len(params.get(name, ())) != 3 for name in (up, "down_proj")):
        return None
    llama4 = type(module).__name__ == "Llama4TextExperts"
    has_interface = hasattr(module, "has_gate") or "top_k_index" in inspect.signature(module.forward).parameters
    if not llama4 and not has_interface:
        return None  # shared experts in one tensor
    transposed = getattr(module, "is_transposed", params[up][1] == params["down_proj"][2])
    interleaved = not getattr(module, "is_concatenated", True)

    def apply_gate(gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        if gate is None:
            return module.act_fn(up)
        if not hasattr(module, "_apply_gate"):
            return module.act_fn(gate) * up
        return module._apply_gate(torch.stack((gate, up), -1).flatten(-2) if interleaved else torch.cat((gate, up), -1))

    def install(run: Run) -> None:
        if llama4:
            block.forward = _llama4_block(block, run)
        else:
            module.forward = _with_zero_experts(run, params["down_proj"][0]) if _has_zero_experts(module) else run

    return ExpertsForm(
        parts={name: name for name in params},
        shapes={name: (params["down_proj"][0], *shape[1:]) for name, shape in params.items()},
        transposed=frozenset(name for name, shape in params.items() if transposed and len(shape) == 3),
        apply_gate=apply_gate,
        install=install,
        interleaved=interleaved,
        post_norm=module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None,
    )


def foreign_experts(model: nn.Module) -> Iterator[str]:
    """Classes in a model that have the look of routed experts: for a refusal, when none were recognised."""
    for module in model.modules():
        name = type(module).__name__
        if name.endswith(("Experts", "MoE", "Moe", "MoA")):
            yield name


def _has_zero_experts(module: Any) -> bool:
    """longcat_flash: experts that compute nothing and hand on their input, numbered after the others."""
    return bool(getattr(module, "zero_expert_num", 0))


def _with_zero_experts(run: Run, num_experts: int) -> Run:
    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        zero = top_k_index >= num_experts
        # In place of a zero expert, the lowest that its token has chosen anyway, with no weight.
        stand_in = top_k_index.amin(1, keepdim=True).where(~zero.all(1, keepdim=True), 0)
        total = run(hidden_states, top_k_index.where(~zero, stand_in), top_k_weights.masked_fill(zero, 0.0))
        share = top_k_weights.masked_fill(~zero, 0.0).sum(1, keepdim=True)
        return total + (hidden_states * share).to(total.dtype)

    return forward


def _llama4_block(block: Any, run: Run) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """llama4 weighs what goes into an expert, not what comes out, and sends every token to all of them, most with
    weight 0; those are left out."""

    def forward(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = hidden_states.reshape(-1, block.hidden_dim)
        scores, logits = block.router(hidden)
        index = torch.topk(logits, block.top_k, dim=1).indices
        weighted = (hidden[:, None] * scores.gather(1, index)[:, :, None]).flatten(0, 1)
        ones = torch.ones_like(index, dtype=hidden.dtype)
        routed = run(weighted, index.reshape(-1, 1), ones.reshape(-1, 1)).view(*index.shape, -1)
        return block.shared_expert(hidden) + routed.sum(1), logits

    return forward


def _dbrx(module: Any) -> ExpertsForm:
    """dbrx keeps the experts of a layer one below the other in matrices [experts * intermediate, hidden]."""
    shape = (module.num_experts, module.ffn_hidden_size, module.hidden_size)

    def install(run: Run) -> None:
        module.forward = lambda hidden, index, weights: run(hidden.flatten(0, 1), index, weights).view_as(hidden)

    return ExpertsForm(
        parts={"mlp.w1": "gate_proj", "mlp.v1": "up_proj", "mlp.w2": "down_proj"},
        shapes=dict.fromkeys(("mlp.w1", "mlp.v1", "mlp.w2"), shape),
        transposed=frozenset(("mlp.w2",)),
        apply_gate=lambda gate, up: module.mlp.activation_fn(gate) * up,
        install=install,
    )


def _jetmoe(module: Any, block: Any) -> ExpertsForm:
    """jetmoe's block routes by itself. Its attention has experts, too, which stay in the trunk."""

    router, attention_router = module.router, block.self_attention.experts.router

    def route(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        best, index = router.layer(hidden).float().topk(router.top_k, dim=1)
        return index, best.softmax(1).type_as(hidden)

    def install(run: Run) -> None:
        def forward(hidden: torch.Tensor) -> torch.Tensor:
            flat = hidden.flatten(0, 1)
            return run(flat, *router(flat)).view_as(hidden) + module.bias

        module.forward, router.forward = forward, route
        attention_router.forward = _countable(attention_router)

    parts = {"input_linear.weight": "gate_up_proj", "output_linear.weight": "down_proj"}
    return ExpertsForm(
        parts=parts,
        shapes={name: tuple(module.get_parameter(name).shape) for name in parts},
        transposed=frozenset(),
        apply_gate=lambda gate, up: module.activation(gate) * up,
        install=install,
    )


def _countable(gating: Any) -> Callable[[torch.Tensor], tuple[Any, ...]]:
    """jetmoe's gating counts the tokens of each expert, which has no answer on the meta device: all go to the first."""

    def forward(hidden: torch.Tensor) -> tuple[Any, ...]:
        if not hidden.is_meta:
            return type(gating).forward(gating, hidden)
        rows = torch.empty(len(hidden) * gating.top_k, dtype=torch.long, device="meta")
        sizes = [len(rows)] + [0] * (gating.num_experts - 1)
        return rows, rows, rows.to(hidden.dtype), sizes, gating.layer(hidden)

    return forward
