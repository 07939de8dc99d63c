"""Random weights that are the same in every format, and a router whose choices can be told.

**Exactness.** A matrix is made of INT4 codes in groups of 32 with one float16 scale each: GGUF's Q4_0 and our symmetric
int4-g32 are the same numbers. Each group holds one code 0 (-8, the largest magnitude), so that our quantiser finds the
very scale and codes again, and scales have at most 5 significant bits, so that code x scale is exact in bfloat16. The
sign of each group's scale is random: weights are zero-mean (with a common offset all tokens would route alike).

**Routing.** With plain random weights attention makes all positions alike and deep layers collapse to few experts, so
the attention's output projection is small (std 0.002) and the experts' down projection large (0.05). The vocabulary has
two halves. Embeddings of the *uniform* half are independent: routing is diverse. Those of the *realistic* half are

    POPULARITY * common + TOPIC * topic[id] + word[id]          (each a unit Gaussian, weighted to unit variance)

where `common` makes some experts popular with every token and `topic`, shared by the ids of one topic, makes neighbours
agree as long as the stream of ids stays on a topic (`token_stream`). One checkpoint so serves both kinds of routing:
the token ids decide, the router computes, and every engine that is fed these ids routes alike. The constants come
from a numpy model of one router, fitted to real decodes of gpt-oss-20b (the previous token's experts again 0.43,
effective number of experts 0.76 of all). The generated model falls short of that in reuse, more so in some layers: 8
layers of Qwen3-30B-A3B's shape measured 0.32 (0.24 to 0.42 by layer) and 0.79; LRU hit rates are nearer (0.76 against
0.78 with 40 % cached). `synthesize --measure` prints them; read "realistic" as that.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np
import torch
from pocketmoe.quant.mxfp4 import Mxfp4Matrix

GROUP = 32
POPULARITY, TOPIC, TOPICS, STAY = 0.30, 0.84, 32, 0.90
"""Shares of an embedding's standard deviation, number of topics, and the chance to stay on one at each token."""
STREAMS = ("uniform", "realistic")
FIRST_WORD = 512
"""Ids below are bytes and special tokens; streams leave them out."""
_CODE_STD = 4.353  # of codes drawn by `_random_codes`, around 8
_PAIRS = np.array([((high or 8) << 4) | (low or 8) for high in range(16) for low in range(16)], dtype=np.uint8)


class Int4Matrix(NamedTuple):
    """codes uint8 [rows, cols] and float16 scales [rows, cols / 32]: W = scale * (code - 8)."""

    codes: np.ndarray
    scales: np.ndarray

    def dequantize(self) -> np.ndarray:
        """float32 [rows, cols]."""
        rows, cols = self.codes.shape
        centred = self.codes.reshape(rows, -1, GROUP).astype(np.float32) - 8.0
        return (centred * self.scales.astype(np.float32)[:, :, None]).reshape(rows, cols)

    def to_q4_0(self) -> np.ndarray:
        """GGUF's block_q4_0: uint8 [rows, cols / 32 * 18]: the scale, then 16 bytes with element i low, i + 16 high."""
        rows, cols = self.codes.shape
        blocks = np.empty((rows, cols // GROUP, 18), dtype=np.uint8)
        blocks[:, :, :2] = np.ascontiguousarray(self.scales).view(np.uint8).reshape(rows, -1, 2)
        halves = self.codes.reshape(rows, -1, 2, GROUP // 2)
        np.bitwise_or(halves[:, :, 0], halves[:, :, 1] << 4, out=blocks[:, :, 2:])
        return blocks.reshape(rows, -1)


def short_scale(std: float) -> np.float16:
    """The float16 with at most 5 significant bits next to the scale that gives weights of that deviation."""
    mantissa, exponent = np.frexp(std / _CODE_STD)
    return np.float16(np.ldexp(np.round(mantissa * 32) / 32, exponent))


def generator(seed: int, name: str) -> np.random.Generator:
    """Random numbers that depend on the tensor's name alone, in whatever order tensors are made."""
    return np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))


def random_matrix(seed: int, name: str, rows: int, cols: int, std: float) -> Int4Matrix:
    """Zero-mean weights of standard deviation `std`."""
    rng = generator(seed, name)
    pairs = _PAIRS[np.frombuffer(rng.bytes(rows * cols // 2), dtype=np.uint8)]
    codes = np.empty((pairs.size, 2), dtype=np.uint8)
    np.bitwise_and(pairs, 15, out=codes[:, 0])
    np.right_shift(pairs, 4, out=codes[:, 1])
    by_group = codes.reshape(-1, GROUP)
    by_group[np.arange(len(by_group)), rng.integers(0, GROUP, len(by_group), dtype=np.uint8)] = 0
    signs = rng.integers(0, 2, (rows, cols // GROUP), dtype=np.int8) * np.float16(2) - np.float16(1)
    return Int4Matrix(codes.reshape(rows, cols), (signs * short_scale(std)).astype(np.float16))


def random_mxfp4(seed: int, name: str, rows: int, cols: int, std: float) -> Mxfp4Matrix:
    """Zero-mean weights of about that standard deviation; all codes are alike likely (their own deviation is 2.92)."""
    rng = generator(seed, name)
    codes = np.frombuffer(rng.bytes(rows * cols // 2), dtype=np.uint8).reshape(rows, -1, GROUP // 2).copy()
    exponents = np.full((rows, cols // GROUP), 127 + round(np.log2(std / 2.92)), dtype=np.uint8)
    return Mxfp4Matrix(torch.from_numpy(codes), torch.from_numpy(exponents))


def to_gguf_mxfp4(matrix: Mxfp4Matrix) -> np.ndarray:
    """GGUF's block_mxfp4: uint8 [rows, cols / 32 * 17]: the exponent, then 16 bytes with element i low, i + 16 high."""
    blocks = matrix.blocks.numpy()
    codes = np.stack((blocks & 15, blocks >> 4), axis=-1).reshape(*blocks.shape[:2], 2, GROUP // 2)
    halves = codes[:, :, 0] | codes[:, :, 1] << 4
    return np.concatenate((matrix.exponents.numpy()[:, :, None], halves), axis=2).reshape(len(blocks), -1)


def embeddings(seed: int, vocabulary: int, hidden: int) -> Int4Matrix:
    """The embedding table described above, rounded to INT4: [vocabulary, hidden], standard deviation 1."""
    rng = generator(seed, "embeddings")
    common, topics = rng.standard_normal(hidden), rng.standard_normal((TOPICS, hidden))
    values = rng.standard_normal((vocabulary, hidden), dtype=np.float32)
    ids = np.arange(vocabulary // 2, vocabulary)
    word = np.sqrt(1 - POPULARITY**2 - TOPIC**2)
    values[ids] = POPULARITY * common + TOPIC * topics[ids % TOPICS] + word * values[ids]
    scale = np.float16(0.375)
    codes = np.clip(np.round(values / np.float32(scale)) + 8, 0, 15).astype(np.uint8)
    return Int4Matrix(codes, np.full((vocabulary, hidden // GROUP), scale))


def router(seed: int, name: str, experts: int, hidden: int) -> np.ndarray:
    """float32 [experts, hidden], exact in bfloat16: about 2.3 of standard deviation in the logits at hidden 2048."""
    values = generator(seed, name).standard_normal((experts, hidden), dtype=np.float32)
    steps = np.round(np.clip(values, -4, 4) * (0.05 * 512))  # whole numbers below 128: 7 significant bits
    return steps / np.float32(512)


def token_stream(kind: str, length: int, vocabulary: int, seed: int) -> list[int]:
    """Token ids to feed: independent ones of the uniform half, or topics of the realistic half that last a while."""
    rng = generator(seed, f"stream {kind}")
    half = vocabulary // 2
    if kind == "uniform":
        return rng.integers(FIRST_WORD, half, length).tolist()
    if kind != "realistic":
        raise ValueError(f"unknown kind of token stream {kind!r}; known: {', '.join(STREAMS)}")
    ids, topic = [], int(rng.integers(TOPICS))
    for _ in range(length):
        if rng.random() > STAY:
            topic = int(rng.integers(TOPICS))
        ids.append(half + int(rng.integers(half // TOPICS)) * TOPICS + topic)
    return ids
