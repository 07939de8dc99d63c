"""The chat: read a message or a command, answer, again."""

from __future__ import annotations

import difflib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..offload.errors import PocketMoEError, UsageError
from .answer import ending_note, stream_answer
from .console import AnswerWriter, say, say_error
from .interrupt import INTERRUPTED
from .report import show_live_report
from .settings import ChatSettings
from .terminal import LineReader, line_reader, read_message
from .transcript import load_transcript, save_transcript

if TYPE_CHECKING:
    from ..offload.model import Model

HELP = {
    "/?": "this list (also /help)",
    "/clear": "forget the conversation; the system prompt stays",
    "/set": "show the settings; /set NAME VALUE changes one: /set temperature 0.7",
    "/stats": "the report on speed, reads and memory so far",
    "/save": "save the conversation: /save FILE",
    "/load": "go on with a saved conversation: /load FILE",
    "/bye": "leave (also Ctrl-D)",
}
KEYS = 'Ctrl-C stops an answer, twice leaves. """ stands around a message of several lines.'
DOUBLE_PRESS_S = 1.0  # so soon after stopping an answer, a second Ctrl-C leaves
FULL_CONTEXT = "/clear begins anew, and --context N gives more room at the next start."


class _Leave(Exception):
    """`/bye`."""


class Session:
    """A chat with one model on this process's terminal or pipe."""

    def __init__(
        self,
        model: Model,
        name: str,
        settings: ChatSettings,
        system: str | None = None,
        reader: LineReader | None = None,
    ) -> None:
        self._model, self._name, self._settings = model, name, settings
        self._conversation = model.chat(system=system)
        self._reader = reader or line_reader(lambda text: [word for word in HELP if word.startswith(text)])
        self._out = AnswerWriter()
        self._stopped_at = float("-inf")
        self._armed = False  # the next Ctrl-C at the prompt leaves
        self._commands: dict[str, Callable[[str], None]] = {
            "/?": self._help,
            "/help": self._help,
            "/clear": self._clear,
            "/set": self._set,
            "/stats": self._stats,
            "/save": self._save,
            "/load": self._load,
            "/bye": self._bye,
            "/exit": self._bye,
            "/quit": self._bye,
        }

    def run(self) -> int:
        """Chats until the user leaves; returns the exit code."""
        if self._reader.interactive:
            say(f"Chat with {self._name}. /? lists the commands, Ctrl-D leaves.")
        while True:
            try:
                text = read_message(self._reader)
                self._armed = False
                self._handle(text)
            except _Leave:
                return 0
            except EOFError:
                if self._reader.interactive:
                    say()
                return 0
            except KeyboardInterrupt:
                if self._leaves():
                    return INTERRUPTED

    def _handle(self, text: str) -> None:
        if not text.strip():
            return
        command, _, argument = text.strip().partition(" ")
        is_command = text.startswith("/") and "\n" not in text and "/" not in command[1:]  # a path is a message
        try:
            if not is_command:
                self._answer(text)
            elif command in self._commands:
                self._commands[command](argument.strip())
            else:
                raise UsageError(f"There is no command {command}; {_near(command)}")
        except PocketMoEError as error:  # what one message can not do does not end the chat
            self._out.end_line()
            say_error(str(error))

    def _answer(self, text: str) -> None:
        self._out.hide_thinking = self._settings.hide_thinking
        before = self._model.stats() if self._settings.show_stats else None
        outcome = stream_answer(
            lambda watch: self._conversation.send(text, on_progress=watch, **self._settings.sampling),
            self._out.write,
            self._out.write_thinking,
        )
        self._out.end_line()
        if outcome.stopped_at is not None:
            self._stopped_at = outcome.stopped_at
            say("(stopped)")
        if note := ending_note(outcome.finish_reason, self._model.context, FULL_CONTEXT):
            say(note)
        if before is not None:
            from ..cache.answer_line import answer_lines

            for line in answer_lines(before, self._model.stats()):
                say(line)

    def _leaves(self) -> bool:
        """Whether this Ctrl-C, which did not stop an answer, is a second one."""
        soon = time.monotonic() - self._stopped_at < DOUBLE_PRESS_S
        if self._armed or soon or not self._reader.interactive:
            say()
            return True
        self._armed = not self._reader.discarded()
        say("\n(Ctrl-C again or Ctrl-D leaves)" if self._armed else "")
        return False

    def _help(self, argument: str) -> None:
        for command, meaning in HELP.items():
            say(f"{command:8}{meaning}")
        say(KEYS)

    def _clear(self, argument: str) -> None:
        self._conversation.clear()
        say("(cleared)")

    def _set(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        if name:
            self._settings.set(name, value.strip(), self._conversation)
        else:
            for line in self._settings.lines(self._model, self._conversation):
                say(line)

    def _stats(self, argument: str) -> None:
        show_live_report(self._model.stats(advice=True), sys.stderr)

    def _save(self, argument: str) -> None:
        path = _file(argument, "/save")
        save_transcript(path, self._conversation.to_dict())
        say(f"(saved in {path})")

    def _load(self, argument: str) -> None:
        path = _file(argument, "/load")
        load_transcript(path, self._conversation)
        say(f"({len(self._conversation.messages)} messages from {path})")

    def _bye(self, argument: str) -> None:
        raise _Leave


def _near(command: str) -> str:
    near = difflib.get_close_matches(command, [*HELP, "/help"], n=2)
    return f"did you mean {' or '.join(near)}?" if near else "/? lists them."


def _file(argument: str, command: str) -> Path:
    if not argument:
        raise UsageError(f"Name a file: {command} FILE.")
    return Path(argument).expanduser()
