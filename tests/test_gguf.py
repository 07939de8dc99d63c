"""GGUF files as checkpoints: every family's logits, every type's values, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
from fakes_store import tree
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from gguf_models import ARCHITECTURES, CHAT_TEMPLATE, write_model
from pocketmoe.offload import gguf_source, hf_keys
from pocketmoe.offload.checkpoint import CheckpointSource
from pocketmoe.offload.convert import convert
from pocketmoe.offload.errors import DataError
from pocketmoe.offload.gguf_file import read_gguf
from pocketmoe.offload.gguf_source import GgufSource
from pocketmoe.offload.gguf_tensor import GgufTensor
from pocketmoe.offload.gguf_tokenizer import write_generation_config, write_tokenizer
from pocketmoe.offload.loading import convert_checkpoint, find_store, load
from pocketmoe.offload.manifest import Manifest
from pocketmoe.offload.source import RowReader
from pocketmoe.quant import int4
from pocketmoe.quant.codecs import Weight
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
CHANGES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True, "rope_parameters": YARN},
    "deepseek_v2": {
        "topk_method": "group_limited_greedy",
        "num_key_value_heads": 4,
        "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v3": {
        "q_lora_rank": None,
        "num_key_value_heads": 4,
        "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "glm4_moe": {"use_qk_norm": True, "attention_bias": True},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}
CASES = [(name, False) for name in ARCHITECTURES] + [("deepseek_v2", True), ("deepseek_v3", True)]


def small_model(name: str, path: Path, **changes: Any) -> Any:
    return tiny.make_checkpoint(path, name, **(CHANGES.get(name, {}) | changes)).requires_grad_(False)


def mixed(name: str) -> Kind:
    """As quantised files are: experts in 4 bits, the rest in 8."""
    return Kind.Q4_0 if "_exps" in name else Kind.Q8_0


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(5, tiny.VOCABULARY, (1, 23), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize(("name", "latent"), CASES, ids=[f"{name}{'-latent' * latent}" for name, latent in CASES])
def test_a_family_computes_what_stock_transformers_does_with_the_values_of_the_file(name, latent, tmp_path):
    stock = small_model(name, tmp_path / "checkpoint")
    source = GgufSource(write_model(tmp_path / "model.gguf", name, stock, mixed, latent))
    assert source.kept_codec == "int4-g32"
    with load(convert(source, tmp_path / "store", "f32"), kernels="torch", ram="4GB") as model:
        got = logits(model.transformers_model)
    torch.testing.assert_close(got, logits(stock), rtol=1e-5, atol=1e-5)


def test_the_config_is_the_one_that_the_file_was_made_from(tmp_path):
    for name in ARCHITECTURES:
        stock = small_model(name, tmp_path / name)
        made = GgufSource(write_model(tmp_path / f"{name}.gguf", name, stock)).config
        want = stock.config.to_dict()
        ignored = {"architectures", "dtype", "head_dim", "eos_token_id", "bos_token_id", "pad_token_id", "use_cache"}
        differing = {key for key in made if key not in ignored and key in want and made[key] != want[key]}
        # Absent and false are the same, and parts of "rope_parameters" that are defaults need not be said.
        assert {key for key in differing if made[key] or want[key]} <= {"rope_parameters"}, (name, made, want)


KEPT = {"mixtral": (Kind.Q4_1, "int4-g32-asym"), "qwen3_moe": (Kind.Q4_0, "int4-g32"), "gpt_oss": (Kind.MXFP4, "mxfp4")}


@pytest.mark.parametrize("name", KEPT)
def test_experts_of_4_bits_keep_their_values_to_the_bit(name, tmp_path):
    kind, codec = KEPT[name]
    stock = small_model(name, tmp_path / "checkpoint")
    file = write_model(tmp_path / "model.gguf", name, stock, lambda name: kind if "_exps" in name else Kind.BF16)
    store = convert_checkpoint(file, tmp_path / "store")
    assert Manifest.read(store).codec == codec
    sites = GgufSource(file).skeleton.sites
    for expert, parts in tiny.records(store):
        module = stock.get_submodule(sites[expert.layer].name)
        for param, value in sites[expert.layer].join(parts).items():
            assert torch.equal(value, getattr(module, param)[expert.index].float()), (expert, param)


def test_q4_0_among_q4_1_is_kept_and_more_bits_are_encoded_anew_and_it_says_so(tmp_path):
    stock = small_model("mixtral", tmp_path / "checkpoint")
    kinds = {"gate": Kind.Q4_0, "up": Kind.Q4_1, "down": Kind.Q8_0}
    file = write_model(
        tmp_path / "model.gguf",
        "mixtral",
        stock,
        lambda name: next((kind for part, kind in kinds.items() if f"ffn_{part}_exps" in name), Kind.F16),
    )
    notices: list[str] = []
    store = convert_checkpoint(file, tmp_path / "store", on_notice=notices.append)
    assert any("3 of 9 expert tensors are Q8_0" in notice for notice in notices), notices
    for expert, parts in tiny.records(store):
        gate_up = stock.model.layers[expert.layer].mlp.experts.gate_up_proj[expert.index]
        assert torch.equal(torch.cat((parts["gate_proj"], parts["up_proj"])), gate_up)
        down = stock.model.layers[expert.layer].mlp.experts.down_proj[expert.index]
        assert 0 < (parts["down_proj"] - down).norm() < 0.1 * down.norm()


# Types


SCALES = {Kind.Q4_0: (0,), Kind.Q4_1: (0, 2), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,), Kind.Q8_0: (0,)}


def random_blocks(kind: Kind, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Any bytes, with scales that are small numbers: uint8 [rows, bytes of a row]."""
    rng = np.random.default_rng(seed)
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows, cols // size, nbytes), dtype=np.uint8)
    if kind == Kind.MXFP4:
        blocks[..., 0] = rng.integers(110, 130, blocks.shape[:2])
    for start in SCALES.get(kind, ()):
        scale = rng.uniform(-0.01, 0.01, blocks.shape[:2]).astype(np.float16)
        blocks[..., start : start + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def write_tensors(path: Path, tensors: dict[str, tuple[np.ndarray, Kind]], architecture: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    finish(writer)
    return path


def values(weight: Weight) -> torch.Tensor:
    return weight if isinstance(weight, torch.Tensor) else weight.dequantize()


@pytest.mark.parametrize("kind", [*SCALES, Kind.MXFP4], ids=lambda kind: kind.name)
def test_values_are_those_of_the_gguf_package_for_any_bytes(kind, tmp_path):
    experts, rows, cols = 3, 37, 768
    data = random_blocks(kind, experts * rows, cols)
    want = torch.from_numpy(np.array(dequantize(data, kind))).reshape(experts, rows, cols)
    file = write_tensors(tmp_path / "x.gguf", {"blk.0.ffn_up_exps.weight": (data.reshape(experts, rows, -1), kind)})
    tensor = GgufTensor(read_gguf(file).tensors["blk.0.ffn_up_exps.weight"])
    assert tensor.shape == (experts, rows, cols) and torch.equal(tensor.read(), want)
    for index in range(experts):
        weight = tensor.expert(index)
        got = values(weight)
        if kind == Kind.Q4_K:  # its scales and minimums are products, rounded to float16:
            assert isinstance(weight, int4.Int4Matrix) and weight.minimums is not None
            bound = (15 * weight.scales.float().abs() + weight.minimums.float().abs()) * 2**-11
            error = (got - want[index]).abs().unflatten(1, (-1, 32)).amax(-1)
            assert (error <= bound).all() and error.any()
            packed = int4.repack(weight, weight.format)
            assert torch.equal(int4.dequantize(packed, rows, cols, weight.format), got)
        else:
            assert torch.equal(got, want[index])


def test_a_type_that_the_gguf_package_cannot_dequantise_is_refused(tmp_path, monkeypatch):
    data = random_blocks(Kind.Q8_0, 4, 64)
    file = write_tensors(tmp_path / "x.gguf", {"output.weight": (data, Kind.Q8_0)})
    place = read_gguf(file).tensors["output.weight"]._replace(kind=Kind.Q8_1)
    with pytest.raises(DataError, match=r"output\.weight is of type Q8_1, which the gguf package cannot"):
        GgufTensor(place._replace(nbytes=4 * 2 * 36))._floats(torch.zeros(4, 72, dtype=torch.uint8))


ODD = "<｜begin▁of▁sentence｜>"


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_vocabulary(path: Path, pre: str, add_bos: bool = False) -> Path:
    """A file with nothing but a byte-level tokenizer without merges."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    tokens = ["<|end|>", ODD, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * 256)
    writer.add_token_merges([])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(add_bos)
    finish(writer)
    return path


# Files in parts, tokenizer, the program's own way in


def split_in_parts(path: Path, count: int) -> list[Path]:
    """The file in parts as gguf-split writes them: metadata in the first, some tensors in each."""
    reader = gguf.GGUFReader(path)
    parts = [path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    for number, part in enumerate(parts):
        writer = gguf.GGUFWriter(part, "llama")
        if number == 0:
            for key, field in reader.fields.items():
                if not key.startswith(("GGUF.", "general.architecture")):
                    kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
                    if field.data:
                        writer.add_key_value(key, field.contents(), kind, inner)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        finish(writer)
    return parts


def test_any_part_of_a_split_file_stands_for_the_whole(tmp_path):
    whole = write_model(tmp_path / "m.gguf", "mixtral", small_model("mixtral", tmp_path / "checkpoint"), mixed)
    want = convert_checkpoint(whole, tmp_path / "whole")
    parts = split_in_parts(whole, 3)
    got = convert_checkpoint(parts[1], tmp_path / "parts")
    for name in ("experts-00001.safetensors", "trunk.safetensors", "config.json", "tokenizer.json"):
        assert (got / name).read_bytes() == (want / name).read_bytes()
    parts[2].unlink()
    with pytest.raises(DataError, match=r"m-00003-of-00003\.gguf is missing: the model is in 3 files"):
        read_gguf(parts[0])
    alone = parts[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(DataError, match=r"alone\.gguf is one of 3 files, but not named"):
        read_gguf(alone)


def test_a_gguf_file_is_loaded_by_its_path_and_speaks_with_its_own_tokenizer(tmp_path):
    stock = small_model("mixtral", tmp_path / "checkpoint", vocab_size=120)
    file = write_model(tmp_path / "model.gguf", "mixtral", stock, mixed)
    with load(file, ram="4GB", kernels="torch") as model:
        tokenizer = model.tokenizer
        assert tokenizer is not None and tokenizer.chat_template == CHAT_TEMPLATE
        ids = tokenizer.encode("<|user|>Hi you<|end|>", add_special_tokens=False)
        assert ids[0] == 3 and ids[-1] == 2 and tokenizer.decode(ids[1:-1]) == "Hi you"
        assert model.stream("Hi", max_tokens=2) and model.generate("Hi", max_tokens=3).generated_tokens <= 3
    again = find_store(file)
    assert again == find_store(file)
    file.write_bytes(file.read_bytes() + b"\0" * 32)
    notices: list[str] = []
    find_store(file, on_notice=notices.append)
    assert any("has changed since it was converted" in notice for notice in notices)


TEXTS = [
    "Hello 🌍👩‍👩‍👧!\n\n  tabs\tand 12345 naïve 中文 \r\n end ",
    "it's 3.14, isn't it?\n\n\n x=1;y__2",
    "ÀÉ ﬁ ½ 한국어 ",
    "",
]


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "gpt-4o", "gpt-2", "of-tomorrow"])
def test_text_is_cut_as_transformers_cuts_it(pre, tmp_path):
    """transformers' own reader of GGUF tokenizers knows these, too."""
    file = write_vocabulary(tmp_path / "x.gguf", pre)
    notices: list[str] = []
    write_tokenizer(read_gguf(file), tmp_path, notices.append)
    assert bool(notices) == (pre == "of-tomorrow")
    got = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    want = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf").backend_tokenizer
    for text in TEXTS:
        pieces = got.pre_tokenizer.pre_tokenize_str(text)  # type: ignore[union-attr]
        assert pieces == want.pre_tokenizer.pre_tokenize_str(text), text
        assert got.decode(got.encode(text).ids) == text


IN_THREES = ("deepseek-v3", "chatglm-bpe", "glm4", "kimi-k2")


@pytest.mark.parametrize("pre", [*IN_THREES, "deepseek-llm", "deepseek-coder", "qwen35", "smollm", "olmo"])
def test_every_other_pre_tokenizer_loses_nothing_and_takes_digits_as_its_models_do(pre, tmp_path):
    notices: list[str] = []
    write_tokenizer(read_gguf(write_vocabulary(tmp_path / "x.gguf", pre)), tmp_path, notices.append)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    digits = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("12345")]  # type: ignore[union-attr]
    want = ["123", "45"] if pre in IN_THREES else ["12345"] if pre == "olmo" else list("12345")
    assert digits == want and notices == []


def test_a_combining_mark_is_part_of_a_word_for_qwen35(tmp_path):
    for pre, pieces in (("qwen2", 2), ("qwen35", 1)):
        write_tokenizer(read_gguf(write_vocabulary(tmp_path / f"{pre}.gguf", pre)), tmp_path)
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert len(tokenizer.pre_tokenizer.pre_tokenize_str("कोट")) == pieces  # type: ignore[union-attr]


def test_special_tokens_outside_the_byte_alphabet_stay_whole_and_the_first_token_is_added(tmp_path):
    write_tokenizer(read_gguf(write_vocabulary(tmp_path / "x.gguf", "deepseek-v3", add_bos=True)), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id == 1
    assert tokenizer.encode(f"{ODD}a{ODD}", add_special_tokens=False)[::2] == [1, 1]


def test_a_sentencepiece_tokenizer_is_the_one_that_transformers_makes_with_a_space_in_front(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_context_length(64)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehlo", "he", "ll", "▁he"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259))
    for add in ("bos", "eos", "unk"):
        getattr(writer, f"add_{add}_token_id")({"unk": 0, "bos": 1, "eos": 2}[add])
    finish(writer)
    write_tokenizer(read_gguf(tmp_path / "x.gguf"), tmp_path)
    got, want = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    for text in ("hello", "he llo ab", "ünïcode"):
        assert got.encode(text) == want.encode(text) and got.encode(text)[0] == 1
        assert got.decode(got.encode(text), skip_special_tokens=True).strip() == text
    space = tokens.index("▁")
    assert got.encode(" a", add_special_tokens=False)[:2] == [space, space]


def test_what_ends_an_answer_and_how_to_sample_are_taken_from_the_file(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_eos_token_id(5)
    writer.add_eot_token_id(7)
    writer.add_sampling_temp(0.7)
    writer.add_sampling_top_k(20)
    finish(writer)
    write_generation_config(read_gguf(tmp_path / "x.gguf"), tmp_path)
    content = json.loads((tmp_path / "generation_config.json").read_text())
    assert content == {"eos_token_id": [5, 7], "do_sample": True, "temperature": 0.7, "top_k": 20}


@pytest.mark.parametrize(
    ("control", "ends"),
    [(["<|end|>", "<|call|>", "<|return|>"], [1, 2, 3]), (["<|end|>", "<|assistant|>"], [0, 2])],
    ids=["gpt-oss", "phi-3"],
)
def test_a_well_known_end_of_a_turn_ends_an_answer_though_the_file_names_another(control, ends, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_token_list([*control, "</s>"])
    writer.add_token_types([3] * (len(control) + 1))
    writer.add_eos_token_id(len(control))
    finish(writer)
    write_generation_config(read_gguf(tmp_path / "x.gguf"), tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == ends


def test_large_trunk_matrices_are_read_in_pieces_with_the_same_result(tmp_path, monkeypatch):
    stock = small_model("mixtral", tmp_path / "checkpoint", hidden_size=256, vocab_size=500)
    file = write_model(tmp_path / "m.gguf", "mixtral", stock, mixed)
    for source in (file, tmp_path / "checkpoint"):
        monkeypatch.undo()
        want = convert_checkpoint(source, tmp_path / f"{source.name}-whole")
        for module in (gguf_source, hf_keys):
            monkeypatch.setattr(module, "LARGE", 1)
        monkeypatch.setattr(int4, "_PIECE", 5000)
        opened = GgufSource(file) if source == file else CheckpointSource(source)
        assert isinstance(dict(opened.trunk())["model.embed_tokens.weight"], RowReader)
        got = convert_checkpoint(source, tmp_path / f"{source.name}-pieces")
        assert tree(got) == tree(want) and Manifest.read(got).trunk_packed
        kept = [convert_checkpoint(source, tmp_path / f"{source.name}-{i}", trunk="keep") for i in range(2)]
        assert tree(kept[0]) == tree(kept[1])
