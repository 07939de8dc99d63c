"""A function of ours in a process of its own: the memory it took is gone when it returns.

The caller's and the child's end in one file. The request is one JSON line on the child's stdin, which stays open for as
long as the caller wants the answer; progress, notices and the outcome come back as JSON lines on its stdout. The child
is a plain `python -c`: unlike `multiprocessing`, it imports nothing of the caller's program.
"""

from __future__ import annotations

import _thread
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from typing import Any

from . import errors
from .errors import MemoryBudgetError, PocketMoEError
from .source import OnNotice, OnProgress, Progress

INTERRUPTED = 130  # 128 + SIGINT
GRACE_S = 30.0
"""A child that is no longer wanted has this long to make durable what it has done."""


class ChildTraceback(Exception):
    """Where in the child a bug showed: the cause of the RuntimeError that the caller gets."""

    def __str__(self) -> str:
        return f"in a child process\n{self.args[0]}"


def run_apart(
    function: str,
    arguments: dict[str, Any],
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
    what: str = "the call",
    resumes: bool = False,
) -> Any:
    """`function(**arguments, on_progress=..., on_notice=...)` in a process of its own.

    Whatever ends this call early (Ctrl-C, an exception of a callback, the end of this process) interrupts the child.

    Args:
        function: "module:name", importable with this process's `sys.path`.
        arguments: what JSON can hold.
        what: what the function does, for the sentence about a child that was killed: "the conversion".
        resumes: whether it goes on where it was when it is called again.

    Returns:
        Its result as JSON can hold it; a path as text.

    Raises:
        PocketMoEError: what the function raised, of the same class; or the child was killed.
        RuntimeError: any other exception in the child, with its traceback as the cause.
    """
    with subprocess.Popen(
        python_command(f"from {__name__} import main; main()"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,  # Ctrl-C on a terminal is for us; we end the child when we have to
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps({"function": function, "arguments": arguments}) + "\n")
                child.stdin.flush()
            outcome: dict[str, Any] = {}
            for line in child.stdout:
                match json.loads(line):
                    case {"progress": step}:
                        if on_progress is not None:
                            on_progress(Progress(*step))
                    case {"notice": text}:
                        if on_notice is not None:
                            on_notice(text)
                    case last:
                        outcome = last
        finally:
            _end(child)
    match outcome:
        case {"result": result}:
            return result
        case {"error": kind, "text": text}:
            raise getattr(errors, kind, PocketMoEError)(text)
        case {"bug": text, "traceback": trace}:
            raise RuntimeError(text) from ChildTraceback(trace)
    raise _killed(child.returncode, what, resumes)


def python_command(program: str) -> list[str]:
    """The command that runs a statement in a new interpreter with this process's `sys.path`."""
    # The path is given rather than found: `-m` would search the current directory first, and `-I` not the user's.
    return [sys.executable, "-c", f"import sys; sys.path[:] = {[str(entry) for entry in sys.path]!r}; {program}"]


def _end(child: subprocess.Popen[str]) -> None:
    """Close what the child reads from, which interrupts it if it still runs; kill it when that is not enough."""
    for pipe in (child.stdin, child.stdout):
        with contextlib.suppress(OSError):
            pipe.close()  # type: ignore[union-attr]
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
    finally:  # also after a second Ctrl-C
        if child.poll() is None:
            child.kill()
            child.wait()


def _killed(code: int, what: str, resumes: bool) -> PocketMoEError:
    again = f"{'what was done is kept; ' if resumes else ''}run the same command again"
    if code == -getattr(signal, "SIGKILL", 9):
        return MemoryBudgetError(
            f"{what}'s process was killed, as systems do when memory runs out; {again} with more memory free"
        )
    reason = f"by signal {-code}" if code < 0 else f"with exit status {code}"
    return PocketMoEError(f"{what}'s process ended early {reason}; {again}")


def main() -> None:
    """The child's end."""
    code = 0
    try:
        _answer()
    except KeyboardInterrupt:
        code = INTERRUPTED
    # Not through the interpreter's end: there, threads of libraries take their time.
    with contextlib.suppress(Exception):
        sys.stderr.flush()
    os._exit(code)


def _answer() -> None:
    interrupted = threading.Event()

    def interrupt(*_: object) -> None:
        if not interrupted.is_set():  # what ends in order is not interrupted again
            interrupted.set()
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)  # the caller's program may ignore it, which is inherited
    channel = os.dup(1)
    with contextlib.suppress(OSError):  # the caller may have no stderr
        os.dup2(2, 1)  # what a library prints is no message

    def send(**message: Any) -> None:
        line = (json.dumps(message, default=str) + "\n").encode()
        with contextlib.suppress(BrokenPipeError):  # nobody listens any more: the interrupt is on its way
            while line:
                line = line[os.write(channel, line) :]

    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_interrupt_at_end_of_input, args=(interrupted,), daemon=True).start()
    try:
        module, _, name = request["function"].partition(":")
        result = getattr(importlib.import_module(module), name)(
            **request["arguments"],
            on_progress=lambda progress: send(progress=progress),
            on_notice=lambda text: send(notice=text),
        )
        send(result=result)
    except PocketMoEError as error:
        send(error=type(error).__name__, text=str(error))
    except Exception as error:
        described = f"{type(error).__name__}: {error}".rstrip(": ")
        send(bug=described, traceback=traceback.format_exc())


def _interrupt_at_end_of_input(interrupted: threading.Event) -> None:
    os.read(0, 1)  # returns when the caller has closed the pipe or is dead
    end = time.monotonic() + GRACE_S
    while not interrupted.is_set() and time.monotonic() < end:
        if hasattr(signal, "pthread_kill"):  # also wakes a thread that waits for something
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        else:
            _thread.interrupt_main()
        interrupted.wait(0.05)  # again: a signal just before a wait begins does not end that wait
    time.sleep(max(0.0, end - time.monotonic()))
    os._exit(INTERRUPTED)  # some library has swallowed the interrupt
