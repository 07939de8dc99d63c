"""MXFP4 as gpt-oss ships it: packing, reading and computing keep every value; what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pocketmoe.offload import tensorfile
from pocketmoe.offload.checkpoint import CheckpointSource
from pocketmoe.offload.convert import convert
from pocketmoe.offload.errors import DataError
from pocketmoe.offload.loading import convert_checkpoint, find_store, load
from pocketmoe.offload.store import ExpertStore
from pocketmoe.quant import mxfp4
from pocketmoe.quant.mxfp4 import Mxfp4Format, Mxfp4Matrix
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

DOWN = "model.layers.1.mlp.experts.down_proj"


def random_matrix(rows: int, groups: int, seed: int = 0, exponents: range = mxfp4.EXPONENTS) -> Mxfp4Matrix:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (rows, groups, 16), generator=generator, dtype=torch.uint8)
    low, high = exponents.start, exponents.stop
    return Mxfp4Matrix(blocks, torch.randint(low, high, (rows, groups), generator=generator, dtype=torch.uint8))


# One matrix


@pytest.mark.parametrize("groups", [1, 2, 5, 9])
def test_packing_loses_nothing_whatever_the_number_of_rows(groups: int):
    for rows in (*range(1, 35), 300):
        matrix = random_matrix(rows, groups, seed=rows)
        packed = mxfp4.pack(matrix)
        assert packed.numel() == Mxfp4Format().nbytes(*matrix.shape)
        again = mxfp4.unpack(packed, *matrix.shape)
        assert torch.equal(again.blocks, matrix.blocks) and torch.equal(again.exponents, matrix.exponents)
        assert torch.equal(mxfp4.dequantize(packed, *matrix.shape), matrix.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_are_those_of_transformers_for_every_byte_and_exponent(dtype: torch.dtype):
    exponents = torch.tensor(mxfp4.EXPONENTS, dtype=torch.uint8).unsqueeze(1).expand(-1, 16)
    every_byte = torch.arange(256, dtype=torch.uint8).reshape(16, 16).expand(len(exponents), -1, -1)
    want = convert_moe_packed_tensors(every_byte[None], exponents[None], dtype=dtype)[0].T
    assert torch.equal(Mxfp4Matrix(every_byte, exponents).dequantize(dtype), want)
    assert want.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dequantised_matrix_gives_back_its_values(dtype: torch.dtype):
    for exponents in (range(100, 130), range(6, 200)):
        weight = random_matrix(50, 7, exponents=exponents).dequantize(dtype)
        for cols in (224, 200, 1):
            cut = weight[:, :cols]
            packed = mxfp4.pack(mxfp4.quantize(cut))
            assert torch.equal(mxfp4.dequantize(packed, 50, cols, dtype), cut)
    assert mxfp4.quantize(torch.zeros(3, 40)).dequantize().count_nonzero() == 0


@pytest.mark.parametrize("value", [5.0, 0.25, 1e-3, 13.0])
def test_weights_that_were_never_mxfp4_are_refused(value: float):
    weight = torch.full((2, 64), 6.0)
    weight[1, 40] = value
    with pytest.raises(ValueError, match=r"\(2, 64\) has weights that MXFP4 cannot hold exactly"):
        mxfp4.quantize(weight)


def test_groups_of_zeros_may_have_any_scale_and_others_only_those_of_float32_numbers():
    for exponent in (0, 1, 2, 252, 253, 254):
        matrix = random_matrix(3, 2)
        matrix.blocks[1, 1] = torch.tensor([0x80, 0x08, 0x88, 0] * 4, dtype=torch.uint8)
        matrix.exponents[1, 1] = exponent
        assert torch.equal(mxfp4.dequantize(mxfp4.pack(matrix), 3, 64), matrix.dequantize())
    for exponent in (0, 1, 253, 254, 255):
        matrix = random_matrix(3, 2)
        matrix.exponents[2, 0] = exponent
        with pytest.raises(ValueError, match=f"an MXFP4 scale is {exponent}; .* have 2 to 252"):
            mxfp4.pack(matrix)


def test_tensors_that_do_not_belong_together_make_no_matrix():
    with pytest.raises(ValueError, match=r"blocks of shape \(2, 3, 16\) do not fit scales of shape \(2, 4\)"):
        Mxfp4Matrix(torch.zeros(2, 3, 16, dtype=torch.uint8), torch.zeros(2, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="must be uint8"):
        Mxfp4Matrix(torch.zeros(2, 3, 16, dtype=torch.uint8), torch.zeros(2, 3))


# A checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, Any]:
    """The directory and the stock model with the dequantised weights."""
    path = tmp_path_factory.mktemp("mxfp4") / "tiny"
    return path, tiny.make_mxfp4_checkpoint(path)


@pytest.fixture(scope="module")
def store(checkpoint, tmp_path_factory) -> Path:
    return convert_checkpoint(checkpoint[0], tmp_path_factory.mktemp("stores") / "store")


def prompt() -> torch.Tensor:
    return torch.randint(3, tiny.VOCABULARY, (1, 23), generator=torch.Generator().manual_seed(3))


def logits_of(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a prompt, and of a greedy answer."""
    with torch.inference_mode():
        answer = model.generate(
            prompt(), max_new_tokens=8, min_new_tokens=8, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        return model(prompt()).logits, torch.cat(answer.logits)


def test_a_store_holds_the_values_that_transformers_dequantises(checkpoint, store):
    assert ExpertStore(store).manifest.codec == "mxfp4"
    for expert, parts in tiny.records(store):
        experts = checkpoint[1].model.layers[expert.layer].mlp.experts
        gate_up = torch.stack((parts["gate_proj"], parts["up_proj"]), 1).flatten(0, 1)
        assert torch.equal(gate_up.T, experts.gate_up_proj[expert.index])
        assert torch.equal(parts["down_proj"].T, experts.down_proj[expert.index])
        assert torch.equal(parts["down_proj_bias"], experts.down_proj_bias[expert.index])
        assert torch.equal(parts["up_proj_bias"], experts.gate_up_proj_bias[expert.index, 1::2])


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_logits_are_those_of_stock_transformers_on_the_dequantised_weights(checkpoint, store, kernels):
    """Bounds as for INT4 in test_exactness.py."""
    want, _ = logits_of(checkpoint[1])
    with load(store, kernels=kernels, ram="4GB") as model:
        got, _ = logits_of(model.transformers_model)
    bound = 1e-4 if kernels == "torch" else 0.08 * want.std()
    close = (got - want).abs().flatten(0, 1).amax(-1) <= bound
    assert close.float().mean() >= (1.0 if kernels == "torch" else 0.9)


def test_logits_are_the_same_bits_for_every_cache_size(store):
    want = None
    for slots in (24, 6, 7, 13):
        with load(store, slots=slots, ram="4GB") as model:
            got = logits_of(model.transformers_model)
        want = want or got
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), slots


def test_a_checkpoint_of_dequantised_weights_can_be_brought_back(checkpoint, store, tmp_path):
    (tmp_path / "bf16").mkdir()
    (tmp_path / "bf16/config.json").write_bytes((store / "config.json").read_bytes())
    tensors = load_file(checkpoint[0] / "model.safetensors")
    for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
        tensors[name] = convert_moe_packed_tensors(tensors.pop(f"{name}_blocks"), tensors.pop(f"{name}_scales"))
    save_file(tensors, tmp_path / "bf16/model.safetensors")
    back = convert(CheckpointSource(tmp_path / "bf16"), tmp_path / "store", "mxfp4")
    for (expert, parts), (_, want) in zip(tiny.records(back), tiny.records(store), strict=True):
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert torch.equal(parts[name], want[name]), (expert, name)


@pytest.mark.parametrize("codec", ["bf16", "f32"])
def test_plain_codecs_hold_the_same_values(checkpoint, store, tmp_path, codec):
    for (_, parts), (_, want) in zip(
        tiny.records(convert_checkpoint(checkpoint[0], tmp_path / codec, codec)), tiny.records(store), strict=True
    ):
        assert all(torch.equal(parts[name], want[name]) for name in ("gate_proj", "up_proj", "down_proj"))


def test_fused_tensors_are_read_one_expert_at_a_time(checkpoint, monkeypatch, tmp_path):
    read = tensorfile.TensorEntry.read

    def only_trunk(entry):
        assert not entry.name.endswith(("_blocks", "_scales")), entry.name
        return read(entry)

    monkeypatch.setattr(tensorfile.TensorEntry, "read", only_trunk)
    convert_checkpoint(checkpoint[0], tmp_path / "store")


def test_the_codec_is_chosen_by_what_ships_and_notices_say_so(checkpoint, tmp_path):
    notices: list[str] = []
    dest = find_store(checkpoint[0], on_notice=notices.append)
    assert ExpertStore(dest).manifest.codec == "mxfp4"
    assert len(notices) == 1 and "to mxfp4 (the values that the experts ship with) in" in notices[0]
    convert_checkpoint(checkpoint[0], tmp_path / "a", on_notice=notices.append)
    assert notices[1:] == ["converting to mxfp4 (the values that the experts ship with)"]
    convert_checkpoint(checkpoint[0], tmp_path / "b", "int4-g32", on_notice=notices.append)
    assert notices[2:] == ["int4-g32 changes the values that the experts ship with; mxfp4 keeps them"]
    assert ExpertStore(tmp_path / "b").manifest.codec == "int4-g32"


def test_a_store_says_nothing_of_how_its_source_was_quantised(store):
    assert "quantization_config" not in json.loads((store / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_config_without_dtype_gets_that_of_the_trunk_and_not_of_the_packed_bytes(tmp_path, dtype):
    tiny.make_mxfp4_checkpoint(tmp_path / "tiny", dtype)
    assert CheckpointSource(tmp_path / "tiny").dtype == dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{DOWN}_scales": None}, r"down_proj_blocks comes without .*down_proj_scales; is a shard missing\?"),
        ({f"{DOWN}_blocks": None}, r"down_proj_scales comes without .*down_proj_blocks; is a shard missing\?"),
        ({f"{DOWN}_blocks": None, f"{DOWN}_scales": None}, r"no tensor for .*layers\.1\.mlp\.experts\.down_proj;"),
        ({DOWN: torch.zeros(8, 96, 64)}, r"down_proj_\w+ and .*\.down_proj are the same weights twice"),
        ({f"{DOWN}_bias": None}, r"no tensor for .*layers\.1\.mlp\.experts\.down_proj_bias;"),
        ({f"{DOWN}_scales": torch.ones(8, 64, 3)}, "down_proj_scales has dtype F32, in MXFP4 it is U8"),
        ({f"{DOWN}_scales": torch.zeros(8, 64, 4, dtype=torch.uint8)},
         r"down_proj_blocks has shape \(8, 64, 3, 16\), which does not fit \(8, 64, 4\) of .*down_proj_scales"),
        ({f"{DOWN}_scales": torch.zeros(7, 64, 3, dtype=torch.uint8),
          f"{DOWN}_blocks": torch.zeros(7, 64, 3, 16, dtype=torch.uint8)},
         r"experts\.down_proj has MXFP4 tensors for the shape \(7, 64, 96\), the config says \(8, 64, 96\)"),
        ({f"{DOWN}_scales": torch.full((8, 64, 3), 255, dtype=torch.uint8)},
         r"tiny: expert 0 of model\.layers\.1\.mlp\.experts: down_proj: an MXFP4 scale is 255;"),
        ({"model.norm.weight": None, "model.norm.weight_blocks": torch.zeros(2, 2, 1, 16, dtype=torch.uint8),
          "model.norm.weight_scales": torch.zeros(2, 2, 1, dtype=torch.uint8)},
         r"model\.norm\.weight is in MXFP4, which can be read for routed experts only"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_checkpoint_is_one_sentence(checkpoint, tmp_path, change, message):
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "config.json").write_bytes((checkpoint[0] / "config.json").read_bytes())
    tensors = load_file(checkpoint[0] / "model.safetensors") | change
    save_file({name: t for name, t in tensors.items() if t is not None}, path / "model.safetensors")
    with pytest.raises(DataError, match=message) as caught:
        convert_checkpoint(path, tmp_path / "store")
    assert "\n" not in str(caught.value)


def test_a_model_that_never_was_mxfp4_is_refused_by_name(tmp_path):
    tiny.make_checkpoint(tmp_path / "tiny", "gpt_oss")
    with pytest.raises(DataError, match=r"tiny: expert 0 of .*: gate_proj: .* MXFP4 cannot hold exactly"):
        convert_checkpoint(tmp_path / "tiny", tmp_path / "store", "mxfp4")
