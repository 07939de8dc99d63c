"""A model without its weights, in numbers: what it will ask of memory. No torch: `outline_reader.py` finds them, and
they are kept (`outline_cache.py`), because that takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .memory import KvGrowth, Needs
from .workspace import Workspace


class Format(NamedTuple):
    """A model in one format; sizes in bytes."""

    experts_as: str
    trunk_as: str
    record: int
    """One expert, the largest where layers differ."""
    experts: int
    """All of them."""
    trunk: int
    ships: bool = False
    """The checkpoint itself, and not a store."""

    @property
    def total(self) -> int:
        return self.experts + self.trunk


class LayerSize(NamedTuple):
    """One MoE layer."""

    experts: int
    top_k: int


class Side(NamedTuple):
    """What a model asks of memory where the CPU, or where a GPU holds its trunk."""

    trunk: int
    """Bytes of the trunk in memory."""
    trunk_read: int
    """Those that a token reads: all but an embedding that is no head as well."""
    workspace: Workspace
    kv: KvGrowth


@dataclass(frozen=True)
class Outline:
    """`read_outline` makes it."""

    name: str
    model_type: str
    parameters: int
    longest: int
    """Tokens that the model was made for."""
    decoder_layers: int
    """Dense ones included."""
    layers: list[LayerSize]
    codec: str
    record_bytes: int
    formats: list[Format]
    """As it ships and what it can become, the largest first."""
    chosen: Format
    """The store's, or that of the one which a conversion would write."""
    largest_tensor: int
    """Bytes of the trunk's largest tensor in the store."""
    chunk: int
    cpu: Side
    gpu: Side
    smaller: Outline | None = None
    """The same model, yet to be converted, with its trunk in INT4; None where it is a store, or its trunk is small."""

    @property
    def num_experts(self) -> int:
        return sum(layer.experts for layer in self.layers)

    @property
    def cycle(self) -> int:
        """Experts that one token chooses in all layers together."""
        return sum(layer.top_k for layer in self.layers)

    def needs(self, context: int, program: int, on_gpu: bool = False) -> Needs:
        """What `Model` will ask of memory, `program` bytes being resident already."""
        side = self.gpu if on_gpu else self.cpu
        return Needs(
            program=program,
            trunk=side.trunk,
            kv=side.kv.at(context),
            workspace=side.workspace.bytes(min(self.chunk, context), context),
            step=side.workspace.bytes(1, context),
            record=self.record_bytes,
            experts=self.num_experts,
            floor=self.cycle,
            context=context,
        )

    @classmethod
    def of_json(cls, data: dict[str, Any]) -> Outline:
        """The inverse of `dataclasses.asdict`, through JSON. Raises KeyError, TypeError or ValueError."""

        def side(values: list[Any]) -> Side:
            trunk, trunk_read, workspace, kv = values
            return Side(trunk, trunk_read, Workspace(*workspace), KvGrowth(*kv))

        formats = [Format(*form) for form in data["formats"]]
        made = {
            "layers": [LayerSize(*layer) for layer in data["layers"]],
            "formats": formats,
            "chosen": Format(*data["chosen"]),
            "cpu": side(data["cpu"]),
            "gpu": side(data["gpu"]),
            "smaller": data["smaller"] and cls.of_json(data["smaller"]),
        }
        return cls(**(data | made))
