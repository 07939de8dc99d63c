"""The fast path for single tokens computes what transformers' own modules compute, in every family that has it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pocketmoe.offload import hf_layers, lean, packing
from pocketmoe.offload.checkpoint import CheckpointSource
from pocketmoe.offload.convert import convert
from pocketmoe.offload.kv_cache import FullLayer, WindowLayer, new_kv_cache
from pocketmoe.offload.loading import load
from pocketmoe.offload.runtime import ExpertRuntime
from pocketmoe.offload.store import ExpertStore
from pocketmoe.quant.native import load_native
from pocketmoe.quant.native_layers import NativeLayers
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

needs_native = pytest.mark.skipif(load_native() is None, reason="the native kernels are not built")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in hf_layers.FAMILIES},
    "mixtral, sliding window": ("mixtral", {"sliding_window": 6}),
    "mixtral, partly rotary-free heads of odd width": ("mixtral", {"head_dim": 18}),
    "qwen2_moe, weights not normalised": ("qwen2_moe", {"norm_topk_prob": False}),
    "qwen3_moe, dense layers between": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "qwen3_moe, biases and one key head": ("qwen3_moe", {"attention_bias": True, "num_key_value_heads": 1}),
    "qwen3_moe, ten heads to a key head": (
        "qwen3_moe",
        {"num_attention_heads": 10, "num_key_value_heads": 1, "norm_topk_prob": True},
    ),
    "qwen3_moe, yarn": (
        "qwen3_moe",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}, "max_position_embeddings": 256},
    ),
    "olmoe, clipped": ("olmoe", {"clip_qkv": 0.02}),
    "glm4_moe, groups and head norms": (
        "glm4_moe",
        {"n_group": 4, "topk_group": 2, "use_qk_norm": True, "partial_rotary_factor": 0.5, "attention_bias": True},
    ),
    "glm4_moe, scaled weights": ("glm4_moe", {"norm_topk_prob": False, "routed_scaling_factor": 2.5}),
    "deepseek_v2, queries directly, chosen in groups": (
        "deepseek_v2",
        {"q_lora_rank": None, "topk_method": "group_limited_greedy", "routed_scaling_factor": 3.0},
    ),
    "deepseek_v3, five heads, halves turned": ("deepseek_v3", {"num_attention_heads": 5, "rope_interleave": False}),
    "deepseek_v3, yarn": (
        "deepseek_v3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "mscale_all_dim": 1.0,
                "mscale": 1.0,
            }
        },
    ),
    "gpt_oss, top-4": ("gpt_oss", {"num_experts_per_tok": 4}),
}
TOKENS = 36
"""More than twice the longest window, so that its buffer has moved."""


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory) -> tuple[Any, Path]:
    """(stock model, lossless store)"""
    name, changes = VARIANTS[request.param]
    path = tmp_path_factory.mktemp("variant")
    stock = tiny.make_checkpoint(path / "checkpoint", name, **changes)
    randomise_vectors(stock)
    stock.save_pretrained(path / "checkpoint")
    return stock, convert(CheckpointSource(path / "checkpoint"), path / "store", "f32")


def randomise_vectors(model: torch.nn.Module) -> None:
    """Norms, biases, sinks and corrections that are not the ones and zeros of a new model."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "inv_freq" not in name and (tensor.dim() == 1 or name.endswith("bias")):
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))


def tokens() -> list[int]:
    return torch.randint(3, tiny.VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(9)).tolist()


def step_logits(model: Any, prompt: int = 7) -> torch.Tensor:
    """Logits [steps, vocabulary] of single tokens after a prompt, through our own token loop."""
    sequence, ids = model.new_sequence(), tokens()
    sequence.feed(ids[:prompt])
    return torch.stack([sequence.feed([token]).clone() for token in ids[prompt:]])


@needs_native
def test_steps_give_the_logits_of_stock_transformers(variant):
    stock, path = variant
    with torch.inference_mode():
        want = stock(torch.tensor([tokens()])).logits[0, 7:]
    with load(path, ram="4GB", context=64, prefill_chunk=8) as model:
        assert model._lean is not None
        got = step_logits(model)
        model.check_integrity()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@needs_native
def test_steps_do_not_depend_on_cache_size_prefetch_or_read_mode(variant):
    _, path = variant
    manifest = ExpertStore(path).manifest
    floor, total = sum(layer.top_k for layer in manifest.layers), manifest.num_experts
    cases: list[dict[str, Any]] = [{"slots": total}, {"slots": floor}, {"slots": floor + 1, "prefetch": False}]
    cases.append({"io": "mmap"})
    want = None
    for case in cases:
        with load(path, ram="4GB", context=64, **case) as model:
            got = step_logits(model)
            model.check_integrity()
        want = got if want is None else want
        assert torch.equal(got, want), f"logits differ with {case}"


def when_tokens_begin(monkeypatch) -> list[bool]:
    """Of each single token from now on: whether it counts as begun only when its first layer has."""
    run, note_missing = NativeLayers.run, ExpertRuntime.note_missing
    started: list[float] = []
    late: list[bool] = []

    def run_from(self, first, alone):
        if first == 0:
            started.append(time.perf_counter())
        return run(self, first, alone)

    def note(self, layer, count, began):
        if layer == 0 and started:
            late.append(began > started.pop())
        note_missing(self, layer, count, began)

    monkeypatch.setattr(NativeLayers, "run", run_from)
    monkeypatch.setattr(ExpertRuntime, "note_missing", note)
    return late


@needs_native
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v2"])
def test_layers_that_run_alone_give_the_same_bits_and_the_same_books(tmp_path, monkeypatch, name):
    tiny.make_checkpoint(tmp_path / "checkpoint", name)
    path = convert(CheckpointSource(tmp_path / "checkpoint"), tmp_path / "store", "int4-g32")
    total, want = ExpertStore(path).manifest.num_experts, None
    alone: list[int] = []
    note_layers = ExpertRuntime.note_layers

    def note(self, layers, began):
        alone.append(len(layers))
        note_layers(self, layers, began)

    monkeypatch.setattr(ExpertRuntime, "note_layers", note)
    for slots in (total, total - 2):
        for table in (True, False):
            alone.clear()
            with load(path, ram="4GB", context=64, slots=slots, warm_start=False) as model:
                if not table:
                    model._runtime.table = None
                began_late = when_tokens_begin(monkeypatch)
                logits = step_logits(model)
                model.check_integrity()
                stats = model.stats(advice=True)
            assert stats.history is not None
            got = logits, stats.uses, stats.history.steps()
            want = want or got
            assert torch.equal(got[0], want[0])
            assert got[1:] == want[1:]
            assert (sum(alone) > 0) is table
            assert len(began_late) > 2
            assert not any(began_late), "a token's time begins before its first attention, whoever runs that layer"
            if table and slots == total:
                assert max(alone) == stats.layers  # a whole token


@needs_native
def test_the_guess_is_what_the_next_router_says_of_this_layers_residual(variant):
    _, path = variant
    floor = sum(layer.top_k for layer in ExpertStore(path).manifest.layers)
    with load(path, ram="4GB", context=64, slots=floor) as model:
        slow, fast = ([], [])
        request = model._runtime.prefetch.request
        seen: list[Any] = []

        def note(layer, indices):
            indices = list(indices)
            seen.append((layer, sorted(indices)))
            request(layer, indices)

        model._runtime.prefetch.request = note
        for found in (fast, slow):
            seen.clear()
            step_logits(model)
            found += seen
            model._lean = None
        assert fast == slow


@needs_native
def test_a_step_that_differs_from_the_modules_is_not_used(tmp_path, monkeypatch):
    """What a release of transformers with other arithmetic would look like."""
    tiny.make_checkpoint(tmp_path / "checkpoint", "qwen3_moe")
    path = convert(CheckpointSource(tmp_path / "checkpoint"), tmp_path / "store", "f32")
    right = hf_layers._norm
    monkeypatch.setattr(hf_layers, "_norm", lambda module: right(module)._replace(epsilon=10.0))
    notices: list[str] = []
    with load(path, ram="4GB", context=64, on_notice=notices.append) as model:
        assert model._lean is None
        step_logits(model)
    assert any("differs from transformers' own modules" in notice for notice in notices)


def test_other_families_go_through_their_own_modules(tmp_path):
    tiny.make_checkpoint(tmp_path / "checkpoint", "granitemoe")
    path = convert(CheckpointSource(tmp_path / "checkpoint"), tmp_path / "store", "f32")
    with load(path, ram="4GB", context=64) as model:
        assert model._lean is None
        assert step_logits(model).isfinite().all()


def cached(layer: Any) -> torch.Tensor:
    return layer.keys


@needs_native
def test_a_cache_in_float16_takes_half_the_memory_and_changes_logits_by_little(variant):
    _, path = variant
    with load(path, ram="4GB", context=64) as model:
        want, plain = step_logits(model), model.plan.needs.kv
    with load(path, ram="4GB", context=64, kv="f16") as model:
        assert model._lean is not None
        got, small = step_logits(model), model.plan.needs.kv
        model._lean = None
        modules = step_logits(model)
    assert small * 2 == plain
    close = (got - want).abs().amax(-1) <= 0.02 * want.std()
    assert close.float().mean() >= 0.8, "but for near-ties between experts"
    assert not torch.equal(got, want)
    close = (got - modules).abs().amax(-1) <= 0.02 * want.std()
    assert close.float().mean() >= 0.8


@pytest.mark.parametrize("window", [None, 5])
def test_preallocated_layers_hold_what_the_librarys_own_layers_hold(window):
    """Random pieces, then single tokens through `extend`, whose room must show the same keys in the same order."""
    generator = torch.Generator().manual_seed(0)
    theirs = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    ours = FullLayer(64) if window is None else WindowLayer(window, 64, 6)
    for n in (6, 1, 3, 6, 2, 1, 6, 5):
        keys, values = torch.randn(2, 1, 2, n, 4, generator=generator)
        assert ours.get_mask_sizes(n) == theirs.get_mask_sizes(n)
        for got, want in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
            assert torch.equal(got, want)
        assert torch.equal(cached(ours), cached(theirs))
        assert ours.get_seq_length() == theirs.get_seq_length()
    for _ in range(20):
        keys, values = torch.randn(2, 1, 2, 1, 4, generator=generator)
        room = ours.extend()
        for buffer, states in zip(ours.buffers, (keys, values), strict=True):
            buffer[:, :, room.position] = states[:, :, 0]
        want, _ = theirs.update(keys, values)
        assert torch.equal(ours.buffers[0][:, :, room.first : room.position + 1], want)
        assert ours.get_seq_length() == theirs.get_seq_length()
    keys, values = torch.randn(2, 1, 2, 3, 4, generator=generator)
    for got, want in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(cached(ours), cached(theirs))


def test_a_cropped_sequence_goes_on_from_where_it_was_cut():
    layer = FullLayer(16)
    states = torch.randn(1, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    layer.update(states, states)
    layer.crop(-3)
    assert layer.extend().position == 5


def test_the_cache_of_a_hybrid_model_keeps_the_librarys_layers():
    config = tiny.config("gpt_oss")
    kinds = [type(layer) for layer in new_kv_cache(config, 32, 8).layers]
    assert kinds == [WindowLayer, FullLayer, FullLayer]
    assert len(kinds) == len(DynamicCache(config=config).layers)


@needs_native
def test_the_check_finds_no_difference_between_right_paths(variant):
    _, path = variant
    with load(path, ram="4GB", context=64) as model:
        assert model._lean is not None
        assert lean.check(model._lean, model.transformers_model, model._runtime) < 1e-5


@needs_native
@pytest.mark.parametrize("trunk", ["int8-g32", "int4-g64"])
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_steps_over_a_packed_trunk_are_as_near_to_the_plain_one_as_the_modules_are(tmp_path, monkeypatch, name, trunk):
    """Both round weights and activations, not at the same places (latent attention goes another way altogether)."""
    monkeypatch.setattr(packing, "SMALLEST", 0)
    stock = tiny.make_checkpoint(tmp_path / "checkpoint", name)
    randomise_vectors(stock)
    stock.save_pretrained(tmp_path / "checkpoint")
    path = convert(CheckpointSource(tmp_path / "checkpoint"), tmp_path / "store", "f32", trunk=trunk)
    with torch.inference_mode():
        exact = stock(torch.tensor([tokens()])).logits[0, 7:]
    with load(path, ram="4GB", context=64) as model:
        assert model._lean is not None
        lean_error = (step_logits(model) - exact).square().mean().sqrt()
        model._lean = None
        modules_error = (step_logits(model) - exact).square().mean().sqrt()
    assert lean_error < 1.25 * modules_error, (lean_error, modules_error, exact.std())


@needs_native
def test_a_step_that_gives_nan_or_cannot_be_built_is_not_used_either(tmp_path, monkeypatch):
    tiny.make_checkpoint(tmp_path / "checkpoint", "mixtral")
    path = convert(CheckpointSource(tmp_path / "checkpoint"), tmp_path / "store", "f32")

    def renamed(_module):
        raise AttributeError("no attribute 'variance_epsilon'")

    right = hf_layers._norm
    for broken in (lambda module: right(module)._replace(epsilon=float("nan")), renamed):
        monkeypatch.setattr(hf_layers, "_norm", broken)
        notices: list[str] = []
        with load(path, ram="4GB", context=64, on_notice=notices.append) as model:
            assert model._lean is None
            assert step_logits(model).isfinite().all()
        assert any("fast path for single tokens is not used" in notice for notice in notices)


@needs_native
def test_steps_read_the_weights_that_they_were_made_with_whatever_becomes_of_the_modules(tmp_path):
    tiny.make_checkpoint(tmp_path / "checkpoint", "mixtral")
    path = convert(CheckpointSource(tmp_path / "checkpoint"), tmp_path / "store", "f32")
    with load(path, ram="4GB", context=64) as model:
        assert model._lean is not None
        want = step_logits(model)
        for layer in model.transformers_model.model.layers:
            layer.self_attn.q_proj.weight.data = torch.zeros(1)  # what `half()` and `to()` do: the storage is gone
        garbage = [torch.full((64, 64), 1e9) for _ in range(50)]
        sequence, ids = model.new_sequence(), tokens()
        sequence._model = None
        cache = new_kv_cache(model.transformers_model.config, 64, 8)
        for layer in cache.layers:
            layer.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))  # type: ignore[union-attr]
        logits = model._lean.step(ids[0], 1, cache)
    assert logits.isfinite().all()
    assert logits.abs().max() < 100 * want.abs().max()
    del garbage
