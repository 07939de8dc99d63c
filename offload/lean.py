"""One token through the whole model with one native call for a layer's attention half.

transformers' modules cost more time for a single token than the arithmetic in them. This does the same arithmetic on
the same weights and the same KV cache; prompts, and families that are not known here, go through the modules.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers.cache_utils import DynamicCache

from ..quant.int8 import Int8Format
from ..quant.linear import NativeLinear, PackedMatrix, linear_weight
from ..quant.native import FLOAT32, Matrix, NativeMatrix, NativePool
from ..quant.native_step import Ends, NativeAttention, NativeLatentAttention, NativeMlp, Norm, Router, Token
from .hf import Skeleton
from .hf_layers import AttentionParts, DecoderParts, LatentParts, LayerParts, MlpParts, UnfitError, read_decoder
from .kv_cache import Room, allocates_ahead, new_kv_cache
from .recorder import NoRecorder
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
        cosine, _ = _angles(parts.rotary, torch.zeros(1, 1, hidden), 3)
        width = cosine.shape[-1]
        # Most families give each angle twice, once for either half of a head.
        self.pairs = width // 2 if torch.equal(cosine[..., : width // 2], cosine[..., width // 2 :]) else width
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
        )
        guesses = _guesses(parts.layers) if predict else [None] * len(parts.layers)
        self._layers = [_Layer(self, layer, guess) for layer, guess in zip(parts.layers, guesses, strict=True)]

    def step(self, token: int, position: int, cache: DynamicCache) -> torch.Tensor:
        """The logits [vocabulary] after one more token, whose key and value are added to a cache that is in use."""
        parts, state = self._parts, self._token
        embedded = parts.embed(torch.tensor([[token]]))
        cosine, sine = _angles(parts.rotary, embedded, position)
        self._x.copy_(embedded.view(-1))
        state.cosine, state.sine, state.delta = cosine.data_ptr(), sine.data_ptr(), None
        guessing = self._runtime.wants_guesses
        state.guess = ctypes.addressof(self._guess) if guessing else None
        for layer, cached in zip(self._layers, cache.layers, strict=True):
            room: Room = cached.extend()  # type: ignore[attr-defined]
            state.keys, state.values, state.half, state.capacity, state.first, state.position = room
            layer.run(state, guessing)
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
        ends = Ends(_matrix(parts.output), parts.input_norm, parts.output_norm, parts.router, guess)
        if isinstance(parts.attention, LatentParts):
            self._attention = _latent_attention(pool, ends, parts.attention, parts.scaling, decoder.pairs)
        else:
            self._attention = _attention(pool, ends, parts.attention, parts.scaling, decoder.pairs)
        self._attention.keep(*_tensors(parts.output), *_tensors_of(parts.attention))
        self._mlp = None if parts.mlp is None else _mlp(pool, parts.mlp)
        k = self._k
        self._weights, self._places = decoder._weights[:k].view(1, k), decoder._places[:k].view(1, k)
        self._hidden, self._out = decoder._normed.view(1, -1), decoder._delta.view(1, -1)

    def run(self, token: Token, guessing: bool) -> None:
        self._attention.run(token)
        if self._site is not None:
            work = Assignment.of_token(self._decoder._experts[: self._k])
            guess: Sequence[int] = self._decoder._guess[: self._guessed] if guessing else ()
            self._runtime.recorder.record_token(self._site, work.experts, self._weights, guess)
            outputs = self._runtime.run_experts(self._site, self._hidden, work, guess)
            self._pool.combine(outputs, self._places, self._weights, self._out)
        if self._mlp is not None:
            self._mlp.run(self._hidden, self._out, add=self._site is not None)


def _angles(rotary: Any, like: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of a position, float32, contiguous; some families give them as complex numbers."""
    angles = rotary(like, torch.tensor([[position]]))
    cosine, sine = (angles.real, angles.imag) if torch.is_tensor(angles) else angles
    return cosine.contiguous(), sine.contiguous()


def _attention(pool: NativePool, ends: Ends, parts: AttentionParts, scaling: float, pairs: int) -> NativeAttention:
    return NativeAttention(
        pool,
        ends,
        query=_matrix(parts.query),
        key=_matrix(parts.key),
        value=_matrix(parts.value),
        query_norm=parts.query_norm,
        key_norm=parts.key_norm,
        sinks=parts.sinks,
        head_dim=parts.head_dim,
        rotary_pairs=pairs,
        scaling=scaling,
        clip=parts.clip,
    )


def _latent_attention(
    pool: NativePool, ends: Ends, parts: LatentParts, scaling: float, pairs: int
) -> NativeLatentAttention:
    # One matrix holds what makes keys and what makes values; keys are needed transposed, which a packed one cannot be.
    up, packed = linear_weight(parts.key_value_up), isinstance(parts.key_value_up, NativeLinear)
    heads = up.reshape(parts.heads, -1, up.shape[1])
    key_up = _HeadMatrices.of(pool, heads[:, : parts.plain].transpose(1, 2), packed)
    value_up = _HeadMatrices.of(pool, heads[:, parts.plain :], packed)
    attention = NativeLatentAttention(
        pool,
        ends,
        query_down=None if parts.query_down is None else _matrix(parts.query_down),
        query_norm=parts.query_norm,
        query=_matrix(parts.query),
        latent_down=_matrix(parts.latent_down),
        latent_norm=parts.latent_norm,
        key_up=key_up.first,
        key_up_stride=key_up.stride,
        value_up=value_up.first,
        value_up_stride=value_up.stride,
        heads=parts.heads,
        rotary_pairs=pairs,
        rotation=parts.rotation,
        scaling=scaling,
    )
    attention.keep(key_up, value_up)
    return attention


def _mlp(pool: NativePool, parts: MlpParts) -> NativeMlp:
    mlp = NativeMlp(pool, _matrix(parts.gate), _matrix(parts.up), _matrix(parts.down), parts.activation, parts.share)
    mlp.keep(*_tensors_of(parts))
    return mlp


class _HeadMatrices(NamedTuple):
    """One matrix for each head, in one block of memory."""

    data: torch.Tensor
    first: Matrix
    stride: int

    @classmethod
    def of(cls, pool: NativePool, matrices: torch.Tensor, packed: bool) -> _HeadMatrices:
        """matrices float32 [heads, rows, cols]; INT8 if `packed`."""
        _, rows, cols = matrices.shape
        if not packed:
            data = matrices.contiguous()
            first = Matrix(data=data.data_ptr(), rows=rows, cols=cols, format=FLOAT32)
            return cls(data, first, rows * cols * 4)
        fmt = Int8Format(32)
        data = torch.stack([PackedMatrix.pack(matrix, fmt).data for matrix in matrices])
        return cls(data, NativeMatrix(pool, data[0], rows, cols, fmt).spec, data.stride(0))


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    """The tensors behind the addresses in `_matrix(module)`, which the module may exchange for others (`half()`)."""
    return [p.detach() for p in module.parameters()]


def _tensors_of(parts: AttentionParts | LatentParts | MlpParts) -> list[torch.Tensor]:
    modules = (value for value in vars(parts).values() if isinstance(value, nn.Module))
    return [tensor for module in modules for tensor in _tensors(module)]


def _matrix(module: nn.Module) -> Matrix:
    if isinstance(module, NativeLinear):
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
    try:
        return _checked_decoder(skeleton, pool, runtime)
    except MemoryError:
        raise
    except Exception as error:  # whatever a release of transformers that is newer than this program may have changed
        on_notice(
            f"the fast path for single tokens is not used, answers are slower: {error or type(error).__name__} "
            f"(transformers {transformers.__version__}, model type {skeleton.config.model_type})"
        )
        return None


def _checked_decoder(skeleton: Skeleton, pool: NativePool | None, runtime: ExpertRuntime) -> LeanDecoder | None:
    if pool is None or any(parameter.dtype != torch.float32 for parameter in skeleton.model.parameters()):
        return None
    if not allocates_ahead(new_kv_cache(skeleton.config, 1, 1)) or (parts := read_decoder(skeleton)) is None:
        return None
    decoder = LeanDecoder(parts, pool, runtime, runtime.predictor is not None)
    difference = check(decoder, skeleton.model, runtime)
    if not difference <= TOLERANCE:
        raise UnfitError(f"it differs from transformers' own modules by {difference:.1%}")
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

    worst, recorder = 0.0, runtime.recorder
    runtime.run_experts, runtime.recorder = simple_experts, NoRecorder()  # type: ignore[method-assign]
    try:
        for cache in caches:
            forward(prompt, cache)
        for at, token in enumerate(tokens, len(prompt)):
            want = forward([token], caches[0])
            got = decoder.step(token % vocabulary, at, caches[1])
            difference = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
            worst = difference if not difference <= worst else worst  # NaN stays
    finally:
        del runtime.run_experts
        runtime.recorder = recorder
    return worst
