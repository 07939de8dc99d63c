"""The one promise: whatever is cached, however it is read, the model computes what stock transformers computes."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from pocketmoe.cache.expert import ExpertId
from pocketmoe.cache.policy import policy_names
from pocketmoe.offload import hf
from pocketmoe.offload.checkpoint import CheckpointSource
from pocketmoe.offload.convert import convert
from pocketmoe.offload.loading import load
from pocketmoe.offload.store import ExpertStore
from pocketmoe.quant.codecs import decode_expert

NEW_TOKENS = 8


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request, tmp_path_factory):
    """(name, stock model, checkpoint directory)"""
    path = tmp_path_factory.mktemp(request.param)
    return request.param, tiny.make_checkpoint(path, request.param), path


def prompt() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, tiny.VOCABULARY, (1, 23), generator=generator)


def outputs(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a prompt, and the tokens of a greedy answer with their logits through transformers' own generate."""
    with torch.inference_mode():
        logits = model(prompt()).logits
        answer = model.generate(
            prompt(),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return logits, torch.cat([answer.sequences.reshape(-1).float(), torch.cat(answer.logits).reshape(-1)])


def make_store(family, tmp_path, codec):
    return convert(CheckpointSource(family[2]), tmp_path / codec, codec)


def floor_of(path) -> int:
    return sum(layer.top_k for layer in ExpertStore(path).manifest.layers)


def test_lossless_store_gives_the_logits_and_greedy_tokens_of_stock_transformers(family, tmp_path):
    _, stock, _ = family
    want_logits, want_answer = outputs(stock)
    with load(make_store(family, tmp_path, "f32"), kernels="torch", ram="4GB") as model:
        logits, answer = outputs(model.transformers_model)
        model.check_integrity()
    torch.testing.assert_close(logits, want_logits, rtol=1e-5, atol=1e-5)
    total = prompt().shape[1] + NEW_TOKENS
    assert torch.equal(answer[:total], want_answer[:total]), "greedy tokens differ"
    torch.testing.assert_close(answer[total:], want_answer[total:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_int4_store_gives_the_logits_of_stock_transformers_on_the_dequantised_weights(family, tmp_path, kernels):
    """Bound: 1e-4 for torch kernels (float rounding). The native ones also round activations to int8 (0.4 % of the
    largest in 32), which random routers amplify where two experts are nearly tied: 8 % of the logits' spread."""
    name, _, checkpoint = family
    path = make_store(family, tmp_path, "int4-g32")  # these matrices are too small for the trunk to be packed
    stock = type(family[1]).from_pretrained(checkpoint, experts_implementation="eager").eval()
    store = ExpertStore(path)
    codec, layouts = store.manifest.codec_and_layouts()
    sites = hf.build_skeleton(hf.read_config(path)).sites
    record = torch.empty(store.record_bytes + 4096, dtype=torch.uint8)
    record = record[-record.data_ptr() % 4096 :][: store.record_bytes]
    with torch.no_grad():
        for site in sites:
            module = stock.get_submodule(site.name)
            for index in range(site.layer.num_experts):
                store.read_into(ExpertId(site.index, index), record.numpy().data)
                parts = decode_expert(codec, layouts[site.index], record)
                for param, value in site.join(parts).items():
                    getattr(module, param)[index] = value
    want, _ = outputs(stock)
    with load(path, kernels=kernels, ram="4GB") as model:
        got, _ = outputs(model.transformers_model)
    bound = 1e-4 if kernels == "torch" else 0.08 * want.std()
    close = (got - want).abs().flatten(0, 1).amax(-1) <= bound
    # Where an activation's rounding flips a near-tie between experts a position differs for good: allow one in ten.
    assert close.float().mean() >= (1.0 if kernels == "torch" else 0.9), (name, (got - want).abs().max(), want.std())


@pytest.mark.parametrize("codec", ["f32", "int4-g32"])
def test_logits_do_not_depend_on_cache_size_policy_prefetch_or_read_mode(family, tmp_path, codec):
    path = make_store(family, tmp_path, codec)
    floor, total = floor_of(path), ExpertStore(path).manifest.num_experts
    cases: list[dict[str, Any]] = [{"slots": slots} for slots in (total, floor, floor + 1, (floor + total) // 2)]
    cases += [
        {"slots": floor, "policy": policy, "prefetch": prefetch}
        for policy in policy_names()
        for prefetch in (True, False)
    ]
    cases += [{"slots": floor, "io": io} for io in ("buffered", "mmap")] + [{"slots": floor, "readers": 1}]
    want = None
    for case in cases:
        with load(path, ram="4GB", **case) as model:
            got = outputs(model.transformers_model)
            model.check_integrity()
            assert model.stats().total("bytes_read") > 0
        want = want or got
        assert torch.equal(got[0], want[0]), f"prompt logits differ with {case}"
        assert torch.equal(got[1], want[1]), f"answer logits differ with {case}"


def test_one_changed_expert_changes_the_logits(family, tmp_path):
    """The negative control: were a wrong expert loaded, the tests above would notice."""
    path = make_store(family, tmp_path, "f32")
    with load(path, ram="4GB") as model:
        want, _ = outputs(model.transformers_model)
        used = min(model._runtime.cache.residents())  # every expert was read because some token chose it
    store = ExpertStore(path)
    file, number = store.manifest.expert_files[0], store.number(used)
    with open(path / file.name, "r+b") as handle:
        handle.seek(file.data_start + number * store.record_bytes)
        values = torch.frombuffer(bytearray(handle.read(4096)), dtype=torch.float32) * 1.5
        handle.seek(file.data_start + number * store.record_bytes)
        handle.write(values.numpy().tobytes())
    with load(path, ram="4GB", verify=False) as model:
        got, _ = outputs(model.transformers_model)
    assert not torch.equal(got, want)


def test_bf16_store_of_a_bf16_checkpoint_holds_the_very_weights(tmp_path):
    stock = tiny.make_checkpoint(tmp_path / "checkpoint", "qwen3_moe", dtype=torch.bfloat16)
    source = CheckpointSource(tmp_path / "checkpoint")
    path = convert(source, tmp_path / "store", "bf16")
    store = ExpertStore(path)
    codec, layouts = store.manifest.codec_and_layouts()
    record = torch.empty(store.record_bytes * 2, dtype=torch.uint8)
    record = record[-record.data_ptr() % 4096 :][: store.record_bytes]
    store.read_into(ExpertId(1, 5), record.numpy().data)
    parts = decode_expert(codec, layouts[1], record, torch.bfloat16)
    experts = stock.model.layers[1].mlp.experts
    assert torch.equal(torch.cat([parts["gate_proj"], parts["up_proj"]]), experts.gate_up_proj[5])
    assert torch.equal(parts["down_proj"], experts.down_proj[5])
