"""A MoE model in GGUF files as a `Source`: the names of the `gguf` package's own maps, transformers' architectures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

from ..quant.codecs import Weight
from . import hf
from .checkpoint import of_config
from .checkpoint_files import by_pattern
from .errors import DataError
from .gguf_config import model_config
from .gguf_file import GgufFile, Place, expert_matrices, is_kept, keeping_codec, read_gguf
from .gguf_tensor import PLAIN, GgufTensor, unpermute
from .gguf_tokenizer import write_generation_config, write_tokenizer
from .hub import HubModel
from .packing import packable_names
from .source import LARGE, MoeLayer, OnNotice, RowReader, TrunkSize

_BLOCK = re.compile(r"layers\.(\d+)\.")
_SUFFIXES = (".weight", ".bias")
_PERMUTED = {"llama"}
"""Architectures whose q and k rows lie as adjacent rotary pairs."""


class GgufSource:
    """The model of a GGUF file, or of one that was split into parts.

    Args:
        model: it is of, on the hub.
        file: its header, where that has been read.

    Raises:
        DataError: not a GGUF file, damaged, incomplete, dense, or of a family that is not known.
    """

    def __init__(
        self,
        path: Path,
        on_notice: OnNotice | None = None,
        model: HubModel | None = None,
        file: GgufFile | None = None,
    ) -> None:
        self.path, self._file = path, file or read_gguf(path)
        self._on_notice = on_notice or (lambda _: None)
        self.name = path.name if model is None else f"{model.name}/{path.name}"
        self.revision = model and model.commit
        self.config = model_config(self._file)
        tensors = self._file.tensors
        embedding = tensors["token_embd.weight"].kind
        self.dtype = torch.bfloat16 if PLAIN.get(embedding) == torch.bfloat16 else torch.float32
        self.config["dtype"] = str(self.dtype).removeprefix("torch.")
        self.skeleton = of_config(path, hf.build_skeleton, hf.make_config(self.config), self.dtype)
        self.config["architectures"] = [type(self.skeleton.model).__name__]
        self._experts = [self._expert_tensors(site.layer) for site in self.skeleton.sites]
        self.kept_codec = keeping_codec(self._file)
        """The codec that keeps the values of experts that ship with 4 bits."""
        self._trunk = dict(self._trunk_tensors())
        self._say_what_changes()

    def layers(self) -> list[MoeLayer]:
        return [site.layer for site in self.skeleton.sites]

    def expert(self, layer: int, index: int) -> dict[str, Weight]:
        parts: dict[str, Weight] = {}
        for name in self.skeleton.sites[layer].layer.shape.parts():
            parts[name] = GgufTensor(self._experts[layer][name]).expert(index)
        return parts

    def trunk(self) -> Iterator[tuple[str, torch.Tensor | RowReader]]:
        for name, (places, make) in self._trunk.items():
            whole, dtype = GgufTensor(places[0]), self.skeleton.dtypes[name]
            if self._in_pieces(name):
                yield name, RowReader(whole.shape, lambda a, b, t=whole, d=dtype: t.read_rows(a, b).to(d))
                continue
            tensor = make(*(GgufTensor(place).read() for place in places))
            want = tuple(self.skeleton.full_state[name].shape)
            if tuple(tensor.shape) != want:
                raise DataError(
                    f"{self.path}: tensor {places[0].name} has shape {tuple(tensor.shape)}, expected {want}"
                )
            yield name, tensor.to(self.skeleton.dtypes[name])

    def _in_pieces(self, name: str) -> bool:
        """Whether a trunk tensor is read so."""
        places, make = self._trunk[name]
        shape = places[0].shape
        return make is as_it_is and prod(shape) >= LARGE and shape == self.skeleton.full_state[name].shape

    def trunk_sizes(self) -> Iterator[TrunkSize]:
        for name, (places, _) in self._trunk.items():
            whole = 0 if self._in_pieces(name) else sum(GgufTensor(place).nbytes for place in places)
            yield TrunkSize(self.skeleton.full_state[name].numel(), whole)

    def shipped_bytes(self) -> tuple[str, int, str, int]:
        """What most of the experts' bytes are packed as and all of these, and the same of the trunk."""
        of_experts = [place for parts in self._experts for place in parts.values()]
        of_trunk = [place for places, _ in self._trunk.values() for place in places]
        return *_main_kind(of_experts), *_main_kind(of_trunk)

    def packable(self) -> set[str]:
        return of_config(self.path, packable_names, self.skeleton)

    def fingerprint(self) -> list[list[Any]]:
        """Name, size and time of change of every part."""
        return [[part.name, stat.st_size, stat.st_mtime_ns] for part in self._file.parts if (stat := part.stat())]

    def copy_files(self, dest: Path) -> None:
        write_tokenizer(self._file, dest, self._on_notice)
        write_generation_config(self._file, dest)

    def _expert_tensors(self, layer: MoeLayer) -> dict[str, Place]:
        """The tensor of each part of an expert, for all experts of a layer."""
        found, block = {}, _block_of(layer.name)
        for part, size in layer.shape.parts().items():
            kind, _, bias = part.partition("_proj")
            name = f"blk.{block}.ffn_{kind}_exps.{'bias' if bias else 'weight'}"
            found[part] = self._place(name, (layer.num_experts, *size))
        return found

    def _place(self, name: str, shape: tuple[int, ...] | None = None) -> Place:
        place = self._file.tensors.get(name)
        if place is None:
            raise DataError(f"{self.path} has no tensor {name}; is a part missing?")
        if shape is not None and place.shape != shape:
            raise DataError(f"{self.path}: tensor {name} has shape {place.shape}, its metadata say {shape}")
        return place

    def _trunk_tensors(self) -> Iterator[tuple[str, tuple[list[Place], Callable[..., torch.Tensor]]]]:
        """What each trunk parameter is made of, and how."""
        architecture = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == self._file.architecture)
        names = get_tensor_name_map(architecture, self._file.count("block_count"))
        heads = {"q": self.config["num_attention_heads"], "k": self.config["num_key_value_heads"]}
        for name in self.skeleton.trunk_names():
            source = self._source_name(names, name)
            if source is None:
                raise DataError(f"GGUF files of {self._file.architecture} have no tensor for {name} of transformers")
            projection = re.search(r"self_attn\.([qk])_proj\.", name)
            if source not in self._file.tensors and ".attn_kv_b." in source:
                places = [self._place(source.replace("_kv_b", part)) for part in ("_k_b", "_v_b")]
                yield name, (places, join_latent)
            elif projection is not None and self._file.architecture in _PERMUTED:
                count = heads[projection[1]]
                yield name, ([self._place(source)], lambda rows, count=count: unpermute(rows, count))
            elif name.endswith("shared_expert_gate.weight"):
                yield name, ([self._place(source)], lambda row: row.reshape(1, -1))
            else:
                yield name, ([self._place(source)], as_it_is)

    def _source_name(self, names: Any, name: str) -> str | None:
        if name.endswith("e_score_correction_bias"):  # the map has it as the bias of a module
            name = name.removesuffix("_bias") + ".bias"
        source = names.get_name(name, _SUFFIXES)
        if source is not None and not source.endswith(_SUFFIXES):
            source += ".weight"
        return source

    def _say_what_changes(self) -> None:
        used = {place.name for parts in self._experts for place in parts.values()}
        used |= {place.name for places, _ in self._trunk.values() for place in places}
        unused = [name for name in self._file.tensors if name not in used and not self._predicts_further(name)]
        if unused:
            self._on_notice(f"{len(unused)} tensors of the file are not used by the model: {by_pattern(unused)}")
        places = expert_matrices(self._file)
        others = [place for place in places if not is_kept(place, self.kept_codec)]
        if others and self.kept_codec is not None:
            kinds = ", ".join(sorted({place.kind.name for place in others}))
            self._on_notice(
                f"{len(others)} of {len(places)} expert tensors are {kinds}, which no 4-bit record holds: they are "
                f"encoded anew as {self.kept_codec}"
            )

    def _predicts_further(self, name: str) -> bool:
        """Whether a tensor belongs to the layers after the last, for several tokens at once."""
        block = re.match(r"blk\.(\d+)\.", name)
        return block is not None and int(block[1]) >= self.config["num_hidden_layers"]


def _main_kind(places: list[Place]) -> tuple[str, int]:
    held = Counter[str]()
    for place in places:
        held[place.kind.name] += place.nbytes
    return held.most_common(1)[0][0], held.total()


def _block_of(name: str) -> int:
    found = _BLOCK.search(name)
    assert found is not None, name
    return int(found[1])


def as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def join_latent(k_b: torch.Tensor, v_b: torch.Tensor) -> torch.Tensor:
    """DeepSeek's kv_b projection of the two halves that newer files have for attention on the compressed cache.

    Args:
        k_b: [heads, rank, key dims], transposed. v_b: [heads, value dims, rank].

    Returns:
        [heads * (key dims + value dims), rank].
    """
    return torch.cat((k_b.transpose(1, 2), v_b), 1).flatten(0, 1)
