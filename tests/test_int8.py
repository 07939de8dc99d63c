"""Packed INT8 matrices: packing loses nothing, quantisation no more than half a step."""

from __future__ import annotations

import pytest
import torch
from pocketmoe.quant import int4, int8
from pocketmoe.quant.int8 import Int8Format


@pytest.mark.parametrize("group", int4.GROUPS)
def test_int8_codes_survive_packing_and_are_half_a_step_from_the_weights(group: int):
    fmt, weight = Int8Format(group), torch.randn(37, 150, generator=torch.Generator().manual_seed(12))
    weight[3] = 0.0
    codes, scales = int8.quantize(weight, fmt)
    packed = int8.pack(codes, scales, fmt)
    assert packed.nbytes == fmt.nbytes(37, 150)
    unpacked, unpacked_scales = int8.unpack(packed, 37, 150, fmt)
    assert torch.equal(unpacked, codes)
    assert torch.equal(unpacked_scales, scales)
    assert codes.min() >= 1  # kernels without VNNI rely on it
    step = scales.float().repeat_interleave(group, 1)[:, :150]
    # The scale is rounded to float16, so the largest weight of a group may lie a little beyond 127 steps.
    error = (int8.dequantize(packed, 37, 150, fmt) - weight).abs()
    assert (error <= 0.5 * step + weight.abs() * 2**-10).all()


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        int8.quantize(torch.tensor([[1.0, float("nan")]]), Int8Format())
    with pytest.raises(ValueError, match="float16"):
        int8.quantize(torch.full((2, 32), 1e9), Int8Format())
    with pytest.raises(ValueError, match="expected a matrix"):
        int8.quantize(torch.ones(3), Int8Format())
    with pytest.raises(ValueError, match="not 48"):
        Int8Format(48)
