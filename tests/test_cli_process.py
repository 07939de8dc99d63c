"""The command as a process: streams, pipes, signals, imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pocketmoe.cli import main
from pocketmoe.cli.console import AnswerWriter, without_controls
from pocketmoe.cli.progress import StageProgress, amount

FAKE = [sys.executable, str(Path(__file__).with_name("fakes_cli.py"))]
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and pipes")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "XDG_STATE_HOME": str(tmp_path), "HOME": str(tmp_path), "TERM": "xterm"}


def run(*args: str | bytes, environment: dict[str, str], stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*FAKE, *args], input=stdin, capture_output=True, env=environment, timeout=60, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"], ["convert", "--help"], ["--version"], ["run"]])
def test_help_and_usage_errors_import_nothing_heavy(arguments):
    code = (
        "import sys\nfrom pocketmoe.cli.main import main\n"
        f"sys.argv = ['pocketmoe', *{arguments!r}]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'numpy', 'rich', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_module_runs_as_a_script():
    command = [sys.executable, "-m", "pocketmoe.cli.main", "--version"]
    assert subprocess.run(command, capture_output=True, timeout=60, check=True).stdout.startswith(b"pocketmoe ")


def test_notes_of_transformers_keep_out_of_the_answer_unless_asked_for(monkeypatch):
    for name in ("app", "prepare_streams", "leave_on_sigterm"):
        monkeypatch.setattr(main, name, lambda **_: None)
    for before, after in ((None, "error"), ("info", "info")):
        monkeypatch.setattr(os, "environ", {} if before is None else {"TRANSFORMERS_VERBOSITY": before})
        main.main()
        assert os.environ["TRANSFORMERS_VERBOSITY"] == after


def test_without_a_terminal_there_are_no_escapes_and_the_answer_is_the_models_bytes(environment):
    done = run("run", "noisy", "évil ünd 漢字", environment=environment | {"LC_ALL": "C", "FORCE_COLOR": "1"})
    assert done.stdout == "évil ünd 漢字\n".encode()
    assert b"\x1b" not in done.stderr
    assert b"\r" not in done.stderr
    assert done.returncode == 0


@posix
@pytest.mark.parametrize(("typed", "out"), [(b"caf\xe9", "caf\ufffd"), ("évil".encode(), "évil")])
def test_a_prompt_is_read_as_utf8_whatever_the_locale_says(environment, typed, out):
    done = run("run", "fake", typed, environment=environment | {"LC_ALL": "C", "PYTHONUTF8": "0"})
    assert done.stdout == (out + "\n").encode()


def test_bytes_that_are_not_utf8_do_not_end_a_chat(environment):
    done = run("chat", "fake", stdin=b"caf\xe9\n", environment=environment)
    assert (done.returncode, done.stdout) == (0, "caf\ufffd\n".encode())


@posix
def test_a_reader_that_goes_away_ends_the_answer_quietly(environment):
    with subprocess.Popen(
        [*FAKE, "run", "fake", "endless"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(5) == b"word1"
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(60) == 141
    assert b"Traceback" not in errors
    assert b"rror" not in errors


def started(*args: str, environment: dict[str, str], until: bytes, stream: str) -> subprocess.Popen[bytes]:
    """The running command, once `until` has been seen on that stream."""
    process = subprocess.Popen([*FAKE, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    seen = b""
    while until not in seen:
        byte = getattr(process, stream).read(1)
        assert byte, seen
        seen += byte
    return process


@posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_loading_leaves_quietly_with_its_code(environment, number, code):
    with started("chat", "slow", environment=environment, until=b"LOADING\n", stream="stderr") as process:
        process.send_signal(number)
        out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (code, b"", b"")


@posix
def test_an_interrupt_stops_a_one_shot_answer_keeps_what_was_streamed_and_leaves_with_130(environment, tmp_path):
    with started("run", "fake", "endless", environment=environment, until=b"word3", stream="stdout") as process:
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.endswith(b"\n")
    assert errors.endswith(b"(stopped)\n")
    assert b"Traceback" not in errors
    assert list((tmp_path / "pocketmoe" / "runs").glob("*.json"))


@posix
def test_an_interrupted_json_run_prints_no_half_object(environment):
    with started(
        "run", "fake", "endless", "--json", environment=environment, until=b"RAM\n", stream="stderr"
    ) as process:
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")


@posix
def test_termination_during_an_answer_leaves_with_143_and_keeps_the_statistics(environment, tmp_path):
    with started("run", "fake", "endless", environment=environment, until=b"word3", stream="stdout") as process:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert b"Traceback" not in errors
    assert list((tmp_path / "pocketmoe" / "runs").glob("*.json"))


@posix
def test_a_full_disk_behind_stdout_is_an_error_and_not_a_traceback(environment):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*FAKE, "run", "fake", "hi"], stdout=full, stderr=subprocess.PIPE, env=environment, timeout=60, check=False
        )
    assert done.returncode == 1
    assert done.stderr.endswith(b"error: The output can not be written: No space left on device.\n")


@posix
@pytest.mark.parametrize(
    ("arguments", "out"),
    [("hi >&-", b""), ("hi 2>&-", b"hi\n"), ("<&- 2>&1", b"pocketmoe: error: The prompt is empty")],
)
def test_a_closed_stream_is_an_empty_one(environment, arguments, out):
    command = f'"{FAKE[0]}" "{FAKE[1]}" run fake {arguments}'
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, env=environment, timeout=60, check=False)
    assert done.stdout.startswith(out)
    assert b"not foreseen" not in done.stderr


def test_control_characters_go_and_text_stays():
    assert without_controls("a\tb\n\x1b]52;c;x\x07\x9bK\r\x7fé漢\u200d") == "a\tb\n]52;c;xKé漢\u200d"


def test_the_writer_ends_only_a_line_that_is_open(capsys):
    writer = AnswerWriter()
    writer.end_line()
    for text in ("a", "", "b\n"):
        writer.write(text)
    writer.end_line()
    writer.write("c")
    writer.end_line()
    assert capsys.readouterr().out == "ab\nc\n"


def test_without_a_terminal_a_stage_is_named_once_and_only_when_it_takes_long(capsys):
    from types import SimpleNamespace

    now = [0.0]
    with StageProgress(patience=2.0, clock=lambda: now[0]) as progress:
        for second, stage in [(0, "short"), (1, "short"), (1, "long"), (2, "long"), (3, "long"), (9, "long")]:
            now[0] = second
            progress.update(SimpleNamespace(stage=stage, done=second, total=10, unit="experts"))  # type: ignore[arg-type]
    assert capsys.readouterr().err == "long: 3 of 10 experts\n"


def test_amounts_are_in_words():
    assert amount(12, 240, "experts") == "12 of 240 experts"
    assert amount(5, 0, "files") == "5 files"
    assert amount(1.2e9, 3.4e9, "bytes", 5.12e8) == "1.2 GB of 3.4 GB, 512 MB/s"
