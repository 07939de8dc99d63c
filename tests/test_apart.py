"""A function in a process of its own: what it reports, how it fails, and that it never outlives its caller."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from pocketmoe.offload import errors
from pocketmoe.offload.apart import ChildTraceback, run_apart
from pocketmoe.offload.errors import MemoryBudgetError, PocketMoEError
from pocketmoe.offload.source import Progress

SCRIPT = str(Path(__file__).with_name("fakes_apart.py"))
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")


@pytest.fixture
def held(tmp_path):
    """The file that `hold` locks, and a check that it has been let go in order."""
    file = tmp_path / "held"

    def let_go() -> bool:
        with FileLock(file, timeout=20):
            return file.with_suffix(".kept").exists()

    return file, let_go


def test_the_result_progress_and_notices_arrive_and_what_is_printed_does_not_disturb_them():
    steps, notices = [], []
    value = {"path": "/tmp/é", "numbers": [1, 2.5, None]}
    assert run_apart("fakes_apart:report", {"value": value}, steps.append, notices.append) == value
    assert steps == [Progress("experts", done, 3, "experts") for done in (1, 2, 3)]
    assert notices == ["räumt auf: 漢字"]
    assert run_apart("fakes_apart:report", {"value": 1}) == 1  # nobody has to listen


def test_the_callers_program_is_not_imported_again():
    assert run_apart("fakes_apart:main_of_the_child", {}) is None


def test_modules_in_the_current_directory_are_not_found(tmp_path, monkeypatch):
    for name in ("json", "subprocess", "psutil", "filelock"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    assert run_apart("fakes_apart:report", {"value": 1}) == 1


@pytest.mark.parametrize("kind", ["UsageError", "DataError", "MemoryBudgetError", "DeviceError", "PocketMoEError"])
def test_an_error_for_the_user_keeps_its_class_and_its_sentence(kind):
    with pytest.raises(PocketMoEError, match=r"^what, where; what to do$") as caught:
        run_apart("fakes_apart:fail", {"kind": kind})
    assert type(caught.value) is getattr(errors, kind)


def test_a_bug_arrives_with_the_childs_traceback():
    with pytest.raises(RuntimeError, match="KeyError: 'no such thing'") as caught:
        run_apart("fakes_apart:crash", {})
    assert isinstance(caught.value.__cause__, ChildTraceback)
    assert "in crash" in str(caught.value.__cause__)


@posix
def test_a_child_that_is_killed_or_leaves_is_one_sentence():
    killed = "^the sum's process was killed, as systems do when memory runs out; run the same command again with more"
    with pytest.raises(MemoryBudgetError, match=killed):
        run_apart("fakes_apart:die", {"number": signal.SIGKILL}, what="the sum")
    with pytest.raises(PocketMoEError, match="ended early by signal 15; what was done is kept"):
        run_apart("fakes_apart:die", {"number": signal.SIGTERM}, resumes=True)
    with pytest.raises(PocketMoEError, match="ended early with exit status 7"):
        run_apart("fakes_apart:leave", {})


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_exception_of_a_callback_interrupts_the_child_which_ends_in_order(held, error):
    file, let_go = held

    def raise_it(_text: str) -> None:
        raise error

    with pytest.raises(error):
        run_apart("fakes_apart:hold", {"file": str(file)}, on_notice=raise_it)
    assert let_go()


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_child_ends_in_order_when_its_caller_is_interrupted_or_killed(held, number):
    file, let_go = held
    with subprocess.Popen(
        [sys.executable, SCRIPT, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as caller:
        assert caller.stdout is not None and caller.stderr is not None
        assert caller.stdout.readline() == "holding\n"
        caller.send_signal(number)
        assert let_go()
        said = caller.stderr.read()
    assert "Traceback" not in said.replace("Traceback", "", 1)  # at most the caller's own
    assert "_answer" not in said


@posix
def test_an_interrupt_reaches_the_child_also_where_the_caller_was_started_with_interrupts_ignored(held):
    file, let_go = held
    start = "trap '' INT; exec \"$@\""
    command = ["sh", "-c", start, "sh", sys.executable, SCRIPT, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        assert caller.stdout.readline() == "holding\n"
        caller.kill()
        assert let_go()
