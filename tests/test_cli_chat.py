"""The chat's commands and files, with lines from a pipe."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import fakes_cli
import pocketmoe.cli.kept_runs as kept_runs
import pocketmoe.cli.loading as loading
import pytest
from pocketmoe.cli.main import app
from pocketmoe.cli.transcript import save_transcript
from pocketmoe.offload.errors import UsageError
from typer.testing import CliRunner, Result


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[fakes_cli.FakeModel]:
    loaded: list[fakes_cli.FakeModel] = []

    def load(path: str, **options: Any) -> fakes_cli.FakeModel:
        loaded.append(fakes_cli.fake_load(path, **options))
        return loaded[-1]

    monkeypatch.setattr(loading, "load_model", load)
    monkeypatch.setattr(kept_runs, "runs_folder", lambda: tmp_path / "state")
    return loaded


def chat(*lines: str, options: tuple[str, ...] = ()) -> Result:
    result = CliRunner().invoke(app, ["chat", "fake", *options], input="".join(line + "\n" for line in lines))
    assert result.exit_code == 0, result.output
    return result


def messages(model: fakes_cli.FakeModel) -> list[str]:
    return [message["content"] for message in model.conversations[0].messages]


def test_a_piped_chat_answers_line_by_line_without_prompt_or_greeting(models):
    result = chat("one two", "", "three")
    assert result.stdout == "one two\nthree\n"
    assert result.stderr == models[0].plan + "\n"
    assert messages(models[0]) == ["one two", "one two", "three", "three"]


@pytest.mark.parametrize("line", ["/bye", "/bye now", "/exit", "/quit"])
def test_bye_leaves_and_what_follows_is_not_asked(models, line):
    result = chat("one", line, "two")
    assert result.stdout == "one\n"
    assert "error" not in result.stderr


def test_quotes_hold_several_lines_together(models):
    chat('"""one', "/bye", 'two"""', '"""single"""', '"""', "a", '"""')
    assert messages(models[0])[::2] == ["one\n/bye\ntwo", "single", "\na\n"]


def test_the_end_of_the_input_ends_an_open_block(models):
    chat('"""one', "two")
    assert messages(models[0])[0] == "one\ntwo"


def test_an_unknown_command_is_named_with_near_ones_and_is_not_sent(models):
    result = chat("/claer", "/nothing-like-it")
    assert "There is no command /claer; did you mean /clear" in result.stderr
    assert "/? lists them" in result.stderr
    assert not messages(models[0])


def test_a_path_at_the_start_of_a_line_is_a_message(models):
    assert chat("/usr/bin holds what?").stdout == "/usr/bin holds what?\n"


@pytest.mark.parametrize("command", ["/?", "/help"])
def test_help_lists_every_command_on_stderr(models, command):
    result = chat(command)
    assert not result.stdout
    for word in ("/clear", "/set", "/stats", "/save", "/load", "/bye", '"""'):
        assert word in result.stderr


def test_clear_forgets_the_messages_and_keeps_the_system_prompt(models):
    chat("one", "/clear", "two", options=("--system", "be brief"))
    assert messages(models[0]) == ["two", "two"]
    assert models[0].conversations[0].system == "be brief"


def test_set_changes_sampling_for_the_next_answers_and_default_gives_it_back(models):
    chat("/set temperature 0.7", "/set top-k 5", '/set stop "a b" \\n', "one", "/set temperature default", "two")
    assert models[0].asked[0][1] == {"temperature": 0.7, "top_k": 5, "stop": ("a b", "\n")}
    assert "temperature" not in models[0].asked[1][1]


def test_set_without_a_name_shows_all_values_and_whose_they_are(models):
    lines = chat("/set", options=("--top-p", "0.5")).stderr.splitlines()
    shown = {line.split()[0]: line for line in lines}
    assert shown["temperature"].split()[1] == "0.6"
    assert "model's own" in shown["temperature"]
    assert shown["top_p"].split()[1:] == ["0.5"]
    assert {"seed", "stop", "system", "stats"} <= shown.keys()


def test_set_changes_the_system_prompt_and_the_statistics_switch(models):
    result = chat('/set system "You are a pirate"', "/set stats on", "ahoy", "/set stats off", "bye")
    assert models[0].conversations[0].system == "You are a pirate"
    assert result.stderr.count("2.5 tokens/s") == 1


def test_set_thinking_shows_and_hides_what_is_thought(models):
    result = chat("think", "/set thinking off", "think", "/set thinking on", "think")
    assert result.stdout == "think\n" * 3
    assert result.stderr.removeprefix(models[0].plan + "\n") == "let me see\n\n(thinking)\n\nlet me see\n\n"


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("/set temperature hot", "temperature must be"),
        ("/set temperature nan", "temperature must be"),
        ("/set top_p 2", "top_p must be"),
        ("/set top_k 1.5", "top_k must be"),
        ("/set temprature 1", "did you mean temperature"),
        ("/set temperature", "Give a value"),
        ("/set stats maybe", "on or off"),
        ('/set stop "a', "quotation mark"),
        ('/set stop ""', "must not be empty"),
        ("/save", "Name a file"),
        ("/load", "Name a file"),
        ("/load /nowhere/at/all.json", "can not be read"),
        ("/save /nowhere/at/all.json", "can not be saved"),
    ],
)
def test_a_wrong_command_is_one_sentence_and_the_chat_goes_on(models, line, word):
    result = chat(line, "still here")
    assert word in result.stderr
    assert result.stdout == "still here\n"
    assert models[0].asked == [("still here", {})]


def test_stats_prints_the_report_on_stderr(models):
    result = chat("a b c", "/stats")
    assert result.stdout == "a b c\n"
    assert "Counted: 3 tokens of 1 answer" in result.stderr
    assert "Setup" in result.stderr, "the whole report"


def test_the_stats_option_prints_each_answers_own_numbers_and_what_bounds_the_run(models):
    said = chat("a", "b c", options=("--stats",)).stderr
    assert "this answer: 1 token, 2.5 tokens/s, first token 0.50 s" in said
    assert "this answer: 2 tokens, 2.5 tokens/s" in said
    assert said.count("so far: Not enough data") == 2
    assert "Setup" not in said


def test_a_failed_answer_does_not_end_the_chat_and_a_full_context_says_what_to_do(models):
    result = chat("fail", "full", "go on")
    assert "error: the record of expert 3 in layer 1 is damaged" in result.stderr
    assert "/clear" in result.stderr
    assert "--context" in result.stderr
    assert result.stdout == "half\ngo on\n"


def test_a_bug_ends_the_chat_with_code_1_and_closes_the_model(models):
    result = CliRunner().invoke(app, ["chat", "fake"], input="crash\nmore\n")
    assert result.exit_code == 1
    assert "--debug" in result.stderr
    assert models[0].closed


def test_a_saved_conversation_comes_back_and_only_its_owner_can_read_it(models, tmp_path):
    path = tmp_path / "talk with spaces.json"
    chat("héllo wörld", f"/save {path}", options=("--system", "brief"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir() if "talk" in file.name] == [path.name]
    result = chat(f"/load {path}", "more")
    assert messages(models[1]) == ["héllo wörld", "héllo wörld", "more", "more"]
    assert models[1].conversations[0].system == "brief"
    assert "2 messages" in result.stderr


@pytest.mark.parametrize("content", ["export PATH", '{"format": "other"}'])
def test_saving_replaces_a_conversation_and_nothing_else(models, tmp_path, content):
    (path := tmp_path / "talk.json").write_text(content)
    assert f"{path} is there and is no saved conversation" in chat("one", f"/save {path}").stderr
    assert path.read_text() == content
    path.unlink()
    assert chat("one", f"/save {path}", "two", f"/save {path}").stderr.count("(saved in") == 2


def test_saving_replaces_the_file_in_one_step_and_a_failure_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "talk.json"
    save_transcript(path, {"system": None, "messages": []})
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(UsageError, match="No space left"):
        save_transcript(path, {"system": None, "messages": [{"role": "user", "content": "x"}]})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"[]", b'{"format": "other"}'])
def test_a_file_that_is_no_saved_conversation_is_refused_with_its_name_and_changes_nothing(models, tmp_path, content):
    path = tmp_path / "talk.json"
    path.write_bytes(content)
    result = chat("one", f"/load {path}", "two")
    assert f"error: {path}" in result.stderr
    assert messages(models[0]) == ["one", "one", "two", "two"]


def test_a_file_too_large_for_a_conversation_is_not_read(models, tmp_path):
    path = tmp_path / "talk.json"
    with path.open("wb") as file:
        file.truncate(10**9)
    assert "too large" in chat(f"/load {path}").stderr


def test_a_directory_and_a_device_are_no_saved_conversations(models, tmp_path):
    assert "can not be read" in chat(f"/load {tmp_path}").stderr
    assert "/dev/zero is no file" in chat("/load /dev/zero").stderr
