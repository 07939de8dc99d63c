"""The bridge to transformers: a model without its experts, and what it tells about them.

transformers holds the architectures. This file and its neighbours (`hf_experts.py`: the experts in a model,
`hf_families.py`: what single families need, `hf_keys.py`: names in checkpoints, `hf_norms.py`: norms on a GPU) are the
only ones that touch its internals; `make breadth` runs every Mixture-of-Experts type of the installed release through
them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, GenerationMixin, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from ..quant.linear import asks_for_attribute
from .errors import DataError
from .hf_experts import MoeSite, find_sites
from .hf_families import ALIASES, LEFT_OUT, foreign_experts
from .kv_cache import allocates_ahead, cache_bytes, capacities, new_kv_cache, token_bytes
from .memory import KvGrowth
from .source import OnNotice

OLDEST, TESTED = (5, 21), (5, 23)
"""The releases of transformers that this works with at least, and the newest that `make breadth` ran with."""

_MOST_LAYERS, _MOST_EXPERTS = 10_000, 100_000
_CPU = torch.device("cpu")


@dataclass
class Skeleton:
    """A transformers model on the meta device whose routed experts have no parameters."""

    model: PreTrainedModel
    config: Any
    sites: list[MoeSite]
    full_state: dict[str, torch.Tensor]
    """Meta tensors by parameter name, experts included: the names that a checkpoint must resolve to."""
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    """Modules that a text never reaches: what reads images and sound."""

    def trunk_names(self) -> list[str]:
        """Parameters and persistent buffers that a store must hold (tied duplicates left out)."""
        dropped = {f"{site.name}.{name}" for site in self.sites for name in site.params}
        dropped.update(self.model.all_tied_weights_keys)
        return [name for name in self.full_state if name not in dropped and not self.is_left_out(name)]

    def computed_with_directly(self, weights: Collection[str]) -> set[str]:
        """Those of the weights, of Linears and Embeddings, that the model also computes with past their own modules."""
        modules = {name: self.model.get_submodule(name.removesuffix(".weight")) for name in weights}
        cache, watch = new_kv_cache(self.config, 3, 2), _DirectUse(modules)
        attach(self, _no_experts)
        try:
            with watch:
                for tokens in (2, 1):
                    _meta_forward(self.model, tokens, cache)
        finally:
            for handle in watch.handles:
                handle.remove()
        return watch.found

    def is_left_out(self, name: str) -> bool:
        """Whether a parameter belongs to what a text never reaches."""
        return any(name.startswith(f"{part}.") for part in self.left_out)


def check_version(on_notice: OnNotice | None = None) -> None:
    """A notice when the installed transformers is newer than what this was tested with.

    Raises:
        DataError: it is too old.
    """
    version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    if version < OLDEST:
        raise DataError(
            f"transformers {transformers.__version__} is too old; install transformers>={OLDEST[0]}.{OLDEST[1]}"
        )
    if version > TESTED and on_notice is not None:
        on_notice(
            f"transformers {transformers.__version__} is newer than {TESTED[0]}.{TESTED[1]}, the last that was tested; "
            "should a model fail, that one may do"
        )


def read_config(path: Path) -> Any:
    """A directory's config. Raises DataError for remote code and unknown types, ValueError for nonsense."""
    file = path / "config.json"
    if not file.is_file():
        raise DataError(f"{path} has no config.json: it is neither a checkpoint nor a store")
    try:
        raw, _ = transformers.PreTrainedConfig.get_config_dict(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    _check_layers(raw)
    model_type = raw.get("model_type")
    if model_type in ALIASES:
        return AutoConfig.for_model(ALIASES[model_type], **{k: v for k, v in raw.items() if k != "model_type"})
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
        _check_layers(content)
        return AutoConfig.for_model(content["model_type"], **settings)
    except Exception as error:  # the library raises many kinds for bad values
        raise DataError(f"the model's metadata cannot be used: {' '.join(str(error).split())}") from error


def _check_layers(content: dict[str, Any]) -> None:
    """Raises ValueError for so many layers that the library would be busy for ever."""
    text = content.get("text_config")
    for part in (content, text if isinstance(text, dict) else {}):
        layers = part.get("num_hidden_layers")
        if isinstance(layers, (int, float)) and not 1 <= layers <= _MOST_LAYERS:
            raise ValueError(f"num_hidden_layers is {layers:,}, expected 1 to {_MOST_LAYERS:,}")


def build_skeleton(config: Any, dtype: torch.dtype | None = None) -> Skeleton:
    """The model of a config on the meta device, its experts dropped.

    Raises:
        DataError: no causal language model, or a dense one.
        ValueError, and others of the library's: the config's numbers are nonsense.
    """
    check_version()
    cls, config = _model_class(config)
    dtype = dtype or config.dtype or config.get_text_config().dtype or torch.float32
    config._experts_implementation = "eager"  # is never run: `attach` takes its place
    with contextlib.ExitStack() as stack:
        for context in cls.get_init_context(dtype, False, False, None):
            stack.enter_context(context)
        try:
            model = cls(config)
        except ImportError as error:
            raise DataError(f"model type {config.model_type!r} cannot be built: {error}; install it with pip") from None
    model.eval()
    full_state = dict(model.state_dict())
    plan = model._get_dtype_plan(dtype)
    dtypes = {
        name: next((wanted for part, wanted in plan.items() if part in name), tensor.dtype)
        for name, tensor in full_state.items()
    }
    left_out = _left_out(model)
    sites = list(find_sites(model, left_out))
    if not sites:
        foreign = next(foreign_experts(model), None)
        raise DataError(
            f"model type {config.model_type!r} is dense: it has no routed experts, so there is nothing to offload"
            if foreign is None
            else f"model type {config.model_type!r} keeps its experts in {foreign}, a form that is not supported"
        )
    for layer in (site.layer for site in sites):
        if not 1 <= layer.top_k <= layer.num_experts:
            raise ValueError(f"{layer.top_k} experts per token, but {layer.name} has {layer.num_experts}")
        if min(layer.shape[:2]) < 1 or layer.num_experts > _MOST_EXPERTS:
            raise ValueError(
                f"{layer.num_experts:,} experts of {layer.shape[1]:,} x {layer.shape[0]:,} in {layer.name}"
            )
    return Skeleton(model, config, sites, full_state, dtypes, left_out)


def _model_class(config: Any) -> tuple[Any, Any]:
    """The class that generates text with a config, and the part of the config that it takes."""
    text = config.get_text_config()
    for of in (config, text):
        for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
            if type(of) in mapping:
                found = mapping[type(of)]
                cls: Any = found[0] if isinstance(found, (tuple, list)) else found
                if GenerationMixin not in cls.__mro__:
                    raise DataError(f"model type {of.model_type!r} does not generate text token by token")
                return cls, text if cls.config_class is type(text) else of
    raise DataError(f"model type {config.model_type!r} is not a causal language model")


def _left_out(model: PreTrainedModel) -> list[str]:
    """The parts beside the language model proper, for classes that also take images or sound."""
    base, decoder = model.base_model, model.get_decoder()
    beside = [child for child in base.children() if child is not decoder] if decoder in base.children() else []
    return [
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in LEFT_OUT
        or (any(module is child for child in beside) and next(module.parameters(), None) is not None)
    ]


def largest(config: Any, name: str) -> int:
    """A size in a config, 0 where it has none: the largest, where layers differ."""
    layers = getattr(config, "per_layer_config", None)
    each = [layers[i] for i in range(config.num_hidden_layers)] if layers else [config]
    return max(getattr(one, name, None) or 0 for one in each)


def load_trunk(
    skeleton: Skeleton,
    tensors: Iterator[tuple[str, torch.Tensor]],
    stand_ins: Collection[str] = (),
    device: torch.device = _CPU,
) -> None:
    """Put trunk tensors into the model, one at a time, then give its computed buffers their values.

    Args:
        stand_ins: parameters that `tensors` leaves out because the caller replaces their module; a parameter that is
            tied to one of them is the caller's as well.

    Raises:
        DataError: a tensor is unknown, missing or of the wrong shape. Nothing is ever initialised at random.
    """
    model, missing = skeleton.model, set(skeleton.trunk_names()) - set(stand_ins)
    for name in skeleton.left_out:
        holder = model.get_submodule(name.rpartition(".")[0])
        delattr(holder, name.rpartition(".")[2])
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
        tensor = tensor.to(device, skeleton.dtypes[name])
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            module._parameters[leaf]._is_hf_initialized = True  # type: ignore[union-attr]
        else:
            module._buffers[leaf] = tensor
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        missing.discard(name)
    if missing:
        raise DataError(f"trunk tensor {min(missing)} is missing ({len(missing)} in all); convert the checkpoint again")
    model._move_missing_keys_from_meta_to_device([], {"": device}, None, None)  # type: ignore[arg-type]
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
    """Let every MoE layer call `forward(site, hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k])`."""
    for site in skeleton.sites:
        site.form.install(functools.partial(forward, site))


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
            skeleton.model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=skeleton.model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def measure_kv_bytes(skeleton: Skeleton, context: int, chunk: int, stored: torch.dtype | None = None) -> int:
    """Bytes of the KV cache with `context` tokens in it: a forward on the meta device, before any weight is read."""
    cache = new_kv_cache(skeleton.config, context, chunk, stored)
    tokens = 1
    if not allocates_ahead(cache):
        tokens, cache = context, new_kv_cache(skeleton.config, context, context, stored)
    _fill_on_meta(skeleton, tokens, cache)
    return cache_bytes(cache)


def measure_kv_growth(skeleton: Skeleton, chunk: int, stored: torch.dtype | None = None) -> Callable[[int], int]:
    """`measure_kv_bytes` by context; a single forward for all of them where every layer takes its memory at once."""
    layers = measure_kv_layers(skeleton, chunk, stored)
    if layers is None:
        return functools.cache(lambda context: measure_kv_bytes(skeleton, context, chunk, stored))
    return KvGrowth(layers).at


def measure_kv_layers(
    skeleton: Skeleton, chunk: int, stored: torch.dtype | None = None
) -> list[tuple[int, int]] | None:
    """For each layer of the KV cache, bytes of a token and the most tokens that it keeps; None where some layer takes
    its memory in another way."""
    cache = new_kv_cache(skeleton.config, 1, chunk, stored)
    if allocates_ahead(cache):
        _fill_on_meta(skeleton, 1, cache)  # in which some types add layers of their own
    if not allocates_ahead(cache):
        return None
    most = capacities(new_kv_cache(skeleton.config, sys.maxsize, chunk, stored))
    return list(zip(token_bytes(cache), most, strict=True))


def _fill_on_meta(skeleton: Skeleton, tokens: int, cache: Any) -> None:
    attach(skeleton, _no_experts)
    _meta_forward(skeleton.model.base_model, tokens, cache)


def _meta_forward(module: Any, tokens: int, cache: Any) -> None:
    """Run tokens through a model on the meta device."""
    # Some families look for tokens of a kind, which meta tensors cannot: they find all.
    fx_config: Any = importlib.import_module("torch.fx.experimental._config")
    with torch.inference_mode(), fx_config.patch(meta_nonzero_assume_all_nonzero=True):
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        module(input_ids=ids, past_key_values=cache, use_cache=True)


class _DirectUse(TorchFunctionMode):
    """Finds the weights that are computed with while none of their own modules runs."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._names: dict[int, set[str]] = {}
        self._running: set[str] = set()
        self.handles = []
        for name, module in modules.items():
            self._names.setdefault(id(module.weight), set()).add(name)
            self.handles += [
                module.register_forward_pre_hook(lambda *_, name=name: self._running.add(name)),
                module.register_forward_hook(lambda *_, name=name: self._running.discard(name)),
            ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not asks_for_attribute(func):
            for value in tree_leaves((args, kwargs)):
                names = self._names.get(id(value), set()) if isinstance(value, nn.Parameter) else set()
                if not names & self._running:
                    self.found |= names
        return func(*args, **kwargs)
