"""Sizes without weights: what publishers state, and what conversion and loading really do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pocketmoe.offload import hf
from pocketmoe.offload.checkpoint import CheckpointSource
from pocketmoe.offload.convert import convert
from pocketmoe.offload.errors import DataError, UsageError
from pocketmoe.offload.manifest import Manifest
from pocketmoe.offload.outline_reader import read_outline
from pocketmoe.offload.sizes import chosen_formats, planned_manifest
from tiny import CHAT_VOCABULARY, add_tokenizer, make_checkpoint, make_mxfp4_checkpoint

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = json.loads((ROOT / "benchmarks/published_models.json").read_text(encoding="utf-8"))["models"]
LARGER = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}


def outline_of(model, tmp_path, **options):
    (tmp_path / "config.json").write_text(json.dumps(model), encoding="utf-8")
    return read_outline(tmp_path / "config.json", **options)


@pytest.mark.parametrize(
    "name", [name if "Qwen3-30B" in name else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]
)
def test_a_published_config_alone_gives_the_published_size(name, tmp_path):
    model = dict(PUBLISHED[name])
    billions = model.pop("billions")
    outline = outline_of(model, tmp_path)
    tolerance = 0.5e9 if isinstance(billions, int) else 0.003e9 * billions  # a whole number is rounded
    assert outline.parameters == pytest.approx(billions * 1e9, abs=tolerance)
    needs = outline.needs(4096, 0)
    assert needs.experts * needs.record == outline.chosen.experts
    assert 0 < outline.cpu.trunk_read <= outline.cpu.trunk < outline.formats[0].total
    assert 0 < needs.kv < outline.cpu.kv.at(2 * 4096)


def test_mxfp4_is_planned_to_keep_its_values_and_ships_in_the_published_size(tmp_path):
    model = {**PUBLISHED["openai/gpt-oss-120b"]}
    outline = outline_of(model, tmp_path)
    assert outline.chosen.experts_as == "mxfp4"
    shipped = next(form for form in outline.formats if form.ships and form.experts_as == "mxfp4")
    assert shipped.total == pytest.approx(65.25e9, rel=0.005)  # of the repository's safetensors files


@pytest.mark.parametrize(
    ("family", "codec", "trunk"),
    [
        ("mixtral", "int4-g32", None),
        ("mixtral", "bf16", None),
        ("qwen2_moe", "int4-g64-asym", "int4-g32"),
        ("deepseek_v3", "int4-g32", None),
        ("granitemoe", "int4-g32", None),  # its head is its embedding
    ],
)
def test_a_store_turns_out_as_planned(family, codec, trunk, tmp_path):
    make_checkpoint(tmp_path / "source", family, torch.bfloat16, vocab_size=1024, **LARGER)
    source = CheckpointSource(tmp_path / "source")
    planned = planned_manifest(source.skeleton, source.packable(), "", *chosen_formats(None, codec, trunk))
    made = Manifest.read(convert(source, tmp_path / "store", codec, trunk=trunk))
    for what in ("layers", "codec", "record_bytes", "trunk_bytes", "trunk_packed"):
        assert getattr(planned, what) == getattr(made, what), what
    before, after = read_outline(tmp_path / "source", codec, trunk), read_outline(tmp_path / "store")
    assert before.chosen == after.chosen
    assert before.needs(4096, 0) == after.needs(4096, 0)
    assert after.chosen.total == made.trunk_bytes + made.num_experts * made.record_bytes


def test_a_checkpoint_of_mxfp4_is_planned_as_it_is_converted(tmp_path):
    make_mxfp4_checkpoint(tmp_path / "source", torch.bfloat16)
    planned = read_outline(tmp_path / "source")
    made = Manifest.read(convert(CheckpointSource(tmp_path / "source"), tmp_path / "store", "mxfp4"))
    assert (planned.codec, planned.record_bytes, planned.chosen.trunk) == ("mxfp4", made.record_bytes, made.trunk_bytes)


@pytest.mark.parametrize("name", ["openai/gpt-oss-20b", "deepseek-ai/DeepSeek-V2-Lite-Chat", "LiquidAI/LFM2-8B-A1B"])
def test_keys_and_values_grow_as_they_are_measured(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]), encoding="utf-8")
    skeleton = hf.build_skeleton(hf.read_config(tmp_path))
    dtype = torch.float16 if "LFM2" not in name else None  # which keeps states beside keys and values
    growth = hf.measure_kv_growth(skeleton, 256, dtype)
    for context in (100, 3000):
        assert growth(context) == hf.measure_kv_bytes(skeleton, context, 256, dtype)


def test_a_plan_is_what_loading_does(tmp_path):
    """Each in a process of its own, because memory that one has taken is there for the other."""
    changes = {**LARGER, "max_position_embeddings": 4096, "vocab_size": CHAT_VOCABULARY}
    # A family without the fast path, which is planned for and, with random weights, may then not be taken.
    make_checkpoint(tmp_path / "source", "granitemoe", torch.bfloat16, **changes)
    add_tokenizer(tmp_path / "source")
    store = convert(CheckpointSource(tmp_path / "source"), tmp_path / "store")
    program = (
        "import sys, json\nfrom pathlib import Path\nfrom pocketmoe.offload.{module} import {function}\n"
        "plan = {call}\nprint(json.dumps({{**plan.needs._asdict(), 'slots': plan.slots, 'budget': plan.budget}}))"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program.format(module=module, function=function, call=call)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for module, function, call in (
            ("loading", "load", f"load({str(store)!r}, ram='700MB').plan"),
            ("survey", "survey", f"survey(Path({str(store)!r}), ram=700_000_000).fit.ram"),
        )
    ]
    loaded, planned = (json.loads(process.communicate()[0].splitlines()[-1]) for process in started)
    assert planned.keys() == loaded.keys()
    for name, value in loaded.items():
        assert planned[name] == pytest.approx(value, rel=0.02), name


def test_what_is_no_model_of_experts_is_refused_in_a_sentence(tmp_path, checkpoints):
    with pytest.raises(DataError, match="does not exist"):
        read_outline(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"is no config\.json"):
        read_outline(Path(__file__))
    with pytest.raises(DataError, match="has no config"):
        read_outline(tmp_path)
    with pytest.raises(DataError, match="dense"):
        outline_of({"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 64}, tmp_path)
    with pytest.raises(UsageError, match="unknown codec 'int3'"):
        read_outline(checkpoints / "mixtral", "int3")
    with pytest.raises(UsageError, match="unknown matrix format 'int3'"):
        read_outline(checkpoints / "mixtral", None, "int3")


def test_a_store_is_planned_for_as_it_is(tmp_path, checkpoints):
    store = convert(CheckpointSource(checkpoints / "mixtral"), tmp_path / "store", "f32")
    with pytest.raises(UsageError, match="is a store already"):
        read_outline(store, "int4-g32")
    assert [form.experts_as for form in read_outline(store).formats] == ["f32", "f32"]
