"""The store's manifest, `pocketmoe.json`: what the files are, how a record is laid out, and every checksum.

What a record's bytes mean is imported late: to tell a finished store from anything else takes no torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from .errors import DataError
from .source import MoeLayer

if TYPE_CHECKING:
    from ..quant.codecs import Codec, RecordLayout
    from .packing import PackedEntry

MANIFEST = "pocketmoe.json"
TRUNK = "trunk.safetensors"
FORMAT = "pocketmoe-store"
VERSION = 1


@dataclass(frozen=True)
class ExpertFile:
    """One file of records: those of global numbers `first` to `first + count - 1`, from byte `data_start` on."""

    name: str
    first: int
    count: int
    data_start: int


@dataclass(frozen=True)
class Manifest:
    """A complete store. Experts are numbered layer by layer; every record has the same size."""

    source: str
    codec: str
    layers: list[MoeLayer]
    record_bytes: int
    expert_files: list[ExpertFile]
    record_checksums: list[str]
    """xxh3_64 of each record, hexadecimal."""
    file_checksums: dict[str, str]
    """xxh3_64 of every other file."""
    trunk_bytes: int
    extra: dict[str, Any] = field(default_factory=dict)
    trunk_packed: dict[str, PackedEntry] = field(default_factory=dict)
    """The trunk matrices that are packed, by parameter name; the others are stored as they are."""

    @property
    def num_experts(self) -> int:
        return sum(layer.num_experts for layer in self.layers)

    def codec_and_layouts(self) -> tuple[Codec, list[RecordLayout]]:
        """The codec and each layer's record layout."""
        from ..quant.codecs import get_codec, record_layout

        codec = get_codec(self.codec)
        return codec, [record_layout(codec, layer.shape) for layer in self.layers]

    def first_number(self) -> list[int]:
        """The number of each layer's expert 0."""
        numbers, total = [], 0
        for layer in self.layers:
            numbers.append(total)
            total += layer.num_experts
        return numbers

    def to_json(self) -> str:
        """The file's text. Its last entry is a checksum of every byte before that entry."""
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        body["layers"] = [
            {"name": m.name, "num_experts": m.num_experts, "top_k": m.top_k, **m.shape._asdict()} for m in self.layers
        ]
        text = json.dumps(body, indent=1).removesuffix("\n}")
        return text + _closing(text.encode()).decode()

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest of a store directory.

        Raises:
            DataError: not a store, an unfinished or damaged one, or one of another version.
        """
        from ..quant.codecs import ExpertShape
        from .packing import PackedEntry

        file, body = path / MANIFEST, _read_body(path)
        try:
            layers = [
                MoeLayer(
                    str(m["name"]),
                    int(m["num_experts"]),
                    int(m["top_k"]),
                    ExpertShape(int(m["hidden"]), int(m["intermediate"]), bool(m["has_gate"]), bool(m["has_bias"])),
                )
                for m in body["layers"]
            ]
            files = [
                ExpertFile(f["name"], int(f["first"]), int(f["count"]), int(f["data_start"]))
                for f in body["expert_files"]
            ]
            manifest = cls(
                str(body["source"]),
                str(body["codec"]),
                layers,
                int(body["record_bytes"]),
                files,
                [str(c) for c in body["record_checksums"]],
                {str(name): str(c) for name, c in body["file_checksums"].items()},
                int(body["trunk_bytes"]),
                dict(body.get("extra", {})),
                {
                    str(name): PackedEntry(str(fmt), int(rows), int(cols))
                    for name, (fmt, rows, cols) in body["trunk_packed"].items()
                },
            )
            manifest._check()
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(
                f"{file} is damaged ({type(error).__name__}: {error}); convert the checkpoint again"
            ) from None
        return manifest

    def _check(self) -> None:
        from ..quant.linear import matrix_format

        for layer in self.layers:
            if min(*layer.shape[:2], layer.top_k) < 1 or layer.num_experts < layer.top_k:
                raise ValueError(f"layer {layer}")
        _, layouts = self.codec_and_layouts()
        for entry in self.trunk_packed.values():
            matrix_format(entry.format)
        if not self.layers or self.record_bytes != max(layout.nbytes for layout in layouts):
            raise ValueError(f"record_bytes is {self.record_bytes}")
        if len(self.record_checksums) != self.num_experts:
            raise ValueError(f"{len(self.record_checksums)} checksums for {self.num_experts} experts")
        number = 0
        for file in self.expert_files:
            misplaced = file.first != number or file.count < 1 or file.data_start < 4096 or file.data_start % 4096
            if misplaced or not _is_plain(file.name):
                raise ValueError(f"expert file {file}")
            number += file.count
        if number != self.num_experts:
            raise ValueError(f"expert files hold {number} of {self.num_experts} experts")
        for name in self.file_checksums:
            if not _is_plain(name):
                raise ValueError(f"file name {name!r}")


def is_store(path: Path) -> bool:
    return (Path(path) / MANIFEST).is_file()


def read_identity(path: Path) -> dict[str, Any]:
    """What a store was made from, as `convert` has entered it. Raises DataError as `Manifest.read` does."""
    extra = _read_body(path).get("extra")
    identity = extra.get("identity") if isinstance(extra, dict) else None
    return identity if isinstance(identity, dict) else {}


def _read_body(path: Path) -> dict[str, Any]:
    """The manifest of a store directory, its format, version and checksum verified."""
    file = path / MANIFEST
    try:
        raw = file.read_bytes()
        body = json.loads(raw.decode("utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is not a pocketmoe store (it has no {MANIFEST})") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is damaged ({error}); convert the checkpoint again") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise DataError(f"{file} is not the manifest of a pocketmoe store")
    if body.get("version") != VERSION:
        raise DataError(
            f"{path} is a store of version {body.get('version')!r}, this program reads version {VERSION}; "
            "convert the checkpoint again"
        )
    text, separator, _ = raw.rpartition(_CLOSING)
    if not separator or raw != text + _closing(text):
        raise DataError(f"{file} is damaged: its checksum is wrong; convert the checkpoint again")
    return body


_CLOSING = b',\n "checksum": "'


def _closing(text: bytes) -> bytes:
    return _CLOSING + xxhash.xxh3_64_hexdigest(text).encode() + b'"\n}'


def _is_plain(name: str) -> bool:
    return Path(name).name == name and "\\" not in name and name.isprintable()
