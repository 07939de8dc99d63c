"""Symmetric INT4 as compressed-tensors packs it (Kimi-K2-Thinking): codes and scales go over as they are."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pocketmoe.offload.config import kept_codec
from pocketmoe.offload.errors import DataError
from pocketmoe.offload.loading import convert_checkpoint, load
from pocketmoe.offload.store import ExpertStore
from pocketmoe.quant import int4
from pocketmoe.quant.codecs import ExpertShape, encode_expert, get_codec, record_layout
from pocketmoe.quant.int4 import Int4Format, Int4Matrix
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

UP = "model.layers.1.mlp.experts.3.up_proj"


def how(**changes: Any) -> dict[str, Any]:
    """The `quantization_config` of Kimi-K2-Thinking, as far as it counts."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | changes
    groups = {"group_0": {"weights": weights, "targets": ["Linear"], "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


def words_of(codes: torch.Tensor) -> torch.Tensor:
    """Eight codes in an int32, the first in the lowest bits."""
    shifted = codes.long().unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)
    return shifted.sum(-1).to(torch.int32)


def write(path: Path, config: dict, tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> tuple[Path, Path]:
    """Packed, and the same weights as numbers."""
    root = tmp_path_factory.mktemp("packed")
    tiny.make_checkpoint(root / "source", "qwen3_moe")
    plain = load_file(root / "source/model.safetensors")
    packed, generator = dict(plain), torch.Generator().manual_seed(0)
    for name in [name for name in plain if name.endswith("_proj.weight")]:
        rows, cols = plain[name].shape
        codes = torch.randint(16, (rows, cols), generator=generator)
        scale = (torch.rand(rows, cols // 32, generator=generator) / 50 + 1e-4).bfloat16()
        del packed[name]
        packed[f"{name}_packed"], packed[f"{name}_scale"] = words_of(codes), scale
        packed[f"{name}_shape"] = torch.tensor([rows, cols])
        plain[name] = (codes - 8).float() * scale.float().repeat_interleave(32, 1)
    config = json.loads((root / "source/config.json").read_text())
    return write(root / "packed", config | {"quantization_config": how()}, packed), write(root / "plain", config, plain)


def assert_same_weights(store: Path, plain: Path) -> None:
    want = load_file(plain / "model.safetensors")
    for (layer, index), parts in tiny.records(store):
        for name, value in parts.items():
            assert torch.equal(value, want[f"model.layers.{layer}.mlp.experts.{index}.{name}.weight"]), name
    opened = ExpertStore(store)
    assert all(torch.equal(tensor, want[name]) for name, tensor in opened.trunk())
    opened.close()


@pytest.mark.parametrize("group", int4.GROUPS)
def test_repacking_keeps_codes_and_scales(group: int):
    generator = torch.Generator().manual_seed(group)
    for rows in (1, 16, 37):
        codes = torch.randint(16, (rows, 3 * group), generator=generator)
        matrix = Int4Matrix(words_of(codes), torch.rand(rows, 3, generator=generator).bfloat16())
        assert torch.equal(matrix.codes(), codes.to(torch.uint8))
        packed = int4.repack(matrix, matrix.format)
        got, scales, _ = int4.unpack(packed, *matrix.shape, Int4Format(group))
        assert torch.equal(got, matrix.codes()) and torch.equal(scales.float(), matrix.scales.float())
        assert torch.equal(int4.dequantize(packed, *matrix.shape, Int4Format(group)), matrix.dequantize())


def test_a_store_holds_the_values_that_ship_by_default(checkpoints, tmp_path):
    notices: list[str] = []
    store = convert_checkpoint(checkpoints[0], tmp_path / "store", on_notice=notices.append)
    assert ExpertStore(store).manifest.codec == "int4-g32"
    assert notices == ["converting to int4-g32 (the values that the experts ship with)"]
    assert_same_weights(store, checkpoints[1])


def test_a_plain_codec_holds_them_too_and_another_int4_says_that_it_does_not(checkpoints, tmp_path):
    notices: list[str] = []
    assert_same_weights(convert_checkpoint(checkpoints[0], tmp_path / "a", "f32", on_notice=notices.append),
                        checkpoints[1])  # fmt: skip
    assert notices == []
    convert_checkpoint(checkpoints[0], tmp_path / "b", "int4-g64", on_notice=notices.append)
    assert notices == ["int4-g64 changes the values that the experts ship with; int4-g32 keeps them"]


def test_logits_are_those_of_stock_transformers_on_the_same_weights(checkpoints, tmp_path):
    stock = AutoModelForCausalLM.from_pretrained(checkpoints[1], experts_implementation="eager").eval()
    ids = torch.randint(3, tiny.VOCABULARY, (1, 23), generator=torch.Generator().manual_seed(3))
    store = convert_checkpoint(checkpoints[0], tmp_path / "store")
    with load(store, kernels="torch", ram="4GB") as model, torch.inference_mode():
        torch.testing.assert_close(model.transformers_model(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group", int4.GROUPS)
def test_the_codec_that_keeps_the_values_has_the_group_that_ships(group: int):
    assert kept_codec(how(group_size=group)) == f"int4-g{group}"


@pytest.mark.parametrize(
    "quantization",
    [
        None, 3, {}, {"quant_method": "compressed-tensors"}, how() | {"format": "float-quantized"},
        how() | {"config_groups": {}}, how() | {"config_groups": {"a": None}}, how(num_bits=8), how(symmetric=False),
        how(group_size=48), how(strategy="channel"), how(type="float"),
    ],
    ids=str,
)  # fmt: skip
def test_no_codec_keeps_what_is_packed_in_another_way(quantization):
    assert kept_codec(quantization) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{UP}.weight_scale": None}, r"comes without .*up_proj\.weight_scale; is a shard missing"),
        ({f"{UP}.weight_packed": None}, r"comes without .*up_proj\.weight_packed; is a shard missing"),
        ({f"{UP}.weight": torch.zeros(32, 64)}, r"up_proj\.weight are the same weights twice"),
        ({f"{UP}.weight_g_idx": torch.zeros(64)}, "weight_g_idx says that columns are out of order"),
        ({f"{UP}.weight_scale": torch.ones(32, 3)},
         r"weight_packed is I32 \(32, 8\), which does not fit F32 \(32, 3\) of .* in groups of 32"),
        ({f"{UP}.weight_packed": torch.zeros(32, 8)}, r"weight_packed is F32 \(32, 8\), which does not fit"),
        ({f"{UP}.weight_scale": torch.full((32, 2), 1e-9)}, r"expert 3 of .*layers\.1.*: up_proj: .* no number of f"),
        ({f"{UP}.weight_packed": torch.zeros(16, 8, dtype=torch.int32), f"{UP}.weight_scale": torch.ones(16, 2)},
         "expert 3 of .*gate_up_proj has shape"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_checkpoint_is_one_sentence(checkpoints, tmp_path, change, message):
    tensors = {k: t for k, t in (load_file(checkpoints[0] / "model.safetensors") | change).items() if t is not None}
    path = write(tmp_path / "tiny", json.loads((checkpoints[0] / "config.json").read_text()), tensors)
    with pytest.raises(DataError, match=message) as caught:
        convert_checkpoint(path, tmp_path / "store")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("codec", ["int4-g32", "int4-g128-asym", "int4-g32-zp"])
def test_threads_make_the_same_record(codec):
    chosen, shape = get_codec(codec), ExpertShape(2048, 1552)
    layout, generator = record_layout(chosen, shape), torch.Generator().manual_seed(0)
    weights = {name: torch.randn(size, generator=generator).bfloat16() for name, size in shape.parts().items()}
    assert len(int4.row_pieces(weights["up_proj"])) == 4
    with ThreadPoolExecutor(3) as pool:
        assert torch.equal(encode_expert(chosen, layout, weights, pool.map), encode_expert(chosen, layout, weights))
