"""Chat templates: messages to the text that a model was trained to read, within limits of time and memory."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import threading
from typing import Any

import psutil

from . import template_worker
from .apart import python_command
from .errors import DataError, UsageError
from .source import OnNotice

CPU_S = 1.0
"""A rendering takes about a millisecond; one that takes this long would not end."""
WALL_S = 30.0
"""For a worker that does not run at all."""
RESIDENT = 250 << 20
"""Bytes, for systems that do not limit a process's memory themselves."""
_POLL_S = 0.02


class ChatTemplate:
    """A model's chat template, rendered in a process that is started at the first use and kept.

    Args:
        template: Jinja source.
        context: what the template finds besides the messages, the special tokens by name.
    """

    def __init__(self, template: str, context: dict[str, Any], on_notice: OnNotice | None = None) -> None:
        self._text, self._context = template, context
        self._notice = on_notice or (lambda _: None)
        self._worker: _Worker | None = None
        self._folds_system = False

    def render(self, messages: list[dict[str, Any]], generation_prompt: bool = True) -> str:
        """The text of a conversation. A system message that the template refuses is put before the first message.

        Raises:
            UsageError: the template refuses the conversation.
            DataError: it takes too long or too much memory.
        """
        try:
            return self._render(_folded(messages) if self._folds_system else messages, generation_prompt)
        except UsageError:
            if self._folds_system or len(messages) < 2 or messages[0]["role"] != "system":
                raise
        text = self._render(_folded(messages), generation_prompt)
        self._folds_system = True
        self._notice("the model's chat template takes no system prompt; it is put before the first message")
        return text

    def _render(self, messages: list[dict[str, Any]], generation_prompt: bool) -> str:
        context = {"tools": None, "documents": None, **self._context}
        context |= {"messages": messages, "add_generation_prompt": generation_prompt}
        if self._worker is None:
            self._worker = _Worker()
        worker, self._worker = self._worker, None  # after any exception it is not to be asked again
        try:
            answer = worker.ask({"template": self._text, "context": context})
        except BaseException:
            worker.close()
            raise
        self._worker = worker
        if "text" in answer:
            return answer["text"]
        if answer["refused"]:
            raise UsageError(f"the model's chat template refuses this conversation: {answer['refused']}")
        raise DataError(_too_much("memory"))

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def make_template(tokenizer: Any, on_notice: OnNotice | None = None) -> ChatTemplate | None:
    """The template of a tokenizer of transformers; None where it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    special = {
        name: list(map(str, v)) if isinstance(v, list) else str(v) for name, v in tokenizer.special_tokens_map.items()
    }
    text = tokenizer.chat_template
    if isinstance(text, dict):  # one for each use
        text = text.get("default") or next(iter(text.values()))
    return ChatTemplate(text, special, on_notice)


class _Worker:
    """A process that renders."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            python_command(f"from {template_worker.__name__} import main; main()"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C on a terminal is for us
        )
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError, OSError):  # closed
            for line in self._process.stdout:
                self._answers.put(line)
        self._answers.put("")

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone, and its end comes as its answer
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        begin: float | None = None
        for _ in range(int(WALL_S / _POLL_S)):
            try:
                line = self._answers.get(timeout=_POLL_S)
                break
            except queue.Empty:
                used, resident = self._usage()
                begin = used if begin is None else begin
                if used - begin > CPU_S:
                    raise DataError(_too_much("time")) from None
                if resident > RESIDENT:
                    raise DataError(_too_much("memory")) from None
        else:
            raise DataError(_too_much("time"))
        if not line:
            raise DataError("the model's chat template ended the process that renders it; use --raw to go without it")
        return json.loads(line)

    def _usage(self) -> tuple[float, int]:
        """CPU seconds and resident bytes."""
        try:
            process = psutil.Process(self._process.pid)
            times = process.cpu_times()
            return times.user + times.system, process.memory_info().rss
        except psutil.Error:
            return 0.0, 0

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError, ValueError):
                pipe.close()  # type: ignore[union-attr]


def _too_much(what: str) -> str:
    return (
        f"the model's chat template takes too much {what} and was stopped; it is damaged or made to harm: get the "
        "model from elsewhere, or use --raw to go without it"
    )


def _folded(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the system's text in front of the first other one's."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return messages
    system, first, *others = messages
    return [first | {"content": f"{system['content']}\n\n{first['content']}"}, *others]
