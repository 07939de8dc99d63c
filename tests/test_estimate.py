"""Seconds from bytes and rates; and that they come near the speeds that were measured."""

from __future__ import annotations

import pytest
from pocketmoe.offload.estimate import LAYER_S, Bytes, Hits, Rates, bytes_per_token, seconds_per_token

# Qwen3-30B-A3B's shape as benchmarks/RESULTS.md of 2026-11-22 has it: vocabulary 8,192, INT8 trunk, int4-g32 experts.
ATTENTION = (2048 * (4096 + 512 + 512) + 4096 * 2048) * 1.0625 + 128 * 2048 * 4
HEAD = 8192 * 2048 * 1.0625
RECORD = 2_654_208
RATES = Rates(ram=25.66e9, disk=2.49e9)


@pytest.mark.parametrize(
    ("layers", "megabytes_read", "measured"),
    [(8, 0, 59.4), (8, 142, 13.0), (8, 82, 19.1), (24, 372, 4.5), (24, 216, 7.8)],
)
def test_the_measured_speeds_are_met_within_a_seventh(layers, megabytes_read, measured):
    experts = layers * 8 * RECORD
    hits = Hits(0.0, 1 - megabytes_read * 1e6 / experts)
    read = bytes_per_token(int(layers * ATTENTION + HEAD), experts, hits, on_gpu=False)
    ratio = 1 / seconds_per_token(read, RATES, layers, LAYER_S).total / measured
    assert 0.95 < ratio < 1.14


def test_every_byte_of_a_token_comes_from_some_tier():
    for on_gpu, hits in ((False, Hits(0.0, 0.8)), (True, Hits(0.5, 0.3))):
        read = bytes_per_token(100, 1000, hits, on_gpu)
        assert read.total == pytest.approx(1100)
        assert read.disk == pytest.approx(200)
    assert bytes_per_token(100, 1000, Hits(0.5, 0.3), True).vram == pytest.approx(600)
    assert bytes_per_token(100, 1000, Hits(0.0, 0.8), False) == pytest.approx(Bytes(0.0, 900, 200))


def test_what_comes_from_the_disk_is_read_from_ram_as_well():
    seconds = seconds_per_token(Bytes(0.0, 0.0, 100.0), Rates(ram=100.0, disk=10.0), 0, LAYER_S)
    assert (seconds.disk, seconds.ram) == (10.0, 1.0)
