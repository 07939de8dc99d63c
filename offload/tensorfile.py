"""Safetensors files without memory maps: headers checked against the file, tensors read into owned memory.

A mapped file counts as resident memory while its pages are touched, and a file truncated under a map kills the process;
plain reads do neither. The format is described at https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .errors import DataError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the format's own limit
_MAX_DIMS = 16
_MAX_NAME = 500


class TensorEntry(NamedTuple):
    """One tensor of a file: `start` and `nbytes` are in bytes from the beginning of the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self) -> torch.Tensor:
        """The whole tensor."""
        return self._read(0, self.shape)

    def read_index(self, index: int) -> torch.Tensor:
        """`tensor[index:index + 1]` along the first dimension, reading only those bytes."""
        return self.read_rows(index, index + 1)

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        """`tensor[start:stop]` along the first dimension, reading only those bytes."""
        assert self.shape and 0 <= start < stop <= self.shape[0], (self.name, self.shape, start, stop)
        step = self.nbytes // self.shape[0]
        return self._read(start * step, (stop - start, *self.shape[1:]))

    def _read(self, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
        dtype = DTYPES.get(self.dtype)
        if dtype is None:
            raise DataError(f"{self.path}: tensor {self.name} has dtype {self.dtype}, which is not supported")
        count = 1
        for size in shape:
            count *= size
        data = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        if data.numel():
            view = data.numpy().data
            try:
                with open(self.path, "rb", buffering=0) as file:
                    file.seek(self.start + offset)
                    done = 0
                    while done < len(view):
                        got = file.readinto(view[done:])
                        if not got:
                            raise DataError(f"{self.path}: tensor {self.name} ends {len(view) - done} bytes early")
                        done += got
            except OSError as error:
                raise DataError(f"{self.path}: tensor {self.name} cannot be read: {error.strerror}") from error
        return data.view(dtype).reshape(shape)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """All tensors of a safetensors file.

    Raises:
        DataError: not a safetensors file (a Git-LFS pointer and a web page are named as such), truncated, or a header
            whose tensors do not cover the file exactly.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise DataError(f"{path} is not a regular file")
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > _MAX_HEADER or length + 8 > size:
                raise DataError(_not_safetensors(path, head + file.read(200), size))
            raw = file.read(length)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    try:
        header = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: the safetensors header is damaged ({error}); download the file again") from None
    return described_tensors(path, header, 8 + length, size)


def described_tensors(path: Path, header: Any, base: int, size: int) -> dict[str, TensorEntry]:
    """The tensors that a parsed header describes, in a file of `size` bytes whose data begin at byte `base`.

    Raises:
        DataError: the header is damaged, or its tensors do not cover the file exactly.
    """
    try:
        entries = _entries(path, header, base)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: the safetensors header is damaged ({error}); download the file again") from None
    covered = base
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.nbytes)):
        if entry.start != covered:
            raise DataError(f"{path}: tensor {entry.name} begins at byte {entry.start}, expected {covered}")
        covered += entry.nbytes
    if covered != size:
        raise DataError(
            f"{path} has {size:,} bytes where its header promises {covered:,}; the file is "
            f"{'truncated' if size < covered else 'too long'}: download it again"
        )
    return entries


def _entries(path: Path, header: Any, base: int) -> dict[str, TensorEntry]:
    entries = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        if not name.isprintable() or len(name) > _MAX_NAME:
            raise ValueError(f"a tensor's name begins with {name[:40]!r}")
        shape, offsets = info["shape"], info["data_offsets"]
        if not isinstance(shape, list) or not isinstance(offsets, list) or not info["dtype"].isidentifier():
            raise ValueError(f"tensor {name} is not described as the format asks")
        if any(type(number) is not int or not 0 <= number < 1 << 63 for number in (*shape, *offsets)):
            raise ValueError(f"tensor {name} has a size or offset that is not a whole number in range")
        if len(shape) > _MAX_DIMS or math.prod(max(size, 1) for size in shape) >= 1 << 63:
            raise ValueError(f"tensor {name} has {len(shape)} dimensions, too many or too large")
        begin, end = offsets
        count = math.prod(shape)
        if end < begin:
            raise ValueError(f"tensor {name} has offsets {begin}..{end}")
        dtype = DTYPES.get(info["dtype"])
        if dtype is not None and count * dtype.itemsize != end - begin:
            raise ValueError(f"tensor {name} has {end - begin} bytes, its shape {shape} needs {count * dtype.itemsize}")
        entries[name] = TensorEntry(path, name, info["dtype"], tuple(shape), base + begin, end - begin)
    return entries


def _not_safetensors(path: Path, head: bytes, size: int) -> str:
    if head.startswith(b"version https://git-lfs"):
        return f"{path} is a Git-LFS pointer, not the file itself; run `git lfs pull` in the checkpoint's directory"
    if head.lstrip()[:1] == b"<":
        return f"{path} is a web page, not a safetensors file; download it again"
    if size == 0:
        return f"{path} is empty; download it again"
    return f"{path} is truncated or not a safetensors file ({size:,} bytes); download it again"


def header_bytes(
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]], length: int, metadata: dict[str, str]
) -> bytes:
    """A safetensors header of exactly `length` bytes, padded with spaces as the format allows.

    Args:
        tensors: name -> (dtype name, shape, first byte, one past the last byte), offsets within the data section.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for name, (dtype, shape, begin, end) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) + 8 <= length, (len(text), length)
    return (length - 8).to_bytes(8, "little") + text.ljust(length - 8)


def fsync_path(path: Path) -> None:
    """Make a file's (or directory's) content durable; directories cannot be synced on Windows."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
