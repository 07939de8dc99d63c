"""A small checkpoint that needs no files and no transformers, and what the tests of stores do to files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pocketmoe.cache.expert import ExpertId
from pocketmoe.offload.convert import JOURNAL
from pocketmoe.offload.source import MoeLayer, TrunkSize
from pocketmoe.quant.codecs import ExpertShape

HIDDEN = 64
SHAPE = ExpertShape(HIDDEN, 32)
TOTAL = 8  # experts of a FakeSource


class FakeSource:
    """`layers` x `experts` random experts, the same for the same seed. Counts what is read.

    Args:
        before_expert: called with the number of experts that were read before; may raise.
    """

    def __init__(
        self,
        layers: int = 2,
        experts: int = 4,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        shape: ExpertShape = SHAPE,
        before_expert: Callable[[int], object] = lambda count: None,
    ) -> None:
        self.name, self.config, self.dtype = "fake", {"model_type": "fake", "hidden_size": HIDDEN}, dtype
        self._layers, self._experts, self._seed, self._shape = layers, experts, seed, shape
        self.before_expert = before_expert
        self.calls: list[ExpertId] = []

    def layers(self) -> list[MoeLayer]:
        return [MoeLayer(f"model.layers.{i}.experts", self._experts, 2, self._shape) for i in range(self._layers)]

    def expert(self, layer: int, index: int) -> dict[str, torch.Tensor]:
        self.before_expert(len(self.calls))
        self.calls.append(ExpertId(layer, index))
        generator = torch.Generator().manual_seed(self._seed * 10_000 + layer * 100 + index)
        return {
            name: torch.randn(shape, generator=generator).to(self.dtype) for name, shape in self._shape.parts().items()
        }

    def trunk(self) -> Iterator[tuple[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(self._seed)
        yield "embed.weight", torch.randn(50, HIDDEN, generator=generator).to(self.dtype)
        yield "gate.scale", torch.tensor(1.5)
        yield "gate.counts", torch.arange(7)
        yield "nothing", torch.zeros(0, 3)
        yield "norm.weight", torch.randn(HIDDEN, generator=generator).bfloat16()

    def trunk_sizes(self) -> list[TrunkSize]:
        return [TrunkSize(50 * HIDDEN, 50 * HIDDEN * self.dtype.itemsize)]

    def packable(self) -> set[str]:
        return {"embed.weight"}

    def fingerprint(self) -> list[list[object]]:
        return [["model.safetensors", 1000, self._seed]]

    def copy_files(self, dest: Path) -> None:
        (dest / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
        (dest / "tokenizer.json").write_text(json.dumps({"model": "none", "seed": 1}))


def tree(path: Path) -> dict[str, bytes]:
    """Every file of a directory and its bytes."""
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@contextmanager
def flipped(file: Path, position: int, bit: int = 0) -> Iterator[None]:
    """One bit of a file changed."""
    with open(file, "r+b") as handle:
        handle.seek(position)
        byte = handle.read(1)[0]
        handle.seek(position)
        handle.write(bytes([byte ^ 1 << bit]))
    try:
        yield
    finally:
        with open(file, "r+b") as handle:
            handle.seek(position)
            handle.write(bytes([byte]))


def positions(file: Path, count: int, seed: int = 0) -> list[int]:
    """The first and the last byte of a file and `count` others at random."""
    size = file.stat().st_size
    return sorted({0, size - 1, *random.Random(seed).sample(range(size), min(count, size))})


def aligned(nbytes: int) -> tuple[torch.Tensor, memoryview]:
    """Memory on a 4 KiB boundary, as slots are."""
    memory = torch.zeros(nbytes + 4096, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % 4096 :][:nbytes]
    return memory, memory.numpy().data


def raise_at(count: int, error: BaseException) -> Callable[[int], None]:
    """For `before_expert`: raise once `count` experts were read."""

    def before_expert(calls: int) -> None:
        if calls == count:
            raise error

    return before_expert


def journaled(dest: Path) -> int:
    """How many experts the half-done conversion into `dest` holds."""
    lines = (dest.with_name(dest.name + ".partial") / JOURNAL).read_text().splitlines()[1:]
    return sum(len(json.loads(line)) for line in lines)
