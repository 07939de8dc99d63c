"""Where a chat's lines come from: a terminal with line editing, or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Protocol

from .console import has_cursor, is_terminal

PROMPT = ">>> "
CONTINUATION = "... "
BLOCK = '"""'


class LineReader(Protocol):
    """Lines of a chat."""

    interactive: bool
    """A person types them: prompt, hints, and a second chance after Ctrl-C."""

    def line(self, prompt: str) -> str:
        """The next line without its end. Raises EOFError at the end and KeyboardInterrupt on Ctrl-C."""
        ...

    def discarded(self) -> str:
        """What had been typed when the last KeyboardInterrupt came, as far as it is known."""
        ...


class PipeReader:
    """Lines of a stdin that nobody types: no prompt."""

    interactive = False

    def line(self, prompt: str) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def discarded(self) -> str:
        return ""


class PlainTerminalReader:
    """A terminal without line editing of ours; the prompt goes to stderr, because stdout is a file or a pipe."""

    interactive = True

    def line(self, prompt: str) -> str:
        print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def discarded(self) -> str:
        return ""


class ReadlineReader:
    """A terminal with line editing and, in memory, history; Tab completes commands."""

    interactive = True

    def __init__(self, completions: Callable[[str], list[str]]) -> None:
        import readline  # not on Windows

        self._readline = readline
        self._completions = completions
        readline.set_completer(self._complete)
        readline.set_completer_delims("")
        if "libedit" in (readline.__doc__ or ""):
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            if has_cursor():  # Python switches it off, and each pasted line would be a message of its own
                readline.parse_and_bind("set enable-bracketed-paste on")

    def line(self, prompt: str) -> str:
        return input(prompt).rstrip("\n")  # what is pasted may end with some

    def discarded(self) -> str:
        return self._readline.get_line_buffer()

    def _complete(self, text: str, state: int) -> str | None:
        found = self._completions(text) if text.startswith("/") else []
        return found[state] if state < len(found) else None


def line_reader(completions: Callable[[str], list[str]]) -> LineReader:
    """The reader for this process's stdin; `completions` gives the commands that begin with a text."""
    if not is_terminal(sys.stdin):
        return PipeReader()
    if is_terminal(sys.stdout):
        try:
            return ReadlineReader(completions)
        except ImportError:
            pass
    return PlainTerminalReader()


def read_message(reader: LineReader) -> str:
    '''One message: a line, or the lines between `"""` and `"""`; the end of the input ends a block, too.'''
    first = reader.line(PROMPT)
    if not first.lstrip().startswith(BLOCK):
        return first
    lines = [first.lstrip()[len(BLOCK) :]]
    while not lines[-1].rstrip().endswith(BLOCK):
        try:
            lines.append(reader.line(CONTINUATION))
        except EOFError:
            return "\n".join(lines)
    lines[-1] = lines[-1].rstrip()[: -len(BLOCK)]
    return "\n".join(lines)
