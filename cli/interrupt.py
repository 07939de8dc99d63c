"""Ctrl-C and termination: how they end an answer, and how they end the process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import NoReturn

from .console import is_terminal

INTERRUPTED = 130  # 128 + SIGINT, what a shell reports for it
TERMINATED = 143  # 128 + SIGTERM
BROKEN_PIPE = 141  # 128 + SIGPIPE

_STOPPING = b"\n(stopping; Ctrl-C again leaves at once)\n"


def leave_now(code: int) -> NoReturn:
    """End the process without waiting for threads that still read or compute: nothing of theirs is worth keeping."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # a broken pipe, or a write that this signal has interrupted
            stream.flush()
    os._exit(code)


class AnswerInterrupt:
    """While an answer is generated, Ctrl-C only sets `requested`, which is looked at between chunks.

    So no read and no kernel call is torn in the middle. A second Ctrl-C leaves the process at once, also when the
    first is still waiting for a piece of a long prompt to be read. Main thread only.
    """

    def __init__(self) -> None:
        self.requested = False
        self.pressed_at = float("-inf")
        self.has_text = False  # set once the answer has begun

    def __enter__(self) -> AnswerInterrupt:
        self._previous = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _press(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            self._write(b"\n")
            leave_now(INTERRUPTED)
        self.requested, self.pressed_at = True, time.monotonic()
        if not self.has_text:
            self._write(_STOPPING)

    @staticmethod
    def _write(line: bytes) -> None:
        # Straight to the descriptor: the handler may have interrupted a write to sys.stderr, which is not reentrant.
        if is_terminal(sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                os.write(sys.stderr.fileno(), line)


def leave_on_sigterm() -> None:
    """Make SIGTERM unwind the stack, so that files in the making are removed; a second one kills."""

    def terminate(signum: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise SystemExit(TERMINATED)

    signal.signal(signal.SIGTERM, terminate)
