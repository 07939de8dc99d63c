"""`load`: where stores come from, what is refused, what is said."""

from __future__ import annotations

import gc
import os

import pytest
import tiny
import torch
from pocketmoe.offload import memory
from pocketmoe.offload.checkpoint import CheckpointSource
from pocketmoe.offload.convert import convert
from pocketmoe.offload.errors import DataError, MemoryBudgetError, UsageError
from pocketmoe.offload.loading import find_store, load
from pocketmoe.offload.manifest import MANIFEST


@pytest.fixture
def checkpoint(tmp_path):
    tiny.make_checkpoint(tmp_path / "tiny", "qwen3_moe", vocab_size=tiny.CHAT_VOCABULARY)
    tiny.add_tokenizer(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """What the checkpoint above becomes, made once and in this process: a conversion of its own costs seconds."""
    path = tmp_path_factory.mktemp("converted")
    tiny.make_checkpoint(path / "tiny", "qwen3_moe", vocab_size=tiny.CHAT_VOCABULARY)
    tiny.add_tokenizer(path / "tiny")
    return convert(CheckpointSource(path / "tiny"), path / "store")


def test_a_checkpoint_is_converted_into_the_users_cache_once(checkpoint):
    notices: list[str] = []
    first = find_store(checkpoint, on_notice=notices.append)
    assert first.is_relative_to(os.environ["XDG_CACHE_HOME"])
    assert str(first) in notices[-1]
    before = (first / MANIFEST).stat().st_mtime_ns
    assert find_store(checkpoint, on_notice=notices.append) == first
    assert (first / MANIFEST).stat().st_mtime_ns == before
    assert len(notices) == 1


def test_a_changed_checkpoint_is_converted_again(checkpoint):
    store = find_store(checkpoint)
    file = next(checkpoint.glob("*.safetensors"))
    os.utime(file, ns=(1, 1))
    notices: list[str] = []
    assert find_store(checkpoint, on_notice=notices.append) == store
    assert "has changed" in notices[0]


def test_a_damaged_store_in_the_cache_is_replaced(checkpoint):
    store = find_store(checkpoint)
    (store / MANIFEST).write_text((store / MANIFEST).read_text()[:-9])
    notices: list[str] = []
    assert find_store(checkpoint, on_notice=notices.append) == store
    assert "damaged" in notices[0]
    with load(checkpoint, ram="4GB") as model:
        assert model.generate("hi", max_tokens=2).generated_tokens == 2


def test_a_store_outlives_its_checkpoint(checkpoint):
    store = find_store(checkpoint)
    next(checkpoint.glob("*.safetensors")).unlink()
    assert find_store(checkpoint) == store


def test_what_is_neither_here_nor_in_the_hub_cache_is_one_sentence():
    for name in ("no/such-model", "/no/such/directory", "a b c"):
        with pytest.raises(DataError, match="there is no"):
            load(name)


def test_a_misspelt_option_names_the_right_one(store):
    with pytest.raises(UsageError, match="'prefetch'"):
        load(store, prefech=False)


@pytest.mark.parametrize(
    "options",
    [
        *({"ram": "lots"}, {"ram": "-1GB"}, {"context": 0}, {"io": "psychic"}, {"policy": "luck"}),
        *({"vram": True}, {"vram_slots": True}, {"vram_slots": 2.0}, {"device": 0}, {"deterministic": "no"}),
    ],
)
def test_option_values_that_make_no_sense_are_refused_by_name(store, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        load(store, **({"ram": "4GB"} | options))


def test_a_context_beyond_the_models_own_is_refused(store):
    with pytest.raises(UsageError, match="256"):
        load(store, ram="4GB", context=100_000)


def test_a_budget_below_the_floor_is_refused_before_the_trunk_is_read(store):
    store, stages = find_store(store), []
    with pytest.raises(MemoryBudgetError, match="at least"):
        load(store, ram="50MB", on_progress=lambda progress: stages.append(progress.stage))
    assert stages == []


def test_missing_native_kernels_are_said_once_and_also_where_the_budget_is_refused(store, monkeypatch):
    for name, gives in (("load_native", None), ("why_missing", "No compiler was found.")):
        monkeypatch.setattr(f"pocketmoe.offload.experts.{name}", lambda gives=gives: gives)
    notices: list[str] = []
    with load(store, ram="4GB", on_notice=notices.append):
        assert sum("No compiler was found" in notice for notice in notices) == 1
    notices.clear()
    with pytest.raises(MemoryBudgetError):
        load(store, ram="50MB", on_notice=notices.append)
    assert any("cannot keep the trunk packed" in notice for notice in notices)


def test_the_transformers_model_is_reachable_and_generates(store):
    with load(store, ram="4GB") as model:
        ids = torch.tensor([model.encode("hello")])
        out = model.transformers_model.generate(ids, max_new_tokens=3, do_sample=False)
        assert out.shape[1] > ids.shape[1]
        assert model.stats().to_dict()["requests"] > 0


def test_a_closed_model_says_so(store):
    with load(store, ram="4GB") as model:
        pass
    with pytest.raises(UsageError, match="closed"):
        model.generate("hi")
    model.close()


def test_statistics_add_up_after_answers(store):
    with load(store, ram="4GB", slots=6) as model:
        completion = model.generate("hello there", max_tokens=9, temperature=0.0)
        stats = model.stats()
        data = stats.to_dict()
        stats.check()
        assert data["generated_tokens"] == completion.generated_tokens
        assert data["prompt_tokens"] == completion.prompt_tokens
        assert data["hits"] + data["misses"] == data["requests"] > 0
        assert data["bytes_read"] == (data["demand_reads"] + data["prefetch_reads"]) * data["record_bytes"]
        assert data["slots"] == 6
        assert data["peak_rss_bytes"] > 0
        assert "hit" in stats.report()
        model.reset_stats()
        assert model.stats().to_dict()["requests"] == 0


def test_when_the_process_grows_over_its_budget_slots_give_way(store, monkeypatch):
    from pocketmoe.offload import memory

    with load(store, ram="4GB") as model:
        before = model._runtime.cache.capacity
        over = model.plan.budget + 3 * model._store.record_bytes
        monkeypatch.setattr(memory, "resident_bytes", lambda: over)
        model._after_step()
        assert model._runtime.cache.capacity == before - 3
        monkeypatch.undo()
        assert model.generate("hi", max_tokens=2).generated_tokens == 2
        model.check_integrity()


def test_without_a_context_the_largest_usual_one_that_fits_is_taken_and_said(tmp_path):
    tiny.make_checkpoint(tmp_path / "tiny", "qwen3_moe", max_position_embeddings=8192, head_dim=1024)
    store = convert(CheckpointSource(tmp_path / "tiny"), tmp_path / "store")
    gc.collect()  # models of earlier tests would otherwise leave between one load and the next, and make room
    with load(store, ram="8GB", context=2048) as model:
        needs = model.plan.needs
    notices: list[str] = []
    budget = needs.fixed + needs.floor * needs.record + 70_000_000
    with load(store, ram=budget, on_notice=notices.append) as model:
        assert model.context == 2048
        assert model.new_sequence().context == 2048
    assert any("2,048 tokens, not for 4,096" in notice for notice in notices), notices
    with load(store, ram="8GB") as model:
        assert model.context == 4096
    with pytest.raises(MemoryBudgetError):
        load(store, ram=budget, context=4096)


def test_a_prompt_borrows_slots_and_gives_them_back_without_changing_the_answer(store, monkeypatch):
    ids = list(range(3, 40))

    def answer(model) -> tuple[torch.Tensor, list[int]]:
        seen: list[int] = []
        compute = model._runtime.run_experts
        monkeypatch.setattr(
            model._runtime,
            "run_experts",
            lambda layer, *rest: (seen.append(model._runtime.cache.capacity), compute(layer, *rest))[1],
        )
        sequence = model.new_sequence()
        sequence.feed(ids)
        logits = torch.stack([sequence.feed([token]).clone() for token in ids[:5]])
        model.check_integrity()
        return logits, seen

    with load(store, ram="4GB", prefill_chunk=16) as model:
        want, capacities = answer(model)
        floor, total = model.plan.needs.floor, model.plan.slots
        assert set(capacities) == {total}
    monkeypatch.setattr(memory.MemoryPlan, "slots_beside", lambda plan, workspace: floor)
    with load(store, ram="4GB", prefill_chunk=16) as model:
        got, capacities = answer(model)
        layers = len(model._store.manifest.layers)
        prompts = 3 * layers  # 37 tokens in pieces of 16
        assert set(capacities[:prompts]) == {floor}
        assert set(capacities[prompts:]) == {total}
        with pytest.raises(IndexError):  # also after an error
            model.transformers_model(torch.tensor([[10**6, 1]]))
        assert model._runtime.cache.capacity == total
    assert torch.equal(got, want)
