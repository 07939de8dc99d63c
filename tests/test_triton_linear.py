"""The trunk's GPU kernels against exact products, in Triton's interpreter and, where there is one, on a GPU."""

from __future__ import annotations

import re

import pytest
import torch
from pocketmoe.offload.trunk import warm_up_trunk
from pocketmoe.quant import triton_kernels, triton_linear
from pocketmoe.quant.linear import PackedMatrix, matrix_format
from pocketmoe.quant.triton_kernels import PackedShape
from pocketmoe.quant.triton_linear import TritonLinear
from torch import nn
from triton_devices import DEVICES, needs_triton

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return request.param


def make(name: str, rows: int, cols: int, dtype: torch.dtype, bias: bool, device: torch.device) -> TritonLinear:
    generator = torch.Generator().manual_seed(rows)
    packed = PackedMatrix.pack(torch.randn(rows, cols, generator=generator), matrix_format(name))
    added = nn.Parameter(torch.randn(rows, generator=generator).to(device, dtype), requires_grad=False)
    return TritonLinear(packed._replace(data=packed.data.to(device)), dtype, added if bias else None)


def rows_of(tokens: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens)) * 3).to(dtype)


@needs_triton
def test_each_kind_of_matrix_is_multiplied_by_once_in_each_size_to_have_it_compiled(monkeypatch):
    calls = []
    monkeypatch.setattr(TritonLinear, "forward", lambda self, x: calls.append((self.out_features, len(x))))
    kinds = [("int8-g32", 32, 64, True), ("int8-g32", 32, 64, True), ("int4-g32", 48, 64, False)]
    warm_up_trunk(nn.Sequential(*(make(*kind[:3], torch.float16, kind[3], torch.device("cpu")) for kind in kinds)))
    assert sorted(calls) == [(rows, tokens) for rows in (32, 48) for tokens in (1, 16, 64)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("name", "rows", "cols", "tokens", "bias"),
    [
        ("int8-g32", 83, 72, 1, True),
        ("int8-g32", 17, 200, 3, False),
        ("int8-g32", 131, 97, 7, True),
        ("int8-g32", 40, 64, 40, False),
        ("int8-g128", 70, 130, 23, True),
        ("int4-g32", 50, 72, 2, True),
        ("int4-g64", 33, 100, 40, False),
    ],
)
def test_products_are_within_the_stated_bound(
    device: torch.device, dtype: torch.dtype, name: str, rows: int, cols: int, tokens: int, bias: bool
):
    linear, x = make(name, rows, cols, dtype, bias, device), rows_of(tokens, cols, dtype)
    got, weight = linear(x.to(device)).cpu(), linear.packed.dequantize().cpu().double()
    added = linear.bias.cpu().double() if linear.bias is not None else 0.0
    exact = x.double() @ weight.T + added
    left_out = 2.0**-14 if dtype == torch.float32 and tokens > triton_kernels.MATVEC_ROWS else 0.0
    sums = (left_out + cols * 2.0**-23) * (x.double().abs() @ weight.abs().T + abs(added))
    assert got.dtype == dtype and got.shape == exact.shape
    # The interpreter cuts bfloat16 off, which costs twice what rounding does.
    assert ((got.double() - exact).abs() <= sums + torch.finfo(dtype).eps * exact.abs()).all()


def test_a_row_gives_the_same_bits_whatever_rows_are_beside_it(device: torch.device):
    linear, x = make("int8-g32", 48, 96, torch.bfloat16, True, device), rows_of(40, 96, torch.bfloat16).to(device)
    few, many = linear(x[:3]), linear(x)
    assert torch.equal(torch.cat([linear(x[i : i + 1]) for i in range(3)]), few)
    assert torch.equal(torch.cat([linear(x[:20]), linear(x[20:])]), many)


def test_rows_may_have_any_shape_and_lie_apart(device: torch.device):
    linear, x = make("int8-g32", 48, 64, torch.float32, False, device), rows_of(6, 128, torch.float32).to(device)
    apart = x.reshape(2, 3, 128)[..., :64]
    assert not apart.is_contiguous()
    assert torch.equal(linear(apart), linear(x[:, :64].contiguous()).reshape(2, 3, 48))


def test_a_row_that_is_not_finite_spoils_no_other(device: torch.device):
    linear = make("int8-g32", 40, 64, torch.float32, False, device)
    for tokens in (3, 20):
        x = rows_of(tokens, 64, torch.float32)
        clean, x[1, 5] = linear(x.to(device)), float("nan")
        spoiled, others = linear(x.to(device)), torch.arange(tokens) != 1
        assert torch.equal(spoiled[others], clean[others]) and spoiled[1].isnan().all()


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_compiled_code_reads_16_bytes_at_a_time_and_multiplies_on_tensor_cores(capability: int, tmp_path):
    from triton import compile, knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    shape = PackedShape.of(matrix_format("int8-g32"), 4096, 2048)
    for tokens in (1, triton_linear.TILE_TOKENS[-1]):
        variant = triton_linear.variant(tokens, shape, torch.bfloat16, interpret=False)
        types = {"weight": "*u8", "bias": "constexpr", "x": "*bf16", "y": "*bf16"}
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind[0] == "*"}
        types |= {"tokens": "i32"} if tokens > 1 else {}
        types |= dict.fromkeys(variant.constants, "constexpr")
        source = ASTSource(variant.kernel, types, {"bias": None, **variant.constants}, aligned)
        with knobs.cache.scope():
            knobs.cache.dir = str(tmp_path)
            compiled = compile(source, GPUTarget("cuda", capability, 32), options=variant.options)
        ptx = compiled.asm["ptx"]
        if tokens == 1:
            assert re.search(r"ld\.global\S*\.v4\.b32", ptx)
            assert "sizePerThread = [1, 4]" in compiled.asm["ttgir"]  # so that those of a warp lie together
        else:
            assert re.search(r"mma\S*\.bf16\.bf16", ptx)
