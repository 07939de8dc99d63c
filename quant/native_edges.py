"""How a token enters the decoder layers and how it leaves them: its embedding, and the last norm with the head."""

from __future__ import annotations

import ctypes

import torch

from .native import Matrix, NativePool, check
from .native_step import Norm


class NativeEmbedding:
    """A table of embeddings, packed or float32, [vocabulary, hidden]; the caller keeps its tensor alive."""

    def __init__(self, pool: NativePool, table: Matrix) -> None:
        self._table, self._call = table, pool.library.c.pm_embed
        self._pointer = ctypes.addressof(table)

    def run(self, token: int, x: torch.Tensor) -> None:
        """x float32 [hidden], contiguous = the row of a token. Raises NativeError where there is none."""
        if self._call(self._pointer, token, x.data_ptr()):
            check(2, f"pm_embed of token {token}")


class NativeHead:
    """What follows the last layer: its output is added to the residual, which goes through a norm and the head.

    Args:
        head: [vocabulary, hidden]; the caller keeps its tensors alive.
    """

    def __init__(self, pool: NativePool, norm: Norm, head: Matrix) -> None:
        self._pool, self._head, self._epsilon = pool, head, norm.epsilon
        self._norm = norm.weight.detach().float().contiguous()
        self._call = pool.library.c.pm_head
        self._pointer, self._weight = ctypes.addressof(head), self._norm.data_ptr()

    def run(self, delta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """delta, x float32 [hidden], contiguous, to logits [vocabulary]; x becomes x + delta."""
        logits = torch.empty(self._head.rows)
        status = self._call(
            self._pool.handle,
            self._pointer,
            self._weight,
            self._epsilon,
            delta.data_ptr(),
            x.data_ptr(),
            logits.data_ptr(),
        )
        if status:
            check(status, f"pm_head {tuple(x.shape)}")
        return logits
