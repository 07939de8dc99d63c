"""A conversation costs only its new tokens, and keeps what was said whatever interrupts it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
from pocketmoe.offload.checkpoint import CheckpointSource
from pocketmoe.offload.convert import convert
from pocketmoe.offload.errors import DataError, UsageError
from pocketmoe.offload.loading import load
from pocketmoe.offload.reasoning import AnswerFormat

GREEDY = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 6}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with load(tiny.make_chat_store(tmp_path_factory.mktemp("chat")), ram="4GB") as model:
        yield model


@pytest.fixture
def fed(model, monkeypatch):
    """How many tokens each forward of the answer loop was given, prompts first."""
    counts: list[int] = []
    answer = model.answer

    def counting(sequence, ids, *args, **options):
        counts.append(len(ids))
        return answer(sequence, ids, *args, **options)

    monkeypatch.setattr(model, "answer", counting)
    return counts


def say(conversation, text, **options) -> str:
    return "".join(chunk.text for chunk in conversation.send(text, **(GREEDY | options)))


def test_a_turn_feeds_only_its_new_tokens(model, fed):
    chat = model.chat()
    say(chat, "first")
    before = chat.tokens
    say(chat, "second")
    # the answer's last token was chosen but never run; then <|end|><|user|>second<|end|><|assistant|>
    assert fed[1] <= len("second") + 5 + 6
    assert chat.tokens > before


def test_a_second_turn_gives_what_a_fresh_run_of_the_whole_conversation_gives(model):
    chat = model.chat(system="Be brief.")
    say(chat, "first")
    say(chat, "second")
    text = model.render_chat([{"role": "system", "content": "Be brief."}, *chat.messages[:3]], True)
    fresh = model.generate(text, raw=True, **GREEDY).text
    assert chat.messages[3]["content"] == fresh


def test_an_answer_that_is_closed_early_is_kept_and_marked(model):
    chat = model.chat()
    stream = chat.send("tell me", **(GREEDY | {"max_tokens": 30}))
    kept = next(stream).text + next(stream).text
    stream.close()
    assert chat.messages[1] == {"role": "assistant", "content": kept, "stopped": True}
    say(chat, "go on")
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2


def test_clear_forgets_messages_and_tokens_but_not_the_system_prompt(model):
    chat = model.chat(system="Be brief.")
    first = say(chat, "hello")
    chat.clear()
    assert (chat.tokens, chat.messages, chat.system) == (0, [], "Be brief.")
    assert say(chat, "hello") == first


def test_a_saved_conversation_goes_on_as_if_it_had_not_been_left(model):
    chat, copy = model.chat(), model.chat()
    say(chat, "hello")
    copy.restore(chat.to_dict())
    assert copy.messages == chat.messages
    assert say(copy, "again") == say(chat, "again")


@pytest.mark.parametrize("data", [None, [], {}, {"format": "pocketmoe-conversation", "version": 9}, {"format": "x"}])
def test_what_is_not_a_conversation_is_refused_and_changes_nothing(model, data):
    chat = model.chat()
    say(chat, "hello")
    before = chat.to_dict()
    with pytest.raises(DataError):
        chat.restore(data)
    assert chat.to_dict() == before


def test_damaged_messages_are_refused(model):
    chat = model.chat()
    data = chat.to_dict() | {"messages": [{"role": "user", "content": 5}]}
    with pytest.raises(DataError, match="damaged"):
        chat.restore(data)


def test_a_message_that_does_not_fit_is_refused_and_not_kept(model):
    chat = model.chat()
    say(chat, "hello")
    with pytest.raises(UsageError, match="context"):
        say(chat, "x" * 400)
    assert len(chat.messages) == 2
    assert say(chat, "short")


def test_a_prompt_that_is_broken_off_can_be_sent_again(model):
    chat = model.chat()
    say(chat, "hello")
    chat._sequence._chunk = 16

    def stop(progress):
        if progress.done >= 32:
            raise KeyboardInterrupt

    long = "a message of several chunks, so that it can be broken off"
    with pytest.raises(KeyboardInterrupt):
        list(chat.send(long, stop, **GREEDY))
    assert len(chat.messages) == 2
    other = model.chat()
    other.restore(chat.to_dict())
    assert say(chat, long) == say(other, long)


def test_without_a_chat_template_chat_is_refused_and_run_continues_the_text(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    tiny.make_checkpoint(checkpoint, "mixtral", vocab_size=tiny.CHAT_VOCABULARY)
    tiny.add_tokenizer(checkpoint, chat_template=None)
    with load(convert(CheckpointSource(checkpoint), tmp_path / "store", "f32"), ram="4GB") as model:
        with pytest.raises(UsageError, match="template"):
            model.chat()
        assert model.generate("once upon", **GREEDY).generated_tokens > 0


def test_a_template_that_raises_is_one_sentence(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    tiny.make_checkpoint(checkpoint, "mixtral", vocab_size=tiny.CHAT_VOCABULARY)
    tiny.add_tokenizer(checkpoint, chat_template="{{ raise_exception('no system role') }}")
    store = convert(CheckpointSource(checkpoint), tmp_path / "store", "f32")
    with load(store, ram="4GB") as model, pytest.raises(UsageError, match="no system role"):
        say(model.chat(), "hi")


class Scripted:
    """A sampler that says what it is told to."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = iter(ids)

    def choose(self, _logits) -> int:
        return next(self._ids)


def test_thoughts_come_apart_and_the_template_decides_whether_they_are_history(model, monkeypatch):
    answer = model.encode("<think>\n2 and 2\n</think>\n\n4".replace("\n", " ")) + model.encode("<|end|>")
    monkeypatch.setattr("pocketmoe.offload.generate.Sampler", lambda *_: Scripted(answer))
    monkeypatch.setattr(model, "_answers", AnswerFormat(SimpleNamespace(chat_template="</think>")))
    chat = model.chat()
    chunks = list(chat.send("2+2?"))
    assert ("".join(c.thinking for c in chunks), "".join(c.text for c in chunks)) == ("2 and 2", "4")
    assert all(c.text or c.thinking for c in chunks[:-1])
    assert chat.messages[1] == {"role": "assistant", "content": "4", "thinking": "2 and 2"}
    asked = []
    monkeypatch.setattr(model, "render_chat", lambda messages, _: asked.append(messages) or "again")
    list(chat.send("sure?"))
    known = {"reasoning_content": "2 and 2", "thinking": "2 and 2"}  # the library's name, and gpt-oss's
    assert asked[0][1] == {"role": "assistant", "content": "4"} | known
    other = model.chat()
    other.restore(chat.to_dict())
    assert other.messages == chat.messages
    completion = model.generate("2+2?")
    assert (completion.text, completion.thinking) == ("4", "2 and 2")
    assert model.generate("2+2?", raw=True).text == "<think> 2 and 2 </think>  4"


def test_what_was_dropped_from_the_history_is_taken_back_from_the_cache(model, monkeypatch):
    chat = model.chat()
    answer = model.encode("<think>2 and 2</think>4") + model.encode("<|end|>")
    monkeypatch.setattr("pocketmoe.offload.generate.Sampler", lambda *_: Scripted(answer))
    monkeypatch.setattr(model, "_answers", AnswerFormat(SimpleNamespace(chat_template="</think>")))
    list(chat.send("2+2?"))
    list(chat.send("sure?"))
    history = model.decode_exactly(chat._sequence.ids)
    assert history.startswith("<|user|>2+2?<|end|><|assistant|>4<|end|><|user|>sure?<|end|><|assistant|><think>")
