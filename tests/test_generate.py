"""The token loop: the same tokens as transformers' own, text that is never cut in a character, reasons to end."""

from __future__ import annotations

import pytest
import tiny
import torch
from pocketmoe.offload.errors import DataError, UsageError
from pocketmoe.offload.generate import Sequence, TextStream
from pocketmoe.offload.loading import load
from pocketmoe.offload.model import Model
from pocketmoe.offload.sampling import Sampler, Sampling, read_generation_config
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny.make_chat_store(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def model(store):
    with load(store, ram="4GB", kernels="torch") as model:
        yield model
        model.check_integrity()


def greedy(model: Model, ids: list[int], count: int) -> list[int]:
    sequence, new = model.new_sequence(), []
    list(model.answer(sequence, ids, new, temperature=0.0, repetition_penalty=1.0, max_tokens=count))
    return new


def test_greedy_tokens_equal_those_of_transformers_generate(model):
    ids = model.encode("The quick brown fox")
    want = model.transformers_model.generate(
        torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=sorted(model._ends)
    )[0, len(ids) :].tolist()
    assert greedy(model, ids, 24) == want


def test_prompt_chunks_do_not_change_the_greedy_answer(store):
    ids = None
    answers = []
    for chunk in (7, 64):
        with load(store, ram="4GB", kernels="torch", prefill_chunk=chunk) as model:
            ids = ids or model.encode("A prompt that is longer than one chunk, by some margin.")
            answers.append(greedy(model, ids, 12))
    assert answers[0] == answers[1]


def test_rewinding_a_sequence_gives_the_same_logits_as_never_having_gone_on(model):
    a, b, c = model.encode("one two three"), model.encode(" four"), model.encode(" five")
    straight, back = model.new_sequence(), model.new_sequence()
    straight.feed(a)
    back.feed(a)
    back.feed(b)
    back.rewind(len(a))
    assert torch.equal(straight.feed(c), back.feed(c))


def test_a_sliding_window_model_starts_over_when_it_cannot_rewind(tmp_path):
    with load(tiny.make_chat_store(tmp_path, "gpt_oss"), ram="4GB") as model:
        sequence, ids = model.new_sequence(), model.encode("a text longer than the window of eight tokens")
        sequence.feed(ids)
        sequence.rewind(5)
        assert sequence.ids == []
        fresh = model.new_sequence()
        assert torch.equal(sequence.feed(ids[:6]), fresh.feed(ids[:6]))


def test_an_interrupted_forward_leaves_an_empty_sequence_not_a_torn_one(model, monkeypatch):
    sequence = model.new_sequence()
    sequence.feed(model.encode("hello"))

    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    world = model.encode(" world")
    with monkeypatch.context() as patch:
        patch.setattr(model._runtime, "run_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sequence.feed(world)
    assert sequence.ids == []
    ids = model.encode("hello world")
    assert torch.equal(sequence.feed(ids), Sequence(model.transformers_model, 64, 256).feed(ids))


def test_answers_end_for_the_right_reason(model):
    options = {"temperature": 0.0, "repetition_penalty": 1.0}
    assert model.generate("Hi", max_tokens=3, **options).finish_reason == "length"
    text = model.generate("Hi", max_tokens=12, **options).text
    stopped = model.generate("Hi", max_tokens=12, stop=text[4:6], **options)
    assert (stopped.finish_reason, stopped.text) == ("stop", text[: text.find(text[4:6])])


def test_an_answer_ends_when_the_context_is_full(store):
    with load(store, ram="4GB", context=40) as model:
        ids = model.encode("0123456789" * 3)
        new: list[int] = []
        chunks = list(model.answer(model.new_sequence(), ids, new, temperature=0.0, min_p=None))
        if chunks[-1].finish_reason != "stop":
            assert chunks[-1].finish_reason == "context"
            assert len(ids) + len(new) == 41  # the last token is chosen from a full cache and needs no room
        with pytest.raises(UsageError, match="40"):
            list(model.answer(model.new_sequence(), ids + ids, []))


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(model):
    def answer(seed):
        return model.generate("Once", temperature=1.0, seed=seed, max_tokens=12).text

    assert answer(5) == answer(5)
    assert len({answer(seed) for seed in range(4)}) > 1


class ByteTokenizer:
    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode("utf-8", errors="replace")


def pieces(text: str, stop=()) -> list[str]:
    stream, out = TextStream(ByteTokenizer(), stop), []
    for byte in text.encode():
        out.append(stream.push(byte))
        if stream.stopped:
            return out
    return [*out, stream.finish()]


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語のテキスト", "a👍🏽b🇩🇪", "�"])
def test_streamed_text_is_whole_characters_and_complete(text):
    out = pieces(text)
    assert "".join(out) == text
    assert text == "�" or not any("�" in piece for piece in out)


def test_hidden_tokens_are_no_text():
    stream = TextStream(ByteTokenizer(), (), hidden={ord("#")})
    assert "".join(stream.push(byte) for byte in "a#ü##b".encode()) + stream.finish() == "aüb"


def test_a_text_that_ends_inside_a_character_shows_a_replacement_only_at_the_end():
    stream = TextStream(ByteTokenizer(), ())
    out = [stream.push(byte) for byte in b"ab" + "é".encode()[:1]]
    assert "".join(out) == "ab"
    assert stream.finish() == "�"


def test_stop_texts_never_show_even_in_part():
    assert "".join(pieces("Hello STOP world", ("STOP",))) == "Hello "
    assert "".join(pieces("Hello STO world", ("STOP",))) == "Hello STO world"
    assert "".join(pieces("aab", ("ab", "aac"))) == "a"


def test_temperature_zero_takes_the_likeliest_token():
    logits = torch.tensor([0.1, 3.0, 2.9])
    assert Sampler(Sampling(temperature=0.0), []).choose(logits) == 1


def test_repetition_penalty_lowers_what_was_seen():
    logits = torch.tensor([0.1, 3.0, 2.9])
    assert Sampler(Sampling(temperature=0.0, repetition_penalty=1.5), [1]).choose(logits) == 2


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.2}])
def test_filters_leave_only_likely_tokens(options):
    logits = torch.tensor([5.0, 4.8, -1.0, -2.0, -3.0])
    sampler = Sampler(Sampling(temperature=1.0, seed=0, **options), [])
    assert {sampler.choose(logits) for _ in range(50)} == {0, 1}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.2},
        {"top_k": 7},
        {"top_p": 0.3, "temperature": 1.7},
        {"top_p": 0.97},
        {"min_p": 0.1},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 1.2, "temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    ],
)
def test_what_may_follow_and_how_likely_it_is_are_those_of_transformers(options):
    generator, seen = torch.Generator().manual_seed(5), [3, 9, 9, 400]
    rules = Sampling(**options)
    processors = LogitsProcessorList()
    processors.append(RepetitionPenaltyLogitsProcessor(rules.repetition_penalty))
    processors.append(TemperatureLogitsWarper(rules.temperature))
    if rules.top_k:
        processors.append(TopKLogitsWarper(rules.top_k))
    processors.append(TopPLogitsWarper(rules.top_p))
    processors.append(MinPLogitsWarper(rules.min_p))
    for spread in (0.1, 1.0, 4.0, 30.0):
        logits = torch.randn(1003, generator=generator) * spread
        want = torch.softmax(processors(torch.tensor([seen]), logits.clone()[None])[0], -1)  # type: ignore[arg-type]
        ids, weights = Sampler(rules, seen).candidates(logits)
        got = torch.zeros(1003)
        got[torch.from_numpy(ids)] = torch.from_numpy(weights / weights.sum())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    sampler = Sampler(Sampling(seed=3, temperature=0.5), [])
    logits = torch.tensor([1.0, 0.0, -torch.inf, 0.5])
    drawn = torch.bincount(torch.tensor([sampler.choose(logits) for _ in range(4000)]), minlength=4) / 4000
    assert (drawn - torch.softmax(logits / 0.5, 0)).abs().max() < 0.03  # four standard deviations
    assert all(Sampler(Sampling(temperature=tiny), []).choose(logits) == 0 for tiny in (1e-38, 1e-50))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"max_tokens": 0},
    ],
)
def test_sampling_values_out_of_range_are_refused_by_name(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        Sampling().with_options(**options)


def test_an_unknown_sampling_option_names_the_nearest():
    with pytest.raises(UsageError, match="temperature"):
        Sampling().with_options(temprature=1)


def test_logits_that_are_not_numbers_end_the_answer_with_an_error():
    with pytest.raises(DataError, match="NaN"):
        Sampler(Sampling(), []).choose(torch.full((5,), torch.nan))


def test_sampling_defaults_come_from_generation_config(tmp_path):
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [3, 4]}'
    )
    sampling, ends = read_generation_config(tmp_path)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, ends) == (0.6, 20, 0.95, {3, 4})
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "eos_token_id": 3}')
    assert read_generation_config(tmp_path)[0].temperature == 0.0
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(DataError, match="generation_config"):
        read_generation_config(tmp_path)


@pytest.mark.parametrize(
    "content", ['{"eos_token_id": [3, 4]}', '{"eos_token_id": null, "text_config": {"eos_token_id": [3, 4]}}']
)
def test_without_generation_config_what_ends_an_answer_is_in_config_json(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    assert read_generation_config(tmp_path) == (Sampling(), {3, 4})


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [[2]]}'])
def test_nonsense_about_what_ends_an_answer_names_the_file(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"/{name}"):
        read_generation_config(tmp_path)


@pytest.mark.parametrize("content", ['{"temperature": "hot"}', '{"top_k": -3}'])
def test_nonsense_about_sampling_names_the_file(content, tmp_path):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(DataError, match=r"generation_config\.json cannot be used"):
        read_generation_config(tmp_path)


def test_sampling_runs_on_as_few_threads_as_a_single_token(monkeypatch):
    threads = []
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    sequence = Sequence.__new__(Sequence)
    sequence._step_threads, sequence._threads = 1, 4
    with sequence.few_threads():
        assert threads == [1]
    assert threads == [1, 4]
