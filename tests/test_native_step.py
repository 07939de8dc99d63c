"""The native attention half, router and dense block against torch, on every instruction set that this machine has."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from pocketmoe.quant.activations import Activation, apply
from pocketmoe.quant.native import FLOAT32, Matrix, NativeError, NativePool, load_native
from pocketmoe.quant.native_step import Ends, NativeAttention, NativeMlp, Norm, Router, Token

library = load_native()
pytestmark = pytest.mark.skipif(library is None, reason="the native kernels are not built")


@pytest.fixture(params=library.isas if library else ())
def pool(request) -> Iterator[NativePool]:
    pool = NativePool(2, request.param)
    yield pool
    pool.close()


class Shape(NamedTuple):
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_pairs: int
    experts: int
    top_k: int
    cached: int
    first: int = 0
    bias: bool = False
    norm: str = ""
    sinks: bool = False
    clip: float = 0.0


SHAPES = {
    "grouped heads": Shape(64, 8, 2, 16, 8, 8, 2, 9),
    "odd sizes": Shape(37, 3, 3, 14, 5, 7, 3, 21, bias=True),
    "five heads to one, partly rotated": Shape(48, 5, 1, 24, 6, 12, 5, 70, norm="head"),
    "norms of whole projections, clipped": Shape(96, 6, 3, 20, 10, 9, 1, 3, norm="whole", clip=0.4),
    "sinks in a window": Shape(80, 4, 2, 64, 32, 33, 4, 150, first=90, bias=True, sinks=True),
    "first token": Shape(256, 4, 2, 128, 64, 128, 8, 0),
}


def matrix(tensor: torch.Tensor, bias: torch.Tensor | None = None) -> Matrix:
    rows, cols = tensor.shape
    address = None if bias is None else bias.data_ptr()
    return Matrix(data=tensor.data_ptr(), bias=address, rows=rows, cols=cols, format=FLOAT32)


def rms(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.epsilon)


def turn(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """x [heads, head_dim]"""
    n = len(cosine)
    a, b, rest = x[:, :n], x[:, n : 2 * n], x[:, 2 * n :]
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine, rest), 1)


def choose(router: Router, x: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    logits = F.linear(x, router.weight, router.bias)
    scores = logits.sigmoid() if router.sigmoid else logits.softmax(0)
    choice = scores if router.correction is None else scores + router.correction
    if router.groups > 1:
        grouped = choice.view(router.groups, -1)
        best = grouped.topk(router.group_best, 1)[0].sum(1).topk(router.top_groups)[1]
        mask = torch.zeros(router.groups, dtype=torch.bool)
        mask[best] = True
        choice = grouped.masked_fill(~mask[:, None], float("-inf")).view(-1)
    experts = choice.topk(router.top_k)[1].sort()[0]
    weights = scores[experts]
    return experts.tolist(), weights / (weights.sum() if router.normalize else 1) * router.scale


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_attention_agrees_with_torch(pool: NativePool, shape: Shape, half: bool):
    generator = torch.Generator().manual_seed(hash(shape[:8]) % 1000)

    def draw(*size: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*size, generator=generator)

    hidden, width, kv_width = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    weights = [draw(rows, cols, scale=cols**-0.5) for rows, cols in ((width, hidden), (kv_width, hidden))]
    weights += [draw(kv_width, hidden, scale=hidden**-0.5), draw(hidden, width, scale=width**-0.5)]
    biases = [draw(len(w)) if shape.bias else None for w in weights]
    norms = [Norm(1 + draw(hidden, scale=0.1), 1e-5) for _ in range(3)]
    sizes = {"": None, "head": (shape.head_dim, shape.head_dim), "whole": (width, kv_width)}[shape.norm]
    qk = [None, None] if sizes is None else [Norm(1 + draw(n, scale=0.1), 1e-3) for n in sizes]
    sinks = draw(shape.heads) if shape.sinks else None
    router = Router(draw(shape.experts, hidden), shape.top_k, bias=draw(shape.experts) if shape.bias else None)
    following = Router(draw(shape.experts, hidden), shape.top_k)
    capacity, position = shape.cached + 3, shape.cached
    cached = torch.float16 if half else torch.float32
    keys, values = (draw(shape.kv_heads, capacity, shape.head_dim).to(cached) for _ in range(2))
    angles = draw(shape.rotary_pairs)
    cosine, sine = angles.cos(), angles.sin()
    x, delta = draw(hidden), draw(hidden)

    # torch
    residual = x + delta
    q, k, v = (F.linear(rms(residual, norms[0]), w, b) for w, b in zip(weights[:3], biases[:3], strict=True))
    heads = []
    for projection, norm, count in ((q, qk[0], shape.heads), (k, qk[1], shape.kv_heads), (v, None, shape.kv_heads)):
        if norm is not None and shape.norm == "whole":
            projection = rms(projection, norm)
        split = projection.view(count, shape.head_dim)
        if norm is not None and shape.norm == "head":
            split = rms(split, norm)
        heads.append(split.clamp(-shape.clip, shape.clip) if shape.clip else split)
    query, key = (turn(part, cosine, sine) for part in heads[:2])
    want_keys, want_values = keys.clone(), values.clone()
    want_keys[:, position], want_values[:, position] = key, heads[2]
    group = shape.heads // shape.kv_heads
    seen = slice(shape.first, position + 1)
    k_all, v_all = (t[:, seen].float().repeat_interleave(group, 0) for t in (want_keys, want_values))
    scores = torch.einsum("hd,htd->ht", query, k_all) * 0.3
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None]), 1)
    probabilities = scores.softmax(1)[:, : k_all.shape[1]]
    attended = torch.einsum("ht,htd->hd", probabilities, v_all).reshape(-1)
    want_x = residual + F.linear(attended, weights[3], biases[3])
    want_experts, want_weights = choose(router, rms(want_x, norms[1]))
    want_guess = F.linear(rms(want_x, norms[2]), following.weight).topk(shape.top_k)[1].tolist()

    # native
    normed, found = torch.empty(hidden), torch.empty(shape.top_k)
    experts, guess = ((ctypes.c_int32 * shape.top_k)() for _ in range(2))
    projections: Any = {
        name: matrix(w, b) for name, w, b in zip(("query", "key", "value", "output"), weights, biases, strict=True)
    }
    attention = NativeAttention(
        pool,
        Ends(projections.pop("output"), norms[0], norms[1], router, (norms[2], following)),
        **projections,
        query_norm=qk[0],
        key_norm=qk[1],
        sinks=sinks,
        head_dim=shape.head_dim,
        rotary_pairs=shape.rotary_pairs,
        scaling=0.3,
        clip=shape.clip,
    )
    token = Token(
        x=x.data_ptr(),
        delta=delta.data_ptr(),
        cosine=cosine.data_ptr(),
        sine=sine.data_ptr(),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        half=half,
        capacity=capacity,
        first=shape.first,
        position=position,
        normed=normed.data_ptr(),
        experts=ctypes.addressof(experts),
        weights=found.data_ptr(),
        guess=ctypes.addressof(guess),
    )
    attention.run(token)
    # Where the last bits of a key decide how it is rounded to float16, one step: 2^-11 of it.
    step, bound = (2**-10, 1e-3) if half else (2e-5, 2e-5)
    torch.testing.assert_close(keys, want_keys, rtol=step, atol=2e-5)
    torch.testing.assert_close(values, want_values, rtol=step, atol=2e-5)
    torch.testing.assert_close(x, want_x, rtol=bound, atol=bound)
    torch.testing.assert_close(normed, rms(want_x, norms[1]), rtol=bound, atol=bound)
    if half:
        return  # a last bit may decide between experts
    assert list(experts) == want_experts
    assert list(guess) == want_guess
    torch.testing.assert_close(found, want_weights, rtol=1e-4, atol=1e-6)

    token.position = capacity
    with pytest.raises(NativeError, match="bad argument"):
        attention.run(token)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 2.0**-14, 3 * 2.0**-24, 2.0**-26, 1 + 2.0**-11, 65504.0, -7e4, 1e30])
def test_float16_is_rounded_to_the_nearest_and_never_to_infinity(pool: NativePool, value: float):
    """Through a value projection that has nothing but a bias."""
    bias, zero, plain = torch.full((2,), value), torch.zeros(2, 2), Norm(torch.ones(2), 1e-6)
    attention = NativeAttention(
        pool,
        Ends(matrix(zero), plain, plain, None, None),
        query=matrix(zero),
        key=matrix(zero),
        value=matrix(zero, bias),
        query_norm=None,
        key_norm=None,
        sinks=None,
        head_dim=2,
        rotary_pairs=0,
        scaling=1.0,
    )
    x, normed, cache = torch.ones(2), torch.empty(2), torch.ones(2, 2, dtype=torch.float16)
    token = Token(x=x.data_ptr(), keys=cache[0].data_ptr(), values=cache[1].data_ptr(), half=1, capacity=1)
    token.normed = normed.data_ptr()
    attention.run(token)
    assert torch.equal(cache[1], bias.clamp(-65504, 65504).half())


ROUTERS = {
    "softmax": {},
    "not normalised": {"normalize": False, "scale": 2.5},
    "sigmoid with a correction": {"sigmoid": True, "correction": True},
    "grouped": {"sigmoid": True, "correction": True, "groups": 4, "top_groups": 2},
    "groups by their one best": {"groups": 4, "top_groups": 2, "group_best": 1, "normalize": False},
    "negative corrections in groups": {"sigmoid": True, "correction": True, "groups": 8, "top_groups": 3, "scale": 0.5},
}


@pytest.mark.parametrize("options", ROUTERS.values(), ids=ROUTERS.keys())
@pytest.mark.parametrize("seed", range(3))
def test_routers_choose_as_torch_does(pool: NativePool, options: dict[str, Any], seed: int):
    hidden, experts, k = 32, 64, 6
    generator = torch.Generator().manual_seed(seed)
    options = dict(options)
    if options.pop("correction", False):
        options["correction"] = torch.randn(experts, generator=generator) - 0.5
    router = Router(torch.randn(experts, hidden, generator=generator), k, **options)
    eye, zero = torch.eye(hidden), torch.zeros(hidden, hidden)
    plain = Norm(torch.ones(hidden), 1e-6)
    attention = NativeAttention(
        pool,
        Ends(matrix(zero), plain, plain, router, None),
        **dict.fromkeys(("query", "key", "value"), matrix(eye)),
        query_norm=None,
        key_norm=None,
        sinks=None,
        head_dim=hidden,
        rotary_pairs=0,
        scaling=1.0,
    )
    x = torch.randn(hidden, generator=generator)
    cache, normed, weights = torch.zeros(2, hidden), torch.empty(hidden), torch.empty(k)
    chosen = (ctypes.c_int32 * k)()
    token = Token(x=x.data_ptr(), keys=cache[0].data_ptr(), values=cache[1].data_ptr(), capacity=1)
    token.normed, token.weights, token.experts = normed.data_ptr(), weights.data_ptr(), ctypes.addressof(chosen)
    attention.run(token)
    want_experts, want_weights = choose(router, rms(x, plain))
    assert list(chosen) == want_experts
    torch.testing.assert_close(weights, want_weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("activation", [Activation("silu"), Activation("gelu_tanh"), Activation("gpt_oss", 1.7, 7.0)])
def test_dense_blocks_agree_with_torch(pool: NativePool, activation: Activation, add: bool, share: bool):
    hidden, inner = 50, 83
    generator = torch.Generator().manual_seed(1)
    gate, up = (torch.randn(inner, hidden, generator=generator) / 7 for _ in range(2))
    down = torch.randn(hidden, inner, generator=generator) / 9
    gating = torch.randn(hidden, generator=generator) if share else None
    x, before = torch.randn(2, hidden, generator=generator)
    want = F.linear(apply(activation, F.linear(x, gate), F.linear(x, up)), down)
    if gating is not None:
        want = want * torch.sigmoid(gating @ x)
    out = before.clone()
    NativeMlp(pool, matrix(gate), matrix(up), matrix(down), activation, gating).run(x, out, add)
    torch.testing.assert_close(out, want + before if add else want, rtol=2e-5, atol=2e-5)
