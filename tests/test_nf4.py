"""NF4 as bitsandbytes packs it: its values, to the bit, from a plain table."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from experts import SILU, inner, project, random_expert
from pocketmoe.quant import nf4
from pocketmoe.quant.activations import apply
from pocketmoe.quant.codecs import ExpertShape, get_codec, record_layout
from pocketmoe.quant.kernels import ExpertJob, TorchKernels

SHAPES = [(16, 64), (5, 24), (3, 7), (1, 1), (48, 200)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_value_is_the_nearest_of_the_table(shape: tuple[int, int]):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3
    packed = nf4.quantize(weight)
    assert packed.numel() == nf4.nbytes(*shape) and packed.numel() % 64 == 0
    flat = weight.flatten()
    blocks = [flat[at : at + nf4.BLOCK] for at in range(0, len(flat), nf4.BLOCK)]
    table = torch.tensor(nf4.TABLE)
    nearest = [table[(b[:, None] - table * b.abs().max()).abs().argmin(1)] * b.abs().max() for b in blocks]
    assert torch.equal(nf4.dequantize(packed, *shape), torch.cat(nearest).view(shape))


def test_zeros_stay_zeros_and_what_is_not_finite_is_refused():
    assert torch.equal(nf4.dequantize(nf4.quantize(torch.zeros(4, 32)), 4, 32), torch.zeros(4, 32))
    with pytest.raises(ValueError, match="NaN"):
        nf4.quantize(torch.full((2, 2), float("nan")))


def test_experts_are_computed_from_nf4_records():
    shape = ExpertShape(40, 24, True, True)
    record, weights = random_expert("nf4", shape, 2)
    codec = get_codec("nf4")
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(3))
    out = torch.empty(3, 40)
    kernels = TorchKernels(codec, record_layout(codec, shape), lambda gate, up: apply(SILU, gate, up))
    kernels.run(x, torch.arange(3).int(), [ExpertJob(record, 0, 3)], out)
    exact = project(weights, "down_proj", inner(weights, SILU, x.double()))
    assert torch.allclose(out.double(), exact, rtol=1e-5, atol=1e-5)


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here")


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="pip install 'pocketmoe[nf4]' brings bitsandbytes")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, GPU])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_and_values_are_those_of_bitsandbytes(device: str, dtype: torch.dtype):
    bitsandbytes = nf4.load_bitsandbytes()
    assert bitsandbytes is not None
    weight = torch.randn(48, 192, generator=torch.Generator().manual_seed(4))
    packed = nf4.quantize(weight).to(device)
    codes, state = bitsandbytes.functional.quantize_4bit(weight.to(device), blocksize=nf4.BLOCK, quant_type="nf4")
    assert torch.equal(packed[: codes.numel()], codes.flatten())
    theirs = nf4.decode_by_bitsandbytes(codes.flatten(), state.absmax, (48, 192), dtype)
    assert torch.equal(theirs.cpu(), nf4.dequantize(packed.cpu(), 48, 192, dtype))
    assert torch.equal(theirs, nf4.dequantize(packed, 48, 192, dtype))
