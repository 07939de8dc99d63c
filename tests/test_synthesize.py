"""The synthetic checkpoint: the same numbers in every format, and routing as promised."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pocketmoe.cache.expert import ExpertId
from pocketmoe.offload import load
from pocketmoe.offload.convert import convert
from pocketmoe.offload.manifest import Manifest
from pocketmoe.offload.store import ExpertStore, verify_store
from pocketmoe.quant.codecs import decode_expert

ROOT = Path(__file__).parent.parent


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    """Modules of `benchmarks`, which is not installed."""
    monkeypatch.syspath_prepend(str(ROOT))

    def get(name: str) -> ModuleType:
        return importlib.import_module(f"benchmarks.{name}")

    return get


@pytest.fixture
def source(bench, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two layers of a model like Qwen3-30B-A3B, made small."""
    shapes = bench("shapes")
    shape = shapes.SHAPES["qwen3-30b-a3b"]
    small = {
        "hidden_size": 128,
        "moe_intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
    }
    return bench("synthetic_source").SyntheticSource(shape._replace(config=shape.config | small), 2)


def test_random_weights_have_no_common_offset_and_the_asked_deviation(bench):
    weights = bench("synthetic_weights").random_matrix(0, "w", 512, 1024, 0.05).dequantize()
    assert abs(weights.std() / 0.05 - 1) < 0.04
    assert abs(weights.mean()) < 4 * 0.05 / np.sqrt(weights.size)
    assert np.abs(weights.mean(axis=1)).max() < 6 * 0.05 / np.sqrt(1024)


def test_weights_are_exact_in_bfloat16(bench):
    weights = torch.from_numpy(bench("synthetic_weights").random_matrix(3, "w", 64, 256, 0.02).dequantize())
    assert torch.equal(weights.bfloat16().float(), weights)


def test_a_tensor_depends_on_its_name_and_seed_alone(bench):
    make = bench("synthetic_weights").random_matrix
    first = make(0, "a", 16, 64, 1.0)
    make(0, "b", 16, 64, 1.0)
    assert (make(0, "a", 16, 64, 1.0).codes == first.codes).all()
    assert (make(0, "b", 16, 64, 1.0).codes != first.codes).any()
    assert (make(1, "a", 16, 64, 1.0).codes != first.codes).any()


def test_q4_0_blocks_read_back_as_the_same_numbers(bench):
    from gguf import GGMLQuantizationType, dequantize

    matrix = bench("synthetic_weights").random_matrix(0, "w", 8, 96, 0.02)
    assert (dequantize(matrix.to_q4_0(), GGMLQuantizationType.Q4_0) == matrix.dequantize()).all()


def test_the_store_holds_exactly_the_generated_experts(source, tmp_path):
    path = convert(source, tmp_path / "store", "int4-g32")
    assert verify_store(path) == []
    manifest = Manifest.read(path)
    codec, layouts = manifest.codec_and_layouts()
    store = ExpertStore(path, io="buffered")
    record = torch.empty(manifest.record_bytes, dtype=torch.uint8)
    for layer, index in ((0, 0), (1, 15)):
        store.read_into(ExpertId(layer, index), record.numpy().data)
        want = source.expert(layer, index)
        got = decode_expert(codec, layouts[layer], record, torch.float32)
        assert all(torch.equal(got[part], want[part]) for part in want), (layer, index)
    store.close()


def test_the_gguf_file_holds_exactly_the_generated_experts(bench, source, tmp_path):
    from gguf import GGUFReader, dequantize

    bench("synthetic_gguf").write_gguf(source, tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    down = tensors["blk.1.ffn_down_exps.weight"]
    values = dequantize(down.data, down.tensor_type).reshape(16, 128, 64)
    assert (values[7] == source.expert(1, 7)["down_proj"].numpy()).all()
    router = tensors["blk.0.ffn_gate_inp.weight"].data
    assert (router == source.trunk_tensor("model.layers.0.mlp.gate.weight")).all()


def test_gpt_oss_keeps_its_mxfp4_experts_in_the_store_and_in_the_gguf_file(bench, tmp_path):
    from gguf import GGUFReader, dequantize

    shape = bench("shapes").SHAPES["gpt-oss-20b"]
    small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    small |= {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    source = bench("synthetic_source").SyntheticSource(shape._replace(config=shape.config | small), 2)
    want = source.expert(1, 3)
    bench("synthetic_gguf").write_gguf(source, tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    for part in ("gate", "up", "down"):
        stacked = tensors[f"blk.1.ffn_{part}_exps.weight"]
        assert stacked.tensor_type.name == "MXFP4"
        values = dequantize(stacked.data, stacked.tensor_type).reshape(4, *want[f"{part}_proj"].shape)
        assert (values[3] == want[f"{part}_proj"].numpy()).all()
    assert tensors["blk.0.post_attention_norm.weight"].data.shape == (64,)
    store = ExpertStore(convert(source, tmp_path / "store", shape.codec), io="buffered")
    record = torch.empty(store.record_bytes, dtype=torch.uint8)
    store.read_into(ExpertId(1, 3), record.numpy().data)
    codec, layouts = store.manifest.codec_and_layouts()
    got = decode_expert(codec, layouts[1], record, torch.float32)
    assert codec.name == "mxfp4" and all(torch.equal(got[part], want[part]) for part in want)
    store.close()


def test_rows_of_q_and_k_are_reordered_for_llamas_rotary_embedding(bench):
    rows = np.arange(2 * 8).reshape(16, 1)  # 2 heads of 8
    assert bench("synthetic_gguf")._to_pairs(rows, 2)[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_transformers_computes_the_same_from_the_hf_checkpoint_as_we_do_from_the_store(bench, source, tmp_path):
    from transformers import AutoModelForCausalLM

    bench("synthesize").write_hf(source, tmp_path / "hf")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = bench("synthetic_weights").token_stream("realistic", 12, 8192, 0)
    with torch.inference_mode():
        want = model(torch.tensor([ids])).logits[0, -1]
    store = convert(source, tmp_path / "store", trunk="keep")
    config = json.loads((store / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    with load(store, kernels="torch") as ours:
        got = ours.new_sequence().feed(ids)
    error = (got - want).norm() / want.norm()
    assert error < 0.03, error  # bfloat16 trunk against float32
    assert got.argmax() == want.argmax()


def test_topics_make_the_realistic_stream_reuse_experts_and_the_uniform_one_not(bench, source, tmp_path):
    store = convert(source, tmp_path / "store")
    measure = bench("routing").measure_routing
    uniform = measure(store, "uniform", 150, threads=1)["mean"]
    realistic = measure(store, "realistic", 150, threads=1)["mean"]
    assert uniform["reuse"] < 0.33, uniform  # by chance 4/16
    assert realistic["reuse"] > uniform["reuse"] + 0.1, realistic
    assert realistic["effective"] < uniform["effective"], realistic
    assert realistic["lru_0.4"] > uniform["lru_0.4"] + 0.1, realistic


def test_streams_stay_in_their_half_of_the_vocabulary(bench):
    stream = bench("synthetic_weights").token_stream
    assert max(stream("uniform", 500, 8192, 0)) < 4096 <= min(stream("realistic", 500, 8192, 0))
    with pytest.raises(ValueError, match="unknown kind"):
        stream("other", 1, 8192, 0)


def test_text_can_be_encoded_and_decoded(bench, source, tmp_path):
    from transformers import AutoTokenizer

    source.copy_files(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("Grüße  ☕")["input_ids"]
    assert max(ids) < 512
    assert tokenizer.decode(ids) == "Grüße  ☕"
    assert "assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )


def test_routing_figures_of_known_sequences(bench):
    routing = bench("routing")
    same = np.tile([[0, 1]], (10, 1))
    assert routing.reuse(same, np.zeros(10)) == 1
    assert routing.effective(same, 8) == pytest.approx(2)
    cycle = np.arange(12).reshape(6, 2) % 6
    assert routing.reuse(cycle, np.zeros(6)) == 0
    assert routing.lru(cycle, 5) == 0  # below one cycle LRU never hits
    assert routing.lru(cycle, 6) == 0.5
