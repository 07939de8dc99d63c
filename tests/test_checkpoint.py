"""Reading checkpoints: every layout, dtype and sharding bit for bit, in pieces as small as an expert."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pocketmoe.offload.checkpoint import CheckpointSource
from pocketmoe.offload.checkpoint_files import INDEX_FILE
from pocketmoe.offload.convert import convert
from pocketmoe.offload.manifest import Manifest
from pocketmoe.offload.store import ExpertStore, verify_store
from pocketmoe.offload.tensorfile import header_bytes
from safetensors.torch import load_file, save_file

SINGLE = "model.safetensors"
W2 = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
FUSED = "model.layers.1.block_sparse_moe.input_linear.weight"


def rewrite(file: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of a safetensors file, or drop them."""
    tensors = load_file(file)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "codec"), [(torch.float32, "f32"), (torch.bfloat16, "bf16"), (torch.float16, "f16")], ids=str
)
@pytest.mark.parametrize("name", ["mixtral", "granitemoe", "gpt_oss", "deepseek_v3"])
def test_experts_and_trunk_of_any_layout_dtype_and_sharding_come_back_bit_for_bit(tmp_path, name, dtype, codec, shards):
    stock = tiny.make_checkpoint(tmp_path / name, name, dtype, shards)
    assert (tmp_path / name / INDEX_FILE).exists() == (shards > 1)
    source = CheckpointSource(tmp_path / name)
    assert source.dtype == dtype
    want = stock.state_dict()
    for site in source.skeleton.sites:
        for index in range(site.layer.num_experts):
            parts: Any = source.expert(site.index, index)
            for param, tensor in site.join(parts).items():
                assert tensor.dtype == dtype and torch.equal(tensor, want[f"{site.name}.{param}"][index])
    dest = convert(source, tmp_path / "store", codec)
    assert verify_store(dest) == []
    store = ExpertStore(dest)
    trunk = dict(store.trunk())
    store.close()
    assert set(trunk) == set(source.skeleton.trunk_names())
    for key, tensor in trunk.items():
        assert torch.equal(tensor, want[key]), key


def resident(field: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def test_converting_a_fused_checkpoint_needs_a_few_experts_of_memory_and_not_a_layer(tmp_path):
    """200 MB of experts in two tensors of 100 MB; the bound is a third of one of them."""
    reset = Path("/proc/self/clear_refs")
    if sys.platform != "linux" or not os.access(reset, os.W_OK):
        pytest.skip("needs Linux's peak of resident memory")
    experts, hidden, inner = 64, 512, 512
    config = tiny.config(
        "granitemoe", hidden_size=hidden, intermediate_size=inner, num_local_experts=experts, num_hidden_layers=2,
        dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path / "big")
    shapes = {}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.block_sparse_moe.input_linear.weight": (experts, 2 * inner, hidden),
            f"{prefix}.block_sparse_moe.output_linear.weight": (experts, hidden, inner),
            f"{prefix}.block_sparse_moe.router.layer.weight": (experts, hidden),
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            **{f"{prefix}.self_attn.{n}_proj.weight": (hidden, hidden) for n in "qo"},
            **{f"{prefix}.self_attn.{n}_proj.weight": (hidden // 2, hidden) for n in "kv"},
        }
    shapes |= {f"{name}.weight": (tiny.VOCABULARY, hidden) for name in ("model.embed_tokens", "lm_head")}
    shapes |= {"model.norm.weight": (hidden,)}
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        entries[name] = ("BF16", shape, begin, end)
    file = tmp_path / "big" / SINGLE
    file.write_bytes(header_bytes(entries, 8192, {"format": "pt"}))
    os.truncate(file, 8192 + end)  # zeros, without writing them
    assert end > 200_000_000
    source = CheckpointSource(tmp_path / "big")
    source.expert(0, 0)
    before = resident("VmRSS")
    reset.write_text("5")  # the peak starts again from what is resident now
    assert resident("VmHWM") < before + (4 << 20)
    convert(source, tmp_path / "store")
    peak = resident("VmHWM") - before
    expert, largest = 3 * hidden * inner * 4, 2 * hidden * hidden
    assert peak < 6 * expert + largest + (8 << 20) < 200_000_000 / 6, f"{peak / 1e6:.0f} MB"


def test_links_into_the_hub_caches_blobs_are_followed(checkpoints, tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in (checkpoints / "mixtral-shards").iterdir():
        shutil.copy(file, blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob-{file.name}")
    assert len(CheckpointSource(snapshot).layers()) == 3


def test_tensors_that_the_model_does_not_use_are_named_in_a_notice(copy):
    path, notices = copy("granitemoe"), []
    more = {f"vision.layers.{i}.norm.weight": torch.zeros(3) for i in range(7)}
    rewrite(path / SINGLE, **more, **{"vision.tower.weight": torch.zeros(3)})
    CheckpointSource(path, notices.append)
    names = "vision.layers.*.norm.weight (7), vision.tower.weight"
    assert notices == [f"8 tensors of the checkpoint are not used by the model: {names}"]


def test_tokenizer_files_go_into_the_store_and_weights_and_code_do_not(copy, tmp_path):
    path = copy("granitemoe")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (path / name).write_text("{}")
    for name in ("modeling_evil.py", "tokenization_evil.py", "pytorch_model.bin", "README.md"):
        (path / name).write_text("x")
    dest = convert(CheckpointSource(path), tmp_path / "store")
    assert set(Manifest.read(dest).file_checksums) == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "special_tokens_map.json", "trunk.safetensors",
    }  # fmt: skip
