"""One token through several decoder layers in one native call, as far as the experts that it needs are in memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .native import NativeKernels, NativePool, check
from .native_step import NativeAttention, NativeLatentAttention, NativeMlp, Token


class _Layer(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("attention", "latent", "experts", "mlp", "records", "next_records")
    )


class NativeLayer(NamedTuple):
    """A decoder layer.

    Attributes:
        attention: its first half.
        experts: None where there are none, or where others compute them.
        mlp: its block of the trunk, if it has one.
        records: int64 by expert, the address of a record that is in memory, 0 of one that is not; read at every run.
        next_records: the same for the layer that a guess is for.
    """

    attention: NativeAttention | NativeLatentAttention
    experts: NativeKernels | None = None
    mlp: NativeMlp | None = None
    records: ctypes.Array[ctypes.c_int64] | None = None
    next_records: ctypes.Array[ctypes.c_int64] | None = None


class NativeLayers:
    """Decoder layers for one token, one after the other.

    Attributes:
        tokens: one for each layer, for the caller to fill: `x` and `normed` are the same in all, and so is `delta`,
            but that the first layer has none.
        seconds: time in each layer's experts, of the layers that have run whole.

    Args:
        delta: float32 [hidden]: what the latest layer's blocks add to the residual.
    """

    def __init__(self, pool: NativePool, layers: Sequence[NativeLayer], delta: torch.Tensor) -> None:
        self._pool, self._kept, self._delta = pool, layers, delta
        self._call, self._count = pool.library.c.pm_layers, len(layers)
        self._layers = (_Layer * len(layers))(*(self._structure(layer) for layer in layers))
        self.tokens = (Token * len(layers))()
        self.seconds = (ctypes.c_double * len(layers))()
        self._reached = ctypes.c_int64()
        self._outputs = delta.data_ptr(), ctypes.addressof(self.seconds), ctypes.addressof(self._reached)

    def run(self, first: int, alone: bool) -> int:
        """Run layers from `first` on.

        Args:
            alone: go on behind a router where every expert that it has chosen, and every one that is guessed, is in
                memory.

        Returns:
            The layer whose attention half has run, but whose experts the caller has to see to; or the number of layers.
        """
        status = self._call(self._pool.handle, self._layers, self.tokens, first, self._count, alone, *self._outputs)
        if status:
            check(status, f"pm_layers from {first} on at position {self.tokens[first].position}")
        return self._reached.value

    @staticmethod
    def _structure(layer: NativeLayer) -> _Layer:
        latent = isinstance(layer.attention, NativeLatentAttention)
        return _Layer(
            attention=None if latent else layer.attention.pointer,
            latent=layer.attention.pointer if latent else None,
            experts=layer.experts and layer.experts.spec_pointer,
            mlp=layer.mlp and layer.mlp.pointer,
            records=None if layer.records is None else ctypes.addressof(layer.records),
            next_records=None if layer.next_records is None else ctypes.addressof(layer.next_records),
        )
