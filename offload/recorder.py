"""The routing of a run to a trace file, and the null twin for runs that nobody records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ..cache.trace import TraceWriter
from .errors import DataError, UsageError
from .manifest import Manifest

Array = np.ndarray[Any, Any]


class Recorder(Protocol):
    """The contract of the recorder and its null twin."""

    def record(
        self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, guess: torch.Tensor | None
    ) -> None:
        """One layer has chosen: [T, k] each. `guess`, of k elements, is for the layer after it."""
        ...

    def record_token(self, experts: Array, weights: Array, guesses: Array | None) -> None:
        """All layers have chosen for a single token: [L, k] each, -1 behind the experts of a layer that chooses fewer,
        a layer's experts in any order; they may be overwritten afterwards. Row i of `guesses` is for layer i + 1."""
        ...

    def new_sequence(self) -> None:
        """The next tokens start a sequence."""
        ...

    def feed(self, ids: Sequence[int]) -> None:
        """The next forward runs these tokens."""
        ...

    def close(self) -> None:
        """Write the file. Raises DataError."""
        ...


class RoutingRecorder:
    """Collects the layers of a forward and writes them together. What an interrupted forward has left is dropped.

    Single tokens are put in the router's order and written some at a time: for each layer by itself, that took 4 % of
    the time of a small model.
    """

    together = 32
    """Single tokens."""

    def __init__(self, writer: TraceWriter, layers: int, top_k: int) -> None:
        self._writer, self._layers = writer, layers
        self._tokens: list[tuple[Array, Array, Array]] = []
        self._tokens_ids: list[int] = []
        self._no_guess = np.full((layers, top_k), -1)
        self._none = torch.full((1, top_k), -1)  # -1 becomes the largest value of an unsigned type
        self._index: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []
        self._guesses: list[torch.Tensor | None] = [None]
        self._ids: Sequence[int] = ()

    def record(
        self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, guess: torch.Tensor | None
    ) -> None:
        if layer == 0:
            self._index, self._weights, self._guesses = [], [], [None]
        self._index.append(top_k_index)
        self._weights.append(top_k_weights)
        self._guesses.append(guess)
        if len(self._index) == self._layers == layer + 1:
            self._write()

    def record_token(self, experts: Array, weights: Array, guesses: Array | None) -> None:
        self._tokens.append((experts.copy(), weights.copy(), self._no_guess if guesses is None else guesses.copy()))
        self._tokens_ids.append(self._ids[0] if len(self._ids) == 1 else -1)
        self._ids = ()
        if len(self._tokens) == self.together:
            self._write_tokens()

    def new_sequence(self) -> None:
        self._write_tokens()
        self._writer.new_sequence()

    def feed(self, ids: Sequence[int]) -> None:
        self._ids = ids

    def close(self) -> None:
        try:
            self._write_tokens()
            self._writer.close()
        except OSError as error:
            raise DataError(f"the trace {self._writer.path} was not written: {error.strerror or error}") from None

    def _write_tokens(self) -> None:
        if not self._tokens:
            return
        tokens, ids, self._tokens, self._tokens_ids = self._tokens, self._tokens_ids, [], []
        experts, weights, guesses = map(np.stack, zip(*tokens, strict=True))
        order = np.argsort(np.where(experts < 0, np.inf, -weights), axis=2, kind="stable")
        guesses = np.roll(guesses, 1, axis=1)  # to the layers that they are for
        guesses[:, 0] = -1
        self._writer.add(
            np.take_along_axis(experts, order, 2),
            np.take_along_axis(weights, order, 2),
            guesses if guesses.max() >= 0 else None,
            ids,
            one_by_one=True,
        )

    def _write(self) -> None:
        self._write_tokens()
        guesses = self._guesses[:-1]
        made = any(guess is not None for guess in guesses)
        self._writer.add(
            torch.stack([self._wide(index, -1) for index in self._index], 1).numpy(),
            torch.stack([self._wide(weights, 0) for weights in self._weights], 1).float().numpy(),
            torch.stack([self._none if g is None else self._wide(g.reshape(1, -1), -1) for g in guesses], 1).numpy()
            if made
            else None,
            self._ids,
        )
        self._ids = ()

    def _wide(self, values: torch.Tensor, fill: int) -> torch.Tensor:
        """[T, k] for every layer's own k."""
        missing = self._none.shape[1] - values.shape[1]
        return torch.nn.functional.pad(values, (0, missing), value=fill) if missing else values


class NoRecorder:
    """The null twin."""

    def record(
        self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, guess: torch.Tensor | None
    ) -> None:
        pass

    def record_token(self, experts: Array, weights: Array, guesses: Array | None) -> None:
        pass

    def new_sequence(self) -> None:
        pass

    def feed(self, ids: Sequence[int]) -> None:
        pass

    def close(self) -> None:
        pass


def make_recorder(path: str | None, manifest: Manifest, with_ids: bool = False) -> Recorder:
    """A recorder to `path`, or the null twin for None. Raises UsageError when the file cannot be written."""
    if path is None:
        return NoRecorder()
    layers = manifest.layers
    top_k = max(layer.top_k for layer in layers)
    try:
        experts = max(layer.num_experts for layer in layers)
        writer = TraceWriter(path, len(layers), experts, top_k, manifest.source, with_ids)
    except OSError as error:
        raise UsageError(f"trace: {path} cannot be written: {error.strerror or error}") from None
    return RoutingRecorder(writer, len(layers), top_k)
