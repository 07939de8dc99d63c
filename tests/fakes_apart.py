"""What the tests of `apart` run in the child; as a script, a program whose child holds a file until interrupted."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from filelock import FileLock
from pocketmoe.offload import errors
from pocketmoe.offload.apart import run_apart
from pocketmoe.offload.source import OnNotice, OnProgress, Progress


def report(value: Any, on_progress: OnProgress, on_notice: OnNotice) -> Any:
    on_notice("räumt auf: 漢字")
    print("a library that prints")
    for done in range(1, 4):
        on_progress(Progress("experts", done, 3, "experts"))
    return value


def main_of_the_child(**_: Any) -> str | None:
    return getattr(sys.modules["__main__"], "__file__", None)


def fail(kind: str, **_: Any) -> None:
    raise getattr(errors, kind)("what, where; what to do")


def crash(**_: Any) -> None:
    raise KeyError("no such thing")


def die(number: int, **_: Any) -> None:
    os.kill(os.getpid(), number)


def leave(**_: Any) -> None:
    os._exit(7)


def hold(file: str, on_notice: OnNotice, **_: Any) -> None:
    """Hold the lock on `file` until interrupted, then write "kept" beside it."""
    with FileLock(file):
        try:
            on_notice("holding")
            threading.Event().wait()
        except KeyboardInterrupt:
            Path(file).with_suffix(".kept").touch()
            raise


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
    run_apart("fakes_apart:hold", {"file": sys.argv[1]}, on_notice=lambda text: print(text, flush=True))
