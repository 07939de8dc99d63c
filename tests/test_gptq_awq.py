"""GPTQ and AWQ checkpoints: codes and scales go over as they are, checked against the published formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pocketmoe.offload.checkpoint import CheckpointSource
from pocketmoe.offload.config import kept_codec
from pocketmoe.offload.errors import DataError
from pocketmoe.offload.hf_keys import Int4Matrix
from pocketmoe.offload.loading import convert_checkpoint, load
from pocketmoe.offload.manifest import Manifest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

GROUP = 32
UP = "model.layers.1.mlp.experts.3.up_proj"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Tensors = dict[str, torch.Tensor]


def gptq(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True} | changes


def awq(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"} | changes


def words(codes: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """int32 [n, m / 8] of codes [n, m]: nibble i holds column order[i] of each eight."""
    eights = codes.long().unflatten(1, (-1, 8))[..., list(order)]
    return (eights << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)


def pack(how: dict[str, Any], codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> Tensors:
    """A Linear's tensors. codes [rows, cols]; zeros and scales [rows, groups]."""
    if how["quant_method"] == "awq":
        packed = {"qweight": words(codes.T, AWQ_ORDER), "qzeros": words(zeros.T, AWQ_ORDER)}
    else:
        less = zeros - 1 & 15 if how.get("checkpoint_format", "gptq") == "gptq" else zeros
        order = torch.arange(codes.shape[1], dtype=torch.int32) // GROUP
        packed = {"qweight": words(codes).T, "qzeros": words(less.T), "g_idx": order}
    return {key: t.contiguous() for key, t in packed.items()} | {"scales": scales.T.half().contiguous()}


def write(path: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


SCHEMES = {
    "gptq-sym": gptq(),
    "gptq-asym": gptq(sym=False),
    "gptq-v2": gptq(sym=False, checkpoint_format="gptq_v2"),
    "awq": awq(),
}


@pytest.fixture(scope="module", params=SCHEMES)
def pair(request, tmp_path_factory) -> tuple[dict[str, Any], Path, Path]:
    """(quantization_config, packed checkpoint, the same weights as numbers)."""
    how, root = SCHEMES[request.param], tmp_path_factory.mktemp(request.param)
    tiny.make_checkpoint(root / "source", "qwen3_moe")
    plain = load_file(root / "source/model.safetensors")
    packed, generator = dict(plain), torch.Generator().manual_seed(0)
    for name in [name for name in plain if name.endswith("_proj.weight")]:
        rows, cols = plain[name].shape
        codes = torch.randint(16, (rows, cols), generator=generator)
        zeros = torch.randint(16, (rows, cols // GROUP), generator=generator)
        if how.get("sym"):
            zeros[:] = 8
        scales = (torch.rand(rows, cols // GROUP, generator=generator) / 50 + 1e-4).half()
        del packed[name]
        module = name.removesuffix(".weight")
        packed |= {f"{module}.{key}": tensor for key, tensor in pack(how, codes, zeros, scales).items()}
        steps = (codes - zeros.repeat_interleave(GROUP, 1)).float()
        plain[name] = steps * scales.float().repeat_interleave(GROUP, 1)
    config = json.loads((root / "source/config.json").read_text())
    packed_path = write(root / "packed", config | {"quantization_config": how}, packed)
    return how, packed_path, write(root / "plain", config, plain)


def test_records_hold_the_codes_and_no_weight_moves_by_more_than_a_rounded_minimum(pair, tmp_path):
    how, packed, plain = pair
    source, numbers = CheckpointSource(packed), CheckpointSource(plain)
    store = convert_checkpoint(packed, tmp_path / "store")
    codec = "int4-g32" if how.get("sym") else "int4-g32-asym"
    assert source.kept_codec == kept_codec(how) == Manifest.read(store).codec == codec
    for expert, parts in tiny.records(store):
        ours, want = source.expert(*expert), numbers.expert(*expert)
        for name, value in parts.items():
            matrix, exact = ours[name], want[name]
            assert isinstance(matrix, Int4Matrix) and isinstance(exact, torch.Tensor)
            assert torch.equal(value, matrix.dequantize())
            if matrix.minimums is None:
                assert torch.equal(value, exact)
            else:  # half of the last of a float16's 11 bits
                bound = matrix.minimums.float().abs().repeat_interleave(GROUP, 1) * 2**-11
                assert ((value - exact).abs() <= bound * 1.01 + 1e-9).all()


def test_the_trunk_is_read_exactly(pair):
    _, packed, plain = pair
    want = dict(CheckpointSource(plain).trunk())
    for name, tensor in CheckpointSource(packed).trunk():
        assert torch.equal(tensor[:], want[name][:]), name


def test_logits_are_those_of_stock_transformers_on_the_same_weights(pair, tmp_path):
    _, packed, plain = pair
    stock = AutoModelForCausalLM.from_pretrained(plain, experts_implementation="eager").eval()
    ids = torch.randint(3, tiny.VOCABULARY, (1, 23), generator=torch.Generator().manual_seed(3))
    with load(convert_checkpoint(packed, tmp_path / "s"), kernels="torch", ram="4GB") as model, torch.inference_mode():
        got, want = model.transformers_model(ids).logits, stock(ids).logits
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("group", [64, 128])
def test_the_codec_that_keeps_the_codes_has_the_group_that_ships(group):
    assert kept_codec(gptq(group_size=group)) == f"int4-g{group}"
    assert kept_codec(awq(group_size=group)) == f"int4-g{group}-asym"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (gptq(desc_act=True), r"\(gptq, columns ordered by activation, desc_act\)"),
        (gptq(bits=8), r"\(gptq, 8 bits\)"),
        (gptq(group_size=-1), r"\(gptq, groups of -1\)"),
        (gptq(checkpoint_format="marlin"), r"\(gptq, checkpoint_format marlin\)"),
        (awq(version="gemv"), r"\(awq, version gemv\)"),
        (awq(zero_point=False), r"\(awq, version gemm without zero points\)"),
    ],
    ids=str,
)
def test_a_scheme_that_is_not_supported_is_refused_by_name(how, message, copy):
    assert kept_codec(how) is None
    path = copy("mixtral")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    with pytest.raises(DataError, match=message):
        CheckpointSource(path)


@pytest.mark.parametrize("pair", ["gptq-sym"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{UP}.scales": None}, r"comes without .*up_proj\.scales; is a shard missing"),
        ({f"{UP}.qzeros": None}, r"comes without .*up_proj\.qzeros; is a shard missing"),
        ({f"{UP}.weight": torch.zeros(32, 64)}, r"up_proj\.weight are the same weights twice"),
        ({f"{UP}.g_idx": torch.arange(64, dtype=torch.int32) % 2}, r"up_proj\.g_idx orders columns"),
        ({f"{UP}.scales": torch.ones(3, 32)}, r"qweight is I32 .*which does not fit \(3, 32\)"),
        ({f"{UP}.scales": torch.ones(2, 32, dtype=torch.int32)}, r"up_proj\.scales is I32, not a float"),
        ({f"{UP}.qzeros": torch.zeros(2, 4, dtype=torch.int32)}, r"up_proj\.qzeros differs from 8, but .* says sym"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_one_sentence(pair, tmp_path, change, message):
    _, packed, _ = pair
    tensors = {k: t for k, t in (load_file(packed / "model.safetensors") | change).items() if t is not None}
    path = write(tmp_path / "tiny", json.loads((packed / "config.json").read_text()), tensors)
    with pytest.raises(DataError, match=message) as caught:
        convert_checkpoint(path, tmp_path / "store")
    assert "\n" not in str(caught.value)
