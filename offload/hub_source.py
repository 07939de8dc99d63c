"""A model on the hub as a `Source` whose shards are fetched when they are needed and are gone afterwards.

What a shard holds is known from its header, which is read by range, so that everything that can be wrong with a
checkpoint is known before its weights are asked for. A shard is fetched into a private folder when one of its tensors
is first read; after the last expert that needs it, its trunk tensors are set aside in a small file and it is removed.
Shards that lie in the hub's cache are the user's: they are read where they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..cache.units import format_bytes
from ..quant.codecs import Weight
from . import hub
from .apart import run_apart
from .checkpoint import CheckpointSource
from .errors import DataError
from .hub import HubModel
from .source import OnNotice, OnProgress, RowReader
from .tensorfile import TensorEntry, described_tensors, fsync_path, header_bytes, read_header

_SET_ASIDE = "trunk"
_BLOCK = 1 << 22


class RemoteTensor(TensorEntry):
    """A tensor of a shard that may have to be fetched first. `path` is where the shard is then; `start` is unknown."""

    at_hand: Callable[[TensorEntry], TensorEntry]

    def _read(self, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
        return self.at_hand(self)._read(offset, shape)


class Shards:
    """The files of weights of a model on the hub.

    Args:
        headers: of those files that are not in the hub's cache.
        folder: for what is fetched; its content outlives an interruption.
        fetch: puts a file into `folder`.
    """

    def __init__(
        self, model: HubModel, headers: dict[str, dict[str, Any]], folder: Path, fetch: Callable[[str], object]
    ) -> None:
        self.folder, self._fetch = folder, fetch
        self._sizes = {file: model.weights[file] for file in headers}
        self.tensors: dict[str, dict[str, TensorEntry]] = {}
        """Per file, its tensors by name."""
        for file in model.weights:
            if file in headers:
                self.tensors[file] = self._remote(file, headers[file])
            else:
                self.tensors[file] = read_header(Path(model.folder) / file)
        self._opened: dict[Path, dict[str, TensorEntry]] = {}
        self._uses: dict[str, tuple[int, int]] = {}
        self._of_experts: set[str] = set()
        self._now = 0

    def _remote(self, file: str, header: dict[str, Any]) -> dict[str, TensorEntry]:
        size, end = self._sizes[file], max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        tensors: dict[str, TensorEntry] = {}
        for name, entry in described_tensors(self.folder / file, header, size - end, size).items():
            tensors[name] = remote = RemoteTensor(*entry)
            remote.at_hand = self._at_hand
        return tensors

    def expect(self, experts: Iterable[Iterable[TensorEntry]]) -> None:
        """Say what each expert is made of, in the order in which they will be read; the rest is the trunk's."""
        for number, tensors in enumerate(experts):
            for tensor in tensors:
                first, _ = self._uses.get(tensor.path.name, (number, number))
                self._uses[tensor.path.name] = first, number
                self._of_experts.add(tensor.name)

    def most_bytes(self) -> int:
        """The most that `folder` will hold at a time."""
        steps: dict[int, int] = {}
        for file, size in self._sizes.items():
            if file in self._uses:  # those of the trunk alone come one by one, at the end
                first, last = self._uses[file]
                steps[first] = steps.get(first, 0) + size
                steps[last + 1] = steps.get(last + 1, 0) - size
        most, held = max((size for file, size in self._sizes.items() if file not in self._uses), default=0), 0
        for number in sorted(steps):
            held += steps[number]
            most = max(most, held)
        return most + sum(tensor.nbytes for file in self._sizes for tensor in self._trunk_of(file))

    def let_go(self, number: int) -> None:
        """Remove the fetched shards that no expert from `number` on is in; what the trunk needs of them is kept."""
        self._now = number
        for file in self._sizes:
            shard, (_, last) = self.folder / file, self._uses.get(file, (-1, -1))
            if last < number and shard.is_file():
                self._set_aside(file)
                self._opened.pop(shard, None)
                shard.unlink()

    def _at_hand(self, tensor: TensorEntry) -> TensorEntry:
        """The tensor where it can be read now."""
        file = tensor.path.name
        if tensor.name in self._of_experts:
            return self._open_shard(file)[tensor.name]
        aside = self.folder / _SET_ASIDE / file
        if not aside.is_file():
            self._open_shard(file)
            self._set_aside(file)
            self.let_go(self._now)
        return self._open(aside)[tensor.name]

    def _open_shard(self, file: str) -> dict[str, TensorEntry]:
        path = self.folder / file
        if path not in self._opened:
            if not path.is_file():
                self._fetch(file)
            found, promised = self._open(path), self.tensors[file]
            for name, tensor in promised.items():
                if name not in found or found[name][2:4] != tensor[2:4]:
                    raise DataError(f"{path} is not the file whose header the hub has shown: {name} differs")
        return self._opened[path]

    def _open(self, path: Path) -> dict[str, TensorEntry]:
        if path not in self._opened:
            self._opened[path] = read_header(path)
        return self._opened[path]

    def _trunk_of(self, file: str) -> list[TensorEntry]:
        return [tensor for name, tensor in self.tensors[file].items() if name not in self._of_experts]

    def _set_aside(self, file: str) -> None:
        """Copy the trunk's tensors of a shard that is here into a safetensors file of their own."""
        path = self.folder / _SET_ASIDE / file
        trunk = self._trunk_of(file)
        if path.is_file() or not trunk:
            return
        entries, position = {}, 0
        for tensor in trunk:
            entries[tensor.name] = (tensor.dtype, tensor.shape, position, position + tensor.nbytes)
            position += tensor.nbytes
        room = 256 + sum(len(tensor.name) * 6 + 500 for tensor in trunk)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, shard = path.with_name(path.name + ".tmp"), self._open_shard(file)
        with open(temporary, "wb") as out, open(self.folder / file, "rb") as source:
            out.write(header_bytes(entries, room, {}))
            for tensor in trunk:
                source.seek(shard[tensor.name].start)
                left = tensor.nbytes
                while left and (block := source.read(min(left, _BLOCK))):
                    out.write(block)
                    left -= len(block)
        fsync_path(temporary)
        temporary.replace(path)


class HubSource(CheckpointSource):
    """A model on the hub whose missing shards are fetched while it is read.

    Args:
        folder: for the shards, and private to this conversion; see `discard`.

    Raises:
        DataError: what `CheckpointSource` raises, and all that has to do with the hub.
    """

    def __init__(
        self, model: HubModel, folder: Path, on_progress: OnProgress | None = None, on_notice: OnNotice | None = None
    ) -> None:
        self.model, self._on_progress, self._on_notice = model, on_progress, on_notice
        headers = hub.read_headers(model, on_progress)
        self.shards = Shards(model, headers, folder, lambda file: self._fetch([file], folder))
        super().__init__(Path(model.folder), on_notice, model)
        self._first = [0]
        for layer in self.layers():
            self._first.append(self._first[-1] + layer.num_experts)
        self.shards.expect(
            self._keys.expert_tensors(number, index)
            for number, layer in enumerate(self.layers())
            for index in range(layer.num_experts)
        )

    def _fetch(self, files: list[str], folder: Path | None) -> None:
        """Download in a process of its own, for the memory that it takes."""
        sizes, model = {file: self.model.weights[file] for file in files}, self.model
        into = None if folder is None else str(folder)
        request = {"name": model.name, "revision": model.commit, "files": sizes, "folder": into}
        watch = self._on_progress, self._on_notice
        run_apart(f"{hub.__name__}:fetch", request, *watch, "the download", resumes=True)

    def download(self) -> None:
        """Fetch all that is missing into the hub's cache."""
        self._fetch(list(self.model.missing()), None)

    def _headers(self) -> dict[str, dict[str, TensorEntry]]:
        return self.shards.tensors

    def expert(self, layer: int, index: int) -> dict[str, Weight]:
        self.shards.let_go(self._first[layer] + index)
        return super().expert(layer, index)

    def trunk(self) -> Iterator[tuple[str, torch.Tensor | RowReader]]:
        self.shards.let_go(self._first[-1])
        yield from super().trunk()

    def room(self, dest: Path, keep_source: bool) -> tuple[Path, int]:
        """Where the shards go: into the hub's cache, or one after the other beside `dest`; and the most bytes there."""
        return (self.path, sum(self.model.missing().values())) if keep_source else (dest, self.shards.most_bytes())

    def discard(self) -> None:
        """Remove what has been fetched for this conversion."""
        shutil.rmtree(self.shards.folder, ignore_errors=True)

    def plan(self) -> str:
        """What will be fetched, in a sentence."""
        missing = self.model.missing()
        return (
            f"downloading {len(missing)} files of {format_bytes(sum(missing.values()))}, each removed once it is "
            f"converted: at most {format_bytes(self.shards.most_bytes())} at a time in {self.shards.folder}"
        )
