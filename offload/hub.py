"""Models on the Hugging Face Hub: what of them is in its local cache, what a repository holds, and its files.

The only file that talks to `huggingface_hub`, whose cache, token and switches apply (HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE). `look_up`, `read_headers` and `fetch` use the network and are to be run apart.
"""

from __future__ import annotations

import errno
import io
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .checkpoint_files import CONFIG, INDEX_FILE, MAX_SMALL_FILE, is_small_file, read_index, weight_files
from .errors import DataError, PocketMoEError
from .hub_name import GGUF, is_commit
from .source import OnNotice, OnProgress, Progress

_HEADER_THREADS = 8
_TIMEOUT_S = 30.0
_PARTIAL = 206
ATTEMPTS = 3
"""At a file, besides the library's own resumptions, when the connection fails."""


@dataclass(frozen=True)
class HubModel:
    """One commit of a model on the hub, of which at least the small files are here."""

    name: str
    """ORGANISATION/NAME"""
    commit: str
    folder: str
    """Its snapshot in the hub's cache."""
    weights: dict[str, int]
    """Each file of weights and its size in bytes; 0, or no files at all, where nobody has asked the hub."""

    @property
    def first_file(self) -> Path:
        return Path(self.folder) / next(iter(self.weights))

    @property
    def is_complete(self) -> bool:
        """Whether all weights are known to be here."""
        return bool(self.weights) and not self.missing()

    def missing(self) -> dict[str, int]:
        """The files of weights that are not in the hub's cache, and their sizes in bytes."""
        return {file: size for file, size in self.weights.items() if not (Path(self.folder) / file).is_file()}


def is_settled(revision: str | None) -> bool:
    """Whether what is here of it may be used: a branch or tag that is named may have moved, if that can be asked."""
    return revision is None or is_commit(revision) or is_offline()


def is_offline() -> bool:
    """Whether the user has forbidden to ask the hub, by HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return constants.is_offline_mode()


def find_cached(name: str, revision: str | None = None) -> HubModel | None:
    """What the hub's cache holds of a model; None when not even its config. Asks nobody.

    Args:
        revision: branch, tag or commit; the main branch as it was when last asked for, by default.
    """
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, CONFIG, revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        weights = set((read_index(folder) or {}).values()) or {file.name for file in folder.glob("*.safetensors")}
    except DataError:  # the hub may have a better one
        weights = set()
    return HubModel(name, folder.name, str(folder), dict.fromkeys(sorted(weights), 0))


def cache_folder() -> Path:
    """Where the library keeps what it downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def snapshot_folder(name: str, commit: str) -> Path:
    """Where the files of one commit of a model are in the cache."""
    return _repository_folder(name) / "snapshots" / commit


def note_commit(name: str, revision: str | None, commit: str) -> None:
    """Note what a branch or tag is, as the library does when it is asked for a file of it."""
    if not is_commit(revision):
        note = _repository_folder(name) / "refs" / (revision or "main")
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(commit)


def _repository_folder(name: str) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return cache_folder() / repo_folder_name(repo_id=name, repo_type="model")


def find_cached_ggufs(name: str, revision: str | None = None) -> HubModel | None:
    """`find_cached` of GGUF files; there may be more of them on the hub."""
    try:
        note = _repository_folder(name) / "refs" / (revision or "main")
        commit = revision if is_commit(revision) else note.read_text().strip()
    except OSError:
        return None
    folder = snapshot_folder(name, str(commit))
    here = [path for path in folder.rglob(f"*{GGUF}") if path.is_file()]  # a link may have lost what it points to
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in here}
    return HubModel(name, folder.name, str(folder), files) if files else None


def fetch_config(
    name: str,
    revision: str | None = None,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
) -> str | None:
    """The path of a model's config, downloaded alone; None where there are GGUF files instead."""
    _, sizes = list_files(name, revision)
    if CONFIG not in sizes and any(file.endswith(GGUF) for file in sizes):
        return None
    return fetch(name, revision or "main", {CONFIG: 0}, None, on_progress, on_notice)[0]


def look_up(
    name: str, revision: str | None = None, on_progress: OnProgress | None = None, on_notice: OnNotice | None = None
) -> dict[str, Any]:
    """Ask the hub for a model and download its small files into the hub's cache: all that is needed but weights.

    Returns:
        A `HubModel`, as a dict; without a folder where there are GGUF files alone.

    Raises:
        DataError: there is no such model or revision, it is gated, it has no weights that can be used, or the hub
            cannot be reached; the sentence says what is missing.
    """
    commit, sizes = list_files(name, revision)
    if CONFIG not in sizes:
        if ggufs := {file: size for file, size in sizes.items() if file.endswith(GGUF)}:
            return asdict(HubModel(name, commit, "", ggufs))
        raise DataError(f"{name} on the hub is no checkpoint of transformers: it has no {CONFIG}")
    small = {f: n for f, n in sizes.items() if f == INDEX_FILE or (is_small_file(f) and n <= MAX_SMALL_FILE)}
    [config] = fetch(name, revision or "main", {CONFIG: sizes[CONFIG]}, None, None, on_notice)  # notes the commit
    fetch(name, commit, small, None, None, on_notice)
    folder = Path(config).parent
    if folder.name != commit:
        raise DataError(f"{name} has just been changed on the hub; run the same command again")
    weights = weight_files(name, read_index(folder), sizes)
    return asdict(HubModel(name, commit, str(folder), {file: sizes[file] for file in weights}))


def list_files(name: str, revision: str | None = None) -> tuple[str, dict[str, int]]:
    """The commit that a revision is, and the files of the repository with their bytes."""
    from huggingface_hub import HfApi

    with _explained(name, revision):
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    return info.sha or "", {file.rfilename: file.size or 0 for file in info.siblings or []}


class RemoteFile(io.RawIOBase):
    """A file on the hub, read from its start by range."""

    def __init__(self, name: str, file: str, commit: str, size: int) -> None:
        from huggingface_hub import hf_hub_url

        self._of, self._url, self._size = (name, commit), hf_hub_url(name, file, revision=commit), size
        self.content = bytearray()
        """What has been read."""

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return len(self.content)

    def readinto(self, buffer: Any) -> int:
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        first = len(self.content)
        end = min(first + len(buffer), self._size)
        if first == end:
            return 0
        headers = {**build_hf_headers(), "Range": f"bytes={first}-{end - 1}", "Accept-Encoding": "identity"}
        with (
            _explained(*self._of),
            get_session().stream("GET", self._url, headers=headers, timeout=_TIMEOUT_S) as response,
        ):
            hf_raise_for_status(response)
            given = response.headers.get("Content-Range", "")
            is_part = response.status_code == _PARTIAL and given.startswith(f"bytes {first}-{end - 1}/")
            for piece in response.iter_raw() if is_part else ():  # the whole file may not fit in memory
                self.content += piece[: end - len(self.content) + 1]
                if len(self.content) > end:
                    break
        if len(self.content) != end:
            raise DataError(f"{self._url} cannot be read in parts; download the file and name it")
        buffer[: end - first] = self.content[first:]
        return end - first


def read_headers(model: HubModel, on_progress: OnProgress | None = None) -> dict[str, dict[str, Any]]:
    """The safetensors headers of the missing files of weights, read by range: a few hundred KB of each file."""
    from huggingface_hub import HfApi

    def read(file: str) -> dict[str, Any]:
        found = HfApi().parse_safetensors_file_metadata(model.name, file, revision=model.commit)
        return {
            name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": list(tensor.data_offsets)}
            for name, tensor in found.tensors.items()
        }

    files, headers = list(model.missing()), {}
    with _explained(model.name, model.commit), ThreadPoolExecutor(_HEADER_THREADS) as threads:
        for file, header in zip(files, threads.map(read, files), strict=True):
            headers[file] = header
            if on_progress is not None:
                on_progress(Progress("headers", len(headers), len(files), "files"))
    return headers


def fetch(
    name: str,
    revision: str,
    files: dict[str, int],
    folder: str | None = None,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
) -> list[str]:
    """Download files, one after the other; those that are here already are not asked for again.

    Args:
        files: name -> bytes, for the progress.
        folder: where to put them instead of the hub's cache.

    Returns:
        Their paths.

    Raises:
        DataError: a file cannot be had, or the disk is full; files that were complete stay.
    """
    from huggingface_hub import hf_hub_download

    total, done, paths = sum(files.values()), 0, []
    for file, size in files.items():
        with _explained(name, revision), _warnings_to(on_notice):
            bar = _bar(lambda n, done=done: on_progress and on_progress(Progress("download", done + n, total, "bytes")))
            for attempts_left in reversed(range(ATTEMPTS)):
                try:
                    paths.append(hf_hub_download(name, file, revision=revision, local_dir=folder, tqdm_class=bar))
                    break
                except Exception as error:
                    if attempts_left == 0 or not _is_of_connection(error):
                        raise
                    if on_notice is not None:
                        on_notice(f"the connection broke off at {file} ({_first_line(error)}); trying again")
        done += size
    return paths


def _bar(report: Callable[[int], object]) -> type:
    """A progress bar in the library's terms that shows nothing and reports the bytes so far."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += int(n or 0)
            report(self.n)

        def update_transfer(self, n: float | None = 1) -> None:
            """What went over the network where it is not the file's own bytes; `update` hears of those."""

        def set_transfer_postfix_str(self, *args: Any, **kwargs: Any) -> None:
            """The network's speed."""

    return Bar


class _ToNotice(logging.Handler):
    def __init__(self, on_notice: OnNotice) -> None:
        super().__init__(logging.WARNING)
        self._on_notice = on_notice

    def emit(self, record: logging.LogRecord) -> None:
        self._on_notice(" ".join(record.getMessage().split()))


@contextmanager
def _warnings_to(on_notice: OnNotice | None) -> Iterator[None]:
    """What the library would print between our bars, as notices."""
    logger = logging.getLogger("huggingface_hub")
    handlers = logger.handlers
    if on_notice is not None:
        logger.handlers = [_ToNotice(on_notice)]
    try:
        yield
    finally:
        logger.handlers = handlers


@contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """Turn what the library, its HTTP client and the disk raise into a sentence for the user."""
    try:
        yield
    except PocketMoEError:
        raise
    except Exception as error:
        raise DataError(_explanation(error, name, revision)) from error


def _explanation(error: Exception, name: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # why the library looked into its cache at all
    endpoint, again = constants.ENDPOINT, "what is complete is kept: run the same command again"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{name} is gated: accept its conditions on {endpoint}/{name}, then log in with `hf auth login` or set "
            "HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} on {endpoint} has no revision {revision}; leave it out, or look for it under Files and versions"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is neither a directory {name} here nor a model of that name on {endpoint} that you may see; check "
            "the name, or log in with `hf auth login` if it is private"
        )
    if status in (401, 403):
        return f"{endpoint} refuses access to {name} ({status}): log in with `hf auth login`, or check HF_TOKEN"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"{name} on {endpoint} lacks a file that it lists: {_first_line(error)}"
    if isinstance(error, errors.SafetensorsParsingError):
        return (
            f"{name} on {endpoint} has a damaged file of weights, or a pointer in its place ({_first_line(error)}); "
            "choose another revision, or tell its authors"
        )
    if _is_of_connection(error) or isinstance(error, errors.LocalEntryNotFoundError):
        offline = is_offline()
        reason = "HF_HUB_OFFLINE is set" if offline else f"{endpoint} cannot be reached ({_first_line(error)})"
        remedy = "unset it to download" if offline else f"check the connection; {again}"
        return f"{what_is_missing(name, revision)}, and {reason}; {remedy}"
    if status is not None:
        return f"{endpoint} answers {status} for {name}; try again later, {again}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error.filename or constants.HF_HUB_CACHE}): free some space; {again}"
    return f"{name} cannot be downloaded ({_first_line(error)}); {again}"


def what_is_missing(name: str, revision: str | None) -> str:
    """What the cache lacks of a model; the beginning of a sentence."""
    from huggingface_hub import constants

    cached = find_cached(name, revision)
    if cached is None:
        return f"there is no directory {name} here, and nothing of a model of that name in {constants.HF_HUB_CACHE}"
    missing = list(cached.missing()) if cached.weights else ["model.safetensors"]
    if not missing:
        return f"{name} is in the cache but cannot be compared with the hub"
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    of = f"{len(missing)} of {max(len(cached.weights), 1)} files of weights"
    return f"of {name}, {of} are missing in {cached.folder}: {', '.join(missing[:5])}{more}"


def _is_of_connection(error: Exception) -> bool:
    """Whether an error is of the way to the hub and not of what it answers. The HTTP client's name has changed over
    the library's versions; its errors all are of its own package."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, (OfflineModeIsEnabled, ConnectionError, TimeoutError)):
        return True
    return type(error).__module__.startswith("httpx") and not isinstance(error, HfHubHTTPError)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return text.rstrip(".") or type(error).__name__
