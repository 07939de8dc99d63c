"""One answer: from the library's chunks to stdout, until it ends or Ctrl-C ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from .interrupt import AnswerInterrupt
from .progress import StageProgress

if TYPE_CHECKING:
    from ..offload.generate import Chunk
    from ..offload.source import OnProgress, Progress


class Outcome(NamedTuple):
    """How an answer ended. `finish_reason` is None when it was stopped; `stopped_at` is that moment (monotonic, s)."""

    text: str
    finish_reason: str | None
    stopped_at: float | None
    thinking: str = ""


class _StopReading(Exception):
    """Ctrl-C between two pieces of a long prompt."""


def stream_answer(
    start: Callable[[OnProgress], Iterator[Chunk]],
    write: Callable[[str], None] = lambda text: None,
    write_thinking: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Passes the text of each chunk to `write` as it comes, and what is thought before it to `write_thinking`.

    `start` makes the iterator, a generator, from the callback that it reports the prompt's progress to; it is closed
    whatever happens, so that the library keeps what was streamed. Ctrl-C ends the answer after the token in the
    making, or the piece of the prompt; `AnswerInterrupt` says what a second one does.
    """
    parts: list[str] = []
    thoughts: list[str] = []
    reason = None

    def outcome(stopped_at: float | None = None) -> Outcome:
        return Outcome("".join(parts), reason, stopped_at, "".join(thoughts))

    with AnswerInterrupt() as interrupt, StageProgress() as reading:

        def watch(progress: Progress) -> None:
            if interrupt.requested:
                raise _StopReading
            reading.update(progress)

        chunks = start(watch)
        try:
            for chunk in chunks:
                reading.stop()  # the bars' line is the answer's now
                interrupt.has_text = True
                if chunk.thinking:
                    thoughts.append(chunk.thinking)
                    write_thinking(chunk.thinking)
                if chunk.text:
                    parts.append(chunk.text)
                    write(chunk.text)
                reason = chunk.finish_reason
                if interrupt.requested and reason is None:
                    return outcome(interrupt.pressed_at)
        except _StopReading:
            return outcome(interrupt.pressed_at)
        finally:
            chunks.close()  # type: ignore[attr-defined]
    return outcome()


def ending_note(reason: str | None, context: int, remedy: str) -> str | None:
    """A sentence for an answer that did not end by itself; `remedy` says what helps against a full context."""
    if reason == "context":
        return f"The context of {context} tokens is full: {remedy}"
    if reason == "length":
        return "(cut off at the largest number of tokens, --max-tokens)"
    return None
