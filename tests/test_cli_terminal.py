"""The chat on a real terminal: keys, signals, redrawing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pexpect = pytest.importorskip("pexpect")
pyte = pytest.importorskip("pyte")
if sys.platform == "win32":
    pytest.skip("pseudo-terminals are POSIX", allow_module_level=True)

FAKE = str(Path(__file__).with_name("fakes_cli.py"))
CTRL_C, CTRL_D = "\x03", "\x04"
Spawned = Any  # pexpect.spawn
Start = Callable[..., Spawned]


def plain(home: Path) -> dict[str, str]:
    """This environment with an ordinary terminal and a home of its own."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    return inherited | {"HOME": str(home), "XDG_STATE_HOME": str(home), "TERM": "xterm"}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the command with the fake model on a terminal of 80 x 24."""
    running = []

    def spawn(*args: str, **environment: str) -> Spawned:
        child = pexpect.spawn(
            sys.executable, [FAKE, *args], env=plain(tmp_path) | environment, timeout=30, encoding="utf-8"
        )
        child.delaybeforesend = None
        running.append(child)
        return child

    yield spawn
    for child in running:
        child.close(force=True)


def left_with(child: Spawned) -> int | None:
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus


def test_a_chat_answers_and_ctrl_d_leaves_with_0(start):
    child = start("chat", "fake")
    child.expect(r"8 of 16 experts in RAM.*>>> ")
    child.sendline("hello world")
    child.expect("hello world\r\n.*hello world\r\n.*>>> ")
    child.send(CTRL_D)
    assert left_with(child) == 0


def test_ctrl_c_stops_the_answer_keeps_it_and_the_chat_goes_on(start, tmp_path):
    child = start("chat", "fake")
    child.expect(">>> ")
    child.sendline("endless")
    child.expect("word3")
    child.send(CTRL_C)
    child.expect(r"\(stopped\).*>>> ")
    child.sendline(f"/save {tmp_path}/talk.json")
    child.expect(r"\(saved in.*>>> ")
    assert '"stopped": true' in (tmp_path / "talk.json").read_text()
    child.sendline("/bye")
    assert left_with(child) == 0


@pytest.mark.parametrize(("window", "leaves"), [("1e9", True), ("0", False)])
def test_a_second_ctrl_c_right_after_stopping_leaves_with_130(start, window, leaves):
    child = start(f"--double-press={window}", "chat", "fake")
    child.expect(">>> ")
    child.sendline("endless")
    child.expect("word3")
    child.send(CTRL_C)
    child.expect(r"\(stopped\).*>>> ")
    child.send(CTRL_C)
    if leaves:
        assert left_with(child) == 130
    else:
        child.expect(r"Ctrl-C again.*>>> ")


def test_two_ctrl_c_at_an_empty_prompt_leave_with_130(start):
    child = start("chat", "fake")
    child.expect(">>> ")
    child.send(CTRL_C)
    child.expect(r"Ctrl-C again.*>>> ")
    child.send(CTRL_C)
    assert left_with(child) == 130


def test_ctrl_c_on_a_half_typed_line_only_drops_the_line(start):
    child = start("chat", "fake")
    child.expect(">>> ")
    for _ in range(2):
        child.send("half typed")
        child.expect("half typed")
        child.send(CTRL_C)
        child.expect(">>> ")
    child.sendline("whole")
    child.expect("whole\r\n.*whole\r\n.*>>> ")


def test_a_message_between_two_ctrl_c_disarms_the_first(start):
    child = start("chat", "fake")
    child.expect(">>> ")
    for _ in range(2):
        child.send(CTRL_C)
        child.expect(r"Ctrl-C again.*>>> ")
        child.sendline("hi there")
        child.expect("hi there\r\n.*hi there\r\n.*>>> ")


def test_a_second_ctrl_c_leaves_even_when_the_prompt_is_still_being_read(start):
    child = start("chat", "fake")
    child.expect(">>> ")
    child.sendline("stuck")
    child.expect("stuck\r\n")
    child.send(CTRL_C)
    child.expect("Ctrl-C again leaves at once")
    child.send(CTRL_C)
    assert left_with(child) == 130


def test_reading_a_long_prompt_shows_a_bar_and_ctrl_c_stops_it_between_two_pieces(start):
    child = start("chat", "fake")
    child.expect(">>> ")
    child.sendline("long")
    child.expect("prompt.*5 of 9 tokens")
    child.send(CTRL_C)
    child.expect(r"\(stopped\).*>>> ")
    child.sendline("short")
    child.expect("short\r\n.*short\r\n.*>>> ")


def test_ctrl_c_while_loading_leaves_with_130_and_no_traceback(start):
    child = start("chat", "slow")
    child.expect("LOADING")
    child.send(CTRL_C)
    assert left_with(child) == 130
    assert "Traceback" not in (child.before or "")


def test_several_lines_in_quotes_have_their_own_prompt(start):
    child = start("chat", "fake")
    child.expect(">>> ")
    child.sendline('"""first')
    child.expect(r"\.\.\. ")
    child.sendline('second"""')
    child.expect(r"first \| second\r\n.*>>> ")


def test_pasted_lines_are_one_message(start):
    child = start("chat", "fake")
    child.expect("2004h")  # asks the terminal to mark what is pasted
    child.send("\x1b[200~first\rsecond\r\x1b[201~")
    child.expect("second")
    child.sendline("")
    child.expect(r"first \| second\r\n.*>>> ")


def test_ctrl_c_in_a_block_drops_the_block(start):
    child = start("chat", "fake")
    child.expect(">>> ")
    child.sendline('"""first')
    child.expect(r"\.\.\. ")
    child.send(CTRL_C)
    child.expect(">>> ")
    child.sendline("plain")
    child.expect("plain\r\n.*plain\r\n.*>>> ")


def test_arrow_up_brings_the_last_message_back_and_tab_completes_a_command(start):
    child = start("chat", "fake")
    child.expect(">>> ")
    child.sendline("again please")
    child.expect("again please\r\n.*again please\r\n.*>>> ")
    child.sendline("\x1b[A")
    child.expect("again please\r\n.*again please\r\n.*>>> ")
    child.sendline("/cl\t")
    child.expect(r"\(cleared\).*>>> ")


def test_set_works_on_the_terminal(start):
    child = start("chat", "fake")
    child.expect(">>> ")
    child.sendline("/set temperature 0.25")
    child.expect(">>> ")
    child.sendline("/set")
    child.expect(r"temperature +0\.25\S*\r\n")


def test_run_without_a_prompt_on_a_terminal_is_a_chat(start):
    child = start("run", "fake")
    child.expect(">>> ")
    child.sendline("/bye")
    assert left_with(child) == 0


def test_json_without_a_prompt_on_a_terminal_is_refused(start):
    child = start("run", "fake", "--json")
    child.expect("--json needs a prompt")
    assert left_with(child) == 2


def test_a_redirected_answer_leaves_prompt_and_hints_on_the_terminal(start, tmp_path):
    shell = pexpect.spawn(
        "/bin/sh",
        ["-c", f'exec "{sys.executable}" "{FAKE}" chat fake > "{tmp_path}/answers"'],
        env=plain(tmp_path),
        timeout=30,
        encoding="utf-8",
    )
    shell.expect(">>> ")
    shell.sendline("hello file")
    shell.expect(">>> ")
    shell.send(CTRL_D)
    assert left_with(shell) == 0
    assert (tmp_path / "answers").read_text() == "hello file\n"


def screen_of(child: Spawned, columns: int = 80, rows: int = 24) -> list[str]:
    """What a person sees at the end of the command: its output, drawn by a terminal emulator."""
    child.expect(pexpect.EOF)
    screen = pyte.Screen(columns, rows)
    screen.title = "untouched"
    pyte.Stream(screen).feed(child.before or "")
    assert screen.title == "untouched"
    return [line.rstrip() for line in screen.display if line.strip()]


def test_an_answer_cannot_control_the_terminal(start):
    lines = screen_of(start("run", "fake", "evil"))
    assert lines[-1].startswith("]0;owned[31mred2J")
    assert lines[-1].endswith("end")


def test_thoughts_are_dim_and_end_before_the_answer(start):
    child = start("run", "fake", "think")
    assert screen_of(child)[-2:] == ["let me see", "think"]
    assert "\x1b[2mlet me \x1b[0m" in child.before


def test_progress_bars_leave_only_the_notices_and_the_plan_on_the_screen(start):
    child = start("run", "noisy", "hi")
    lines = screen_of(child)
    assert lines == [
        "converted on first use [bold]x[/bold]",
        "plan: trunk 1 MB, KV 1 MB",
        "plan: 8 of 16 experts in RAM",
        "hi",
    ]


def test_the_bar_of_the_prompt_makes_room_for_the_answer(start):
    child = start("run", "fake", "read")
    assert screen_of(child)[-2:] == ["plan: 8 of 16 experts in RAM", "read"]
    assert "5 of 9 tokens" in child.before


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_color_and_dumb_terminals_get_no_colours(start, environment):
    child = start("run", "noisy", "hi", **environment)
    child.expect(pexpect.EOF)
    assert "\x1b[2m" not in child.before
    if "TERM" in environment:
        assert "\x1b" not in child.before
        assert child.before.count("\r") == child.before.count("\r\n")


def test_the_bars_are_dim_free_of_markup_and_shown_on_a_terminal(start):
    child = start("run", "noisy", "hi")
    child.expect(pexpect.EOF)
    assert "trunk [red]x[/red]" in child.before
    assert "\x1b[2mplan:" in child.before


def test_a_resize_at_the_prompt_and_during_an_answer_disturbs_nothing(start):
    child = start("chat", "fake")
    child.expect(">>> ")
    child.setwinsize(10, 20)
    child.sendline("hi")
    child.expect("hi\r\n.*hi\r\n.*>>> ")
    child.sendline("endless")
    child.expect("word3")
    child.setwinsize(30, 100)
    child.expect("word20")
    child.send(CTRL_C)
    child.expect(r"\(stopped\).*>>> ")
    child.setwinsize(12, 40)
    child.sendline("/bye")
    assert left_with(child) == 0
