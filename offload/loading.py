"""`load`: from what a user names to a model, converting it on first use.

Nothing here imports torch before the store is there: a conversion runs in a process of its own, and until it is over
this one stays small.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
import xxhash

from . import gguf_hub, hub
from .apart import run_apart
from .config import DEFAULT_CODEC, MXFP4, OffloadConfig, default_trunk, kept_codec
from .errors import DataError, UsageError
from .gguf_file import is_gguf, keeping_codec, read_gguf
from .hub import HubModel
from .manifest import is_store, read_identity
from .memory import left_for_child
from .naming import locate
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
    revision: str | None = None,
    keep_source: bool = True,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
    **options: Any,
) -> Model:
    """Load a model whose experts may be larger than memory.

    Args:
        path: a store, a checkpoint directory or GGUF file (converted into the user's cache folder on first use), or,
            where there is no such path, a model on the Hugging Face Hub as "ORGANISATION/NAME" (downloaded as well);
            of GGUF files there, one as "ORGANISATION/NAME:Q4_K_M" or "ORGANISATION/NAME/FILE.gguf".
        codec: record format for a conversion; by default what keeps the values of experts that ship packed,
            "mxfp4" or an INT4, else "int4-g32-zp".
        trunk: format of the large trunk matrices for a conversion, "int8-g32" by default; "keep" leaves them.
        revision: branch, tag or commit of a model on the hub. By default what is here of it is used as it is, and the
            main branch where nothing is.
        keep_source: leave a model's files in the hub's cache; if not, each is removed as soon as it is converted.
        on_progress: called with `Progress` during long steps.
        on_notice: called with a sentence whenever something is chosen or falls back.
        options: fields of `OffloadConfig`, such as `ram="4GB"`, `context=8192`.

    Raises:
        UsageError, DataError, MemoryBudgetError: each with one sentence for the user.
    """
    config = OffloadConfig.of(**options)
    notice = on_notice or (lambda _: None)
    if config.device not in ("auto", "cpu"):  # a wrong name is said before anything is converted
        from .device import require_device

        require_device(config.device)
    store = find_store(path, codec, on_progress, notice, trunk, config.ram, revision, keep_source, config.device)
    from .model import Model

    return Model(store, config, on_progress, notice)


def find_store(
    path: str | Path,
    codec: str | None = None,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
    trunk: str | None = None,
    ram: int | None = None,
    revision: str | None = None,
    keep_source: bool = True,
    device: str = "cpu",
) -> Path:
    """The store for what `load` is given; downloads and converts first, in other processes, if there is none yet.

    Args:
        ram: bytes that this process and the conversion's may take together, and the model when it runs.
        device: what it runs on. A GPU holds the trunk, so that RAM need not.
    """

    def is_enough(model: HubModel) -> bool:
        folder = Path(model.folder)
        dest = _place(folder, model, codec, trunk)
        return model.is_complete or (is_store(dest) and _out_of_date(dest, folder) is None)

    notice = on_notice or (lambda _: None)
    to_run = {"ram": ram, "device": device}
    for_gguf = {"codec": codec, "trunk": trunk, "dest": str(_stores()), "to_run": to_run, "keep_source": keep_source}
    local, model = _resolve(path, revision, is_enough, for_gguf, on_progress, on_notice)
    if is_store(local):
        if codec or trunk:
            notice(f"codec and trunk are chosen at the conversion and have no effect here: {local} is a store.")
        return local
    if model is None and not is_gguf(local) and not (local / "config.json").exists():
        _open_source(local, None)  # says what is wrong with it
    dest = _place(local, model, codec, trunk)
    if is_store(dest):
        obstacle = _out_of_date(dest, local)
        if obstacle is None:
            return dest
        notice(f"{obstacle}; converting {local} again")
        shutil.rmtree(dest)
    codec, trunk = _formats(local, codec, trunk)
    what = local if model is None else f"{model.name} ({model.commit[:12]})"
    notice(f"converting {what} to {codec}{_KEPT if codec == _kept_codec(local) else ''} in {dest}, once")
    request = {"path": str(local), "dest": str(dest), "codec": codec, "trunk": trunk, "ram": left_for_child(ram)}
    if model is not None:
        request |= {"model": asdict(model), "keep_source": keep_source, "to_run": to_run}
    watch = on_progress, on_notice
    return Path(run_apart(f"{__name__}:convert_checkpoint", request, *watch, "the conversion", resumes=True))


def convert_model(
    path: str | Path,
    dest: str | Path,
    codec: str | None = None,
    trunk: str | None = None,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
    revision: str | None = None,
    keep_source: bool = True,
) -> Path:
    """`convert` of a checkpoint directory or of a model on the hub, with the arguments of `load`."""
    for_gguf = {"codec": codec, "trunk": trunk, "dest": str(dest), "to_run": None, "keep_source": keep_source}
    local, model = _resolve(path, revision, lambda found: found.is_complete, for_gguf, on_progress, on_notice)
    given = {} if model is None else {"model": asdict(model), "keep_source": keep_source}
    return convert_checkpoint(local, dest, codec, trunk, None, on_progress, on_notice, **given)


def convert_checkpoint(
    path: str | Path,
    dest: str | Path,
    codec: str | None = None,
    trunk: str | None = None,
    ram: int | None = None,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
    model: dict[str, Any] | None = None,
    keep_source: bool = True,
    to_run: dict[str, Any] | None = None,
) -> Path:
    """`convert` of a checkpoint directory or GGUF file, in this process; the default codec is that of `load`.

    Args:
        model: the `HubModel` that the directory is the snapshot of; what is missing in it is downloaded.
        to_run: {"ram": bytes or None, "device": name} that the model must fit into for a download to make sense.
    """
    from .convert import convert, is_free

    notice, dest = on_notice or (lambda _: None), Path(dest)
    on_hub, remote = None if model is None else HubModel(**model), None
    if on_hub is not None and not on_hub.is_complete:
        from .hub_source import HubSource

        remote = HubSource(on_hub, dest.with_name(f".{dest.name}.shards"), on_progress, on_notice)
    source = remote or _open_source(Path(path), on_notice, on_hub)
    if codec is None and source.kept_codec is not None:
        notice(f"converting to {source.kept_codec}{_KEPT}")
    codec = codec or source.kept_codec or DEFAULT_CODEC
    exact = (source.kept_codec, "f32", "bf16" if source.kept_codec == MXFP4 else None)
    if source.kept_codec is not None and codec not in exact:
        notice(f"{codec} changes the values that the experts ship with; {source.kept_codec} keeps them")
    if remote is not None and is_free(dest):
        from .fit import require_fit

        remedy = ", or keep only the store with --no-keep-source" if keep_source else ""
        download = remote.room(dest, keep_source)
        require_fit(remote, codec, trunk or default_trunk(codec), dest, download, to_run, remedy)
        if keep_source:
            remote.download()
            source = _open_source(Path(path), None, on_hub)
        else:
            notice(remote.plan())
    store = convert(source, dest, codec, on_progress, on_notice, trunk, ram)
    if remote is not None:
        remote.discard()
    return store


def _resolve(
    path: str | Path,
    revision: str | None,
    is_enough: Callable[[HubModel], bool],
    for_gguf: dict[str, Any],
    on_progress: OnProgress | None,
    on_notice: OnNotice | None,
) -> tuple[Path, HubModel | None]:
    """A local path as it is; else a model on the hub and its snapshot, or its GGUF file, which is downloaded.

    The hub is asked unless what its cache has of the model is enough. A branch or tag that is named is always looked up
    where that is allowed: it may have moved.
    """
    local, named = locate(str(path), revision)
    if named is None:
        return local, None
    name, wanted = named
    model = None
    if hub.is_settled(revision):
        model = None if wanted else hub.find_cached(name, revision)
        if model is None and (gguf := gguf_hub.find_cached(name, revision, wanted)) is not None:
            return gguf.first_file, gguf
    if not wanted and (model is None or not is_enough(model)):
        request = {"name": name, "revision": revision}
        model = HubModel(**run_apart(f"{hub.__name__}:look_up", request, on_progress, on_notice, "the lookup"))
    if model is not None and model.folder:
        return Path(model.folder), model
    if not for_gguf.pop("keep_source"):
        raise UsageError(f"{name} holds GGUF files, which stay in the hub's cache; leave out --no-keep-source")
    request = {"name": name, "revision": revision, "wanted": wanted, **for_gguf}
    fetch = f"{gguf_hub.__name__}:fetch_gguf"
    gguf = HubModel(**run_apart(fetch, request, on_progress, on_notice, "the download", resumes=True))
    return gguf.first_file, gguf


def _formats(checkpoint: Path, codec: str | None, trunk: str | None) -> tuple[str, str]:
    """The codec and the trunk format that a store in the cache gets."""
    codec = codec or _kept_codec(checkpoint) or DEFAULT_CODEC
    return codec, trunk or default_trunk(codec)


def _stores() -> Path:
    return platformdirs.user_cache_path("pocketmoe") / "stores"


def _place(checkpoint: Path, model: HubModel | None, codec: str | None, trunk: str | None) -> Path:
    """Where the store of a checkpoint lies in the user's cache."""
    codec, trunk = _formats(checkpoint, codec, trunk)
    if model is not None:
        inside = checkpoint.relative_to(model.folder).with_suffix("") if is_gguf(checkpoint) else None
        file = f"-{'--'.join(inside.parts)}" if inside else ""  # folders may hold files of the same name
        name = f"{model.name.replace('/', '--')}{file}-{model.commit[:12]}"
    else:
        resolved = checkpoint.resolve()
        digest = xxhash.xxh3_64_hexdigest(str(resolved).encode())[:8]  # tells directories of the same name apart
        name = "--".join(resolved.parts[-3:] if resolved.parent.name == "snapshots" else resolved.parts[-1:])
        name = f"{name}-{digest}"
    return _stores() / f"{name}-{codec}-trunk-{trunk}"


def _open_source(
    path: Path, on_notice: OnNotice | None, model: HubModel | None = None
) -> CheckpointSource | GgufSource:
    if is_gguf(path):
        from .gguf_source import GgufSource

        return GgufSource(path, on_notice, model)
    from .checkpoint import CheckpointSource

    files = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
    if files:
        raise DataError(f"{path} holds GGUF files; name one of them, such as {files[0]}")
    return CheckpointSource(path, on_notice, model)


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
