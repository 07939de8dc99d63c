"""What one token needs of a layer beside its routed experts, in one native call each: the attention half with its
router, and the trunk's feed-forward blocks. The structures mirror those of `csrc/pocketmoe_cpu.h`.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch

from .activations import KINDS, Activation
from .native import Matrix, NativePool, check

_POINTER, _INT, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class Norm(NamedTuple):
    """RMS norm: weight * x / sqrt(mean(x^2) + epsilon), weight float32 [n]."""

    weight: torch.Tensor
    epsilon: float


class Router(NamedTuple):
    """How a layer chooses experts: the `top_k` largest of scores + correction, weighted by their scores.

    Attributes:
        weight: float32 [experts, hidden].
        bias: float32 [experts], part of the logits; or None.
        correction: float32 [experts], counts for the choice alone; or None.
        sigmoid: scores are sigmoids of the logits, else their softmax.
        normalize: weights are divided by their sum.
        groups, top_groups: choose only within the groups whose two best experts are best; 0 = among all.
        scale: of the weights, at last.
    """

    weight: torch.Tensor
    top_k: int
    bias: torch.Tensor | None = None
    correction: torch.Tensor | None = None
    sigmoid: bool = False
    normalize: bool = True
    groups: int = 0
    top_groups: int = 0
    scale: float = 1.0


class _Router(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("weight", "bias", "correction")),
        *((name, _INT) for name in ("experts", "top_k", "scoring", "normalize", "groups", "top_groups")),
        ("scale", _FLOAT),
    )


class _AttentionSpec(ctypes.Structure):
    _fields_ = (
        *((name, Matrix) for name in ("query", "key", "value", "output")),
        *((name, _POINTER) for name in ("input_norm", "query_norm", "key_norm", "output_norm", "sinks")),
        *((name, _POINTER) for name in ("router", "next_norm", "next_router")),
        *((name, _INT) for name in ("heads", "kv_heads", "head_dim", "rotary_pairs", "whole_norms")),
        *((name, _FLOAT) for name in ("input_epsilon", "qk_epsilon", "output_epsilon", "next_epsilon")),
        *((name, _FLOAT) for name in ("scaling", "clip")),
    )


class Token(ctypes.Structure):
    """`pm_token`: one token's arrays, by address; see the header for what is read and what is written."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "delta", "cosine", "sine", "keys", "values")),
        *((name, _SIZE) for name in ("capacity", "first", "position")),
        *((name, _POINTER) for name in ("normed", "experts", "weights", "guess")),
    )


class _MlpSpec(ctypes.Structure):
    _fields_ = (
        *((name, Matrix) for name in ("gate", "up", "down")),
        ("share", _POINTER),
        ("activation", _INT),
        ("alpha", _FLOAT),
        ("limit", _FLOAT),
    )


class _Keeper:
    """Addresses of tensors, which stay alive with it."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def address(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.detach().float().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def router(self, router: Router | None) -> int | None:
        if router is None:
            return None
        struct = _Router(
            weight=self.address(router.weight),
            bias=self.address(router.bias),
            correction=self.address(router.correction),
            experts=router.weight.shape[0],
            top_k=router.top_k,
            scoring=int(router.sigmoid),
            normalize=int(router.normalize),
            groups=router.groups,
            top_groups=router.top_groups,
            scale=router.scale,
        )
        self._kept.append(struct)
        return ctypes.addressof(struct)


class NativeAttention(_Keeper):
    """The first half of a decoder layer for one token: x += attention(norm(x)), then a norm for what follows, and the
    router's choice.

    Args:
        query, key, value, output: the projections, [heads * head_dim, hidden] and so on; the caller keeps their tensors
            alive.
        input_norm, output_norm: before and after attention.
        query_norm, key_norm: of each head [head_dim], or of the whole projection.
        sinks: float32 [heads], or None.
        router: this layer's; None where a dense block follows.
        guess: the next MoE layer's norm and router, to be run on this layer's residual; None = no guess.
        rotary_pairs: how many pairs of a head's values are turned (half its rotary width).
        clip: bound of queries, keys and values; 0 = none.
    """

    def __init__(
        self,
        pool: NativePool,
        *,
        query: Matrix,
        key: Matrix,
        value: Matrix,
        output: Matrix,
        input_norm: Norm,
        output_norm: Norm,
        query_norm: Norm | None,
        key_norm: Norm | None,
        sinks: torch.Tensor | None,
        router: Router | None,
        guess: tuple[Norm, Router] | None,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rotary_pairs: int,
        scaling: float,
        clip: float = 0.0,
    ) -> None:
        super().__init__()
        next_norm, next_router = guess or (None, None)
        self.pool, self._call = pool, pool.library.c.pm_attention
        self._spec = _AttentionSpec(
            query=query,
            key=key,
            value=value,
            output=output,
            input_norm=self.address(input_norm.weight),
            query_norm=self.address(query_norm and query_norm.weight),
            key_norm=self.address(key_norm and key_norm.weight),
            output_norm=self.address(output_norm.weight),
            sinks=self.address(sinks),
            router=self.router(router),
            next_norm=self.address(next_norm and next_norm.weight),
            next_router=self.router(next_router),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rotary_pairs=rotary_pairs,
            whole_norms=int(query_norm is not None and len(query_norm.weight) != head_dim),
            input_epsilon=input_norm.epsilon,
            qk_epsilon=query_norm.epsilon if query_norm else 0.0,
            output_epsilon=output_norm.epsilon,
            next_epsilon=next_norm.epsilon if next_norm else 0.0,
            scaling=scaling,
            clip=clip,
        )
        self._pointer = ctypes.addressof(self._spec)

    def run(self, token: Token) -> None:
        status = self._call(self.pool.handle, self._pointer, ctypes.addressof(token))
        if status:
            check(status, f"pm_attention at position {token.position}")


class NativeMlp(_Keeper):
    """A feed-forward block of the trunk for one token: down(activation(gate x) * up x).

    Args:
        gate, up, down: the projections; the caller keeps their tensors alive.
        share: float32 [hidden]; the output is multiplied by sigmoid(share x). None = 1.
    """

    def __init__(
        self,
        pool: NativePool,
        gate: Matrix,
        up: Matrix,
        down: Matrix,
        activation: Activation,
        share: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.pool, self._call = pool, pool.library.c.pm_mlp
        self._spec = _MlpSpec(
            gate=gate,
            up=up,
            down=down,
            share=self.address(share),
            activation=KINDS.index(activation.kind),
            alpha=activation.alpha,
            limit=activation.limit,
        )
        self._pointer = ctypes.addressof(self._spec)

    def run(self, x: torch.Tensor, out: torch.Tensor, add: bool) -> None:
        """out [hidden] = the block of x [hidden], or out += it; float32, contiguous."""
        status = self._call(self.pool.handle, self._pointer, x.data_ptr(), int(add), out.data_ptr())
        if status:
            check(status, f"pm_mlp {tuple(x.shape)}")
