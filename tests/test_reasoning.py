"""What is thought and what is said, however the text is cut into pieces."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from pocketmoe.offload.reasoning import AnswerFormat, Channels, Plain, ThinkTags
from tokenizers import AddedToken

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "<think>"}}\n</tool_call>'
TAGGED = [
    ("<think>\nso\nso\n</think>\n\nyes", False, ("so\nso", "yes")),
    ("so</think>yes", True, ("so", "yes")),
    ("\n\n<think>a < b </ c</think> d < e", False, ("a < b </ c", "d < e")),
    ("<think>\n\n</think>\n\nyes", False, ("", "yes")),
    ("no thoughts", False, ("", "no thoughts")),
    ("what is <think>x</think>?", False, ("", "what is <think>x</think>?")),
    ("<think>a</think>b <think>c</think>", False, ("a", "b <think>c</think>")),
    ("<think>never ends, </thin", False, ("never ends, </thin", "")),
    ("<thi", False, ("", "<thi")),
    ("</think>\n\nyes", False, ("", "yes")),
    ("</div>", False, ("", "</div>")),
    ("  indented", False, ("", "  indented")),
    (f"<think>I call f</think>{CALL}", False, ("I call f", CALL)),
    ("", True, ("", "")),
]
ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|start|>assistant<|channel|>final<|message|>"
TOOL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}'
CHANNELS = [
    (f"{ANALYSIS}so <|end|>{FINAL}yes", ("so ", "yes")),
    ("<|channel|>final<|message|>yes", ("", "yes")),
    (f"{ANALYSIS}one<|end|><|start|>assistant{ANALYSIS}two<|end|>{FINAL}a <| b", ("onetwo", "a <| b")),
    (f"{ANALYSIS}so<|end|><|start|>assistant{TOOL}", ("so", f"<|start|>assistant{TOOL}")),
    (f"<|channel|>commentary<|message|>First,<|end|>{FINAL}then", ("", "First,\n\nthen")),
    (f"{ANALYSIS}never ends <|en", ("never ends <|en", "")),
    ("no head at all", ("", "no head at all")),
]


def split(splitter, text: str, seed: int) -> tuple[str, str]:
    """The text, given in random pieces, in its two parts."""
    cuts, parts = random.Random(seed), []
    while text:
        at = cuts.randint(1, 4)
        parts.append(splitter.push(text[:at]))
        text = text[at:]
    parts.append(splitter.finish())
    return "".join(part.thinking for part in parts), "".join(part.text for part in parts)


@pytest.mark.parametrize(("text", "begun", "want"), TAGGED)
def test_thoughts_between_tags_are_told_from_the_answer(text, begun, want):
    for seed in range(30):
        assert split(ThinkTags("<think>", "</think>", begun), text, seed) == want


@pytest.mark.parametrize(("text", "want"), CHANNELS)
def test_channels_are_told_apart_and_calls_stay_as_they_are(text, want):
    for seed in range(30):
        assert split(Channels(), text, seed) == want


def test_what_can_be_shown_is_shown_at_once():
    tags = ThinkTags("<think>", "</think>", False)
    assert tags.push("<think>\nI se") == ("I se", "")
    assert tags.push("e <") == ("e", "")  # it may become the end
    assert tags.push("b") == (" <b", "")
    assert tags.push("</think>\n\nYe") == ("", "Ye")
    assert tags.push("s") == ("", "s")


def tokenizer(template: str, *tokens: tuple[str, bool]) -> SimpleNamespace:
    added = {i: AddedToken(text, special=special) for i, (text, special) in enumerate(tokens)}
    return SimpleNamespace(chat_template=template, added_tokens_decoder=added)


def test_the_tokenizer_and_the_template_tell_how_answers_are_written():
    def splitter(prompt="", *args):
        return AnswerFormat(tokenizer(*args)).splitter(prompt)

    assert isinstance(splitter("", "{{ messages }}"), Plain)
    assert isinstance(splitter("", "{{ messages }}", ("<|channel|>", True), ("<|message|>", True)), Channels)
    assert split(splitter("", "{{ '</think>' }}"), "<think>a</think>b", 0) == ("a", "b")
    assert split(splitter("<|assistant|><think>\n", "", ("<think>", False)), "a</think>b", 0) == ("a", "b")
    assert split(splitter("<think>\n\n</think>\n\n", "", ("<think>", False)), "b", 0) == ("", "b")
    assert split(splitter("", "", ("[THINK]", True)), "[THINK]a[/THINK]b", 0) == ("a", "b")
    gemma4 = "", ("<|channel>", True), ("<channel|>", True)
    assert split(splitter("<|turn>model\n", *gemma4), "<|channel>thought\na\n<channel|>b", 0) == ("a", "b")
    assert split(splitter("<|turn>model\n<|channel>thought\n", *gemma4), "a<channel|>b", 0) == ("a", "b")
    assert split(splitter("<|channel>thought\n<channel|>", *gemma4), "b", 0) == ("", "b")


def test_special_tokens_are_hidden_but_for_those_that_belong_to_the_text():
    found = AnswerFormat(tokenizer("", ("<s>", True), ("[TOOL_CALLS]", True), ("[THINK]", True), ("<think>", False)))
    assert found.hidden == {0}
    gemma4 = AnswerFormat(tokenizer("", *((name, True) for name in ("<turn|>", "<|channel>", "<channel|>", '<|"|>'))))
    assert gemma4.hidden == {0}
    assert AnswerFormat(tokenizer("", ("[ARGS]", True), ("[IMG]", True), ("<|START_ACTION|>", True))).hidden == {1}
    assert AnswerFormat(tokenizer("", ("<|channel|>", True), ("<|message|>", True))).hidden == frozenset()
