"""`load`: from what a user names to a model, converting it on first use.

Nothing here imports torch before the store is there: a conversion runs in a process of its own, and until it is over
this one stays small.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
import xxhash

from .apart import run_apart
from .config import DEFAULT_CODEC, MXFP4, OffloadConfig, default_trunk, kept_codec
from .errors import DataError
from .gguf_file import is_gguf, keeping_codec, read_gguf
from .manifest import is_store, read_identity
from .memory import left_for_child
from .source import OnNotice, OnProgress

if TYPE_CHECKING:
    from .checkpoint import CheckpointSource
    from .gguf_source import GgufSource
    from .model import Model

_KEPT = " (the values that the experts ship with)"


def load(
    path: str | Path,
    *,
    codec: str | None = None,
    trunk: str | None = None,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
    **options: Any,
) -> Model:
    """Load a model whose experts may be larger than memory.

    Args:
        path: a store, a checkpoint directory or GGUF file (converted into the user's cache folder on first use), or the
            id of a repository in the local Hugging Face cache.
        codec: record format for a conversion; by default what keeps the values of experts that ship packed,
            "mxfp4" or an INT4, else "int4-g32".
        trunk: format of the large trunk matrices for a conversion, "int8-g32" by default; "keep" leaves them.
        on_progress: called with `Progress` during long steps.
        on_notice: called with a sentence whenever something is chosen or falls back.
        options: fields of `OffloadConfig`, such as `ram="4GB"`, `context=8192`.

    Raises:
        UsageError, DataError, MemoryBudgetError: each with one sentence for the user.
    """
    config = OffloadConfig.of(**options)
    notice = on_notice or (lambda _: None)
    store = find_store(path, codec, on_progress, notice, trunk, config.ram)
    from .model import Model

    return Model(store, config, on_progress, notice)


def find_store(
    path: str | Path,
    codec: str | None = None,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
    trunk: str | None = None,
    ram: int | None = None,
) -> Path:
    """The store for a path or cached hub id; converts a checkpoint first, in another process, if it has none yet.

    Args:
        ram: bytes that this process and the conversion's may take together.
    """
    local = Path(path).expanduser()
    if not local.exists():
        local = _hub_snapshot(str(path))
    if is_store(local):
        return local
    kept = _kept_codec(local)
    codec = codec or kept or DEFAULT_CODEC
    trunk = trunk or default_trunk(codec)
    resolved = local.resolve()
    name = "--".join(resolved.parts[-3:] if resolved.parent.name == "snapshots" else resolved.parts[-1:])
    digest = xxhash.xxh3_64_hexdigest(str(resolved).encode())[:8]  # tells directories of the same name apart
    dest = platformdirs.user_cache_path("pocketmoe") / "stores" / f"{name}-{digest}-{codec}-trunk-{trunk}"
    notice = on_notice or (lambda _: None)
    if is_store(dest):
        obstacle = _out_of_date(dest, local)
        if obstacle is None:
            return dest
        notice(f"{obstacle}; converting {local} again")
        shutil.rmtree(dest)
    notice(f"converting {local} to {codec}{_KEPT if codec == kept else ''} in {dest}, once")
    request = {"path": str(local), "dest": str(dest), "codec": codec, "trunk": trunk, "ram": left_for_child(ram)}
    return Path(run_apart(f"{__name__}:convert_checkpoint", request, on_progress, on_notice))


def convert_checkpoint(
    path: str | Path,
    dest: str | Path,
    codec: str | None = None,
    trunk: str | None = None,
    ram: int | None = None,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
) -> Path:
    """`convert` of a checkpoint directory or GGUF file, in this process; the default codec is that of `load`."""
    from .convert import convert

    notice = on_notice or (lambda _: None)
    source = _open_source(Path(path), on_notice)
    if codec is None and source.kept_codec is not None:
        notice(f"converting to {source.kept_codec}{_KEPT}")
    codec = codec or source.kept_codec or DEFAULT_CODEC
    exact = (source.kept_codec, "f32", "bf16" if source.kept_codec == MXFP4 else None)
    if source.kept_codec is not None and codec not in exact:
        notice(f"{codec} changes the values that the experts ship with; {source.kept_codec} keeps them")
    return convert(source, Path(dest), codec, on_progress, on_notice, trunk, ram)


def _open_source(path: Path, on_notice: OnNotice | None) -> CheckpointSource | GgufSource:
    if is_gguf(path):
        from .gguf_source import GgufSource

        return GgufSource(path, on_notice)
    from .checkpoint import CheckpointSource

    files = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
    if files:
        raise DataError(f"{path} holds GGUF files; name one of them, such as {files[0]}")
    return CheckpointSource(path, on_notice)


def _kept_codec(checkpoint: Path) -> str | None:
    """`kept_codec` of a checkpoint; what is wrong with its config is said elsewhere."""
    if is_gguf(checkpoint):
        return keeping_codec(read_gguf(checkpoint))
    try:
        return kept_codec(json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["quantization_config"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _out_of_date(store: Path, checkpoint: Path) -> str | None:
    """Why a store in the cache cannot stand for its checkpoint any more; None when it can."""
    try:
        identity = read_identity(store)
    except DataError as error:
        return str(error).partition(";")[0]
    directory = checkpoint.parent if is_gguf(checkpoint) else checkpoint
    for name, size, mtime in identity.get("files", []):
        try:
            stat = (directory / name).stat()
        except OSError:
            continue  # the store outlives its source
        if (stat.st_size, stat.st_mtime_ns) != (size, mtime):
            return f"{directory / name} has changed since it was converted"
    return None


def _hub_snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise DataError(f"{name} is neither a directory nor a model in the local Hugging Face cache") from None
