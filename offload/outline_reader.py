"""Finding a model's outline from its config alone.

A store says how it is laid out; for a checkpoint, or a config.json alone, the manifest of the store that a conversion
would write is made up instead, so that both are planned for in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import hf
from .checkpoint import of_config, read_config_json, take_quantization
from .checkpoint_files import CONFIG
from .config import DEFAULT_TRUNK, OffloadConfig, kept_codec
from .errors import DataError, UsageError
from .foresight import foresee
from .gguf_file import GgufFile, is_gguf
from .gguf_source import GgufSource
from .manifest import Manifest, is_store
from .memory import KvGrowth
from .outline import Format, LayerSize, Outline, Side
from .packing import packable_names
from .sizes import chosen_formats, format_of, planned_manifest, shipped_format, usual_formats
from .trunk import largest_tensor, trunk_bytes
from .workspace import Workspace

_SHORT = (256, 1024, 2048)
"""Tokens of context for which a forward on the meta device is quick, whatever the family does."""
_SMALLER_TRUNK = DEFAULT_TRUNK.replace("int8", "int4")


def read_outline(
    path: Path,
    codec: str | None = None,
    trunk: str | None = None,
    *,
    native: bool = True,
    gpu_kernels: bool = True,
    options: OffloadConfig | None = None,
    name: str | None = None,
    gguf: GgufFile | None = None,
) -> Outline:
    """The outline of a store, a checkpoint directory, a config.json or a GGUF file.

    Args:
        codec: record format of a conversion; by default what `load` chooses.
        trunk: format of the large trunk matrices, likewise.
        native: compiled kernels compute on the CPU; without them nothing in the trunk is kept packed.
        gpu_kernels: the same of a GPU.
        name: what to call the model; by default what its directory is called.
        gguf: the header of a GGUF file, where it has been read.

    Raises:
        UsageError: an unknown codec or trunk format, or one for a store, which has its own.
        DataError: no config, or not that of a Mixture-of-Experts model that transformers knows.
    """
    options = options or OffloadConfig()
    if not path.exists():
        raise DataError(f"{path} does not exist; give a checkpoint directory, a store, a config.json or a GGUF file")
    shapes = _of_gguf(path, gguf) if is_gguf(path) else _of_checkpoint(path)
    plain, dtype, packable = shapes.skeleton, shapes.dtype, shapes.packable
    name = name or shapes.name

    def planned(trunk: str | None) -> Manifest:
        try:
            return planned_manifest(plain, packable, name, *chosen_formats(shapes.kept_codec, codec, trunk))
        except ValueError as error:
            raise UsageError(str(error)) from None

    store = path.is_dir() and is_store(path)
    if store and (codec or trunk):
        raise UsageError(f"{path} is a store already; codec and trunk are for what is yet to be converted")
    manifest = Manifest.read(path) if store else planned(trunk)
    formats = (
        [shipped_format(plain, packable, dtype, None), format_of(manifest, dtype)]
        if store
        else usual_formats(plain, packable, dtype, shapes.kept_codec, shapes.shipped, format_of(manifest, dtype))
    )

    def has_kernels(on_gpu: bool) -> bool:
        return gpu_kernels if on_gpu else native

    @cache
    def form(packed: bool, on_gpu: bool) -> tuple[hf.Skeleton, Workspace, KvGrowth]:
        in_float = packed and not on_gpu and dtype != torch.float32
        skeleton = shapes.build(torch.float32) if in_float else plain
        workspace, kv_dtype = foresee(skeleton, has_kernels(on_gpu), packed, options.kv, not on_gpu)
        return skeleton, workspace, shapes.guard(_kv_growth, skeleton, options.prefill_chunk, kv_dtype)

    def side(manifest: Manifest, on_gpu: bool) -> Side:
        packs = has_kernels(on_gpu)
        skeleton, workspace, kv = form(packs and bool(manifest.trunk_packed), on_gpu)
        in_memory = trunk_bytes(manifest, skeleton, packs)
        return Side(in_memory, in_memory - _never_read(manifest, skeleton, packs), workspace, kv)

    def made(manifest: Manifest) -> Outline:
        config, dropped = plain.config.get_text_config(), plain.model.all_tied_weights_keys
        return Outline(
            name=name,
            model_type=plain.config.model_type,
            parameters=sum(t.numel() for name, t in plain.full_state.items() if name not in dropped),
            longest=getattr(config, "max_position_embeddings", None) or 4096,
            decoder_layers=getattr(config, "num_hidden_layers", 0) or len(manifest.layers),
            layers=[LayerSize(layer.num_experts, layer.top_k) for layer in manifest.layers],
            codec=manifest.codec,
            record_bytes=manifest.record_bytes,
            formats=formats,
            chosen=format_of(manifest, dtype),
            largest_tensor=largest_tensor(manifest, plain),
            chunk=options.prefill_chunk,
            cpu=side(manifest, False),
            gpu=side(manifest, True),
        )

    outline = made(manifest)
    if store or outline.chosen.trunk_as != DEFAULT_TRUNK:
        return outline
    return replace(outline, smaller=made(planned(_SMALLER_TRUNK)))


class _Shapes(NamedTuple):
    """What is read of a model before it is planned for."""

    name: str
    skeleton: hf.Skeleton
    dtype: torch.dtype
    """Of the trunk where it is not packed."""
    packable: set[str]
    kept_codec: str | None
    """What keeps the values of experts that ship packed."""
    shipped: Format
    build: Callable[[torch.dtype], hf.Skeleton]
    """The skeleton in another dtype."""
    guard: Callable[..., Any]
    """Calls a function with arguments, and lays its errors to the config."""


def _of_checkpoint(path: Path) -> _Shapes:
    """Those of a store, a checkpoint directory or a config.json."""
    directory = path if path.is_dir() else path.parent
    if path.is_file() and path.name != CONFIG:
        raise UsageError(
            f"{path} is no config.json; give a checkpoint directory, a store, a GGUF file, or a file of that name"
        )
    content, config = read_config_json(directory), of_config(directory / CONFIG, hf.read_config, directory)
    quantization = take_quantization(directory, content, config)
    said = config.dtype or config.get_text_config().dtype
    dtype = said if isinstance(said, torch.dtype) else torch.bfloat16

    guard = partial(of_config, directory / CONFIG)
    build = partial(guard, hf.build_skeleton, config)
    plain = build(dtype)
    packable = guard(packable_names, plain)  # takes forwards on the meta device, as does the KV cache: seconds in all
    shipped = shipped_format(plain, packable, dtype, quantization)
    return _Shapes(directory.resolve().name, plain, dtype, packable, kept_codec(quantization), shipped, build, guard)


def _of_gguf(path: Path, file: GgufFile | None) -> _Shapes:
    source = GgufSource(path, file=file)
    experts_as, experts, trunk_as, trunk = source.shipped_bytes()
    layers = source.layers()
    record = experts // sum(layer.num_experts for layer in layers)
    return _Shapes(
        source.name,
        source.skeleton,
        source.dtype,
        source.packable(),
        source.kept_codec,
        Format(experts_as, trunk_as, record, experts, trunk, ships=True),
        lambda dtype: hf.build_skeleton(hf.make_config(source.config), dtype),
        partial(of_config, path),
    )


def _never_read(manifest: Manifest, skeleton: hf.Skeleton, packs: bool) -> int:
    """Bytes of an embedding that is no head as well: a token reads one row of it."""
    model: Any = skeleton.model
    table = model.get_input_embeddings()
    name = next(f"{name}.weight" for name, module in model.named_modules() if module is table)
    if name in model.all_tied_weights_keys.values():
        return 0
    entry = manifest.trunk_packed.get(name)
    if entry is not None and packs:
        return entry.nbytes
    return skeleton.full_state[name].numel() * skeleton.dtypes[name].itemsize


def _kv_growth(skeleton: hf.Skeleton, chunk: int, stored: torch.dtype | None) -> KvGrowth:
    layers = hf.measure_kv_layers(skeleton, chunk, stored)
    if layers is not None:
        return KvGrowth(layers)
    return KvGrowth((), [(tokens, hf.measure_kv_bytes(skeleton, tokens, chunk, stored)) for tokens in _SHORT])
