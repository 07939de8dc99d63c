"""A Hugging Face checkpoint directory as a `Source`: safetensors shards, read piece by piece."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..quant.codecs import Weight
from . import hf
from .checkpoint_files import CONFIG, MAX_SMALL_FILE, by_pattern, is_small_file, read_index, weight_files
from .config import kept_codec
from .errors import DataError, PocketMoEError
from .hf_keys import KeyMap
from .hub import HubModel
from .manifest import MANIFEST
from .naming import exists
from .packing import packable_names
from .prequantized import join_quantized
from .source import MoeLayer, OnNotice, RowReader, TrunkSize
from .tensorfile import TensorEntry, read_header
from .tiktoken_file import is_tiktoken, load_tiktoken, require_known

_T = TypeVar("_T")


class CheckpointSource:
    """A local checkpoint of any MoE family that transformers knows.

    Args:
        model: what on the hub it is the snapshot of.

    Raises:
        DataError: not a checkpoint, dense, unknown, pickled, damaged or incomplete.
    """

    def __init__(self, path: Path, on_notice: OnNotice | None = None, model: HubModel | None = None) -> None:
        self.path = path
        self.name = path.resolve().name if model is None else model.name
        self.revision = None if model is None else model.commit
        if not path.is_dir():
            raise DataError(f"{path} is not a directory; give the one of a checkpoint or of a store, or a GGUF file")
        if (path / MANIFEST).is_file():
            raise DataError(f"{path} is a pocketmoe store already; give the checkpoint that it was made from")
        self.config = read_config_json(path)
        if is_tiktoken(path):
            require_known(path)  # before the hours that a conversion may take
        config = of_config(path / CONFIG, hf.read_config, path)
        quantization = take_quantization(path, self.config, config)
        self.kept_codec = kept_codec(quantization)
        """The codec that keeps the values of experts that ship packed."""
        tensors = _joined(path, self._headers())
        self.dtype = _main_dtype(config, tensors)
        entries = join_quantized(path, tensors, quantization, self.dtype) if quantization else tensors
        self.skeleton = of_config(path / CONFIG, hf.build_skeleton, config, self.dtype)
        self._keys = KeyMap(self.skeleton, entries)
        self._files = sorted({entry.path for entry in tensors.values()})
        if self._keys.unknown and on_notice is not None:
            unknown = self._keys.unknown
            on_notice(f"{len(unknown)} tensors of the checkpoint are not used by the model: {by_pattern(unknown)}")
        if self.skeleton.left_out and on_notice is not None:
            on_notice(f"this model will read text only; it goes without {', '.join(self.skeleton.left_out[:5])}")

    def _headers(self) -> dict[str, dict[str, TensorEntry]]:
        """Per file of weights, its tensors by name."""
        files, index = list(self.path.iterdir()), read_index(self.path)
        lost = [file for file in files if index is None and file.suffix == ".safetensors" and not exists(file)]
        if lost:
            raise DataError(f"{lost[0]} is a link to {lost[0].readlink()}, which is not there; download it again")
        names = (file.name for file in files if exists(file))
        shards = [self.path / name for name in weight_files(self.path, index, names)]
        for shard in shards:
            _check_link(self.path, shard)
        return {shard.name: read_header(shard) for shard in shards}

    def layers(self) -> list[MoeLayer]:
        return [site.layer for site in self.skeleton.sites]

    def expert(self, layer: int, index: int) -> dict[str, Weight]:
        return self._keys.expert(layer, index)

    def trunk(self) -> Iterator[tuple[str, torch.Tensor | RowReader]]:
        return self._keys.trunk()

    def trunk_sizes(self) -> Iterator[TrunkSize]:
        return self._keys.trunk_sizes()

    def packable(self) -> set[str]:
        return of_config(self.path / CONFIG, packable_names, self.skeleton)

    def fingerprint(self) -> list[list[Any]]:
        """Name, size and time of change of the config and every shard: whether a half-done conversion was of them.
        A revision says it all."""
        files = [] if self.revision else [self.path / CONFIG, *self._files]
        return [[file.name, stat.st_size, stat.st_mtime_ns] for file in files if (stat := file.stat())]

    def copy_files(self, dest: Path) -> None:
        for file in sorted(file for file in self.path.iterdir() if is_small_file(file.name)):
            if file.is_file() and file.stat().st_size <= MAX_SMALL_FILE:
                _check_link(self.path, file)
                shutil.copyfile(file, dest / file.name)
        if is_tiktoken(dest):
            load_tiktoken(dest).save_pretrained(dest)  # as tokenizer.json, which takes no seconds to read


def read_config_json(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if exists(file) and not file.is_file():  # opening a pipe would wait for ever
        raise DataError(f"{file} is not a regular file")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} has no config.json: it is not a checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is damaged ({error}); download it again") from None
    if not isinstance(content, dict):
        raise DataError(f"{file} is not the config of a model; download it again")
    return content


def of_config(file: Path, function: Callable[..., _T], *args: Any) -> _T:
    """`function(*args)`, where any error is the fault of that file: the library raises many kinds for bad values."""
    try:
        return function(*args)
    except PocketMoEError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{file} cannot be used: {reason}") from error


def take_quantization(path: Path, content: dict[str, Any], config: Any) -> dict[str, Any] | None:
    """What config.json says of packed weights, taken out: a store says itself how its records are packed.

    Raises:
        DataError: they are those of bitsandbytes.
    """
    found = content.pop("quantization_config", None)
    if found is None:
        return None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    quantization = found if isinstance(found, dict) else {"quant_method": str(found)}
    eight_bits = quantization.get("load_in_8bit")
    if quantization.get("quant_method") == "bitsandbytes" or quantization.get("load_in_4bit") or eight_bits:
        kind = "8 bits" if eight_bits else str(quantization.get("bnb_4bit_quant_type", "fp4")).upper()
        raise DataError(
            f"{path} is quantised by bitsandbytes ({kind}), whose values none of the formats for experts can "
            "hold, and quantising it again would lose twice: take the model that it was made from, or a GPTQ, AWQ or "
            "GGUF version of 4 bits, whose values are kept"
        )
    return quantization


def _joined(path: Path, shards: dict[str, dict[str, TensorEntry]]) -> dict[str, TensorEntry]:
    """Every tensor of the checkpoint's shards, from those that the index names where there is one."""
    weight_map = read_index(path)
    entries: dict[str, TensorEntry] = {}
    for shard, tensors in shards.items():
        for name, entry in tensors.items():
            if weight_map is not None and weight_map.get(name) != shard:
                continue
            if name in entries:
                raise DataError(f"{path}: tensor {name} is in both {entries[name].path.name} and {shard}")
            entries[name] = entry
    lost = [name for name in weight_map or () if name not in entries]
    if lost:
        raise DataError(
            f"{path}: tensor {lost[0]} is not in {(weight_map or {})[lost[0]]} as the index says; download it again"
        )
    return entries


def _check_link(path: Path, file: Path) -> None:
    target = file.resolve()
    blobs = path.resolve().parent.parent / "blobs"
    if target.parent != path.resolve() and target.parent != blobs and target.exists():
        raise DataError(f"{file} is a link to {target}, outside of the checkpoint")


def _main_dtype(config: Any, entries: dict[str, TensorEntry]) -> torch.dtype:
    """The dtype to run in: what the config says, else that of most of the bytes."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    sizes: dict[str, int] = {}
    for entry in entries.values():
        if entry.dtype in ("F32", "F16", "BF16"):  # others are packed weights
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    common = max(sizes, key=lambda name: sizes[name], default="F32")
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(common, torch.float32)
