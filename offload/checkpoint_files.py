"""Which files make up a checkpoint, by their names and its index: known before torch is, and before they are here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from .errors import DataError

CONFIG = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SMALL_FILES = ("generation_config.json", "chat_template.jinja", "chat_template.json", "added_tokens.json", "vocab.json",
               "merges.txt", "vocab.txt", "tekken.json", "tiktoken.model")  # fmt: skip
SMALL_PATTERNS = ("tokenizer*", "special_tokens_map.json", "spiece.model", "*.tiktoken")
MAX_SMALL_FILE = 200_000_000
PICKLED = ("*.bin", "*.pt", "*.pth")


def is_small_file(name: str) -> bool:
    """Whether a file of that name is for the tokenizer, the chat or the sampling."""
    return "/" not in name and (name in SMALL_FILES or any(fnmatch(name, pattern) for pattern in SMALL_PATTERNS))


def by_pattern(names: Iterable[str]) -> str:
    """Names of tensors with a star for the numbers in which they differ: "model.layers.*.bias (48), lm_head.scale"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        pattern = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        groups.setdefault(pattern, []).append(name)
    return ", ".join(found[0] if len(found) == 1 else f"{pattern} ({len(found)})" for pattern, found in groups.items())


def read_index(path: Path) -> dict[str, str] | None:
    """Tensor name -> shard, from a checkpoint's index; None where there is none.

    Raises:
        DataError: the index is damaged, or names a file that is not of its directory.
    """
    index = path / INDEX_FILE
    if not index.is_file():
        return None
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = set(weight_map.values())
        if not all(isinstance(shard, str) for shard in shards):
            raise TypeError("weight_map must hold file names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{index} is damaged ({error}); download it again") from None
    for shard in sorted(shards):
        if shard in ("", ".", "..") or Path(shard).name != shard or "\\" in shard or not shard.isprintable():
            raise DataError(f"{index} names the file {shard!r}, which is not a file of its directory")
    return weight_map


def weight_files(what: object, weight_map: dict[str, str] | None, names: Iterable[str]) -> list[str]:
    """The files of weights that a checkpoint asks for.

    Args:
        what: it is, in messages.
        weight_map: its index, if it has one.
        names: all its files.

    Raises:
        DataError: it has no weights that can be used, or not all that its index names.
    """
    names = [name for name in names if "/" not in name]
    if weight_map is not None:
        shards = sorted(set(weight_map.values()))
        missing = sorted(set(shards).difference(names))
        if missing:
            raise DataError(
                f"{what}: shard {missing[0]} is missing ({len(missing)} of {len(shards)}); download it again"
            )
        return shards
    found = sorted(name for name in names if fnmatch(name, "*.safetensors"))
    if not found:
        pickled = sorted(name for name in names if any(fnmatch(name, pattern) for pattern in PICKLED))
        if pickled:
            raise DataError(
                f"{what} holds pickled weights ({pickled[0]}), which are never opened because they can run code; "
                "get the safetensors version of this model"
            )
        raise DataError(f"{what} has no *.safetensors files")
    return found
