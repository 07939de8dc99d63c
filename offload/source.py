"""What conversion reads from: a checkpoint, piece by piece, whatever its files look like."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:  # progress and notices are wanted where torch is not loaded
    import torch

    from ..quant.codecs import ExpertShape, Weight


class Progress(NamedTuple):
    """One step of something long. `unit` is "bytes", "experts", "tokens" or "files"."""

    stage: str
    done: int
    total: int
    unit: str


OnProgress = Callable[[Progress], None]
OnNotice = Callable[[str], None]


class MoeLayer(NamedTuple):
    """One MoE layer of a model: the name of its experts module and the sizes of its experts."""

    name: str
    num_experts: int
    top_k: int
    shape: ExpertShape


LARGE = 1 << 24
"""Weights of a matrix that is not read at once."""


@dataclass(frozen=True)
class RowReader:
    """A matrix of the trunk that is read piece by piece, because whole it would be a conversion's peak of memory."""

    shape: tuple[int, ...]
    read: Callable[[int, int], torch.Tensor]
    """Rows from a first one to one past the last; called by several threads at once."""

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self.read(*rows.indices(self.shape[0])[:2])

    def pieces(self) -> Iterator[torch.Tensor]:
        """All of it, LARGE weights at a time."""
        rows = self.shape[0]
        step = max(1, LARGE * rows // prod(self.shape))
        return (self[start : start + step] for start in range(0, rows, step))


class TrunkSize(NamedTuple):
    """A trunk tensor during a conversion."""

    weights: int
    whole: int
    """Bytes that it takes while it is made; 0 where it is read in pieces."""


class Source(Protocol):
    """A checkpoint that can be read one expert and one trunk tensor at a time."""

    name: str
    """Shown to the user and stored in the manifest."""
    config: dict[str, Any]
    """The content of transformers' config.json."""
    dtype: torch.dtype
    """Of the trunk, as it ships."""

    def layers(self) -> list[MoeLayer]:
        """The MoE layers in order; `ExpertId.layer` is an index into this list."""
        ...

    def expert(self, layer: int, index: int) -> Mapping[str, Weight]:
        """The tensors of one expert under the names and in the shapes of `ExpertShape.parts()`."""
        ...

    def trunk(self) -> Iterator[tuple[str, torch.Tensor | RowReader]]:
        """Everything that is not a routed expert, under transformers' parameter names, one tensor at a time."""
        ...

    def trunk_sizes(self) -> Iterable[TrunkSize]:
        """The trunk tensors that `trunk` makes."""
        ...

    def packable(self) -> set[str]:
        """The trunk parameters that may be packed: weights of plain Linears and Embeddings."""
        ...

    def copy_files(self, dest: Path) -> None:
        """Write what a tokenizer and generation need (tokenizer files, chat template, generation_config.json)."""
        ...
