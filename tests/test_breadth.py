"""Model types at large: every one that the installed transformers can build gives stock's logits, or says why not."""

from __future__ import annotations

import json
import sys

import breadth
import pytest
import tiny
import tiny_families
import torch
from pocketmoe.offload import hf, packing
from pocketmoe.offload.checkpoint import CheckpointSource
from pocketmoe.offload.convert import convert
from pocketmoe.offload.errors import DataError
from pocketmoe.offload.loading import load

DEFAULT = ("dbrx", "jamba", "llama4", "longcat_flash", "minimax", "muse_spark", "qwen3_next", "qwen3_vl_moe")
"""One of each kind: experts in a form of their own, recurrent layers, experts with a norm, images left out."""
OTHERS = sorted(set(tiny_families.moe_types()) - set(DEFAULT) - breadth.REFUSED.keys())


@pytest.mark.parametrize("model_type", [*DEFAULT, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_type_gives_the_logits_and_tokens_of_stock_transformers(model_type, tmp_path):
    pytest.importorskip(breadth.WANTS.get(model_type, "torch"))
    breadth.check(model_type, tmp_path)


@pytest.mark.parametrize(
    "model_type",
    ["deepseek_v32", "jamba", "llama4", *(pytest.param(name, marks=pytest.mark.slow) for name in [*DEFAULT, *OTHERS])],
)
def test_a_packed_trunk_and_native_kernels_answer_nearly_the_same(model_type, tmp_path, monkeypatch):
    """INT4 experts and INT8 trunk matrices change the logits; a matrix that is read in a wrong way turns them over."""
    pytest.importorskip(breadth.WANTS.get(model_type, "torch"))
    monkeypatch.setattr(packing, "SMALLEST", 1)
    stock = breadth.make_checkpoint(model_type, tmp_path / "checkpoint")
    _, tokens, want = breadth.stock_answer(stock)
    path = convert(CheckpointSource(tmp_path / "checkpoint"), tmp_path / "store")
    with load(path, ram="8GB", context=256) as model:
        assert len(model._store.manifest.trunk_packed) >= 4
        got = breadth.own_answer(model, tokens)
    assert torch.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.8


def test_only_weights_that_nothing_else_computes_with_are_packed(monkeypatch):
    """jamba multiplies with dt_proj's weight itself; deepseek_v32 asks weights_proj's for its dtype."""
    monkeypatch.setattr(packing, "SMALLEST", 1)
    jamba = packing.packable_names(hf.build_skeleton(tiny_families.tiny_config("jamba")))
    assert not any("dt_proj" in name for name in jamba) and any("x_proj" in name for name in jamba)
    deepseek = packing.packable_names(hf.build_skeleton(tiny_families.tiny_config("deepseek_v32")))
    assert any("weights_proj" in name for name in deepseek)


@pytest.mark.parametrize("model_type", sorted(breadth.REFUSED))
def test_a_type_that_cannot_run_is_refused_with_a_sentence(model_type):
    with pytest.raises(DataError, match=breadth.REFUSED[model_type]):
        hf.build_skeleton(tiny_families.tiny_config(model_type))


def test_a_package_that_upstream_asks_for_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(DataError, match=r"'inkling_mm_model' cannot be built: .*scipy.*; install it with pip"):
        hf.build_skeleton(tiny_families.tiny_config("inkling_mm_model"))


def test_the_types_that_people_ask_for_are_among_those_that_run():
    asked = (
        "gpt_oss mixtral deepseek_v2 deepseek_v3 deepseek_v4 qwen2_moe qwen3_moe qwen3_next qwen3_5_moe olmoe glm4_moe "
        "minimax_m2 granitemoe phimoe hunyuan_v1_moe ernie4_5_moe lfm2_moe gemma4 nemotron_h jamba dbrx llama4 "
        "longcat_flash step3p7"
    )
    assert set(asked.split()) <= {*DEFAULT, *OTHERS}


def test_kimi_k2_is_read_as_deepseek_v3_and_its_own_code_is_not_run(tmp_path):
    stock = tiny.make_checkpoint(tmp_path / "kimi", "deepseek_v3")
    file = tmp_path / "kimi" / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content |= {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}
    content |= {"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    file.write_text(json.dumps(content), encoding="utf-8")
    source = CheckpointSource(tmp_path / "kimi")
    assert source.skeleton.config.model_type == "deepseek_v3"
    parts = source.expert(0, 3)
    weights = stock.model.layers[1].mlp.experts
    assert torch.equal(torch.cat([parts["gate_proj"], parts["up_proj"]]), weights.gate_up_proj[3])  # type: ignore


def test_a_newer_release_of_transformers_than_the_tested_is_said_and_an_older_one_refused(monkeypatch):
    notices: list[str] = []
    hf.check_version(notices.append)
    monkeypatch.setattr(hf.transformers, "__version__", f"{hf.TESTED[0]}.{hf.TESTED[1] + 1}.0.dev0")
    hf.check_version(notices.append)
    assert len(notices) == 1 and "newer than" in notices[0]
    monkeypatch.setattr(hf.transformers, "__version__", "4.57.1")
    with pytest.raises(DataError, match="too old; install transformers>="):
        hf.check_version(notices.append)
