"""Machines and model shapes for simulations: sizes in bytes, speeds in bytes per second, each from what is published.

Speeds of machines are the parts' specifications, so that anybody can check them; what a program reaches of those is
said once, by the shares below, and is the same for every strategy that is compared.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

GB, GIB = 10**9, 2**30
_LANE = {3: 0.985 * GB, 4: 1.969 * GB, 5: 3.938 * GB}
"""One PCIe lane, one way, after the 128b/130b coding of the specification."""
_LINK = re.compile(r"pcie([345])x(1|2|4|8|16)", re.ASCII)
LINKS = tuple(f"pcie{generation}x{lanes}" for generation in (3, 4, 5) for lanes in (4, 8, 16))
LINK_SHARE = 0.8
"""Of PCIe's bytes reach their place in large copies from pinned memory: packets and acknowledgements take the rest."""


def link_speed(link: str) -> float:
    """Bytes per second of copies from pinned RAM over a link such as "pcie4x8". Raises ValueError for another name."""
    match = _LINK.fullmatch(link)
    if match is None:
        raise ValueError(f"{link!r} is not a link: write pcie3, pcie4 or pcie5 and the lanes, as pcie4x8.")
    return LINK_SHARE * _LANE[int(match[1])] * int(match[2])


@dataclass(frozen=True)
class Machine:
    """One consumer machine. `vram` and `ram` are what is built in."""

    name: str
    vram: int
    ram: int
    link: str
    ram_bandwidth: float
    gpu_bandwidth: float
    disk: float
    about: str


class ModelShape(NamedTuple):
    """What one token reads of a model, and what stays on the GPU. Experts at about 4 bits, the rest at 8 (int8-g32)."""

    name: str
    layers: int
    """MoE layers; dense ones count into `dense`."""
    experts: int
    """Per layer."""
    top_k: int
    record: int
    """Bytes of one expert."""
    trunk: int
    """Bytes of attention, router and shared experts of one MoE layer."""
    dense: int
    """Bytes of dense layers and head. Input embeddings stay in RAM: a token reads one row."""
    kv: int
    """Bytes of keys and values per token of context, all layers."""


def _record(hidden: int, intermediate: int, bits: float = 4.5) -> int:
    """Bytes of gate, up and down in groups of 32 with a 16-bit scale each, padded to pages."""
    return -(-int(3 * hidden * intermediate * bits / 8) // 4096) * 4096


def _int8(*matrices: tuple[int, int]) -> int:
    """Bytes of matrices with 8-bit codes and a 16-bit scale for 32 of them."""
    return sum(rows * columns for rows, columns in matrices) * 17 // 16


def _attention(hidden: int, heads: int, kv_heads: int, head: int) -> int:
    return _int8((hidden, heads * head), (hidden, 2 * kv_heads * head), (heads * head, hidden))


_LATENT = _int8((7168, 1536), (1536, 128 * 192), (7168, 576), (512, 128 * 256), (128 * 128, 7168))
"""Attention of DeepSeek-V3: queries through 1536, keys and values through 512 + 64, 128 heads of 128 + 64 and 128."""

_GPT_OSS_20B = ModelShape(
    "gpt-oss-20b",
    24,
    32,
    4,
    record=_record(2880, 2880, 4.25),  # MXFP4: an 8-bit scale for 32 codes
    trunk=_attention(2880, 64, 8, 64),
    dense=_int8((2880, 201_088)),
    kv=12 * 2 * 8 * 64 * 2,  # every second layer looks back at 128 tokens only
)
_SHAPES = (
    _GPT_OSS_20B,
    _GPT_OSS_20B._replace(name="gpt-oss-120b", layers=36, experts=128, kv=18 * 2 * 8 * 64 * 2),
    ModelShape(
        "qwen3-30b-a3b",
        48,
        128,
        8,
        record=_record(2048, 768),
        trunk=_attention(2048, 32, 4, 128),
        dense=_int8((2048, 151_936)),
        kv=48 * 2 * 4 * 128 * 2,
    ),
    ModelShape(
        "mixtral-8x7b",
        32,
        8,
        2,
        record=_record(4096, 14_336),
        trunk=_attention(4096, 32, 8, 128),
        dense=_int8((4096, 32_000)),
        kv=32 * 2 * 8 * 128 * 2,
    ),
    ModelShape(
        "deepseek-v3",
        58,
        256,
        8,
        record=_record(7168, 2048),
        trunk=_LATENT + _int8((3 * 7168, 2048)),  # the second: one shared expert
        dense=_int8((7168, 129_280)) + 3 * (_LATENT + _int8((3 * 7168, 18_432))),
        kv=61 * 576 * 2,
    ),
)
SHAPES = {shape.name: shape for shape in _SHAPES}

_MACHINES = (
    Machine("laptop-8gb", 8 * GIB, 32 * GIB, "pcie4x8", 76.8 * GB, 256 * GB, 3.5 * GB, "RTX 4060 Laptop, DDR5-4800"),
    Machine("desktop-12gb", 12 * GIB, 32 * GIB, "pcie4x16", 51.2 * GB, 360 * GB, 3.5 * GB, "RTX 3060, DDR4-3200"),
    Machine("laptop-16gb", 16 * GIB, 32 * GIB, "pcie4x16", 89.6 * GB, 576 * GB, 5 * GB, "RTX 4090 Laptop, DDR5-5600"),
    Machine("desktop-24gb", 24 * GIB, 64 * GIB, "pcie4x16", 96 * GB, 1008 * GB, 5 * GB, "RTX 4090, DDR5-6000"),
    Machine("desktop-32gb", 32 * GIB, 64 * GIB, "pcie5x16", 96 * GB, 1792 * GB, 10 * GB, "RTX 5090, DDR5-6000"),
)
MACHINES = {machine.name: machine for machine in _MACHINES}
