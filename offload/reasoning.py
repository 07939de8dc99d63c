"""What of an answer is thought and what is said: models write both into one text, each family in its own way.

Two ways are known: a pair of tags around the thoughts at the beginning (`<think>...</think>`; some prompts end with the
opening tag, some answers begin with the closing one), and gpt-oss's channels
(https://cookbook.openai.com/articles/openai-harmony). What neither is for, calls of tools above all, stays in the text
as it is.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple, Protocol

TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<think:opensource>", "</think:opensource>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought\n", "<channel|>"),
)
_CHANNEL, _MESSAGE, _START = "<|channel|>", "<|message|>", "<|start|>"
_MARKS = (_CHANNEL, _MESSAGE, _START, "<|end|>", "<|call|>", "<|return|>")
_MARK = re.compile("|".join(map(re.escape, _MARKS)))
_SHOWN = re.compile('tool|call|function|action|args|think|python|"', re.IGNORECASE)


class Part(NamedTuple):
    """A piece of an answer: what is thought, then what is said."""

    thinking: str = ""
    text: str = ""


class Splitter(Protocol):
    """Divides one answer as it comes."""

    def push(self, text: str) -> Part:
        """Add a piece; returns what of the answer so far is certain and new."""
        ...

    def finish(self) -> Part:
        """The rest, once nothing follows."""
        ...


class AnswerFormat:
    """How a model's answers are written, as far as its tokenizer and chat template tell."""

    def __init__(self, tokenizer: Any) -> None:
        template = str(getattr(tokenizer, "chat_template", None) or "")
        added = {int(i): token for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        names = {str(token) for token in added.values()}
        self._channels = {_CHANNEL, _MESSAGE} <= names or _CHANNEL in template
        known = (pair for pair in TAGS if names.intersection(pair) or any(tag in template for tag in pair))
        self._tags = next(known, None)
        special, marks = {i: str(token) for i, token in added.items() if token.special}, "".join(self._tags or ())
        self.hidden = (
            frozenset()
            if self._channels
            else frozenset(i for i, name in special.items() if not _SHOWN.search(name) and name not in marks)
        )
        """Special tokens that are no part of an answer's text."""

    def splitter(self, prompt: str) -> Splitter:
        """For the answer to a rendered conversation."""
        if self._channels:
            return Channels()
        if self._tags is not None:
            return ThinkTags(*self._tags, thinking=prompt.rstrip().endswith(self._tags[0].rstrip()))
        return Plain()


class Plain:
    """All is said."""

    def push(self, text: str) -> Part:
        return Part("", text)

    def finish(self) -> Part:
        return Part()


class ThinkTags:
    """Thoughts between two tags, at the beginning only; white space around them belongs to neither part."""

    def __init__(self, opening: str, closing: str, thinking: bool) -> None:
        self._opening, self._closing = opening, closing
        self._state = "thought" if thinking else "beginning"
        self._held = ""
        self._thought = False

    def push(self, text: str) -> Part:
        self._held += text
        thinking = said = ""
        if self._state == "beginning":
            begun = self._held.lstrip()
            if begun.startswith(self._opening):
                self._state, self._held = "thought", begun.removeprefix(self._opening)
            elif begun.startswith(self._closing):  # how some say that they do not think
                self._state, self._held = "between", begun.removeprefix(self._closing)
            elif not self._opening.startswith(begun) and not self._closing.startswith(begun):
                self._state = "said"
        if self._state == "thought":
            if not self._thought:
                self._held = self._held.lstrip()
            thinking, mark, rest = self._held.partition(self._closing)
            self._thought = self._thought or bool(self._held)
            if mark:
                self._state, self._held, thinking = "between", rest, thinking.rstrip()
            else:
                thinking = thinking[: len(thinking) - _length_of_beginning(thinking, (self._closing,))].rstrip()
                self._held = self._held[len(thinking) :]
        if self._state == "between":
            self._held = self._held.lstrip()
            if self._held:
                self._state = "said"
        if self._state == "said":
            said, self._held = self._held, ""
        return Part(thinking, said)

    def finish(self) -> Part:
        rest, self._held = self._held, ""
        return Part(rest.rstrip(), "") if self._state == "thought" else Part("", rest)


class Channels:
    """Messages with a head that says where each is meant to go: `<|channel|>analysis<|message|>...<|end|>`."""

    def __init__(self) -> None:
        self._held = ""
        self._head: str | None = ""
        """Of the message to come; None inside of one."""
        self._thinking = self._said = self._parted = False

    def push(self, text: str) -> Part:
        self._held += text
        part = Part()
        while found := _MARK.search(self._held):
            before, self._held = self._held[: found.start()], self._held[found.end() :]
            part = self._pass(part, before, found[0])
        if self._head is None:
            keep = _length_of_beginning(self._held, _MARKS)
            before, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            part = self._tell(part, before)
        return part

    def finish(self) -> Part:
        rest, self._held = self._held, ""
        if self._head is None:
            return self._tell(Part(), rest)
        return Part() if _MARK.search(self._head) else Part("", self._head + rest)  # an answer without any head

    def _pass(self, part: Part, before: str, mark: str) -> Part:
        """Take in the text before a mark, and the mark."""
        if self._head is None:
            part = self._tell(part, before)
            self._head = mark if mark in (_CHANNEL, _START) else ""
        elif mark != _MESSAGE:
            self._head += before + mark
        else:
            head, self._head = self._head + before, None
            self._thinking = head.rpartition(_CHANNEL)[2].split()[:1] == ["analysis"] and "to=" not in head
            self._parted = self._said
            if "to=" in head:  # a tool is called
                part = self._tell(part, head + mark)
        return part

    def _tell(self, part: Part, text: str) -> Part:
        if self._thinking or not text:
            return Part(part.thinking + text, part.text)
        gap = "\n\n" if self._parted else ""
        self._said, self._parted = True, False
        return Part(part.thinking, part.text + gap + text)


def _length_of_beginning(text: str, marks: tuple[str, ...]) -> int:
    """How many of the last characters may be the beginning of a mark."""
    lengths = (n for mark in marks for n in range(1, len(mark)) if text.endswith(mark[:n]))
    return max(lengths, default=0)
