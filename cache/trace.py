"""Routing traces: which experts every token chose in every layer, written while a model runs, read for replay.

A trace is one `.npz` file (a zip of numpy arrays, deflated), so that `numpy.load` opens it without us. T tokens in the
order in which they ran, L MoE layers, k experts each:

    meta     text, JSON: format, version, layers, experts (per layer), top_k, model
    experts  uint8 [T, L, k], uint16 above 255 experts a layer: chosen experts, in the router's order
    weights  float16 [T, L, k]: gate weights
    guesses  like experts: what prefetch expected for this layer one layer earlier; absent when no guess was made
    seq      int32 [T]: number of the sequence, ascending
    phase    uint8 [T]: 0 prefill (ran together with other tokens), 1 decode (ran alone)
    ids      int32 [T]: the tokens themselves, -1 where not known; only in a trace that was asked for them

The dtype's largest value stands for "none" in experts and guesses. With weights and guesses, real
routing takes 1.7 to 2.3 bytes per chosen expert. `read_trace` also reads files without `meta` and `phase`, as published
routing collections have them: a JSON file of the same name beside it may say `experts` and `model`; all is decode then.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from .whole_file import replacing, require_writable

FORMAT, VERSION = "pocketmoe-trace", 1
PREFILL, DECODE = 0, 1
_BROKEN = (zipfile.BadZipFile, zlib.error, struct.error)
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Trace:
    """A trace in memory; arrays as in the file, shapes and dtypes above."""

    experts: Array
    seq: Array
    phase: Array
    num_experts: int
    """Experts per layer."""
    weights: Array | None = None
    guesses: Array | None = None
    model: str | None = None
    ids: Array | None = None

    @property
    def tokens(self) -> int:
        return self.experts.shape[0]

    @property
    def layers(self) -> int:
        return self.experts.shape[1]

    @property
    def top_k(self) -> int:
        return self.experts.shape[2]

    @property
    def none(self) -> int:
        """What stands for "no expert" in `experts` and `guesses`."""
        return int(np.iinfo(self.experts.dtype).max)


class TraceWriter:
    """Writes a trace while a model runs. Memory does not grow with it: rows go to temporary files beside `path`.

    The file appears, whole, with `close`; a process that is killed leaves nothing. Not safe from several threads.

    Args:
        experts: per layer.
        top_k: the most experts that a token chooses in a layer.
        with_ids: whether token ids are recorded: with them, whoever has the tokenizer can read what was said.

    Raises:
        OSError: the folder of `path` cannot be written to, or `path` is a folder.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        layers: int,
        experts: int,
        top_k: int,
        model: str | None,
        with_ids: bool = False,
    ) -> None:
        self.path = Path(path)
        require_writable(self.path)
        meta = {"layers": layers, "experts": experts, "top_k": top_k, "model": model}
        self._meta = json.dumps({"format": FORMAT, "version": VERSION, **meta})
        index = np.dtype("u1" if experts <= np.iinfo("u1").max else "<u2")
        wide = (layers, top_k)
        self._columns = {
            "experts": _Column(self.path.parent, index, wide),
            "weights": _Column(self.path.parent, np.dtype("<f2"), wide),
            "guesses": _Column(self.path.parent, index, wide),
            "seq": _Column(self.path.parent, np.dtype("<i4")),
            "phase": _Column(self.path.parent, np.dtype("u1")),
        }
        if with_ids:
            self._columns["ids"] = _Column(self.path.parent, np.dtype("<i4"))
        self._no_guess = np.full((1, *wide), np.iinfo(index).max, index)
        self._guessed = False
        self._seq = self._start = 0
        self.tokens = 0

    def new_sequence(self) -> None:
        """The tokens from here on do not follow those before. A sequence without tokens is none."""
        if self.tokens > self._start:
            self._seq, self._start = self._seq + 1, self.tokens

    def add(
        self,
        experts: Array,
        weights: Array,
        guesses: Array | None = None,
        ids: Sequence[int] = (),
        one_by_one: bool = False,
    ) -> None:
        """Tokens of one forward, or `one_by_one` of as many: integers [T, L, k] and gate weights [T, L, k]; the dtype's
        largest value is none.

        `guesses` like `experts`, or None when none were made. `ids` of the T tokens are left out where they are not
        recorded; any other number than T is not known.
        """
        tokens = len(experts)
        phase = PREFILL if tokens > 1 and not one_by_one else DECODE
        self._guessed |= guesses is not None
        rows = {
            "experts": experts,
            "weights": weights,
            "guesses": np.repeat(self._no_guess, tokens, 0) if guesses is None else guesses,
            "seq": np.full(tokens, self._seq),
            "phase": np.full(tokens, phase),
            "ids": np.array(ids) if len(ids) == tokens else np.full(tokens, -1),
        }
        for name, column in self._columns.items():
            column.put(self.tokens, rows[name])
        self.tokens += tokens  # rows that an interruption has left without this are written over

    def close(self) -> None:
        """Write the file, all or nothing, readable by its owner only. Raises OSError."""
        if not self._columns:
            return
        try:
            with (
                replacing(self.path) as whole,
                zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as file,
            ):
                with file.open("meta.npy", "w") as member:
                    np.lib.format.write_array(member, np.array(self._meta), allow_pickle=False)
                for name, column in self._columns.items():
                    if name != "guesses" or self._guessed:
                        with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                            column.copy_to(member, self.tokens)
        finally:
            for column in self._columns.values():
                column.spool.close()
            self._columns = {}


class _Column:
    """One array of a trace on its way, in a nameless temporary file."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], shape: tuple[int, ...] = ()) -> None:
        self._dtype, self._shape, self._row_bytes = dtype, shape, dtype.itemsize * math.prod(shape)
        self.spool: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as the writer

    def put(self, first: int, rows: Array) -> None:
        """They are rows first, first + 1, ..."""
        assert rows.shape[1:] == self._shape, f"rows of shape {rows.shape[1:]}, not {self._shape}"
        self.spool.seek(first * self._row_bytes)
        self.spool.write(rows.astype(self._dtype).tobytes())

    def copy_to(self, member: IO[bytes], rows: int) -> None:
        shape = (rows, *self._shape)
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        self.spool.truncate(rows * self._row_bytes)
        self.spool.seek(0)
        shutil.copyfileobj(self.spool, member)


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read what `TraceWriter` wrote, or a file with at least `experts` and `seq` (see above).

    Raises OSError, or ValueError with one sentence when the file holds something else.
    """
    path = Path(path)
    with path.open("rb") as file:
        is_archive = zipfile.is_zipfile(file)
    try:
        if not is_archive:  # numpy would suggest to unpickle it
            raise ValueError("no whole .npz archive")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("experts", "seq")}
            arrays |= {name: file[name] for name in ("weights", "guesses", "phase", "ids") if name in file}
            meta = json.loads(str(file["meta"])) if "meta" in file else _meta_beside(path)
        if meta.get("version", VERSION) != VERSION:
            raise ValueError(f"version {meta['version']!r} instead of {VERSION}")
        return _checked(arrays, meta)
    except (ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError, *_BROKEN) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} is not a routing trace ({reason}): record one with --trace FILE.") from None


def _meta_beside(path: Path) -> dict[str, Any]:
    beside = path.with_suffix(".json")
    return json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}


def _checked(arrays: dict[str, Array], meta: dict[str, Any]) -> Trace:
    experts, seq = arrays["experts"], arrays["seq"]
    if experts.ndim != 3 or experts.dtype.kind != "u" or 0 in experts.shape[1:]:
        raise ValueError(f"experts is {experts.dtype} {list(experts.shape)}, not unsigned [tokens, layers, top_k]")
    for name, array in arrays.items():
        shape = experts.shape if name in ("experts", "weights", "guesses") else experts.shape[:1]
        if array.shape != shape or (name != "weights" and array.dtype.kind not in "iu"):
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, which does not fit {list(shape)}")
    if np.any(np.diff(seq) < 0):
        raise ValueError("seq is not ascending")
    chosen = experts[experts != np.iinfo(experts.dtype).max] if "version" in meta else experts
    count = int(meta.get("experts", chosen.max(initial=0) + 1))
    if chosen.max(initial=0) >= count:
        raise ValueError(f"expert {chosen.max()} of {count}")
    phase = arrays.get("phase", np.full(len(seq), DECODE, "u1"))
    return Trace(
        experts, seq, phase, count, arrays.get("weights"), arrays.get("guesses"), meta.get("model"), arrays.get("ids")
    )
