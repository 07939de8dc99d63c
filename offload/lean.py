"""One token through the whole model in as few native calls as there are layers with something to read.

transformers' modules cost more time for a single token than the arithmetic in them. This does the same arithmetic on
the same weights and the same KV cache; prompts, and families that are not known here, go through the modules.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import nn
from transformers.cache_utils import DynamicCache

from ..quant.int8 import Int8Format
from ..quant.linear import NativeLinear, PackedMatrix, QuantEmbedding, linear_weight
from ..quant.native import FLOAT32, Matrix, NativeKernels, NativeMatrix, NativePool
from ..quant.native_edges import NativeEmbedding, NativeHead
from ..quant.native_layers import NativeLayer, NativeLayers
from ..quant.native_step import Ends, NativeAttention, NativeLatentAttention, NativeMlp, Norm, Router
from .hf import Skeleton
from .hf_layers import AttentionParts, DecoderParts, LatentParts, LayerParts, MlpParts, UnfitError, read_decoder
from .kv_cache import Room, allocates_ahead, new_kv_cache
from .recorder import NoRecorder
from .runtime import Assignment, ExpertRuntime

TOLERANCE = 0.05
"""Most that logits may differ from the modules' own in `check`, as a share of the largest. Where weights are packed,
a difference in the last bit of a float can move an activation to the next of its 255 codes, and so on from layer to
layer; with plain weights the tests ask for 1e-5."""


_Numbers = ctypes.Array[ctypes.c_int32]


class LeanDecoder:
    """Runs single tokens of a model whose activations are float32.

    Args:
        parts: of the loaded model; its tensors must not be replaced afterwards.
        predict: whether to guess the next layer's experts.
    """

    def __init__(self, parts: DecoderParts, pool: NativePool, runtime: ExpertRuntime, predict: bool) -> None:
        self._parts, self._runtime = parts, runtime
        hidden = parts.norm.weight.shape[0]
        self._angles = _Angles(parts.rotary, hidden)
        self.pairs = self._angles.pairs
        self.x, self.delta, self.normed = (torch.zeros(hidden) for _ in range(3))
        self._embed, self._head = _embedding(pool, parts.embed), NativeHead(pool, parts.norm, _matrix(parts.head))
        self._kept = [*_tensors(parts.embed), *_tensors(parts.head)]
        guesses = _guesses(parts.layers) if predict else [None] * len(parts.layers)
        self.choices = Choices.of([layer.router.top_k for layer in parts.layers if layer.router is not None])
        self._layers = [
            _Layer(self, pool, runtime, layer, guess) for layer, guess in zip(parts.layers, guesses, strict=True)
        ]
        self._native = NativeLayers(pool, [layer.native for layer in self._layers], self.delta)
        for number, (state, layer) in enumerate(zip(self._native.tokens, self._layers, strict=True)):
            state.x, state.normed = self.x.data_ptr(), self.normed.data_ptr()
            state.cosine, state.sine = self._angles.cosine.data_ptr(), self._angles.sine.data_ptr()
            state.delta = self.delta.data_ptr() if number else None
            state.weights, state.experts = layer.weights.data_ptr(), ctypes.addressof(layer.experts)

    def step(self, token: int, position: int, cache: DynamicCache) -> torch.Tensor:
        """The logits [vocabulary] after one more token, whose key and value are added to a cache that is in use."""
        runtime, began = self._runtime, time.perf_counter()
        self._embed.run(token, self.x)
        self._angles.turn_to(position)
        guessing = runtime.wants_guesses
        for layer, state, cached in zip(self._layers, self._native.tokens, cache.layers, strict=True):
            room: Room = cached.extend()  # type: ignore[attr-defined]
            state.keys, state.values, state.half, state.capacity, state.first, state.position = room
            state.guess = ctypes.addressof(layer.guess) if guessing and layer.guess else None
        at = 0
        while at < len(self._layers):
            reached = self._native.run(at, runtime.may_run_alone)
            self._note(at, reached, began)
            if reached < len(self._layers):
                self._layers[reached].run_experts(guessing, began)
            at = reached + 1
        runtime.recorder.record_token(*self.choices[:2], self.choices.guesses if guessing else None)
        return self._head.run(self.delta, self.x)

    def _note(self, first: int, end: int, began: float) -> None:
        """Do the books of the layers first..end - 1, which have run by themselves, of a step since `began`."""
        alone = [
            (layer.site, layer.experts[:], seconds)
            for layer, seconds in zip(self._layers[first:end], self._native.seconds[first:end], strict=True)
            if layer.site is not None
        ]
        if alone:
            self._runtime.note_layers(alone, began)


class Choices(NamedTuple):
    """What the routers chose for a token: [MoE layers, k], -1 and 0 where a layer chooses fewer."""

    experts: np.ndarray[Any, Any]
    """int32."""
    weights: np.ndarray[Any, Any]
    """float32."""
    guesses: np.ndarray[Any, Any]
    """int32: what each layer has guessed for the next one."""

    @classmethod
    def of(cls, top_ks: list[int]) -> Choices:
        shape = max(1, len(top_ks)), max(top_ks, default=0)
        return cls(np.full(shape, -1, np.int32), np.zeros(shape, np.float32), np.full(shape, -1, np.int32))

    def row(self, layer: int, k: int, guessed: int) -> tuple[_Numbers, torch.Tensor, _Numbers]:
        """A layer's own, for native code to write: experts [k], weights [1, k] and guesses [guessed]."""
        experts = (ctypes.c_int32 * k).from_buffer(self.experts[layer])
        guess = (ctypes.c_int32 * guessed).from_buffer(self.guesses[layer])
        return experts, torch.from_numpy(self.weights[layer : layer + 1, :k]), guess


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
    """A decoder layer: attention and routing, then its experts, then its dense part.

    Attributes:
        site: its number among those with experts; None = it has none.
        experts, weights, guess: what its router chose, int32 [k] and float32 [k], and what the next one is believed to.
    """

    def __init__(
        self,
        decoder: LeanDecoder,
        pool: NativePool,
        runtime: ExpertRuntime,
        parts: LayerParts,
        guess: tuple[Norm, Router] | None,
    ) -> None:
        self._pool, self._runtime = pool, runtime
        self.site = None if parts.site is None else parts.site.index
        k = 0 if parts.router is None else parts.router.top_k
        self.experts, self.weights, self.guess = decoder.choices.row(
            0 if self.site is None else self.site, k, 0 if guess is None else guess[1].top_k
        )
        self._places = torch.arange(k, dtype=torch.int32).view(1, k)
        self._hidden, self._out = decoder.normed.view(1, -1), decoder.delta.view(1, -1)
        ends = Ends(_matrix(parts.output), parts.input_norm, parts.output_norm, parts.router, guess)
        if isinstance(parts.attention, LatentParts):
            attention = _latent_attention(pool, ends, parts.attention, parts.scaling, decoder.pairs)
        else:
            attention = _attention(pool, ends, parts.attention, parts.scaling, decoder.pairs)
        attention.keep(*_tensors(parts.output), *_tensors_of(parts.attention))
        self._mlp = None if parts.mlp is None else _mlp(pool, parts.mlp)
        self.native = NativeLayer(attention, mlp=self._mlp)
        table, kernels = runtime.table, None if self.site is None else runtime.kernels[self.site]
        if self.site is not None and table is not None and isinstance(kernels, NativeKernels):
            following = None if guess is None else table.row(self.site + 1)
            self.native = self.native._replace(experts=kernels, records=table.row(self.site), next_records=following)

    def run_experts(self, guessing: bool, began: float) -> None:
        """What comes after the attention half, read if necessary."""
        assert self.site is not None
        work = Assignment.of_token(self.experts[:])
        guess = self.guess[:] if guessing else ()
        outputs = self._runtime.run_experts(self.site, self._hidden, work, guess, began)
        self._pool.combine(outputs, self._places, self.weights, self._out)
        if self._mlp is not None:
            self._mlp.run(self._hidden, self._out, add=True)


class _Angles:
    """The cosines and sines of one position, float32 [width], at addresses that stay.

    Attributes:
        pairs: how many of them are distinct: most families give each angle twice, once for either half of a head.
    """

    ahead = 64
    """Positions that are asked for at a time, where angles depend on nothing else."""

    def __init__(self, rotary: Any, hidden: int) -> None:
        self._rotary, self._like = rotary, torch.zeros(1, 1, hidden)
        if getattr(rotary, "rope_type", None) not in ("default", "linear", "llama3", "yarn"):
            self.ahead = 1  # others may depend on how far the sequence has come
        self._from = -1
        self._known: tuple[torch.Tensor, ...] = ()
        cosine = self._ask(3)[0][0]
        width = len(cosine)
        self.pairs = width // 2 if torch.equal(cosine[: width // 2], cosine[width // 2 :]) else width
        self.cosine, self.sine = torch.zeros(width), torch.zeros(width)

    def turn_to(self, position: int) -> None:
        first = position // self.ahead * self.ahead
        if first != self._from:
            self._from, self._known = first, self._ask(first)
        for ours, known in zip((self.cosine, self.sine), self._known, strict=True):
            ctypes.memmove(ours.data_ptr(), known.data_ptr() + (position - first) * ours.nbytes, ours.nbytes)

    def _ask(self, first: int) -> tuple[torch.Tensor, ...]:
        """float32 [ahead, width] each, contiguous; some families give them as complex numbers."""
        angles = self._rotary(self._like, torch.arange(first, first + self.ahead)[None])
        cosine, sine = (angles.real, angles.imag) if torch.is_tensor(angles) else angles
        return cosine[0].float().contiguous(), sine[0].float().contiguous()


def _embedding(pool: NativePool, module: nn.Module) -> NativeEmbedding:
    if isinstance(module, QuantEmbedding):
        packed = module.packed
        return NativeEmbedding(pool, NativeMatrix(pool, packed.data, packed.rows, packed.cols, packed.format).spec)
    if type(module) is not nn.Embedding:
        raise UnfitError(f"embeddings of type {type(module).__name__}")
    return NativeEmbedding(pool, _plain(module.weight, None))


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
    return _plain(module.weight, module.bias)


def _plain(weight: torch.Tensor, bias: torch.Tensor | None) -> Matrix:
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

    def simple_experts(_layer: int, hidden: torch.Tensor, work: Assignment, *_: object) -> torch.Tensor:
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
