"""NF4 matrices as bitsandbytes packs them, and the plain reference of its values.

The codes are places in a table of quantiles of a normal distribution (QLoRA, arXiv:2305.14314, appendix E). A matrix is
one row of numbers, row by row, cut into blocks of 64; W = TABLE[code] * largest magnitude of the block. Bytes:

    codes    uint8 [numbers / 2]       the first of two numbers in the high four bits
    (zero bytes up to a multiple of 64)
    absmax   float32 [blocks]
    (zero bytes up to a multiple of 64)

On a GPU with bitsandbytes its kernel decodes. Its kernels for CPUs are not used: they differ by processor, and its
matvec gives wrong numbers on codes that it has not packed for the CPU itself.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch

from .int4 import ALIGNMENT, finite_matrix, round_up

BLOCK = 64
TABLE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@cache
def load_bitsandbytes() -> ModuleType | None:
    """bitsandbytes (pip install 'pocketmoe[nf4]'), or None."""
    try:
        import bitsandbytes  # type: ignore[import-not-found]
    except ImportError:
        return None
    return bitsandbytes


def decode_by_bitsandbytes(
    codes: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """What `dequantize` does with these parts of the packed bytes, by the library's kernel for their device."""
    return torch.ops.bitsandbytes.dequantize_4bit(codes[:, None], absmax, BLOCK, "nf4", shape, dtype)


def nbytes(rows: int, cols: int) -> int:
    """Bytes of a packed matrix of shape [rows, cols]; a multiple of 64."""
    codes, blocks = _sizes(rows * cols)
    return round_up(codes, ALIGNMENT) + round_up(blocks * 4, ALIGNMENT)


def _sizes(numbers: int) -> tuple[int, int]:
    """Bytes of codes, and blocks."""
    return -(-numbers // 2), -(-numbers // BLOCK)


def quantize(weight: torch.Tensor) -> torch.Tensor:
    """The nearest NF4 values of a matrix [rows, cols], packed: uint8 [nbytes].

    Raises:
        ValueError: weight is not a finite matrix.
    """
    w = finite_matrix(weight).flatten()
    codes, blocks = _sizes(len(w))
    w = torch.nn.functional.pad(w, (0, blocks * BLOCK - len(w))).view(blocks, BLOCK)
    absmax = w.abs().amax(1)
    table = torch.tensor(TABLE)
    places = torch.bucketize(w / absmax.clamp(min=1e-38).unsqueeze(1), (table[1:] + table[:-1]) / 2)
    pairs = places.to(torch.uint8).view(-1, 2)
    out = torch.zeros(nbytes(*weight.shape), dtype=torch.uint8)
    out[:codes] = (pairs[:, 0] << 4 | pairs[:, 1])[:codes]
    at = round_up(codes, ALIGNMENT)
    out[at : at + blocks * 4] = absmax.view(torch.uint8)
    return out


def dequantize(packed: torch.Tensor, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The matrix [rows, cols] that the packed bytes stand for."""
    size, blocks = _sizes(rows * cols)
    at = round_up(size, ALIGNMENT)
    codes, absmax = packed[:size], packed[at : at + blocks * 4].view(torch.float32)
    if packed.is_cuda and load_bitsandbytes() is not None:
        return decode_by_bitsandbytes(codes, absmax, (rows, cols), dtype)
    places = torch.stack((codes >> 4, codes & 15), 1).flatten().int()
    values = torch.tensor(TABLE, device=packed.device)[places][: rows * cols]
    return (values * absmax.repeat_interleave(BLOCK)[: rows * cols]).view(rows, cols).to(dtype)
