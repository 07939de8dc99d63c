"""GGUF files without memory maps: metadata and the places of tensors, checked against the files' sizes.

The `gguf` package knows the types and how to dequantise them; its reader makes several objects for every token of a
vocabulary, which costs seconds and hundreds of megabytes. Neither torch nor any tensor is needed here. The format is
described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import os
import re
import reprlib
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from math import inf, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .config import MXFP4
from .errors import DataError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS, _COUNTS_END = 4, 1 << 31
_MAX_VALUE, _MAX_HEADER = 64 << 20, 256 << 20
"""Bytes of one string or list of metadata, and of all that precedes the tensors' data in the files of a model.
Vocabularies of 262,144 tokens with their merges take 20 MB."""
_SYMMETRIC, _WITH_MINIMUM = "int4-g32", "int4-g32-asym"
_HELD = {MXFP4: ("MXFP4",), _SYMMETRIC: ("Q4_0",), _WITH_MINIMUM: ("Q4_0", "Q4_1", "Q4_K")}
"""Types whose codes and scales records of a codec take over."""
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
"""A model that was split into files: what they have in common, which one, of how many."""


class Place(NamedTuple):
    """Where a tensor lies. `shape` is in torch's order, `start` and `nbytes` count bytes of the file."""

    path: Path
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """One model: the metadata of its file (or of the first of its parts) and the tensors of all of them."""

    path: Path
    parts: list[Path]
    fields: dict[str, Any]
    tensors: dict[str, Place]

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture", "?"))

    def field(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own: `field("rope.scaling.type")` is `llama.rope.scaling.type` in a llama file.

        Raises:
            DataError: there is none, and no default.
        """
        value = self.fields.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise DataError(
                f"{self.path} has no metadata {self.architecture}.{key}; it was written by a wrong converter"
            )
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """The same of a whole number, which is positive, or 0 if that is its default; of a list for each layer, the
        number that is in all of it.

        Raises:
            DataError: it is none.
        """
        value, least = self.field(key, default), 0 if default == 0 else 1
        values: list[Any] = value if isinstance(value, list) and value else [value]
        if any(type(one) is not int or not least <= one < _COUNTS_END for one in values):
            raise self.wrong(key, value, f"a whole number from {least}")
        if len(set(values)) > 1:
            raise DataError(f"{self.path} has layers of different {key}, which is not supported")
        return values[0]

    def number(self, key: str, default: float | None = None) -> float:
        """The same of a number, which is positive, or 0 if that is its default, to the six digits that were meant by a
        float32."""
        value = self.field(key, default)
        if type(value) not in (int, float) or not (0 < value < inf or value == default):
            raise self.wrong(key, value, "a positive number")
        return decimal(value)

    def flag(self, key: str, default: bool) -> bool:
        """The same of yes or no."""
        value = self.field(key, default)
        if type(value) is not bool:
            raise self.wrong(key, value, "true or false")
        return value

    def wrong(self, key: str, value: Any, wanted: str) -> DataError:
        """What to raise for a value that is not what was wanted."""
        its = f"{self.path}: metadata {self.architecture}.{key} is {reprlib.repr(value)}"
        return DataError(f"{its}, expected {wanted}; it was written by a wrong converter")


def decimal(value: float) -> float:
    """The decimal number that was meant by a float32."""
    return float(f"{value:.6g}")


def is_gguf(path: Path) -> bool:
    """Whether a path is meant as a GGUF file, by its name."""
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def read_gguf(path: Path, sizes: Mapping[str, int] | None = None) -> GgufFile:
    """The header of a GGUF file; of all parts when it is one of NAME-00001-of-0000N.gguf.

    Args:
        sizes: bytes of each whole file by its name, where only their headers are here.

    Raises:
        DataError: not a GGUF file, damaged, truncated, of an unknown version or tensor type, or a part is missing.
    """
    parts = parts_of(path)
    fields, tensors, read = {}, {}, 0
    for part in parts:
        its_fields, found, length = _read_one(part, sizes[part.name] if sizes else None, read)
        fields, read = fields or its_fields, read + length
        for name, place in found.items():
            if name in tensors:
                raise DataError(f"tensor {name} is in both {tensors[name].path} and {place.path}")
            tensors[name] = place
    count = fields.get("split.count", 0)
    if not isinstance(count, int):
        raise DataError(f"{path}: metadata split.count is {reprlib.repr(count)}, expected a whole number")
    if (count or 1) != len(parts):
        raise DataError(f"{path} is one of {count} files, but not named NAME-00001-of-{count:05d}.gguf: rename it back")
    return GgufFile(path, parts, fields, tensors)


def expert_matrices(file: GgufFile) -> list[Place]:
    """The tensors that hold the matrices of all experts of a layer."""
    return [place for place in file.tensors.values() if len(place.shape) == 3 and "_exps." in place.name]


def keeping_codec(file: GgufFile) -> str | None:
    """The codec that keeps the values of the experts that ship with 4 bits; None when there are none."""
    kinds = {place.kind.name for place in expert_matrices(file)}
    if kinds == {"MXFP4"}:
        return MXFP4
    if kinds & {"Q4_1", "Q4_K"}:
        return _WITH_MINIMUM
    return _SYMMETRIC if "Q4_0" in kinds else None


def is_kept(place: Place, codec: str | None) -> bool:
    """Whether records of that codec hold the codes of a tensor."""
    return place.kind.name in _HELD.get(codec or "", ())


def parts_of(path: Path) -> list[Path]:
    """The files of a model of which `path` is one, in order. Raises DataError when one of them is missing."""
    named = PART.fullmatch(path.name)
    if named is None:
        return [path]
    stem, _, count = named.groups()
    parts = [path.with_name(f"{stem}-{number:05d}-of-{count}.gguf") for number in range(1, int(count) + 1)]
    for part in parts:
        if not part.exists():
            raise DataError(f"{part} is missing: the model is in {int(count)} files, which belong in one directory")
    return parts


def header_length(path: Path, file: BufferedReader, size: int, before: int = 0) -> int:
    """Bytes of the header of a file that is read from elsewhere, once it has been checked. Raises DataError.

    Args:
        before: bytes of the headers of the model's other parts.
    """
    with _damage_explained(path):
        _Header(path, file, size, before).read()
    return file.tell()


def _read_one(path: Path, size: int | None, before: int) -> tuple[dict[str, Any], dict[str, Place], int]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise DataError(f"{path} is not a regular file")
        with open(path, "rb") as file, _damage_explained(path):
            found = _Header(path, file, size or os.fstat(file.fileno()).st_size, before).read()
            return *found, file.tell()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


@contextmanager
def _damage_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, struct.error, RecursionError, MemoryError, OverflowError) as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{path}: the GGUF header is damaged ({reason}); download the file again") from None


class _Header:
    """A cursor over the bytes of one header. Raises ValueError where they make no sense."""

    def __init__(self, path: Path, file: BufferedReader, size: int, before: int) -> None:
        self.path, self.file, self.size, self.before = path, file, size, before

    def read(self) -> tuple[dict[str, Any], dict[str, Place]]:
        magic = self.file.read(4)
        if magic != _MAGIC:
            head = magic + self.file.read(200)
            if head.startswith(b"version https://git-lfs"):
                raise DataError(f"{self.path} is a Git-LFS pointer, not the file itself; download the file")
            raise DataError(f"{self.path} cannot be read as a GGUF file: it does not begin with {_MAGIC.decode()}")
        (version,) = self.numbers("I")
        if version not in _VERSIONS:
            swapped = version & 0xFFFF == 0
            raise DataError(
                f"{self.path} is a GGUF file {'for big-endian machines' if swapped else f'of version {version}'}; "
                f"versions {' and '.join(map(str, _VERSIONS))} in little-endian order are supported"
            )
        tensor_count, field_count = self.numbers("QQ")
        fields = {}
        for _ in range(self.checked(field_count, 12)):
            key = self.string()
            fields[key] = self.value(*self.numbers("I"))
        entries = [self.entry() for _ in range(self.checked(tensor_count, 24))]
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"an alignment of {alignment}")
        base = -(-self.file.tell() // alignment) * alignment
        places: dict[str, Place] = {}
        for name, kind, shape, offset, nbytes in entries:
            if name in places:
                raise ValueError(f"tensor {name} is listed twice")
            if offset % alignment:
                raise ValueError(f"tensor {name} begins at byte {offset} of the data, no multiple of {alignment}")
            places[name] = Place(self.path, name, kind, shape, base + offset, nbytes)
        promised = max((place.start + place.nbytes for place in places.values()), default=0)
        if promised > self.size:
            raise DataError(
                f"{self.path} has {self.size:,} bytes where its header promises {promised:,}; "
                "the file is truncated: download it again"
            )
        return fields, places

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{kinds}")
        return layout.unpack(self.file.read(layout.size))

    def checked(self, count: int, least: int) -> int:
        """A count of things that take at least so many bytes each; a damaged one must not fill the memory."""
        nbytes, before = count * least, self.file.tell()
        if nbytes > self.size - before:
            raise ValueError(f"it promises {count} entries in {self.size:,} bytes")
        if nbytes > _MAX_VALUE:
            raise ValueError(f"a value takes {nbytes:,} bytes where {_MAX_VALUE:,} are more than any model needs")
        if self.before + before + nbytes > _MAX_HEADER:
            raise ValueError(f"it goes on after {_MAX_HEADER:,} bytes, which are more than any model needs")
        return count

    def string(self) -> str:
        (length,) = self.numbers("Q")
        return self.file.read(self.checked(length, 1)).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"metadata of type {kind}")
        inner, count = self.numbers("IQ")
        if inner in _SCALARS:
            return list(self.numbers(f"{self.checked(count, struct.calcsize('<' + _SCALARS[inner]))}{_SCALARS[inner]}"))
        return [self.value(inner) for _ in range(self.checked(count, 8))]

    def entry(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int, int]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self.string()
        if not name.isprintable():
            raise ValueError(f"a tensor's name begins with {name[:40]!r}")
        (dims,) = self.numbers("I")
        if dims > _MAX_DIMS:
            raise ValueError(f"tensor {name} has {dims} dimensions")
        shape = tuple(reversed(self.numbers(f"{dims}Q")))
        number, offset = self.numbers("IQ")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise DataError(
                f"{self.path}: tensor {name} is of type {number}, which the gguf package does not know; "
                "a newer one may (pip install -U gguf)"
            ) from None
        block, nbytes = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise ValueError(f"tensor {name} is {kind.name} of shape {shape}, no multiple of {block} columns")
        return name, kind, shape, offset, prod(shape) // block * nbytes
