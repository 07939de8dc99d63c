"""The routing of the latest tokens of a run: what the report replays under other settings."""

from __future__ import annotations

import base64
import sys
from array import array
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Any

from .expert import ExpertId

Step = tuple[ExpertId, ...]
"""The distinct experts of one layer in one token."""
MOST_STEPS = 12_288
"""Steps that are kept: 256 tokens of 48 layers, which are replayed in a second or so."""
_NONE = 0xFFFF


class History:
    """The experts that the latest single tokens chose, layer by layer. A forward that was cut short is left out."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._steps: deque[Step] = deque(maxlen=max(1, MOST_STEPS // layers) * layers)
        self._token: list[Step] = []

    def record(self, layer: int, experts: Step) -> None:
        self.extend(layer, (experts,))

    def extend(self, layer: int, steps: Sequence[Step]) -> None:
        """`record` for layers in a row, from `layer` on."""
        if layer == 0:
            self._token = []
        self._token.extend(steps)
        if len(self._token) == self.layers == layer + len(steps):
            self._steps.extend(self._token)

    def clear(self) -> None:
        self._steps.clear()

    def copy(self) -> History:
        """As it is now; later recording does not change it."""
        other = History(self.layers)
        other._steps.extend(self._steps)
        return other

    @property
    def tokens(self) -> int:
        return len(self._steps) // self.layers

    @property
    def top_k(self) -> int:
        """The most experts that a layer chose for a token."""
        return max((len(step) for step in self._steps), default=0)

    def steps(self) -> list[Step]:
        """Steps of whole tokens, oldest first, the experts of each ascending."""
        return [tuple(sorted(step)) for step in self._steps]

    # As data

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable: two bytes, little endian, for each chosen expert; 65535 is none."""
        width = self.top_k
        flat = array("H")
        for step in self._steps:
            flat.extend(expert[1] for expert in step)
            flat.extend([_NONE] * (width - len(step)))
        return {"layers": self.layers, "top_k": width, "experts": base64.b64encode(_little(flat)).decode("ascii")}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> History:
        """Raises ValueError, KeyError or TypeError when `data` is not what `to_dict` gives."""
        history, width = cls(data["layers"]), data["top_k"]
        flat = array("H")
        flat.frombytes(base64.b64decode(data["experts"], validate=True))
        flat = array("H", _little(flat))
        if len(flat) % max(1, width * history.layers):
            raise ValueError(f"{len(flat)} experts are not whole tokens of {history.layers} layers x {width}")
        numbers = iter(flat)
        for at in range(len(flat) // max(1, width)):
            layer = at % history.layers
            step = tuple(ExpertId(layer, i) for i in islice(numbers, width) if i != _NONE)
            if len(set(step)) < len(step):
                raise ValueError(f"an expert of layer {layer} is there twice: {[expert.index for expert in step]}")
            history.record(layer, step)
        return history


def _little(numbers: array[int]) -> bytes:
    """The bytes, little endian whatever this machine is."""
    if sys.byteorder == "big":
        numbers = array(numbers.typecode, numbers)
        numbers.byteswap()
    return numbers.tobytes()
