"""One token through the whole model with one native call for a layer's attention half.

transformers' modules cost more time for a single token than the arithmetic in them. This does the same arithmetic on
the same weights and the same KV cache; prompts, and families that are not known here, go through the modules.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ..quant.linear import QuantLinear
from ..quant.native import FLOAT32, Matrix, NativePool
from ..quant.native_step import NativeAttention, NativeMlp, Norm, Router, Token
from .hf import Skeleton
from .hf_layers import DecoderParts, LayerParts, read_decoder
from .kv_cache import allocates_ahead, new_kv_cache
from .runtime import Assignment, ExpertRuntime

TOLERANCE = 0.05
"""Most that logits may differ from the modules' own in `check`, as a share of the largest. Where weights are packed,
a difference in the last bit of a float can move an activation to the next of its 255 codes, and so on from layer to
layer; with plain weights the tests ask for 1e-5."""


class LeanDecoder:
    """Runs single tokens of a model whose activations are float32.

    Args:
        parts: of the loaded model; its tensors must not be replaced afterwards.
        predict: whether to guess the next layer's experts.
    """

    def __init__(self, parts: DecoderParts, pool: NativePool, runtime: ExpertRuntime, predict: bool) -> None:
        self._parts, self._pool, self._runtime = parts, pool, runtime
        hidden = parts.norm.weight.shape[0]
        cosine, _ = parts.rotary(torch.zeros(1, 1, hidden), torch.tensor([[3]]))
        width = cosine.shape[-1]
        # Most families give each angle twice, once for either half of a head.
        self._pairs = width // 2 if torch.equal(cosine[..., : width // 2], cosine[..., width // 2 :]) else width
        most = max(layer.router.top_k for layer in parts.layers if layer.router is not None)
        self._x, self._delta, self._normed = (torch.zeros(hidden) for _ in range(3))
        self._weights = torch.zeros(most)
        self._experts, self._guess = ((ctypes.c_int32 * most)() for _ in range(2))
        self._places = torch.arange(most, dtype=torch.int32)
        self._token = Token(
            x=self._x.data_ptr(),
            normed=self._normed.data_ptr(),
            weights=self._weights.data_ptr(),
            experts=ctypes.addressof(self._experts),
            guess=ctypes.addressof(self._guess),
        )
        guesses = _guesses(parts.layers) if predict else [None] * len(parts.layers)
        self._layers = [_Layer(self, layer, guess) for layer, guess in zip(parts.layers, guesses, strict=True)]

    def step(self, token: int, position: int, cache: DynamicCache) -> torch.Tensor:
        """The logits [vocabulary] after one more token, whose key and value are added to a cache that is in use."""
        parts, state = self._parts, self._token
        embedded = parts.embed(torch.tensor([[token]]))
        cosine, sine = parts.rotary(embedded, torch.tensor([[position]]))
        self._x.copy_(embedded.view(-1))
        state.cosine, state.sine, state.delta = cosine.data_ptr(), sine.data_ptr(), None
        for layer, cached in zip(self._layers, cache.layers, strict=True):
            state.keys, state.values, state.capacity, state.first, state.position = cached.extend()  # type: ignore[attr-defined]
            layer.run(state)
            state.delta = self._delta.data_ptr()
        self._x.add_(self._delta)
        return parts.head(parts.norm(self._x))


def _guesses(layers: list[LayerParts]) -> list[tuple[Norm, Router] | None]:
    """For each layer that routes, the norm and router of the next one that does."""
    guesses: list[tuple[Norm, Router] | None] = []
    following: tuple[Norm, Router] | None = None
    for layer in reversed(layers):
        guesses.append(following if layer.router is not None else None)
        if layer.router is not None:
            following = layer.output_norm, layer.router
    return guesses[::-1]


class _Layer:
    """A decoder layer: attention and routing, then its experts, then its dense part."""

    def __init__(self, decoder: LeanDecoder, parts: LayerParts, guess: tuple[Norm, Router] | None) -> None:
        pool = decoder._pool
        self._decoder, self._pool, self._runtime = decoder, pool, decoder._runtime
        self._site = None if parts.site is None else parts.site.index
        self._k = 0 if parts.router is None else parts.router.top_k
        self._guessed = 0 if guess is None else guess[1].top_k
        self._attention = NativeAttention(
            pool,
            query=_matrix(parts.query),
            key=_matrix(parts.key),
            value=_matrix(parts.value),
            output=_matrix(parts.output),
            input_norm=parts.input_norm,
            output_norm=parts.output_norm,
            query_norm=parts.query_norm,
            key_norm=parts.key_norm,
            sinks=parts.sinks,
            router=parts.router,
            guess=guess,
            heads=_matrix(parts.query).rows // parts.head_dim,
            kv_heads=_matrix(parts.key).rows // parts.head_dim,
            head_dim=parts.head_dim,
            rotary_pairs=decoder._pairs,
            scaling=parts.scaling,
            clip=parts.clip,
        )
        mlp = parts.mlp
        self._mlp = mlp and NativeMlp(
            pool, _matrix(mlp.gate), _matrix(mlp.up), _matrix(mlp.down), mlp.activation, mlp.share
        )
        k = self._k
        self._weights, self._places = decoder._weights[:k].view(1, k), decoder._places[:k].view(1, k)
        self._hidden, self._out = decoder._normed.view(1, -1), decoder._delta.view(1, -1)

    def run(self, token: Token) -> None:
        self._attention.run(token)
        if self._site is not None:
            work = Assignment.of_token(self._decoder._experts[: self._k])
            guess: Sequence[int] = self._decoder._guess[: self._guessed]
            outputs = self._runtime.run_experts(self._site, self._hidden, work, guess)
            self._pool.combine(outputs, self._places, self._weights, self._out)
        if self._mlp is not None:
            self._mlp.run(self._hidden, self._out, add=self._site is not None)


def _matrix(module: nn.Module) -> Matrix:
    if isinstance(module, QuantLinear):
        return module.matrix.spec
    assert isinstance(module, nn.Linear), module
    weight, bias = module.weight, module.bias
    assert weight.dtype == torch.float32, weight.dtype
    assert weight.is_contiguous(), weight.stride()
    return Matrix(
        data=weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        rows=weight.shape[0],
        cols=weight.shape[1],
        format=FLOAT32,
    )


def make_lean_decoder(
    skeleton: Skeleton, pool: NativePool | None, runtime: ExpertRuntime, on_notice: Callable[[str], None]
) -> LeanDecoder | None:
    """The decoder of a loaded model whose experts are attached; None where the modules have to do."""
    if pool is None or any(parameter.dtype != torch.float32 for parameter in skeleton.model.parameters()):
        return None
    if not allocates_ahead(new_kv_cache(skeleton.config, 1, 1)) or (parts := read_decoder(skeleton)) is None:
        return None
    decoder = LeanDecoder(parts, pool, runtime, runtime.predictor is not None)
    difference = check(decoder, skeleton.model, runtime)
    if difference > TOLERANCE:
        on_notice(
            f"the fast path for single tokens differs from transformers' own modules by {difference:.1%} and is not "
            "used: answers are slower; a release of transformers that is newer than this program may be the reason"
        )
        return None
    return decoder


@torch.inference_mode()
def check(decoder: LeanDecoder, model: Any, runtime: ExpertRuntime) -> float:
    """How far the logits of two tokens lie from those of the model's own modules, as a share of the largest.

    Experts are replaced by something simple that depends on the router's choice, so that nothing is read.
    """
    prompt, tokens = [0, 1, 2], [3, 4]
    vocabulary = model.config.vocab_size
    caches = [new_kv_cache(model.config, len(prompt) + len(tokens), len(prompt)) for _ in range(2)]

    def forward(ids: list[int], cache: DynamicCache) -> torch.Tensor:
        ids = [i % vocabulary for i in ids]
        positions = torch.arange(len(ids))[None] + cache.get_seq_length()
        output = model(input_ids=torch.tensor([ids]), position_ids=positions, past_key_values=cache)
        return output.logits[0, -1]

    def simple_experts(_layer: int, hidden: torch.Tensor, work: Assignment, _guess: Sequence[int]) -> torch.Tensor:
        scale = torch.zeros(len(work.rows))
        for expert, start, end in zip(work.experts, work.starts, work.starts[1:], strict=False):
            scale[start:end] = (1 + expert) / (1 + work.experts[-1])
        return hidden[work.rows] * scale[:, None]

    worst = 0.0
    runtime.run_experts = simple_experts  # type: ignore[method-assign]
    try:
        for cache in caches:
            forward(prompt, cache)
        for at, token in enumerate(tokens, len(prompt)):
            want = forward([token], caches[0])
            got = decoder.step(token % vocabulary, at, caches[1])
            worst = max(worst, float((got - want).abs().max() / want.abs().max().clamp(min=1e-30)))
    finally:
        del runtime.run_experts
    return worst
