"""FP8 in blocks as DeepSeek ships it: read as the very values that it stands for, matrix by matrix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from pocketmoe.offload.checkpoint import CheckpointSource
from pocketmoe.offload.convert import convert
from pocketmoe.offload.errors import DataError
from pocketmoe.offload.loading import load
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

BLOCK = 16
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
CUT = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"  # 24 rows: one block and a half


def write(path: Path, config: dict, tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Each block's scale at all of its weights."""
    return scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: shape[0], : shape[1]]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def checkpoints(request, tmp_path_factory) -> tuple[Path, Path]:
    """In FP8, and the same weights dequantised."""
    root, dtype = tmp_path_factory.mktemp("fp8"), request.param
    tiny.make_checkpoint(root / "source", "deepseek_v3", dtype)
    tensors = load_file(root / "source/model.safetensors")
    packed, plain = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if not name.endswith("_proj.weight") and name != CUT:
            continue
        grid = [-(-size // BLOCK) for size in weight.shape]
        scale = torch.rand(grid, generator=torch.Generator().manual_seed(len(name))) / 400 + 1e-3
        packed[name] = (weight.float() / spread(scale, weight.shape)).to(torch.float8_e4m3fn)
        packed[f"{name}_scale_inv"] = scale
        plain[name] = (packed[name].float() * spread(scale, weight.shape)).to(dtype)
    assert packed[EXPERT].dtype == packed[CUT].dtype == torch.float8_e4m3fn
    assert packed[CUT].shape[0] % BLOCK
    config = json.loads((root / "source/config.json").read_text())
    how = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    return write(root / "fp8", config | {"quantization_config": how}, packed), write(root / "plain", config, plain)


@pytest.mark.parametrize("codec", ["f32", "int4-g32"])
def test_a_store_holds_the_bytes_that_the_dequantised_checkpoint_gives(checkpoints, tmp_path, codec):
    stores = [convert(CheckpointSource(path), tmp_path / path.name, codec) for path in checkpoints]
    for name in ("experts-00001.safetensors", "trunk.safetensors", "config.json"):
        assert (stores[0] / name).read_bytes() == (stores[1] / name).read_bytes(), name


def test_logits_are_those_of_stock_transformers_on_the_dequantised_weights(checkpoints, tmp_path):
    stock = AutoModelForCausalLM.from_pretrained(checkpoints[1], experts_implementation="eager").eval()
    if stock.dtype != torch.float32:
        pytest.skip("compared to float32's rounding only")
    ids = torch.randint(3, tiny.VOCABULARY, (1, 23), generator=torch.Generator().manual_seed(3))
    store = convert(CheckpointSource(checkpoints[0]), tmp_path / "store", "f32")
    with load(store, kernels="torch", ram="4GB") as model, torch.inference_mode():
        torch.testing.assert_close(model.transformers_model(ids).logits, stock(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{EXPERT}_scale_inv": None}, "up_proj.weight comes without .*up_proj.weight_scale_inv; is a shard missing"),
        ({EXPERT: None}, "up_proj.weight_scale_inv comes without what it scales; is a shard missing"),
        ({EXPERT: torch.zeros(32, 64)}, "up_proj.weight has scales but dtype F32, not F8_E4M3"),
        ({f"{CUT}_scale_inv": torch.ones(1, 4)},
         r"kv_a_proj_with_mqa.weight_scale_inv has shape \(1, 4\) and dtype F32, which does not fit \(24, 64\)"),
        ({f"{EXPERT}_scale_inv": torch.ones(2, 4, dtype=torch.int32)}, "dtype I32, which does not fit"),
        ({f"{EXPERT}_scale_inv": torch.full((2, 4), float("nan"))}, r"expert 3 of .*layers\.1.*: up_proj: .*NaN"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_checkpoint_is_one_sentence(checkpoints, tmp_path, change, message):
    tensors = {k: t for k, t in (load_file(checkpoints[0] / "model.safetensors") | change).items() if t is not None}
    path = write(tmp_path / "tiny", json.loads((checkpoints[0] / "config.json").read_text()), tensors)
    with pytest.raises(DataError, match=message) as caught:
        convert(CheckpointSource(path), tmp_path / "store")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("block", [None, [128], ["a", "b"], [0, 128], 128])
def test_fp8_without_blocks_is_refused(checkpoints, tmp_path, block):
    config = json.loads((checkpoints[0] / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = block
    path = write(tmp_path / "tiny", config, load_file(checkpoints[0] / "model.safetensors"))
    with pytest.raises(DataError, match=r"tiny is quantised \(fp8 without weight_block_size\); only"):
        CheckpointSource(path)


def test_packed_weights_that_the_config_is_silent_about_are_never_taken_for_numbers(checkpoints, tmp_path):
    config = json.loads((checkpoints[0] / "config.json").read_text())
    del config["quantization_config"]
    path = write(tmp_path / "tiny", config, load_file(checkpoints[0] / "model.safetensors"))
    with pytest.raises(DataError, match=r"is F8_E4M3, and config\.json does not say how to read it"):
        CheckpointSource(path)
