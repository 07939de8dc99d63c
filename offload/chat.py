"""A conversation: the model's own chat template, and a KV cache that is kept from turn to turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .errors import DataError, UsageError
from .generate import Chunk

if TYPE_CHECKING:
    from .model import Model

FORMAT = "pocketmoe-conversation"


class Conversation:
    """Messages and the sequence of tokens that they stand for. A turn feeds only its new tokens."""

    def __init__(self, model: Model, system: str | None = None) -> None:
        self._model = model
        self._sequence = model.new_sequence()
        self._text = ""
        """The exact text of the tokens in the sequence."""
        self.system = system
        self.messages: list[dict[str, Any]] = []

    @property
    def tokens(self) -> int:
        """Tokens in the KV cache."""
        return len(self._sequence.ids)

    def send(self, text: str, on_progress: Callable[..., None] | None = None, **options: Any) -> Iterator[Chunk]:
        """Add a user's message and stream the answer. Closing the iterator early keeps what was streamed.

        Args:
            options: fields of `Sampling`.

        Raises:
            UsageError: the conversation does not fit into the context; the message is not kept.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._new_tokens()
            chunks = self._model.answer(self._sequence, prompt, generated := [], on_progress, self._text, **options)
            first = next(chunks)
        except BaseException:
            self.messages.pop()
            self._text = ""  # a prompt that broke off is in the sequence only in part
            raise
        answer: dict[str, Any] = {"role": "assistant", "content": ""}
        self.messages.append(answer)
        complete = False
        try:
            for chunk in itertools.chain([first], chunks):
                answer["content"] += chunk.text
                if chunk.thinking:
                    answer["thinking"] = answer.get("thinking", "") + chunk.thinking
                complete = chunk.finish_reason is not None
                yield chunk
        finally:
            if not complete:
                answer["stopped"] = True
            chunks.close()
            self._remember(generated)

    def _render(self) -> str:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self._model.render_chat([_for_template(m) for m in system + self.messages], True)

    def _new_tokens(self) -> list[int]:
        """The tokens that follow those in the sequence; takes back what no longer matches."""
        rendered = self._render()
        if self._text and rendered.startswith(self._text):
            new = self._model.encode(rendered[len(self._text) :])
        else:
            ids, have = self._model.encode(rendered), self._sequence.ids
            same = next(
                (i for i, (a, b) in enumerate(zip(have, ids, strict=False)) if a != b), min(len(have), len(ids))
            )
            self._sequence.rewind(min(same, len(ids) - 1))
            new = ids[len(self._sequence.ids) :]
        self._text = rendered
        return new

    def _remember(self, generated: list[int]) -> None:
        """Note the exact text of what is cached now: the prompt, and the answer's tokens that were fed."""
        if not self._sequence.ids:  # an error in the middle of a forward starts the sequence over
            self._text = ""
            return
        fed = generated[:-1]  # the last token was chosen and never run
        self._text += self._model.decode_exactly(fed)

    def clear(self) -> None:
        """Forget all messages; the system prompt stays."""
        self.messages.clear()
        self._text = ""
        self._sequence.reset()

    def to_dict(self) -> dict[str, Any]:
        """The conversation as data, for saving."""
        return {"format": FORMAT, "version": 1, "system": self.system, "messages": [dict(m) for m in self.messages]}

    def restore(self, data: Any) -> None:
        """Take over a saved conversation. Raises DataError, changing nothing, when `data` is not one."""
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != 1:
            raise DataError("this is not a saved pocketmoe conversation")
        messages = data.get("messages")
        good = isinstance(messages, list) and all(
            isinstance(m, dict)
            and m.get("role") in ("user", "assistant")
            and isinstance(m.get("content"), str)
            and isinstance(m.get("thinking", ""), str)
            for m in messages
        )
        if not good or not isinstance(data.get("system"), (str, type(None))):
            raise DataError("the saved conversation is damaged: its messages are not texts of user and assistant")
        self.clear()
        self.system = data["system"]
        self.messages += [dict(m) for m in messages]  # type: ignore[union-attr]

    def require_template(self) -> None:
        if not self._model.has_chat_template:
            raise UsageError("this model has no chat template; use `pocketmoe run --raw` to continue a text with it")


def _for_template(message: dict[str, Any]) -> dict[str, str]:
    """What a template sees of a message. Thoughts go under the names that templates know them by, which then keep or
    drop them as the model was trained; a template that knows none never sees them."""
    thinking = message.get("thinking")
    shown = {"role": message["role"], "content": message["content"]}
    return shown | ({"reasoning_content": thinking, "thinking": thinking} if thinking else {})
