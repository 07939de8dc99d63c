"""The bridge to transformers: a model without its experts, and what it tells about them.

transformers holds the architectures. This file (with `hf_keys.py`, which maps checkpoint names) is the only one that
touches its internals; the names it relies on are checked against the tested range in `SUPPORTED`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..quant.activations import Activation, apply
from ..quant.codecs import ExpertShape, Weight
from .errors import DataError
from .kv_cache import allocates_ahead, cache_bytes, new_kv_cache
from .source import MoeLayer

EXPERTS_IMPLEMENTATION = "pocketmoe"
SUPPORTED = ((5, 21), (5, 99))
_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k", "moe_top_k")

ExpertsForward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
):
    return module.__dict__["_pocketmoe_forward"](hidden_states, top_k_index, top_k_weights)


@dataclass
class MoeSite:
    """One MoE layer inside a transformers model, its expert parameters dropped."""

    index: int
    name: str
    experts: Any
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
        module: Any = self.experts
        parts: dict[str, Weight] = {}
        for name, tensor in params.items():
            if isinstance(tensor, torch.Tensor) and module.is_transposed and tensor.dim() == 2:
                tensor = tensor.T
            if name.startswith("gate_up_proj"):
                suffix, half = name.removeprefix("gate_up_proj"), tensor.shape[0] // 2
                parts["gate_proj" + suffix] = tensor[:half] if module.is_concatenated else tensor[0::2]
                parts["up_proj" + suffix] = tensor[half:] if module.is_concatenated else tensor[1::2]
            else:
                parts[name] = tensor
        return {name: parts[name].contiguous() for name in self.layer.shape.parts()}

    def join(self, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse of `split`: one expert in the module's own layout."""
        module, params = self.experts, {}
        for name, tensor in parts.items():
            if name.startswith("gate_proj"):
                up = parts["up_proj" + name.removeprefix("gate_proj")]
                both = torch.cat((tensor, up)) if module.is_concatenated else torch.stack((tensor, up), 1).flatten(0, 1)
                name, tensor = "gate_up_proj" + name.removeprefix("gate_proj"), both
            elif name.startswith("up_proj") and self.layer.shape.has_gate:
                continue
            params[name] = tensor.T if module.is_transposed and tensor.dim() == 2 else tensor
        return params

    def apply_gate(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        """The module's own activation on separate gate and up, [rows, intermediate] each."""
        module = self.experts
        if gate is None:
            return module.act_fn(up)
        if module.is_concatenated:
            return module._apply_gate(torch.cat((gate, up), -1))
        return module._apply_gate(torch.stack((gate, up), -1).flatten(-2))

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


@dataclass
class Skeleton:
    """A transformers model on the meta device whose routed experts have no parameters."""

    model: PreTrainedModel
    config: Any
    sites: list[MoeSite]
    full_state: dict[str, torch.Tensor]
    """Meta tensors by parameter name, experts included: the names that a checkpoint must resolve to."""
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def trunk_names(self) -> list[str]:
        """Parameters and persistent buffers that a store must hold (tied duplicates left out)."""
        dropped = {f"{site.name}.{name}" for site in self.sites for name in site.params}
        return [
            name for name in self.full_state if name not in dropped and name not in self.model.all_tied_weights_keys
        ]


def check_version() -> None:
    """Raises DataError when the installed transformers is outside the range that this file was tested with."""
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not SUPPORTED[0] <= version <= SUPPORTED[1]:
        wanted = f"transformers>={SUPPORTED[0][0]}.{SUPPORTED[0][1]},<{SUPPORTED[1][0] + 1}"
        raise DataError(f"transformers {transformers.__version__} is not supported; install {wanted}")


def read_config(path: Path) -> Any:
    """The transformers config of a directory. Raises DataError for remote code and unknown model types."""
    file = path / "config.json"
    if not file.is_file():
        raise DataError(f"{path} has no config.json: it is neither a checkpoint nor a store")
    try:
        raw, _ = transformers.PreTrainedConfig.get_config_dict(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    model_type = raw.get("model_type")
    try:
        return AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        if raw.get("auto_map"):
            raise DataError(
                f"{path}: model type {model_type!r} needs code that ships with the checkpoint, which is never run; "
                "only architectures inside transformers are supported"
            ) from None
        if model_type is None or model_type not in transformers.CONFIG_MAPPING:
            raise DataError(
                f"{path}: model type {model_type!r} is unknown to transformers {transformers.__version__}; "
                "a newer transformers may know it"
            ) from None
        raise DataError(f"{file} cannot be used: {error}") from None


def make_config(content: dict[str, Any]) -> Any:
    """The transformers config of the content of a config.json that never was a file."""
    settings = {key: value for key, value in content.items() if key != "model_type"}
    try:
        return AutoConfig.for_model(content["model_type"], **settings)
    except Exception as error:  # the library raises many kinds for bad values
        raise DataError(f"the model's metadata cannot be used: {' '.join(str(error).split())}") from error


def build_skeleton(config: Any, dtype: torch.dtype | None = None) -> Skeleton:
    """The model of a config on the meta device, its experts dropped.

    Raises:
        DataError: no causal language model, or a dense one.
    """
    check_version()
    config = config if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else config.get_text_config()
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise DataError(f"model type {config.model_type!r} is not a causal language model")
    cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if isinstance(cls, (tuple, list)):
        cls = cls[0]
    dtype = dtype or config.dtype or torch.float32
    ExpertsInterface.register(EXPERTS_IMPLEMENTATION, _experts_forward)
    config._experts_implementation = "eager"  # the registered name is set below, once the experts are known
    with contextlib.ExitStack() as stack:
        for context in cls.get_init_context(dtype, False, False, None):
            stack.enter_context(context)
        model = cls(config)
    model.eval()
    full_state = dict(model.state_dict())
    plan = model._get_dtype_plan(dtype)
    dtypes = {
        name: next((wanted for part, wanted in plan.items() if part in name), tensor.dtype)
        for name, tensor in full_state.items()
    }
    sites = list(_find_sites(model))
    if not sites:
        raise DataError(
            f"model type {config.model_type!r} is dense: it has no routed experts, so there is nothing to offload"
        )
    for module in model.modules():  # composite configs: parts may keep a config object of their own
        part = getattr(module, "config", None)
        if part is not None and hasattr(part, "_experts_implementation_internal"):
            part._experts_implementation_internal = EXPERTS_IMPLEMENTATION
    return Skeleton(model, config, sites, full_state, dtypes)


def _find_sites(model: PreTrainedModel) -> Iterator[MoeSite]:
    index = 0
    for name, module in list(model.named_modules()):
        experts: Any = module
        if not (hasattr(module, "is_transposed") and hasattr(module, "has_gate")):
            continue
        if getattr(module, "has_post_expert_norm", False):
            raise DataError(f"{name}: experts with a norm of their own after them are not supported yet")
        block = model.get_submodule(name.rpartition(".")[0])
        router = next((m for n in ("gate", "router") if isinstance(m := getattr(block, n, None), nn.Module)), None)
        params = {n: (tuple(p.shape), p.dtype) for n, p in module.named_parameters(recurse=False)}
        down, up_name = params["down_proj"][0], "gate_up_proj" if experts.has_gate else "up_proj"
        hidden, intermediate = (down[2], down[1]) if experts.is_transposed else (down[1], down[2])
        shape = ExpertShape(hidden, intermediate, experts.has_gate, f"{up_name}_bias" in params)
        known = {up_name, "down_proj"} | ({f"{up_name}_bias", "down_proj_bias"} if shape.has_bias else set())
        if set(params) != known:
            raise DataError(f"{name}: expert parameters {sorted(params)} are not supported, expected {sorted(known)}")
        top_k = getattr(router, "top_k", None) or _config_top_k(model.config)
        for param in params:
            module._parameters[param] = None  # never materialised: their bytes live in slots
        module._is_hf_initialized = True
        yield MoeSite(index, name, module, router, MoeLayer(name, down[0], int(top_k), shape), params)
        index += 1


def _config_top_k(config: Any) -> int:
    text = config.get_text_config()
    for name in _TOP_K_NAMES:
        if isinstance(value := getattr(text, name, None), int):
            return value
    raise DataError(f"model type {config.model_type!r} does not say how many experts a token uses")


def load_trunk(
    skeleton: Skeleton, tensors: Iterator[tuple[str, torch.Tensor]], stand_ins: Collection[str] = ()
) -> None:
    """Put trunk tensors into the model, one at a time, then give its computed buffers their values.

    Args:
        stand_ins: parameters that `tensors` leaves out because the caller replaces their module; a parameter that is
            tied to one of them is the caller's as well.

    Raises:
        DataError: a tensor is unknown, missing or of the wrong shape. Nothing is ever initialised at random.
    """
    model, missing = skeleton.model, set(skeleton.trunk_names()) - set(stand_ins)
    for name, tensor in tensors:
        if name not in missing:
            raise DataError(f"trunk tensor {name} is unknown to {type(model).__name__}")
        want = skeleton.full_state[name]
        if tensor.shape != want.shape:
            raise DataError(
                f"trunk tensor {name} has shape {tuple(tensor.shape)}, the model expects {tuple(want.shape)}"
            )
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        tensor = tensor.to(skeleton.dtypes[name])
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            module._parameters[leaf]._is_hf_initialized = True  # type: ignore[union-attr]
        else:
            module._buffers[leaf] = tensor
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        missing.discard(name)
    if missing:
        raise DataError(f"trunk tensor {min(missing)} is missing ({len(missing)} in all); convert the checkpoint again")
    model._move_missing_keys_from_meta_to_device([], {"": "cpu"}, None, None)  # type: ignore[arg-type]
    model._initialize_missing_keys(False)  # rotary tables and the like; every parameter above is marked as loaded
    tied = {target: source for target, source in model.all_tied_weights_keys.items() if source not in stand_ins}
    replaced = model.all_tied_weights_keys.keys() - tied.keys()
    model.all_tied_weights_keys = tied
    model.tie_weights(missing_keys=set(tied), recompute_mapping=False)
    tensors_left = (*model.named_parameters(), *model.named_buffers())
    left = [n for n, t in tensors_left if t.device.type == "meta" and n not in replaced]
    assert not left, left[:3]


def attach(
    skeleton: Skeleton, forward: Callable[[MoeSite, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    """Let every experts module call `forward(site, hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k])`."""
    for site in skeleton.sites:
        site.experts.__dict__["_pocketmoe_forward"] = lambda x, i, w, site=site: forward(site, x, i, w)


def _no_experts(_site: MoeSite, hidden_states: torch.Tensor, *_routing: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(hidden_states)


def find_router_norms(skeleton: Skeleton) -> None:
    """Find, by one small forward, the norm that feeds each router.

    It is the module whose output shares its storage with the router's input. Some families route on the residual
    itself; their sites keep `norm = None`.
    """
    outputs: dict[int, nn.Module] = {}
    keep: list[torch.Tensor] = []  # outputs stay alive so that no storage address is used twice
    handles = []

    def record(module: nn.Module, _args: Any, output: Any) -> None:
        if torch.is_tensor(output):
            keep.append(output)
            outputs[output.untyped_storage().data_ptr()] = module

    def match(site: MoeSite, _router: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        site.norm = outputs.get(args[0].untyped_storage().data_ptr())
        site.router_dims = args[0].dim()
        returns_indices = isinstance(output, tuple) and any(
            torch.is_tensor(t) and t.dtype == torch.int64 for t in output
        )
        site.predictable = len(args) == 1 and not kwargs and returns_indices

    for name, module in skeleton.model.named_modules():
        if "norm" in name.rpartition(".")[2].lower() or "Norm" in type(module).__name__:
            handles.append(module.register_forward_hook(record))
    for site in skeleton.sites:
        if site.router is not None:
            hook = functools.partial(match, site)
            handles.append(site.router.register_forward_hook(hook, with_kwargs=True))
    attach(skeleton, _no_experts)
    try:
        with torch.inference_mode():
            skeleton.model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def measure_kv_bytes(skeleton: Skeleton, context: int, chunk: int, stored: torch.dtype | None = None) -> int:
    """Bytes of the KV cache with `context` tokens in it: a forward on the meta device, before any weight is read."""
    cache = new_kv_cache(skeleton.config, context, chunk, stored)
    tokens = 1
    if not allocates_ahead(cache):
        tokens, cache = context, new_kv_cache(skeleton.config, context, context, stored)
    attach(skeleton, _no_experts)
    with torch.inference_mode():
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        skeleton.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache_bytes(cache)
