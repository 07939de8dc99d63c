"""Outlines that were found before, in the user's cache folder: to find one takes transformers and seconds, to read one
takes neither. Whoever deletes them loses nothing but that time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs
import xxhash

from ..cache.whole_file import replacing
from .checkpoint_files import CONFIG, is_small_file
from .gguf_file import is_gguf, parts_of
from .manifest import MANIFEST
from .outline import Outline

_MOST = 100
"""Files; the oldest go first."""


class Known(NamedTuple):
    """What is kept of a model."""

    outline: Outline
    program: int
    """What Python, torch, the skeleton and the tokenizer take in RAM."""


class OutlineCache:
    """The place of one outline.

    Args:
        model: a store, a checkpoint directory, a config.json or a GGUF file.
        options: everything else that decides it.
    """

    def __init__(self, model: Path, **options: Any) -> None:
        self._place: Path | None = None
        with suppress(OSError):  # what cannot be read is explained by whoever reads it next
            folder = platformdirs.user_cache_path("pocketmoe") / "plans"
            self._place = folder / f"{_fingerprint(model, options)}.json"

    def read(self) -> Known | None:
        """What is there, if it is whole."""
        if self._place is None:
            return None
        try:
            data = json.loads(self._place.read_text(encoding="utf-8"))
            return Known(Outline.of_json(data["outline"]), int(data["program"]))
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None

    def write(self, known: Known) -> None:
        """Keep it; where nothing can be written nothing is kept."""
        if self._place is None:
            return
        data = {"program": known.program, "outline": asdict(known.outline)}
        with suppress(OSError):
            self._place.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._place) as file:
                file.write(json.dumps(data).encode())
            there = sorted(self._place.parent.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
            for old in there[:-_MOST]:
                old.unlink()


def _fingerprint(model: Path, options: dict[str, Any]) -> str:
    """Of all that an outline depends on: the model's files, the options, the libraries, and this program itself."""
    package = Path(__file__).resolve().parent.parent
    sources = (file for part in ("offload", "quant") for file in sorted((package / part).glob("*.py")))
    files = [_stamp(file) for file in (*_files(model), *sources)]
    text = json.dumps([str(model.resolve()), options, *map(_version, ("torch", "transformers")), files], default=str)
    return xxhash.xxh3_128_hexdigest(text.encode())


def _files(model: Path) -> Iterator[Path]:
    if is_gguf(model):
        yield from parts_of(model)
    elif model.is_file():
        yield model
    else:
        names = (CONFIG, MANIFEST)
        yield from sorted(file for file in model.iterdir() if file.name in names or is_small_file(file.name))


def _stamp(file: Path) -> tuple[str, int, int]:
    stat = file.stat()
    return file.name, stat.st_size, stat.st_mtime_ns


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
