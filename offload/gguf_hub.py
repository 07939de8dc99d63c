"""GGUF files of a repository on the hub: which of them is meant, whether it fits, and its download.

`fetch_gguf` and `fetch_headers` use the network and are to be run apart. Names are those of llama.cpp and ollama:
OWNER/NAME:QUANT, OWNER/NAME/FILE.gguf and, where there is one choice or a Q4_K_M, OWNER/NAME.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

from ..cache.units import format_bytes
from . import hub
from .config import DEFAULT_CODEC, default_trunk
from .errors import DataError
from .gguf_file import PART, header_length, read_gguf
from .hub_name import GGUF
from .source import OnNotice, OnProgress, Progress

DEFAULT_QUANT = "Q4_K_M"
_BLOCK = 4 << 20
"""Bytes of a request for a header, most of which is the vocabulary."""
_QUANT = re.compile(r"(?:^|[-_.])((?:UD-)?(?:I?Q\d|TQ\d)(?:_[0-9A-Z]+)*|MXFP4(?:_[0-9A-Z]+)*|BF16|FP?16|FP?32)$", re.I)
_NO_MODEL = ("mmproj", "imatrix")
"""What else people put into GGUF files: what reads images, and statistics of a quantisation."""


def choose(name: str, files: Mapping[str, int], wanted: str = "") -> list[str]:
    """The files of one model, the first part first.

    Args:
        name: of the repository.
        files: GGUF files and their bytes.
        wanted: a quantisation or a file's name; by default DEFAULT_QUANT, or the only model that there is.

    Raises:
        DataError: there is none, or several; says what there is.
    """
    models: dict[str, list[str]] = {}
    for file in sorted(files):
        stem = file.rpartition("/")[2]
        if not any(part in stem.lower() for part in _NO_MODEL):
            part = PART.fullmatch(file)
            models.setdefault(part[1] if part else file.removesuffix(".gguf"), []).append(file)
    if wanted.lower().endswith(".gguf"):
        found = [parts for parts in models.values() if wanted in parts]
    else:
        quant = (wanted or DEFAULT_QUANT).upper()
        tags = {stem: quant_of(stem) for stem in models}
        found = [parts for stem, parts in models.items() if tags[stem] == quant]
        found = found or [parts for stem, parts in models.items() if tags[stem] == f"UD-{quant}"]
        if not (found or wanted) and len(models) == 1:
            found = list(models.values())
    if len(found) == 1:
        return found[0]
    if not models:
        raise DataError(f"{name} on the hub has no GGUF file of a model")
    if found:
        raise DataError(f"{name} has several {wanted or DEFAULT_QUANT}: name one as {name}/{found[0][0]}")
    there = sorted((sum(files[part] for part in parts), stem) for stem, parts in models.items())
    listed = ", ".join(f"{quant_of(stem)} ({format_bytes(size)})" for size, stem in there)
    smallest = there[0][1]
    one = f"{name}:{quant_of(smallest)}" if _QUANT.search(smallest) else f"{name}/{models[smallest][0]}"
    raise DataError(f"{name} has no {wanted or DEFAULT_QUANT}; it has {listed}: ask for {one}")


def quant_of(stem: str) -> str:
    """The quantisation in a file's name without its ending; the name itself where it has none."""
    name = stem.rpartition("/")[2]
    found = _QUANT.search(name)
    return found[1].upper() if found else name


def find_cached(name: str, revision: str | None, wanted: str) -> hub.HubModel | None:
    """What the hub's cache holds of the model that is meant, if that is all of it. Asks nobody."""
    cached = hub.find_cached_ggufs(name, revision)
    if cached is None:
        return None
    try:  # where it can be asked, the hub may have the usual one
        parts = choose(name, cached.weights, wanted or ("" if hub.is_offline() else DEFAULT_QUANT))
    except DataError:
        return None
    split = PART.fullmatch(parts[0])
    if split is not None and len(parts) != int(split[3]):
        return None
    return replace(cached, weights={part: cached.weights[part] for part in parts})


def _look_up(name: str, revision: str | None, wanted: str) -> tuple[str, dict[str, int]]:
    """The commit, and the chosen files with their bytes."""
    commit, listed = hub.list_files(name, revision)
    parts = choose(name, {file: size for file, size in listed.items() if file.endswith(GGUF)}, wanted)
    return commit, {part: listed[part] for part in parts}


def fetch_headers(
    name: str,
    revision: str | None,
    wanted: str,
    folder: str,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
) -> dict[str, Any]:
    """The headers of the chosen files, read by range and written into `folder` under the files' own names.

    Returns:
        "commit", "path" of the first, and "sizes", the bytes of each whole file.

    Raises:
        DataError: see `choose`; or the hub cannot be asked, or a file is damaged.
    """
    commit, sizes = _look_up(name, revision, wanted)
    read = 0
    for number, part in enumerate(sizes, 1):
        remote = hub.RemoteFile(name, part, commit, sizes[part])
        length = header_length(Path(part), BufferedReader(remote, _BLOCK), sizes[part], read)
        read += length
        Path(folder, Path(part).name).write_bytes(remote.content[:length])
        if on_progress is not None:
            on_progress(Progress("headers", number, len(sizes), "files"))
    return {"commit": commit, "path": str(Path(folder, Path(next(iter(sizes))).name)), "sizes": sizes}


def fetch_gguf(
    name: str,
    revision: str | None,
    wanted: str,
    codec: str | None,
    trunk: str | None,
    dest: str,
    to_run: dict[str, Any] | None,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
) -> dict[str, Any]:
    """Download the files of a model into the hub's cache, once their headers have shown that it fits.

    Args:
        dest: where its store will be.
        codec, trunk, to_run: see `fit.require_fit`.

    Returns:
        A `HubModel` whose weights are the files, as a dict.

    Raises:
        DataError, UsageError, MemoryBudgetError: before the weights are asked for where that can be known.
    """
    from .fit import require_fit
    from .gguf_source import GgufSource

    commit, sizes = _look_up(name, revision, wanted)
    if (cached := find_cached(name, commit, next(iter(sizes)))) is not None:
        return asdict(cached)
    with tempfile.TemporaryDirectory(prefix="pocketmoe-") as folder:
        found = fetch_headers(name, commit, next(iter(sizes)), folder, on_progress, on_notice)
        by_name = {Path(part).name: size for part, size in sizes.items()}
        source = GgufSource(path := Path(found["path"]), file=read_gguf(path, by_name))
        codec = codec or source.kept_codec or DEFAULT_CODEC
        download = (hub.cache_folder(), sum(sizes.values()))
        require_fit(source, codec, trunk or default_trunk(codec), Path(dest), download, to_run)
    hub.fetch(name, commit, sizes, None, on_progress, on_notice)
    hub.note_commit(name, revision, commit)
    return asdict(hub.HubModel(name, commit, str(hub.snapshot_folder(name, commit)), sizes))
