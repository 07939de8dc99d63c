"""A source to a store: streaming, resumable, atomic, checksummed.

Everything is written into a sibling directory `NAME.partial`; a journal names the experts whose bytes are durable, so
that an interrupted conversion goes on where it stopped; the finished directory is renamed into place.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

import filelock
import torch
import xxhash

from ..cache.units import format_bytes
from ..quant.codecs import RECORD_ALIGNMENT, Codec, encode_expert, get_codec, record_layout
from ..quant.int4 import MapPieces, is_finite, round_up
from ..quant.linear import matrix_format
from .config import DEFAULT_CODEC, KEEP, default_trunk
from .convert_memory import require_memory
from .errors import DataError, UsageError
from .manifest import MANIFEST, TRUNK, VERSION, ExpertFile, Manifest
from .packing import PackedEntry, pack_trunk
from .source import MoeLayer, OnNotice, OnProgress, Progress, RowReader, Source
from .tensorfile import DTYPE_NAMES, fsync_path, header_bytes

FILE_BYTES = 8 << 30  # an expert file is closed at this size: small enough to copy, few enough to keep open
SYNC_BYTES = 256 << 20  # after this many bytes of records they are made durable and entered in the journal
TRUNK_HEADER = 1 << 20
JOURNAL = "journal.jsonl"


def convert(
    source: Source,
    dest: Path,
    codec: str = DEFAULT_CODEC,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
    trunk: str | None = None,
    ram: int | None = None,
) -> Path:
    """Write the store of `source` to the directory `dest` and return it.

    Peak memory is a few experts or the largest trunk tensor. A second call after an interruption resumes.

    Args:
        trunk: the format of its large matrices (`int8-g32`, ...) or "keep"; by default what goes with the codec.
        ram: bytes that this process may take; checked before anything is written.

    Raises:
        MemoryBudgetError: `ram` is too little.
        UsageError: the codec is unknown, `dest` exists and is something else, or another conversion is writing there.
        DataError: the source is damaged, or the disk is full.
    """
    try:
        chosen, trunk = get_codec(codec), trunk or default_trunk(codec)
        if trunk != KEEP:
            matrix_format(trunk)
    except ValueError as error:
        raise UsageError(str(error)) from None
    dest = Path(dest)
    identity = _identity(source, codec, trunk)
    on_notice = on_notice or (lambda _: None)
    if _is_finished(dest, identity, on_notice):
        return dest
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot create {dest.parent}: {error.strerror}; convert it into another folder") from None
    with _only_writer(dest):
        if _is_finished(dest, identity, on_notice):  # by another process, since we looked
            return dest
        partial = dest.with_name(dest.name + ".partial")
        if ram is not None:
            require_memory(source, trunk, ram)
        writer = _Writer(source, chosen, partial, identity, on_progress or (lambda _: None), on_notice)
        try:
            with _threads_for_pieces() as writer.map_pieces:
                writer.run()
            if dest.is_dir():
                dest.rmdir()  # an empty directory that was there before
            partial.rename(dest)
            fsync_path(dest.parent)
        except OSError as error:
            kept = f"after {writer.done} of {len(writer.numbers)} experts; they are kept"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                free = format_bytes(shutil.disk_usage(dest.parent).free)
                raise DataError(
                    f"{dest.parent} is full ({free} free) {kept}: free some space and run the same command again"
                ) from None
            if error.errno == errno.EFBIG:  # FAT32, ulimit -f
                raise DataError(
                    f"{dest.parent} takes no larger files {kept}: lift the limit and run the same command again"
                ) from None
            raise DataError(f"cannot write {dest}: {error}") from error
        except DataError:
            if not writer.done:  # a second call would find nothing of use
                shutil.rmtree(partial, ignore_errors=True)
            raise
    return dest


def _identity(source: Source, codec: str, trunk: str) -> dict[str, Any]:
    fingerprint, revision = getattr(source, "fingerprint", None), getattr(source, "revision", None)
    return {
        **({"revision": revision} if revision else {}),
        "source": source.name,
        "codec": codec,
        "trunk": trunk,
        "version": VERSION,
        "files": fingerprint() if fingerprint else [],
    }


def is_free(dest: Path) -> bool:
    """Whether a store may be made there: there is nothing, or an empty directory."""
    return not os.path.lexists(dest) or (dest.is_dir() and not dest.is_symlink() and not any(dest.iterdir()))


def _is_finished(dest: Path, identity: dict[str, Any], on_notice: OnNotice) -> bool:
    """Whether `dest` is the store that is asked for. Raises UsageError when anything else is in its place."""
    if is_free(dest):
        return False
    advice = "choose another place or remove it"
    if not (dest / MANIFEST).is_file():
        raise UsageError(f"{dest} exists already and is something else; {advice}")
    try:
        found = Manifest.read(dest).extra.get("identity")
    except DataError:
        raise UsageError(f"{dest} holds a store that is damaged or of another version; {advice}") from None
    if found != identity:
        raise UsageError(f"{dest} holds the store of another checkpoint or codec; {advice}")
    on_notice(f"{dest} already is this store; nothing to do")
    return True


@contextmanager
def _threads_for_pieces() -> Iterator[MapPieces]:
    """As many threads as torch has, each with a piece of a matrix of its own: torch's would share each of many small
    steps, which was half as fast on two threads as on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _only_writer(dest: Path) -> Iterator[None]:
    lock_path = dest.with_name(f".{dest.name}.lock")
    lock = filelock.FileLock(lock_path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(f"another process is converting into {dest}; wait for it to end") from None
    except OSError as error:
        raise DataError(f"cannot write to {dest.parent}: {error.strerror}") from None
    try:
        yield
    finally:
        with suppress(OSError):  # before the release, so that nobody's new lock is taken away
            lock_path.unlink()
        lock.release()


class _Writer:
    """One conversion into one partial directory."""

    def __init__(
        self,
        source: Source,
        codec: Codec,
        partial: Path,
        identity: dict[str, Any],
        on_progress: OnProgress,
        on_notice: OnNotice,
    ) -> None:
        self.source, self.codec, self.partial, self.identity = source, codec, partial, identity
        self.on_progress, self.on_notice = on_progress, on_notice
        self.map_pieces: MapPieces = map
        self.layers = source.layers()
        self.layouts = [record_layout(codec, layer.shape) for layer in self.layers]
        self.record_bytes = max(layout.nbytes for layout in self.layouts)
        self.numbers = [(i, e) for i, layer in enumerate(self.layers) for e in range(layer.num_experts)]
        self.checksums: list[str] = []

    @property
    def done(self) -> int:
        return len(self.checksums)

    def run(self) -> None:
        if self._is_complete():
            (self.partial / JOURNAL).unlink(missing_ok=True)
            return
        self._open_journal()
        self._check_space()
        files = plan_expert_files(self.layers, self.record_bytes)
        for file in files:
            if self.done < file.first + file.count:
                self._write_expert_file(file)
        kept = {JOURNAL, *(file.name for file in files)}
        for file in self.partial.iterdir():
            if file.name not in kept:  # left by an earlier run
                file.unlink()
        (self.partial / "config.json").write_text(json.dumps(self.source.config, indent=2), encoding="utf-8")
        self.source.copy_files(self.partial)
        packed: dict[str, PackedEntry] = {}
        tensors = self.source.trunk()
        if self.identity["trunk"] != KEEP:
            tensors = pack_trunk(tensors, self.source.packable(), self.identity["trunk"], packed, self.map_pieces)
        trunk_bytes = write_trunk(self.partial / TRUNK, tensors, self.on_progress)
        others = sorted(file for file in self.partial.iterdir() if file.name not in kept)
        manifest = Manifest(
            self.source.name,
            self.codec.name,
            self.layers,
            self.record_bytes,
            files,
            self.checksums,
            {file.name: file_checksum(file) for file in others},
            trunk_bytes,
            {"identity": self.identity},
            packed,
        )
        for file in others:
            fsync_path(file)
        temporary = self.partial / (MANIFEST + ".tmp")
        temporary.write_bytes(manifest.to_json().encode())
        fsync_path(temporary)
        temporary.replace(self.partial / MANIFEST)
        (self.partial / JOURNAL).unlink()
        fsync_path(self.partial)

    def _is_complete(self) -> bool:
        """Whether an earlier run was interrupted between its last write and the renaming."""
        try:
            return Manifest.read(self.partial).extra.get("identity") == self.identity
        except DataError:
            return False

    def _open_journal(self) -> None:
        """Take over what an earlier run of the same conversion left; anything else starts anew."""
        journal = self.partial / JOURNAL
        if self.partial.exists() and any(self.partial.iterdir()):
            if not journal.exists() and not (self.partial / MANIFEST).exists():
                raise UsageError(f"{self.partial} is in the way and no half-done conversion; move or remove it")
            try:
                self.checksums = self._read_journal(journal)
            except (OSError, ValueError, TypeError) as error:
                self.on_notice(f"{self.partial} cannot be resumed ({error}); starting anew")
                shutil.rmtree(self.partial)
        if self.checksums:
            self.on_notice(f"resuming after {self.done} of {len(self.numbers)} experts")
        if not journal.exists():
            self.partial.mkdir(exist_ok=True)
            journal.write_text(json.dumps(self.identity) + "\n", encoding="utf-8")

    def _read_journal(self, journal: Path) -> list[str]:
        """The checksums of the records that are durable. Raises ValueError when the directory is no use."""
        text = journal.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if len(whole) < len(text):  # a torn last line was not durable; nothing may be appended to it
            os.truncate(journal, len(whole.encode()))
        head, *lines = whole.splitlines() or ["{}"]
        if json.loads(head) != json.loads(json.dumps(self.identity)):
            raise ValueError("it is of another checkpoint or codec")
        checksums = [checksum for line in lines for checksum in json.loads(line)]
        if len(checksums) > len(self.numbers):
            raise ValueError(f"its journal has {len(checksums)} of {len(self.numbers)} experts")
        for file in plan_expert_files(self.layers, self.record_bytes):
            held = min(len(checksums) - file.first, file.count)
            if held > 0 and (self.partial / file.name).stat().st_size < file.data_start + held * self.record_bytes:
                raise ValueError(f"{file.name} is too short")
        return checksums

    def _check_space(self) -> None:
        need = (len(self.numbers) - self.done) * self.record_bytes
        free = shutil.disk_usage(self.partial).free
        if free < need:
            raise DataError(
                f"{self.partial.parent} has {format_bytes(free)} free, but {format_bytes(need)} are needed; "
                "free some space and run the same command again"
            )

    def _write_expert_file(self, file: ExpertFile) -> None:
        path = self.partial / file.name
        with open(path, "r+b" if path.exists() else "w+b", buffering=0) as out:
            if self.done <= file.first:
                _write_all(out, memoryview(expert_file_header(file, self.numbers, self.record_bytes)))
            unsynced: list[str] = []
            for number in range(max(self.done, file.first), file.first + file.count):
                try:
                    data = self._encode(*self.numbers[number]).numpy().data
                    out.seek(file.data_start + (number - file.first) * self.record_bytes)
                    _write_all(out, data)
                except BaseException:  # Ctrl-C, a full disk, bad weights: keep what was done before
                    with suppress(OSError):
                        self._enter(out, unsynced)
                    raise
                unsynced.append(xxhash.xxh3_64_hexdigest(data))
                if len(unsynced) * self.record_bytes >= SYNC_BYTES:
                    self._enter(out, unsynced)
                self.on_progress(Progress("experts", number + 1, len(self.numbers), "experts"))
            self._enter(out, unsynced)

    def _encode(self, layer: int, index: int) -> torch.Tensor:
        try:
            weights = self.source.expert(layer, index)
            record = encode_expert(self.codec, self.layouts[layer], weights, self.map_pieces)
        except ValueError as error:
            raise DataError(f"{self.source.name}: expert {index} of {self.layers[layer].name}: {error}") from None
        if record.numel() < self.record_bytes:
            record = torch.nn.functional.pad(record, (0, self.record_bytes - record.numel()))
        return record

    def _enter(self, out: FileIO, checksums: list[str]) -> None:
        """Make what was written durable, then say so in the journal: never the other way round."""
        if not checksums:
            return
        os.fsync(out.fileno())
        with open(self.partial / JOURNAL, "a", encoding="utf-8") as journal:
            journal.write(json.dumps(checksums) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self.checksums += checksums
        checksums.clear()


def _write_all(out: FileIO, data: memoryview) -> None:
    while data:
        data = data[out.write(data) :]


def plan_expert_files(layers: list[MoeLayer], record_bytes: int) -> list[ExpertFile]:
    """How records are spread over files: in order, each file of at most FILE_BYTES."""
    total = sum(layer.num_experts for layer in layers)
    per_file = max(1, FILE_BYTES // record_bytes)
    files = []
    for index, first in enumerate(range(0, total, per_file)):
        count = min(per_file, total - first)
        # 120 bytes hold an entry such as "layers.99.experts.999":{"dtype":"U8","shape":[N],"data_offsets":[B,E]}
        start = round_up(256 + count * 120, RECORD_ALIGNMENT)
        files.append(ExpertFile(f"experts-{index + 1:05d}.safetensors", first, count, start))
    return files


def expert_file_header(file: ExpertFile, numbers: list[tuple[int, int]], record_bytes: int) -> bytes:
    tensors = {}
    for i in range(file.count):
        layer, index = numbers[file.first + i]
        tensors[f"layers.{layer}.experts.{index}"] = ("U8", (record_bytes,), i * record_bytes, (i + 1) * record_bytes)
    return header_bytes(tensors, file.data_start, {"format": "pocketmoe-store"})


def write_trunk(path: Path, tensors: Iterator[tuple[str, torch.Tensor | RowReader]], on_progress: OnProgress) -> int:
    """Write tensors as they come into one safetensors file; returns the bytes of its data section.

    The header is written last into room left for it, because shapes are known only as tensors arrive.
    """
    entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    position = 0
    with open(path, "wb") as out:
        out.seek(TRUNK_HEADER)
        for name, tensor in tensors:
            start, dtype = position, ""
            for piece in tensor.pieces() if isinstance(tensor, RowReader) else [tensor]:
                if piece.is_floating_point() and not is_finite(piece):
                    raise DataError(f"trunk tensor {name} of shape {tuple(tensor.shape)} holds NaN or infinity")
                data, dtype = piece.contiguous().reshape(-1).view(torch.uint8), DTYPE_NAMES[piece.dtype]
                out.write(data.numpy().data)
                position += data.numel()
            entries[name] = (dtype, tuple(tensor.shape), start, position)
            on_progress(Progress("trunk", position, 0, "bytes"))
        out.seek(0)
        out.write(header_bytes(entries, TRUNK_HEADER, {"format": "pt"}))
        out.flush()
        os.fsync(out.fileno())
    return position


def file_checksum(path: Path) -> str:
    """xxh3_64 of a file's content, hexadecimal."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
