"""What routers on a device have chosen, told to the caller: at once where it has to act on that, else layers later."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .device import Device, OnItsWay
from .recorder import NoRecorder, Recorder


class Told(NamedTuple):
    """Tensors lie in RAM until something else is asked for."""

    chosen: torch.Tensor
    """[T, k], as the router gave them."""
    hidden: torch.Tensor | None
    """float32 [1, H], of a single token."""
    guess: list[int]
    """Experts of the next layer, the likeliest first."""
    earlier: list[tuple[int, list[int]]]
    """Layers that were put off, and what they had chosen."""


class Choices:
    """What is asked for travels while the device goes on with what is launched meanwhile.

    Args:
        recorder: is told all that is asked for. While it records, nothing should be put off.
    """

    def __init__(self, device: Device, recorder: Recorder) -> None:
        self._device, self._recorder = device, recorder
        self.recorded = not isinstance(recorder, NoRecorder)
        self._layer = 0
        self._names: tuple[str, ...] = ()
        self._on_its_way: OnItsWay | None = None
        self._put_off: list[tuple[int, torch.Tensor]] = []

    def ask(
        self,
        layer: int,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        hidden: torch.Tensor | None = None,
        guess: torch.Tensor | None = None,
    ) -> None:
        """Begin to bring these to RAM: [T, k], [T, k], [1, H] and k indices."""
        everything = {"chosen": chosen, "hidden": hidden, "guess": guess}
        everything["weights"] = weights if self.recorded else None
        everything["earlier"] = torch.cat([indices for _, indices in self._put_off]) if self._put_off else None
        asked = {name: tensor for name, tensor in everything.items() if tensor is not None}
        self._layer, self._names = layer, tuple(asked)
        self._on_its_way = self._device.to_host(list(asked.values()))

    def put_off(self, layer: int, chosen: torch.Tensor) -> None:
        """Tell of a single token's choice, [k], together with the next that is asked for."""
        self._put_off.append((layer, chosen))

    def wait(self) -> Told:
        """Wait for what was asked for last."""
        assert self._on_its_way is not None, "nothing was asked for"
        got = dict(zip(self._names, self._on_its_way.wait(), strict=True))
        if self.recorded:
            kept = {name: tensor.clone() for name, tensor in got.items()}
            self._recorder.record(self._layer, kept["chosen"], kept["weights"], kept.get("guess"))
        guess = got["guess"].reshape(-1).tolist() if "guess" in got else []
        return Told(got["chosen"], got.get("hidden"), guess, self._earlier(got.get("earlier")))

    def recover(self) -> None:
        """After an interruption: nothing has been asked for, and nobody hears of what was put off."""
        self._on_its_way = None
        self._put_off.clear()

    def _earlier(self, indices: torch.Tensor | None) -> list[tuple[int, list[int]]]:
        if indices is None:
            return []
        layers, counts = zip(*((layer, len(chosen)) for layer, chosen in self._put_off), strict=True)
        self._put_off.clear()
        return [(layer, chosen.tolist()) for layer, chosen in zip(layers, indices.split(counts), strict=True)]
