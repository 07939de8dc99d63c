"""What one token needs of a layer beside its routed experts, in one native call each: the attention half with its
router, and the trunk's feed-forward blocks. The structures mirror those of `csrc/pocketmoe_cpu.h`.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
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
        groups, top_groups, group_best: choose only within the groups whose best `group_best` experts (1 or 2) are best;
            0 groups = among all.
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
    group_best: int = 2
    scale: float = 1.0


class Ends(NamedTuple):
    """How a layer's attention half begins and ends.

    Attributes:
        output: the projection back to the residual; the caller keeps its tensors alive.
        input_norm, output_norm: before and after attention.
        router: this layer's; None where a dense block follows.
        guess: the next MoE layer's norm and router, to be run on this layer's residual; None = no guess.
    """

    output: Matrix
    input_norm: Norm
    output_norm: Norm
    router: Router | None
    guess: tuple[Norm, Router] | None


class Rotation(IntEnum):
    """`pm_rotation`: which of a head's values make a pair, and where the turned pair goes."""

    HALVES = 0
    """(i, i + pairs)"""
    INTERLEAVED = 1
    """(2 i, 2 i + 1)"""
    SORTED = 2
    """From (2 i, 2 i + 1) to (i, i + pairs)."""


class _Router(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("weight", "bias", "correction")),
        *((name, _INT) for name in ("experts", "top_k", "scoring", "normalize", "groups", "top_groups", "group_best")),
        ("scale", _FLOAT),
    )


class _Ends(ctypes.Structure):
    _fields_ = (
        ("output", Matrix),
        *((name, _POINTER) for name in ("input_norm", "output_norm", "router", "next_norm", "next_router")),
        *((name, _FLOAT) for name in ("input_epsilon", "output_epsilon", "next_epsilon")),
    )


class _AttentionSpec(ctypes.Structure):
    _fields_ = (
        ("ends", _Ends),
        *((name, Matrix) for name in ("query", "key", "value")),
        *((name, _POINTER) for name in ("query_norm", "key_norm", "sinks")),
        *((name, _INT) for name in ("heads", "kv_heads", "head_dim", "rotary_pairs", "whole_norms")),
        *((name, _FLOAT) for name in ("qk_epsilon", "scaling", "clip")),
    )


class _LatentSpec(ctypes.Structure):
    _fields_ = (
        ("ends", _Ends),
        ("query_down", Matrix),
        ("query_norm", _POINTER),
        ("query", Matrix),
        ("latent_down", Matrix),
        ("latent_norm", _POINTER),
        *((name, Matrix) for name in ("key_up", "value_up")),
        *((name, _SIZE) for name in ("key_up_stride", "value_up_stride")),
        *((name, _INT) for name in ("heads", "rotary_pairs", "rotation")),
        *((name, _FLOAT) for name in ("query_epsilon", "latent_epsilon", "scaling")),
    )


class Token(ctypes.Structure):
    """`pm_token`: one token's arrays, by address; see the header for what is read and what is written."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "delta", "cosine", "sine", "keys", "values")),
        *((name, _SIZE) for name in ("half", "capacity", "first", "position")),
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

    def keep(self, *things: Any) -> None:
        """Keep what a given address points to."""
        self._kept += things

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
            group_best=router.group_best,
            scale=router.scale,
        )
        self._kept.append(struct)
        return ctypes.addressof(struct)

    def ends(self, ends: Ends) -> _Ends:
        next_norm, next_router = ends.guess or (None, None)
        return _Ends(
            output=ends.output,
            input_norm=self.address(ends.input_norm.weight),
            output_norm=self.address(ends.output_norm.weight),
            router=self.router(ends.router),
            next_norm=self.address(next_norm and next_norm.weight),
            next_router=self.router(next_router),
            input_epsilon=ends.input_norm.epsilon,
            output_epsilon=ends.output_norm.epsilon,
            next_epsilon=next_norm.epsilon if next_norm else 0.0,
        )


class NativeAttention(_Keeper):
    """The first half of a decoder layer for one token: x += attention(norm(x)), then a norm for what follows, and the
    router's choice.

    Args:
        query, key, value: the projections, [heads * head_dim, hidden] and so on; the caller keeps their tensors alive.
        query_norm, key_norm: of each head [head_dim], or of the whole projection.
        sinks: float32 [heads], or None.
        rotary_pairs: how many pairs of a head's values are turned (half its rotary width).
        clip: bound of queries, keys and values; 0 = none.
    """

    def __init__(
        self,
        pool: NativePool,
        ends: Ends,
        *,
        query: Matrix,
        key: Matrix,
        value: Matrix,
        query_norm: Norm | None,
        key_norm: Norm | None,
        sinks: torch.Tensor | None,
        head_dim: int,
        rotary_pairs: int,
        scaling: float,
        clip: float = 0.0,
    ) -> None:
        super().__init__()
        self.pool, self._call = pool, pool.library.c.pm_attention
        self._spec = _AttentionSpec(
            ends=self.ends(ends),
            query=query,
            key=key,
            value=value,
            query_norm=self.address(query_norm and query_norm.weight),
            key_norm=self.address(key_norm and key_norm.weight),
            sinks=self.address(sinks),
            heads=query.rows // head_dim,
            kv_heads=key.rows // head_dim,
            head_dim=head_dim,
            rotary_pairs=rotary_pairs,
            whole_norms=int(query_norm is not None and len(query_norm.weight) != head_dim),
            qk_epsilon=query_norm.epsilon if query_norm else 0.0,
            scaling=scaling,
            clip=clip,
        )
        self.pointer = ctypes.addressof(self._spec)

    def run(self, token: Token) -> None:
        status = self._call(self.pool.handle, self.pointer, ctypes.addressof(token))
        if status:
            check(status, f"pm_attention at position {token.position}")


class NativeLatentAttention(_Keeper):
    """The same with multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), in its absorbed form: what is cached
    is one latent vector a token, and nothing is ever expanded from it.

    Args:
        query_down, query_norm: to a latent query; None where queries come from the hidden state directly.
        query: [heads * (plain + 2 rotary_pairs), ...]; a head's plain values come first.
        latent_down: [latent + 2 rotary_pairs, hidden].
        key_up: of the first head, transposed: [latent, plain]; the next one lies `key_up_stride` bytes further.
        value_up: of the first head: [value_dim, latent], and so on.
    """

    def __init__(
        self,
        pool: NativePool,
        ends: Ends,
        *,
        query_down: Matrix | None,
        query_norm: Norm | None,
        query: Matrix,
        latent_down: Matrix,
        latent_norm: Norm,
        key_up: Matrix,
        key_up_stride: int,
        value_up: Matrix,
        value_up_stride: int,
        heads: int,
        rotary_pairs: int,
        rotation: Rotation,
        scaling: float,
    ) -> None:
        super().__init__()
        self.pool, self._call = pool, pool.library.c.pm_latent_attention
        self._spec = _LatentSpec(
            ends=self.ends(ends),
            query_down=query_down or Matrix(),
            query_norm=self.address(query_norm and query_norm.weight),
            query=query,
            latent_down=latent_down,
            latent_norm=self.address(latent_norm.weight),
            key_up=key_up,
            value_up=value_up,
            key_up_stride=key_up_stride,
            value_up_stride=value_up_stride,
            heads=heads,
            rotary_pairs=rotary_pairs,
            rotation=int(rotation),
            query_epsilon=query_norm.epsilon if query_norm else 0.0,
            latent_epsilon=latent_norm.epsilon,
            scaling=scaling,
        )
        self.pointer = ctypes.addressof(self._spec)

    def run(self, token: Token) -> None:
        status = self._call(self.pool.handle, self.pointer, ctypes.addressof(token))
        if status:
            check(status, f"pm_latent_attention at position {token.position}")


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
        self.pointer = ctypes.addressof(self._spec)

    def run(self, x: torch.Tensor, out: torch.Tensor, add: bool) -> None:
        """out [hidden] = the block of x [hidden], or out += it; float32, contiguous."""
        status = self._call(self.pool.handle, self.pointer, x.data_ptr(), int(add), out.data_ptr())
        if status:
            check(status, f"pm_mlp {tuple(x.shape)}")
