"""A model without its weights: what it will ask of memory, found from its config alone.

A store says how it is laid out; for a checkpoint, or a config.json alone, the manifest of the store that a conversion
would write is made up instead, so that both are planned for in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import hf
from .checkpoint import of_config, read_config_json, take_quantization
from .config import OffloadConfig, kept_codec
from .errors import DataError, UsageError
from .gguf_file import is_gguf
from .gguf_source import GgufSource
from .kv_cache import allocates_ahead, new_kv_cache
from .manifest import Manifest, is_store
from .memory import Needs
from .packing import packable_names
from .sizes import Format, chosen_formats, format_of, planned_manifest, shipped_format, usual_formats
from .trunk import trunk_bytes
from .workspace import Workspace, foresee

_SHORT = 1024
"""Tokens of context for which a forward on the meta device is quick, whatever the family does."""


@dataclass(frozen=True)
class Outline:
    """`read_outline` makes it."""

    name: str
    manifest: Manifest
    """Of the store, or of the one that a conversion would write."""
    skeleton: hf.Skeleton = field(repr=False)
    parameters: int
    formats: list[Format]
    """As it ships and what it can become, the largest first."""
    chosen: Format
    """The manifest's."""
    workspace: Workspace
    packs: bool
    """The trunk stays packed."""
    is_store: bool
    chunk: int
    kv_bytes: Callable[[int], int] = field(repr=False)
    """Bytes of the KV cache by tokens of context."""
    of_gpu: Callable[[], Outline] = field(repr=False)
    of_trunk: Callable[[str], Outline] = field(repr=False)
    """The same model, yet to be converted, with its trunk in another format."""

    @cached_property
    def on_gpu(self) -> Outline:
        """The same model where a GPU holds the trunk."""
        return self.of_gpu()

    @property
    def model_type(self) -> str:
        return self.skeleton.config.model_type

    @property
    def longest(self) -> int:
        """Tokens that the model was made for."""
        return getattr(self.skeleton.config.get_text_config(), "max_position_embeddings", None) or 4096

    @property
    def decoder_layers(self) -> int:
        """Dense ones included."""
        return getattr(self.skeleton.config.get_text_config(), "num_hidden_layers", 0) or len(self.manifest.layers)

    @property
    def cycle(self) -> int:
        """Experts that one token chooses in all layers together."""
        return sum(layer.top_k for layer in self.manifest.layers)

    @cached_property
    def trunk(self) -> int:
        """Bytes of the trunk in memory."""
        return trunk_bytes(self.manifest, self.skeleton, self.packs)

    @cached_property
    def trunk_read(self) -> int:
        """Bytes of the trunk that a token reads: all but an embedding that is no head as well."""
        model: Any = self.skeleton.model
        table = model.get_input_embeddings()
        name = next(f"{name}.weight" for name, module in model.named_modules() if module is table)
        if name in model.all_tied_weights_keys.values():
            return self.trunk
        entry = self.manifest.trunk_packed.get(name)
        if entry is not None and self.packs:
            return self.trunk - entry.nbytes
        return self.trunk - self.skeleton.full_state[name].numel() * self.skeleton.dtypes[name].itemsize

    def needs(self, context: int, program: int) -> Needs:
        """What `Model` will ask of memory, `program` bytes being resident already."""
        return Needs(
            program=program,
            trunk=self.trunk,
            kv=self.kv_bytes(context),
            workspace=self.workspace.bytes(min(self.chunk, context), context),
            step=self.workspace.bytes(1, context),
            record=self.manifest.record_bytes,
            experts=self.manifest.num_experts,
            floor=self.cycle,
            context=context,
        )


def read_outline(
    path: Path,
    codec: str | None = None,
    trunk: str | None = None,
    *,
    native: bool = True,
    gpu_kernels: bool = True,
    options: OffloadConfig | None = None,
    name: str | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Outline:
    """The outline of a store, a checkpoint directory, a config.json or a GGUF file.

    Args:
        codec: record format of a conversion; by default what `load` chooses.
        trunk: format of the large trunk matrices, likewise.
        native: compiled kernels compute on the CPU; without them nothing in the trunk is kept packed.
        gpu_kernels: the same of a GPU.
        name: what to call the model; by default what its directory is called.
        sizes: see `read_gguf`, for a GGUF file of which the header alone is here.

    Raises:
        UsageError: an unknown codec or trunk format, or one for a store, which has its own.
        DataError: no config, or not that of a Mixture-of-Experts model that transformers knows.
    """
    options = options or OffloadConfig()
    if not path.exists():
        raise DataError(f"{path} does not exist; give a checkpoint directory, a store, a config.json or a GGUF file")
    shapes = _of_gguf(path, sizes) if is_gguf(path) else _of_checkpoint(path)
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
    def form(packed: bool, on_gpu: bool) -> tuple[hf.Skeleton, Workspace, Callable[[int], int]]:
        in_float = packed and not on_gpu and dtype != torch.float32
        skeleton = shapes.build(torch.float32) if in_float else plain
        workspace, kv_dtype = foresee(skeleton, has_kernels(on_gpu), packed, options.kv, not on_gpu)
        return skeleton, workspace, _kv_growth(skeleton, options.prefill_chunk, kv_dtype)

    def made(manifest: Manifest, on_gpu: bool) -> Outline:
        packs = has_kernels(on_gpu)
        skeleton, workspace, kv_bytes = form(packs and bool(manifest.trunk_packed), on_gpu)
        dropped = plain.model.all_tied_weights_keys
        return Outline(
            name=name,
            manifest=manifest,
            skeleton=skeleton,
            parameters=sum(t.numel() for name, t in plain.full_state.items() if name not in dropped),
            formats=formats,
            chosen=format_of(manifest, dtype),
            workspace=workspace,
            packs=packs,
            is_store=store,
            chunk=options.prefill_chunk,
            kv_bytes=kv_bytes,
            of_gpu=lambda: made(manifest, True),
            of_trunk=lambda trunk: made(planned(trunk), False),
        )

    return made(manifest, False)


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


def _of_checkpoint(path: Path) -> _Shapes:
    """Those of a store, a checkpoint directory or a config.json."""
    directory = path if path.is_dir() else path.parent
    if path.is_file() and path.name != "config.json":
        raise UsageError(
            f"{path} is no config.json; give a checkpoint directory, a store, a GGUF file, or a file of that name"
        )
    content, config = read_config_json(directory), of_config(directory, hf.read_config, directory)
    quantization = take_quantization(directory, content, config)
    said = config.dtype or config.get_text_config().dtype
    dtype = said if isinstance(said, torch.dtype) else torch.bfloat16

    def build(dtype: torch.dtype) -> hf.Skeleton:
        return of_config(directory, hf.build_skeleton, config, dtype)

    plain = build(dtype)
    packable = packable_names(plain)  # takes forwards on the meta device, as does the KV cache: seconds in all
    shipped = shipped_format(plain, packable, dtype, quantization)
    return _Shapes(directory.resolve().name, plain, dtype, packable, kept_codec(quantization), shipped, build)


def _of_gguf(path: Path, sizes: Mapping[str, int] | None) -> _Shapes:
    source = GgufSource(path, sizes=sizes)
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
    )


def _kv_growth(skeleton: hf.Skeleton, chunk: int, stored: torch.dtype | None) -> Callable[[int], int]:
    """Bytes of the KV cache by tokens of context: where long ones take long to measure, the line through two short
    ones. Where layers look back at thousands of tokens and no further, that is more than they take in the end."""
    measured = hf.measure_kv_growth(skeleton, chunk, stored)
    if allocates_ahead(new_kv_cache(skeleton.config, 1, chunk, stored)):
        return measured

    def at(context: int) -> int:
        if context < 2 * _SHORT:
            return measured(context)
        low, high = measured(_SHORT), measured(2 * _SHORT)
        return high + (high - low) * (context - 2 * _SHORT) // _SHORT

    return at
