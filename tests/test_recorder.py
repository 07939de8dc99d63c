"""Recording the routing of a run: what is in the trace is what ran."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from pocketmoe.cache.policy import policy_names
from pocketmoe.cache.replay import Requests, replay
from pocketmoe.cache.trace import DECODE, PREFILL, TraceWriter, read_trace
from pocketmoe.offload import loading
from pocketmoe.offload.errors import DataError, UsageError
from pocketmoe.offload.loading import load
from pocketmoe.offload.recorder import RoutingRecorder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny.make_chat_store(tmp_path_factory.mktemp("recorded"), "qwen3_moe", num_hidden_layers=4)


def answer(model, ids: list[int], tokens: int) -> None:
    list(model.answer(model.new_sequence(), ids, [], max_tokens=tokens, temperature=1.0, top_p=1.0, top_k=0, seed=1))


@pytest.mark.parametrize("policy", policy_names())
def test_replaying_a_run_gives_its_own_hits_and_misses(store, tmp_path, policy):
    path = tmp_path / "run.npz"
    with load(store, ram="4GB", slots=14, policy=policy, prefetch=False, warm_start=False, trace=str(path)) as model:
        for start in range(10, 16):  # prompts of one token: with more, what the prompt has left would count as well
            answer(model, [start], 30)
        stats = model.stats()
    requests = Requests(read_trace(path), warm=True)
    result = replay(requests, policy, 14)
    assert (result.requests, result.hits) == (stats.total("requests"), stats.total("hits"))
    assert list(result.misses_by_layer) == [layer.misses for layer in stats.per_layer]
    assert 0.1 < result.hits / result.requests < 0.9


def test_token_ids_are_recorded_on_request_only(store, tmp_path):
    for asked in (True, False):
        path, prompt = tmp_path / f"{asked}.npz", [7, 8, 9, 10, 11]
        with load(store, ram="4GB", prefill_chunk=4, trace=str(path), trace_tokens=asked) as model:
            generated: list[int] = []
            list(model.answer(model.new_sequence(), prompt, generated, max_tokens=4, temperature=0))
        ids = read_trace(path).ids
        assert (ids.tolist() if ids is not None else None) == ([*prompt, *generated[:3]] if asked else None)
    with pytest.raises(UsageError, match="trace_tokens needs a trace"):
        load(store, ram="4GB", trace_tokens=True)


def test_prompt_answer_sequences_and_guesses_are_told_apart(store, tmp_path):
    path = tmp_path / "run.npz"
    with load(
        # Too few slots for all experts, or there would be nothing to guess.
        store,
        ram="4GB",
        slots=14,
        trace=str(path),
        prefill_chunk=4,
    ) as model:
        answer(model, [7, 8, 9, 10, 11, 12, 13], 5)
        answer(model, [7, 8], 2)
        assert not path.exists()
    trace = read_trace(path)
    phases = [PREFILL] * 7 + [DECODE] * 4 + [PREFILL] * 2 + [DECODE]
    assert trace.phase.tolist() == phases
    assert trace.seq.tolist() == [0] * 11 + [1] * 3
    assert trace.weights is not None and trace.guesses is not None
    assert np.all(np.diff(trace.weights, axis=2) <= 0), "the router's order is kept"
    decoded = trace.phase == DECODE
    assert np.all(trace.guesses[~decoded] == trace.none)
    assert np.all(trace.guesses[decoded][:, 0] == trace.none), "nobody guesses the first layer"
    assert np.all(trace.guesses[decoded][:, 1:] < trace.num_experts)


def test_the_routing_in_a_trace_is_that_of_stock_transformers(tmp_path):
    stock = tiny.make_checkpoint(tmp_path / "checkpoint", "qwen3_moe")
    chosen: list[torch.Tensor] = []
    for name, module in stock.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda _m, _i, output: chosen.append(output[-1]))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.inference_mode():
        stock(ids)
        with load(tmp_path / "checkpoint", codec="f32", ram="4GB", trace=str(tmp_path / "run.npz")) as model:
            model.transformers_model(ids)
    assert np.array_equal(read_trace(tmp_path / "run.npz").experts, torch.stack(chosen, 1).numpy())


def test_an_interrupted_forward_is_not_in_the_trace(tmp_path):
    writer = TraceWriter(tmp_path / "run.npz", layers=2, experts=8, top_k=2, model=None)
    recorder = RoutingRecorder(writer, layers=2, top_k=2)
    index, weights = torch.tensor([[3, 1]]), torch.tensor([[0.5, 0.5]])
    recorder.record(0, index, weights, None)
    recorder.record(0, index + 1, weights, torch.tensor([[6, 5]]))
    recorder.record(1, index + 2, weights, None)
    recorder.close()
    trace = read_trace(tmp_path / "run.npz")
    assert trace.experts.tolist() == [[[4, 2], [5, 3]]]
    assert trace.guesses is not None
    assert trace.guesses.tolist() == [[[255, 255], [6, 5]]]


def test_layers_that_choose_fewer_experts_are_filled_up(tmp_path):
    writer = TraceWriter(tmp_path / "run.npz", layers=2, experts=8, top_k=2, model=None)
    recorder = RoutingRecorder(writer, layers=2, top_k=2)
    recorder.record(0, torch.tensor([[3, 1]]), torch.tensor([[0.5, 0.5]], dtype=torch.bfloat16), None)
    recorder.record(1, torch.tensor([[4]]), torch.tensor([[1.0]], dtype=torch.bfloat16), None)
    guesses = np.array([[6, -1], [-1, -1]])
    recorder.record_token(np.array([[1, 3], [4, -1]]), np.array([[0.25, 0.5], [-1.0, 0.0]]), guesses)
    recorder.close()
    trace = read_trace(tmp_path / "run.npz")
    assert trace.experts.tolist() == [[[3, 1], [4, 255]]] * 2
    assert trace.weights is not None and trace.guesses is not None
    assert trace.weights[1].tolist() == [[0.5, 0.25], [-1.0, 0.0]]
    assert trace.guesses[1].tolist() == [[255, 255], [6, 255]]
    assert Requests(trace).total == 6


def test_single_tokens_wait_to_be_written_together_but_never_out_of_turn(tmp_path):
    writer = TraceWriter(tmp_path / "run.npz", layers=1, experts=8, top_k=1, model=None, with_ids=True)
    recorder, expert_of, weights = RoutingRecorder(writer, layers=1, top_k=1), np.zeros((1, 1)), np.ones((1, 1))

    def token(expert: int) -> None:
        recorder.feed([10 + expert])
        expert_of[:] = expert
        recorder.record_token(expert_of, weights, None)

    for _ in range(recorder.together):
        token(1)
    assert writer.tokens == recorder.together
    token(2)
    recorder.feed([20, 21])
    recorder.record(0, torch.tensor([[3], [4]]), torch.tensor([[1.0], [1.0]]), None)
    token(5)
    recorder.new_sequence()
    token(6)
    recorder.close()
    trace = read_trace(tmp_path / "run.npz")
    assert trace.experts.reshape(-1).tolist() == [1] * recorder.together + [2, 3, 4, 5, 6]
    assert trace.seq.tolist() == [0] * (recorder.together + 4) + [1]
    assert trace.phase.tolist() == [DECODE] * (recorder.together + 1) + [PREFILL] * 2 + [DECODE] * 2
    assert trace.ids is not None
    assert trace.ids.tolist() == [11] * recorder.together + [12, 20, 21, 15, 16]


def test_a_trace_that_cannot_be_written_is_refused_before_anything_is_converted(store, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "find_store", lambda *_: pytest.fail("nothing is to be converted yet"))
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "no" / "folder.npz", tmp_path / "file" / "run.npz", "n" * 300 + "/run.npz"):
        with pytest.raises(UsageError, match=r"^trace: .* cannot be written: "):
            load(store, ram="4GB", trace=str(path))
    with pytest.raises(UsageError, match="trace_tokens needs a trace"):
        load(store, trace_tokens=True)


def test_a_trace_that_can_no_longer_be_written_is_an_error_at_the_end(store, tmp_path):
    model = load(store, ram="4GB", trace=str(tmp_path / "run.npz"))
    answer(model, [7], 2)
    (tmp_path / "run.npz").mkdir()
    with pytest.raises(DataError, match="was not written"):
        model.close()
