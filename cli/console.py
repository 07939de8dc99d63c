"""What is shown, and where: answers raw on stdout, everything else on stderr.

Nothing here interprets markup, and what goes to a terminal carries no control characters: a model's answer or a
file's name can not move the cursor, set the title or write to the clipboard.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from typing import TextIO

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def without_controls(text: str) -> str:
    """`text` without the C0 and C1 control characters, except newline and tab."""
    return _CONTROLS.sub("", text)


def prepare_streams() -> None:
    """UTF-8 on the three streams whatever the locale says; what can not be coded is replaced, never an exception.

    One that the parent has closed becomes an empty one, or one that forgets.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        # A stream can be replaced by an embedder, or already read from.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            getattr(sys, name).reconfigure(encoding="utf-8", errors="replace")


def is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def may_style(stream: TextIO | None) -> bool:
    """Whether `stream` may be styled, after https://no-color.org."""
    return is_terminal(stream) and os.environ.get("TERM") not in ("dumb", "unknown") and not os.environ.get("NO_COLOR")


def has_cursor() -> bool:
    """Whether stderr can redraw a line: only then are there progress bars."""
    return is_terminal(sys.stderr) and os.environ.get("TERM") not in ("dumb", "unknown")


def has_colour() -> bool:
    """Whether stderr may be styled."""
    return may_style(sys.stderr)


def say(text: str = "", end: str = "\n") -> None:
    """A line for the user on stderr, dim where that can be shown."""
    text = without_controls(text)
    if text and has_colour():
        text = f"\x1b[2m{text}\x1b[0m"
    print(text, end=end, file=sys.stderr, flush=True)


def say_error(sentence: str) -> None:
    print(f"pocketmoe: error: {without_controls(sentence)}", file=sys.stderr, flush=True)


class AnswerWriter:
    """Writes answers to stdout as they come, each chunk at once, and thoughts to stderr, dim.

    Args:
        hide_thinking: of thoughts, only that there are some is said.
    """

    def __init__(self, stream: TextIO | None = None, hide_thinking: bool = False) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._strips = is_terminal(self._stream)
        self._at_line_start = True
        self.hide_thinking = hide_thinking
        self._thoughts_end = ""
        """What has to follow the thoughts that are on the screen."""

    def write_thinking(self, text: str) -> None:
        if self.hide_thinking:
            text = "" if self._thoughts_end else "(thinking)"
        if text:
            say(text, end="")
            self._thoughts_end = "\n" if text.endswith("\n") else "\n\n"

    def write(self, text: str) -> None:
        if text and self._thoughts_end:
            say(end=self._thoughts_end)
            self._thoughts_end = ""
        if self._strips:
            text = without_controls(text)
        if text:
            self._stream.write(text)
            self._stream.flush()
            self._at_line_start = text.endswith("\n")

    def end_line(self) -> None:
        """Ends the line that the answer, or its thoughts, have left open, if any."""
        if self._thoughts_end:
            say(end=self._thoughts_end[1:])
            self._thoughts_end = ""
        if not self._at_line_start:
            self.write("\n")
