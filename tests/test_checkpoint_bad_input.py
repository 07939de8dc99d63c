"""What is wrong with a checkpoint is one sentence that names the culprit, and nothing is ever made up."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from pocketmoe.offload.checkpoint import CheckpointSource
from pocketmoe.offload.checkpoint_files import INDEX_FILE
from pocketmoe.offload.convert import convert
from pocketmoe.offload.errors import DataError, PocketMoEError
from pocketmoe.offload.outline_reader import read_outline
from pocketmoe.offload.store import verify_store
from safetensors.torch import load_file, save_file

SINGLE = "model.safetensors"
W2 = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
FUSED = "model.layers.1.block_sparse_moe.input_linear.weight"


def refusal(path: Path, dest: Path | None = None) -> str:
    """The one sentence with which a checkpoint is refused: at once or, with `dest`, during its conversion."""

    def attempt():
        source = CheckpointSource(path)
        assert dest is not None, "should have been refused at once"
        convert(source, dest)

    with pytest.raises(DataError) as caught:
        attempt()
    message = str(caught.value)
    assert message.isprintable(), message
    assert caught.value.exit_code == 3
    return message


def rewrite(file: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of a safetensors file, or drop them."""
    tensors = load_file(file)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(file: Path, **changes) -> None:
    content = json.loads(file.read_text())
    for key, value in changes.items():
        content.pop(key, None) if value is None else content.__setitem__(key, value)
    file.write_text(json.dumps(content))


# Files that are missing, cut or something else


def test_a_missing_shard_is_named(copy):
    path = copy("mixtral-shards")
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"shard {shard.name} is missing (1 of 3)" in refusal(path)


def test_a_shard_cut_anywhere_is_named(copy, checkpoints):
    path = copy("mixtral-shards")
    shard = sorted(path.glob("*.safetensors"))[1]
    size = shard.stat().st_size
    header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    for length in (size - 1, size - 4096, size // 2, header + 1, header, header - 1, 100, 8, 7, 1, 0):
        os.truncate(shard, length)
        assert shard.name in refusal(path)
        shutil.copy(checkpoints / path.name / shard.name, shard)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4\n", "git lfs pull"),
        (b"<!doctype html><title>404</title>", "web page"),
    ],
)
def test_a_shard_that_is_something_else_is_named_for_what_it_is(copy, content, says):
    path = copy("mixtral-shards")
    shard = sorted(path.glob("*.safetensors"))[0]
    shard.write_bytes(content)
    message = refusal(path)
    assert shard.name in message and says in message


def test_a_shard_that_is_cut_while_it_is_read_ends_the_conversion_with_its_name(copy, tmp_path):
    path = copy("granitemoe")
    source = CheckpointSource(path)
    os.truncate(path / SINGLE, 100_000)
    with pytest.raises(DataError, match=rf"{SINGLE}: tensor .* ends [\d,]+ bytes early"):
        convert(source, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path, copy):
    assert "is not a directory" in refusal(tmp_path / "none")
    (tmp_path / "file").write_text("")
    assert "is not a directory" in refusal(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refusal(tmp_path / "empty")
    path = copy("granitemoe")
    (path / SINGLE).unlink()
    assert "has no *.safetensors files" in refusal(path)
    (path / SINGLE).symlink_to("absent")
    assert f"{SINGLE} is a link to absent, which is not there" in refusal(path)
    (path / "config.json").unlink()
    os.mkfifo(path / "config.json")
    assert "config.json is not a regular file" in refusal(path)


def test_a_store_is_no_checkpoint(copy, tmp_path):
    assert "is a pocketmoe store already" in refusal(convert(CheckpointSource(copy("granitemoe")), tmp_path / "store"))


# The index


def _index(path: Path, **changes: str) -> None:
    index = json.loads((path / INDEX_FILE).read_text())
    index["weight_map"].update(changes)
    (path / INDEX_FILE).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "sub/../../x.safetensors", "sub/x", "..", "", "a\\b", "a\nb", "\x1b[1m"],
)
def test_an_index_that_leads_out_of_its_directory_is_refused(copy, name):
    path = copy("mixtral-shards")
    shutil.copy(path / "model-00001-of-00003.safetensors", path.parent / "outside.safetensors")
    _index(path, **{W2: name})
    message = refusal(path)
    assert INDEX_FILE in message and repr(name) in message


@pytest.mark.parametrize("name", ["mixtral", "mixtral-shards"])
def test_a_shard_that_is_a_link_to_somewhere_else_is_refused(copy, name):
    path = copy(name)
    shard = sorted(path.glob("*.safetensors"))[0]
    shutil.move(shard, path.parent / "outside.safetensors")
    shard.symlink_to(path.parent / "outside.safetensors")
    message = refusal(path)
    assert f"{shard} is a link to {path.parent / 'outside.safetensors'}, outside of the checkpoint" in message


def test_a_tokenizer_that_is_a_link_to_somewhere_else_is_not_copied(copy, tmp_path):
    path = copy("granitemoe")
    (tmp_path / "secret").write_text("secret")
    (path / "tokenizer.json").symlink_to(tmp_path / "secret")
    assert "tokenizer.json is a link" in refusal(path, tmp_path / "store")
    assert not (tmp_path / "store.partial" / "tokenizer.json").exists()


def test_an_index_that_names_a_tensor_its_shard_does_not_hold_is_refused(copy):
    path = copy("mixtral-shards")
    _index(path, **{"model.norm.bias": "model-00002-of-00003.safetensors"})
    assert "tensor model.norm.bias is not in model-00002-of-00003.safetensors" in refusal(path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "5", "{}", '{"weight_map": []}', '{"weight_map": 5}', '{"weight_map": {"a": 5}}',
     '{"weight_map": {"a": ["b"]}}', "\x00", "[" * 100_000],
)  # fmt: skip
def test_a_damaged_index_is_refused(copy, content):
    path = copy("mixtral-shards")
    (path / INDEX_FILE).write_text(content)
    assert f"{INDEX_FILE} is damaged" in refusal(path)


def test_a_tensor_in_two_files_is_refused(copy):
    path = copy("granitemoe")
    save_file({FUSED: torch.zeros(1)}, path / "more.safetensors")
    assert f"tensor {FUSED} is in both {SINGLE} and more.safetensors" in refusal(path)


# Tensors


def test_a_missing_tensor_of_one_expert_is_named_and_never_made_up(copy):
    path = copy("mixtral")
    rewrite(path / SINGLE, **{W2: None})
    message = refusal_of_tensor(path)
    assert "expert 3 of model.layers.1.mlp.experts" in message and "w2" in message


def refusal_of_tensor(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        CheckpointSource(path)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_an_expert_under_a_wrong_number_does_not_take_the_place_of_another(copy):
    path = copy("mixtral")
    rewrite(path / SINGLE, **{W2: None, W2.replace("experts.3", "experts.8"): torch.zeros(64, 96)})
    assert "expert 3 of model.layers.1.mlp.experts" in refusal_of_tensor(path)


@pytest.mark.parametrize("number", [0, 7])
def test_a_whole_expert_that_is_missing_is_named(copy, number):
    path = copy("mixtral")
    prefix = f"model.layers.2.block_sparse_moe.experts.{number}."
    rewrite(path / SINGLE, **{f"{prefix}w{i}.weight": None for i in (1, 2, 3)})
    assert f"expert {number} of model.layers.2.mlp.experts" in refusal_of_tensor(path)


def test_more_experts_than_the_config_says_are_refused(copy):
    path = copy("mixtral")
    edit_json(path / "config.json", num_local_experts=7)
    assert "has 8 experts in the checkpoint, the config says 7" in refusal_of_tensor(path)


def test_one_kind_of_tensor_missing_from_all_experts_is_named(copy):
    path = copy("mixtral")
    prefix = "model.layers.0.block_sparse_moe.experts."
    rewrite(path / SINGLE, **{f"{prefix}{e}.w3.weight": None for e in range(8)})
    message = refusal_of_tensor(path)
    assert "model.layers.0.mlp.experts.gate_up_proj" in message and "w3" in message


@pytest.mark.parametrize(
    "tensor", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.2.self_attn.o_proj.weight", FUSED]
)
def test_a_missing_tensor_is_named_and_never_made_up(copy, tensor):
    path = copy("granitemoe")
    rewrite(path / SINGLE, **{tensor: None})
    assert tensor.partition("block_sparse_moe")[0] in refusal_of_tensor(path)


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [
        ("model.norm.weight", (32,)),
        ("model.layers.2.self_attn.o_proj.weight", (64, 63)),
        ("model.embed_tokens.weight", (96, 64)),
        (FUSED, (4, 192, 64)),
        (FUSED, (8, 192, 63)),
        (FUSED, (8, 64)),
        (FUSED, ()),
    ],
)
def test_a_tensor_of_another_shape_than_the_config_says_is_named_with_both(copy, tmp_path, tensor, shape):
    path = copy("granitemoe")
    rewrite(path / SINGLE, **{tensor: torch.zeros(shape)})
    message = refusal(path, tmp_path / "store")
    assert tensor.partition("block_sparse_moe")[0] in message and "the config says" in message


@pytest.mark.parametrize("shape", [(64, 95), (63, 96), (96, 64), (64,), (), (1, 64, 96)])
@pytest.mark.parametrize("tensor", ["w1", "w2"])
def test_an_expert_of_another_shape_than_the_config_says_is_named(copy, tmp_path, tensor, shape):
    path = copy("mixtral")
    if (tensor, shape) == ("w1", (96, 64)):
        shape = (95, 64)
    rewrite(path / SINGLE, **{W2.replace("w2", tensor): torch.zeros(shape)})
    message = refusal(path, tmp_path / "store")
    assert "model.layers.1.mlp.experts" in message and "shape" in message


def test_the_same_parameter_under_two_names_is_refused_with_both(copy):
    path = copy("granitemoe")
    rewrite(path / SINGLE, **{"norm.weight": torch.ones(64)})
    message = refusal_of_tensor(path)
    assert "tensors model.norm.weight and norm.weight are both model.norm.weight" in message


@pytest.mark.parametrize("tensor", ["model.layers.1.block_sparse_moe.gate.weight", "model.norm.weight"])
def test_infinity_in_the_trunk_is_named(copy, tmp_path, tensor):
    path = copy("mixtral")
    weight = load_file(path / SINGLE)[tensor]
    weight[5] = torch.inf
    rewrite(path / SINGLE, **{tensor: weight})
    name = tensor.replace("block_sparse_moe", "mlp")
    message = refusal(path, tmp_path / "store")
    assert message == f"trunk tensor {name} of shape {tuple(weight.shape)} holds NaN or infinity"


def test_of_a_checkpoint_whose_first_expert_is_bad_nothing_is_left(copy, tmp_path):
    path = copy("mixtral")
    first = W2.replace("layers.1", "layers.0").replace("experts.3", "experts.0")
    rewrite(path / SINGLE, **{first: torch.full_like(load_file(path / SINGLE)[first], torch.nan)})
    refusal(path, tmp_path / "made" / "store")
    assert list((tmp_path / "made").iterdir()) == []


def test_nan_in_an_expert_is_named(copy, tmp_path):
    path = copy("mixtral")
    weight = load_file(path / SINGLE)[W2]
    weight[5, 5] = float("nan")
    rewrite(path / SINGLE, **{W2: weight})
    message = refusal(path, tmp_path / "store")
    assert "expert 3 of model.layers.1.mlp.experts: down_proj:" in message and "NaN" in message


# Models


def test_a_dense_model_is_refused_as_such(tmp_path):
    tiny.FAMILIES["llama"] = {}
    try:
        tiny.make_checkpoint(tmp_path / "llama", "llama")
    finally:
        del tiny.FAMILIES["llama"]
    assert "'llama' is dense" in refusal_of_tensor(tmp_path / "llama")


def test_an_unknown_model_type_is_refused_by_its_name(copy):
    path = copy("granitemoe")
    edit_json(path / "config.json", model_type="hyper_moe")
    assert "model type 'hyper_moe' is unknown to transformers" in refusal(path)


def test_a_model_that_is_no_language_model_is_refused(copy):
    path = copy("granitemoe")
    edit_json(path / "config.json", model_type="vit")
    assert "'vit' is not a causal language model" in refusal_of_tensor(path)


def test_code_that_ships_with_a_checkpoint_is_never_run(copy, tmp_path, monkeypatch):
    path, canary = copy("granitemoe"), tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').write('run')\nclass Evil: pass\nclass EvilConfig: pass\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py"):
        (path / name).write_text(code)
    auto_map = {"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"}
    edit_json(path / "config.json", model_type="evil", auto_map=auto_map)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever asks gets a yes
    assert "needs code that ships with the checkpoint, which is never run" in refusal(path)
    edit_json(path / "config.json", model_type="granitemoe")  # known: transformers' own class serves
    assert verify_store(convert(CheckpointSource(path), tmp_path / "store")) == []
    assert not canary.exists()


class _Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_unopened(copy, tmp_path, name):
    path, canary = copy("granitemoe"), tmp_path / "canary"
    (path / SINGLE).unlink()
    (path / name).write_bytes(pickle.dumps(_Canary(canary)))
    message = refusal(path)
    assert name in message and "never opened" in message and "safetensors" in message
    assert not canary.exists()


@pytest.mark.parametrize("method", ["hqq", "compressed-tensors"])
def test_a_quantised_checkpoint_is_refused_with_its_method(copy, method):
    path = copy("granitemoe")
    edit_json(path / "config.json", quantization_config={"quant_method": method})
    assert f"is quantised ({method})" in refusal(path)


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "NF4"),
        ({"load_in_4bit": True, "load_in_8bit": False}, "FP4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8 bits"),
    ],
)
def test_bitsandbytes_is_refused_by_the_config_with_what_to_take_instead(copy, how, kind):
    path = copy("granitemoe")
    (path / SINGLE).unlink()
    edit_json(path / "config.json", quantization_config=how)
    message = refusal(path)
    assert f"is quantised by bitsandbytes ({kind})" in message and "take the model that it was made from" in message


@pytest.mark.parametrize("content", ["", "{", "\x00", "[" * 100_000, '"text"', "[]", "null"])
def test_a_damaged_config_is_refused(copy, content):
    path = copy("granitemoe")
    (path / "config.json").write_text(content)
    assert "config.json" in refusal(path)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "many"}, {"num_local_experts": 0}, {"num_hidden_layers": -1}, {"num_hidden_layers": 10**9},
        {"num_attention_heads": 0}, {"dtype": "float13"}, {"hidden_act": "magic"}, {"num_experts_per_tok": 99},
        {"num_local_experts": 10**9}, {"intermediate_size": 0}, {"num_key_value_heads": 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_of_nonsense_is_refused_by_conversion_and_by_plans(copy, change, tmp_path):
    path = copy("granitemoe")
    edit_json(path / "config.json", **change)
    with pytest.raises(PocketMoEError):
        convert(CheckpointSource(path), tmp_path / "store")
    with pytest.raises(PocketMoEError, match=r"config\.json"):
        read_outline(path)
