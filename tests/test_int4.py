"""Packed INT4: what each kind of group keeps of a matrix, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from pocketmoe.quant import int4
from pocketmoe.quant.int4 import Int4Format

FORMATS = [Int4Format(group, kind) for group in int4.GROUPS for kind in int4.KINDS]


def matrix(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.02


def packed_and_back(weight: torch.Tensor, fmt: Int4Format) -> torch.Tensor:
    rows, cols = weight.shape
    return int4.dequantize(int4.pack(*int4.quantize(weight, fmt), fmt), rows, cols, fmt)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_codes_scales_and_minimums_survive_packing(fmt: Int4Format):
    weight = matrix(20, 200)
    wanted = int4.quantize(weight, fmt)
    packed = int4.pack(*wanted, fmt)
    assert len(packed) == fmt.nbytes(20, 200)
    for want, got in zip(wanted, int4.unpack(packed, 20, 200, fmt), strict=True):
        assert want is got is None or (want is not None and got is not None and torch.equal(want, got))
    x = matrix(1, 200, seed=1)[0]
    torch.testing.assert_close(int4.matvec(packed, 20, 200, fmt, x), int4.dequantize(packed, 20, 200, fmt) @ x)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e3])
def test_in_the_same_bytes_zero_points_leave_less_error_than_the_middle_code(scale: float):
    weight = matrix(64, 1024) * scale
    formats = {kind: Int4Format(32, kind) for kind in int4.KINDS}
    errors = {kind: (packed_and_back(weight, fmt) - weight).norm() for kind, fmt in formats.items()}
    sizes = {kind: fmt.nbytes(64, 1024) for kind, fmt in formats.items()}
    assert sizes["zp"] == sizes["sym"] and errors["zp"] < 0.93 * errors["sym"]
    assert sizes["zp"] < sizes["asym"] and errors["zp"] < 1.01 * errors["asym"]


@pytest.mark.parametrize("kind", int4.KINDS)
def test_zeros_stay_zeros(kind: str):
    weight = matrix(16, 64)
    weight[:, 32:] = 0.0
    weight[3] = 0.0
    back = packed_and_back(weight, Int4Format(32, kind))
    assert not back[:, 32:].any() and not back[3].any() and back[:3, :32].any()


def test_a_group_of_one_sign_reaches_its_farthest_value():
    weight = matrix(32, 64).abs() + 0.05
    weight[::2] *= -1
    back = packed_and_back(weight, Int4Format(32, "zp"))
    groups, error = weight.unflatten(1, (2, 32)), (back - weight).unflatten(1, (2, 32))
    assert (error.abs().amax(-1) < 0.55 * groups.abs().amax(-1) / 15).all()


def test_of_two_values_of_the_largest_magnitude_the_negative_one_is_exact():
    weight = torch.zeros(1, 32)
    weight[0, 3], weight[0, 7] = 4.0, -4.0
    back = packed_and_back(weight, Int4Format())
    assert back[0, 7] == -4.0 and back[0, 3] == 3.5


@pytest.mark.parametrize(("kind", "value"), [("sym", 1e6), ("asym", -1e5), ("zp", 4000.0), ("zp", float("nan"))])
def test_what_no_scale_reaches_is_refused(kind: str, value: float):
    weight = matrix(16, 64)
    weight[3, 40] = value
    with pytest.raises(ValueError, match=r"range|NaN"):
        int4.quantize(weight, Int4Format(32, kind))
