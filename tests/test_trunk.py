"""The packed trunk: what stock transformers computes with the dequantised matrices, with and without kernels."""

from __future__ import annotations

import pytest
import tiny
import torch
from pocketmoe.offload import packing, trunk
from pocketmoe.offload.checkpoint import CheckpointSource
from pocketmoe.offload.config import OffloadConfig
from pocketmoe.offload.convert import convert
from pocketmoe.offload.loading import load
from pocketmoe.offload.simulated_device import SimulatedDevice
from pocketmoe.offload.store import ExpertStore
from pocketmoe.quant.linear import (
    NativeLinear,
    PackedMatrix,
    QuantEmbedding,
    matrix_format,
    matrix_format_names,
)
from pocketmoe.quant.native import NativePool, load_native

needs_native = pytest.mark.skipif(load_native() is None, reason="the native kernels are not built")
IDS = torch.randint(3, tiny.VOCABULARY, (1, 19), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _pack_small_matrices(monkeypatch):
    monkeypatch.setattr(packing, "SMALLEST", 0)


@pytest.mark.parametrize("name", matrix_format_names())
def test_rows_taken_from_a_packed_matrix_are_those_of_the_dequantised_one(name):
    generator = torch.Generator().manual_seed(1)
    for rows, cols in ((40, 72), (97, 64), (16, 256), (2 * 128 * 16 + 5, 64)):
        packed = PackedMatrix.pack(torch.randn(rows, cols, generator=generator), matrix_format(name))
        ids = torch.randint(0, rows, (3, 5), generator=generator)
        assert torch.equal(QuantEmbedding(packed, torch.float32)(ids), packed.dequantize()[ids])


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_linear_gives_the_product_with_the_dequantised_matrix_in_the_inputs_dtype(dtype):
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(97, 72, generator=generator), torch.randn(97, generator=generator)
    packed = PackedMatrix.pack(weight, matrix_format("int8-g32"))
    x = torch.randn(2, 3, 72, generator=generator).to(dtype)
    got = NativeLinear(NativePool(1), packed, dtype, torch.nn.Parameter(bias))(x)
    want = torch.nn.functional.linear(x.float(), packed.dequantize(), bias)
    # Activations are rounded by at most half a step, 1/254 of the largest of 32; bf16 rounds the result once more.
    steps = torch.nn.functional.pad(x.float(), (0, 24)).unflatten(-1, (3, 32)).abs().amax(-1) / 254
    bound = torch.nn.functional.linear(steps.repeat_interleave(32, -1)[..., :72], packed.dequantize().abs())
    bound = bound + want.abs() * torch.finfo(dtype).eps + 1e-5
    assert got.dtype == dtype
    assert ((got.float() - want).abs() <= bound).all()


@pytest.mark.parametrize("kernels", ["torch", pytest.param("auto", marks=needs_native)])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_stock_transformers_with_the_dequantised_trunk(tmp_path, name, kernels, tied):
    stock = tiny.make_checkpoint(tmp_path / "checkpoint", name, tie_word_embeddings=tied)
    path = convert(CheckpointSource(tmp_path / "checkpoint"), tmp_path / "store", "f32", trunk="int8-g32")
    store = ExpertStore(path)
    packed = store.manifest.trunk_packed
    assert "model.embed_tokens.weight" in packed
    assert ("lm_head.weight" in packed) is not tied
    assert not any("gate.weight" in n and "shared" not in n for n in packed), "a router was packed"
    parameters = dict(stock.named_parameters())
    with torch.no_grad():
        for tensor_name, tensor in store.trunk():
            if tensor_name in packed:
                entry = packed[tensor_name]
                matrix = PackedMatrix(tensor, entry.rows, entry.cols, matrix_format(entry.format))
                parameters[tensor_name].copy_(matrix.dequantize())
        want = stock(IDS).logits
    with load(path, kernels=kernels, ram="4GB") as model, torch.inference_mode():
        got = model.transformers_model(IDS).logits
    # Native kernels round activations to int8; in a random model that flips near-ties between experts at some positions
    # for good (deepseek's groups have the most of them), so most positions have to be close, not all.
    bound = 1e-4 if kernels == "torch" else 0.08 * want.std()
    close = (got - want).abs().flatten(0, 1).amax(-1) <= bound
    assert close.float().mean() >= (1.0 if kernels == "torch" else 0.6), (got - want).abs().max()


def test_a_lossless_codec_keeps_the_trunk_as_it_ships_unless_told_otherwise(tmp_path):
    tiny.make_checkpoint(tmp_path / "checkpoint", "mixtral")
    source = CheckpointSource(tmp_path / "checkpoint")
    assert not ExpertStore(convert(source, tmp_path / "a", "f32")).manifest.trunk_packed
    assert ExpertStore(convert(source, tmp_path / "b", "int4-g32")).manifest.trunk_packed
    assert not ExpertStore(convert(source, tmp_path / "c", "int4-g32", trunk="keep")).manifest.trunk_packed


@pytest.mark.parametrize("why", ["the device lacks something.", None])
def test_a_trunk_that_a_device_can_only_keep_dequantised_is_said_once_and_why(why, monkeypatch):
    device = SimulatedDevice()
    device.linear, device.lacks = None, why
    monkeypatch.setattr(trunk, "load_triton", lambda: None)
    monkeypatch.setattr(trunk, "why_missing", lambda: "There is no Triton.")
    notices: list[str] = []
    for kernels, packed in (("auto", True), ("auto", False), ("torch", True)):
        config = OffloadConfig.of(kernels=kernels)
        assert trunk.find_linear(None, device, config, packed, notices.append) is None
    assert len(notices) == 1
    assert notices[0].startswith(f"{why or 'There is no Triton.'} The trunk's packed matrices are dequantised")
