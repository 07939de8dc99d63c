"""The NVMe tier: records read from a store's files straight into a caller's memory.

Direct reads bypass the page cache: the bytes go from the disk into the slot that the kernels read, without a copy and
without evicting what other programs have cached.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import xxhash

from ..cache.expert import ExpertId
from .convert import TRUNK_HEADER, expert_file_header, file_checksum
from .errors import DataError
from .manifest import TRUNK, ExpertFile, Manifest
from .source import OnNotice, OnProgress, Progress
from .tensorfile import TensorEntry, read_header

_O_DIRECT = getattr(os, "O_DIRECT", 0)
_F_NOCACHE = 48  # macOS fcntl: do not keep what is read through this descriptor
_RETRIES = 3


class ExpertStore:
    """A verified-on-first-read view of a store directory. Safe to use from several threads.

    Args:
        io: "direct", "buffered" or "mmap". Direct falls back to buffered, with a notice, where it is refused.
        verify: compare each record with its checksum the first time it is read.

    Raises:
        DataError: the store is unfinished, damaged, of another version, or a file has the wrong size.
    """

    def __init__(self, path: Path, io: str = "direct", verify: bool = True, on_notice: OnNotice | None = None) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        self.record_bytes = self.manifest.record_bytes
        self.io = io
        self._first = self.manifest.first_number()
        self._verified = None if not verify else bytearray(self.manifest.num_experts)
        self._lock = threading.Lock()
        self._descriptors: list[int] = []
        self._maps: list[tuple[mmap.mmap, int]] = []
        self.retries = 0
        self._check_files()
        try:
            self._open(on_notice or (lambda _: None))
        except BaseException:
            self.close()
            raise

    def _check_files(self) -> None:
        files = self.manifest.expert_files
        sizes = {file.name: file.data_start + file.count * self.record_bytes for file in files}
        sizes[TRUNK] = TRUNK_HEADER + self.manifest.trunk_bytes
        for name in (*sizes, *self.manifest.file_checksums):
            path = self.path / name
            if not path.is_file():
                raise DataError(f"{path} is missing; convert the checkpoint again")
            if name in sizes and (size := path.stat().st_size) != sizes[name]:
                raise DataError(f"{path} has {size:,} bytes, expected {sizes[name]:,}; convert the checkpoint again")
            if name not in sizes and self._verified is not None and not _is_unchanged(path, self.manifest):
                raise DataError(f"{path} is not as it was converted; convert the checkpoint again")

    def _open(self, on_notice: OnNotice) -> None:
        for file in self.manifest.expert_files:
            path = self.path / file.name
            direct = self.io == "direct"
            try:
                self._descriptors.append(self._open_file(path, direct))
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise DataError(f"{path} cannot be opened: {error.strerror}") from error
                self._fall_back(on_notice, f"{self.path} is on a file system without direct reads")
                self._descriptors.append(self._open_file(path, False))
            descriptor = self._descriptors[-1]
            if direct and not _O_DIRECT:
                if sys.platform == "darwin":
                    import fcntl

                    fcntl.fcntl(descriptor, _F_NOCACHE, 1)
                else:
                    self._fall_back(on_notice, "this system has no direct reads")
            if self.io == "mmap":
                mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
                address = np.frombuffer(mapped, dtype=np.uint8).ctypes.data
                self._maps.append((mapped, address))

    def _open_file(self, path: Path, direct: bool) -> int:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | (_O_DIRECT if direct else 0))
        try:
            if direct and _O_DIRECT:  # some file systems refuse at the first read only
                self._pread(descriptor, memoryview(mmap.mmap(-1, 4096)), 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _fall_back(self, on_notice: OnNotice, reason: str) -> None:
        self.io = "buffered"
        on_notice(f"{reason}: reading through the page cache instead, which is slower and uses more CPU")

    def number(self, expert: ExpertId) -> int:
        return self._first[expert.layer] + expert.index

    def read_into(self, expert: ExpertId, view: memoryview, start: int = 0, stop: int | None = None) -> None:
        """Read one record into `view` (writable, record_bytes long, 4 KiB aligned), and check it the first time.

        Args:
            start, stop: bytes of a piece of it, multiples of 4 KiB. A record that is read in pieces is checked with
                the last one, so the others have to be in `view` by then.

        Raises:
            DataError: the disk returned an error three times, the file ended early, or the checksum is wrong.
        """
        assert self._descriptors, f"{self.path} is closed"
        number = self.number(expert)
        index = next(i for i, f in enumerate(self.manifest.expert_files) if number < f.first + f.count)
        file = self.manifest.expert_files[index]
        offset = file.data_start + (number - file.first) * self.record_bytes
        piece = view[start:stop]
        for attempt in range(_RETRIES):
            try:
                self._read(index, piece, offset + start)
                break
            except OSError as error:
                self.retries += 1
                if attempt == _RETRIES - 1:
                    raise DataError(
                        f"{self.path / file.name}: reading {len(piece):,} bytes at {offset + start:,} failed "
                        f"{_RETRIES} times: {error.strerror}; is the disk failing?"
                    ) from error
        if self._verified is not None and not self._verified[number] and stop in (None, self.record_bytes):
            if xxhash.xxh3_64_hexdigest(view) != self.manifest.record_checksums[number]:
                raise DataError(
                    f"{self.path / file.name}: expert {expert.index} of MoE layer {expert.layer} (byte {offset:,}) is "
                    f"damaged, its checksum is wrong; convert again (`pocketmoe verify {self.path}` lists all damage)"
                )
            self._verified[number] = 1

    def _read(self, index: int, view: memoryview, offset: int) -> None:
        if self._maps:
            mapped, address = self._maps[index]
            target = (ctypes.c_char * len(view)).from_buffer(view)
            ctypes.memmove(target, address + offset, len(view))  # releases the interpreter while pages are read
            if hasattr(mapped, "madvise"):  # mapped pages count as resident; the slot now has the bytes
                start = offset // mmap.PAGESIZE * mmap.PAGESIZE
                mapped.madvise(mmap.MADV_DONTNEED, start, offset + len(view) - start)
            return
        done = 0
        while done < len(view):
            got = self._pread(self._descriptors[index], view[done:], offset + done)
            if not got:
                raise OSError(errno.EIO, "the file ended early")
            done += got

    def _pread(self, descriptor: int, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(descriptor, [view], offset)
        with self._lock:  # Windows: no positioned reads in the standard library
            os.lseek(descriptor, offset, os.SEEK_SET)
            data = os.read(descriptor, len(view))
        view[: len(data)] = data
        return len(data)

    def trunk_entries(self) -> dict[str, TensorEntry]:
        return read_header(self.path / TRUNK)

    def trunk(self, on_progress: OnProgress | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Trunk tensors in file order, each read into memory of its own.

        Raises:
            DataError: the file is damaged; a wrong checksum is found after the last tensor.
        """
        path, done, total = self.path / TRUNK, 0, self.manifest.trunk_bytes
        entries = sorted(self.trunk_entries().values(), key=lambda entry: entry.start)
        digest = xxhash.xxh3_64()
        with open(path, "rb") as file:
            digest.update(file.read(entries[0].start if entries else -1))
        for entry in entries:
            tensor = entry.read()
            if self._verified is not None:
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
            yield entry.name, tensor
            done += entry.nbytes
            if on_progress:
                on_progress(Progress("trunk", done, total, "bytes"))
        if self._verified is not None and digest.hexdigest() != self.manifest.file_checksums.get(TRUNK):
            raise DataError(f"{path} is damaged, its checksum is wrong; convert the checkpoint again")

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        self._maps.clear()  # the maps close with their last reference


def verify_store(path: Path, on_progress: OnProgress | None = None) -> list[str]:
    """Read everything in a store and compare it with its checksums; returns one sentence per problem found."""
    path, problems = Path(path), []
    manifest = Manifest.read(path)
    for name, want in manifest.file_checksums.items():
        try:
            if not (path / name).is_file():
                problems.append(f"{name} is missing")
            elif file_checksum(path / name) != want:
                problems.append(f"{name} is damaged: its checksum is wrong")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
    layers = [(i, e) for i, layer in enumerate(manifest.layers) for e in range(layer.num_experts)]
    for file in manifest.expert_files:
        try:
            size, want_size = (path / file.name).stat().st_size, file.data_start + file.count * manifest.record_bytes
            if size != want_size:
                problems.append(f"{file.name} has {size:,} bytes, expected {want_size:,}")
            with open(path / file.name, "rb", buffering=0) as handle:
                head = handle.read(file.data_start)
                if size == want_size and not _header_is_right(head, file.count, manifest, layers[file.first :]):
                    problems.append(f"{file.name} is damaged in its header")
                for i in range(file.count):
                    handle.seek(file.data_start + i * manifest.record_bytes)
                    data = handle.read(manifest.record_bytes)
                    number = file.first + i
                    if xxhash.xxh3_64_hexdigest(data) != manifest.record_checksums[number]:
                        layer, expert = layers[number]
                        problems.append(
                            f"{file.name}: expert {expert} of MoE layer {layer} is damaged: its checksum is wrong"
                        )
                    if on_progress:
                        on_progress(Progress("verify", number + 1, len(layers), "experts"))
        except OSError as error:
            problems.append(f"{file.name} cannot be read: {error.strerror}")
    return problems


def _header_is_right(data: bytes, count: int, manifest: Manifest, numbers: list[tuple[int, int]]) -> bool:
    return data == expert_file_header(ExpertFile("", 0, count, len(data)), numbers[:count], manifest.record_bytes)


def _is_unchanged(path: Path, manifest: Manifest) -> bool:
    try:
        return file_checksum(path) == manifest.file_checksums[path.name]
    except OSError:
        return False
