"""A model without weights for the tests of the command line, and the command itself on top of it.

`python fakes_cli.py [--double-press=SECONDS] ARGUMENTS` is `pocketmoe ARGUMENTS` with this model: the tests run it on
a real terminal. The prompt chooses what happens: `endless` answers until it is stopped, `stuck` never gets past its
prompt, `long` neither but reports progress, `read` reports it once, `full` ends with a full context, `fail` raises a
user's error and `crash` a bug, `think` thinks first, `evil` answers with terminal escapes; everything else is repeated
word by word.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pocketmoe.cli.loading as loading
from pocketmoe.cache.stats import RunStats
from pocketmoe.offload.errors import DataError, PocketMoEError

EVIL = "\x1b]0;owned\x07\x1b[31mred\x9b2J\tend\n"


class Chunk(NamedTuple):
    text: str
    tokens: int = 1
    finish_reason: str | None = None
    thinking: str = ""


class FakeConversation:
    def __init__(self, model: FakeModel, system: str | None) -> None:
        self.model, self.system = model, system
        self.messages: list[dict[str, Any]] = []

    @property
    def tokens(self) -> int:
        return sum(len(message["content"].split()) for message in self.messages)

    def send(self, text: str, on_progress: Any = None, **options: Any) -> Iterator[Chunk]:
        self.messages.append({"role": "user", "content": text})
        parts: list[str] = []
        ended = False
        try:
            for chunk in self.model.stream(text, on_progress=on_progress, **options):
                parts.append(chunk.text)
                ended = chunk.finish_reason is not None
                yield chunk
        finally:
            message = {"role": "assistant", "content": "".join(parts)}
            self.messages.append(message if ended else message | {"stopped": True})

    def clear(self) -> None:
        self.messages.clear()

    def to_dict(self) -> dict[str, Any]:
        return {"format": "fake", "system": self.system, "messages": self.messages}

    def restore(self, data: Any) -> None:
        if not isinstance(data, dict) or data.get("format") != "fake":
            raise DataError("this is not a saved conversation")
        self.system, self.messages = data.get("system"), list(data["messages"])


class FakeModel:
    def __init__(self, path: str, options: dict[str, Any]) -> None:
        self.path, self.options = path, options
        self.plan = "plan: trunk 1 MB, KV 1 MB\nplan: 8 of 16 experts in RAM"
        self.vram_plan = None
        self.context = 4096
        self.sampling = SimpleNamespace(
            temperature=0.6, top_p=0.9, top_k=0, min_p=0.0, repetition_penalty=1.0, seed=None, max_tokens=512, stop=()
        )
        self.closed = False
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.conversations: list[FakeConversation] = []
        self._generated = 0

    def stream(self, prompt: str, on_progress: Any = None, **options: Any) -> Iterator[Chunk]:
        self.asked.append((prompt, options))
        while prompt == "long":
            on_progress(SimpleNamespace(stage="prompt", done=5, total=9, unit="tokens"))
            threading.Event().wait(0.01)
        if prompt == "read":
            on_progress(SimpleNamespace(stage="prompt", done=5, total=9, unit="tokens"))
        if prompt == "stuck":
            threading.Event().wait()
        if prompt == "fail":
            raise DataError("the record of expert 3 in layer 1 is damaged")
        if prompt == "crash":
            raise KeyError("no such thing")
        if prompt == "full":
            yield Chunk("half", 1, "context")
            return
        if prompt == "think":
            yield Chunk("", 1, thinking="let me ")
            yield Chunk("", 2, thinking="see")
        while prompt == "endless":
            self._generated += 1
            yield Chunk(f"word{self._generated} ")
            threading.Event().wait(0.01)  # the pace of a model
        words = [EVIL] if prompt == "evil" else [f"{word} " for word in prompt.replace("\n", " | ").split()]
        for word in words[:-1]:
            self._generated += 1
            yield Chunk(word)
        self._generated += 1
        yield Chunk(words[-1].rstrip(" "), 1, "length" if options.get("max_tokens") == len(words) else "stop")

    def chat(self, system: str | None = None) -> FakeConversation:
        self.conversations.append(FakeConversation(self, system))
        return self.conversations[-1]

    def stats(self, advice: bool = False) -> RunStats:
        run = RunStats(1, 4096, slots=8, total_experts=16, ram_budget_bytes=10**9, peak_rss_bytes=5 * 10**8)
        run.time_to_first_token_s, run.finish_reason = 0.5, "stop"
        for _ in self.asked:
            run.record_prompt(1, 0.5)
        run.record_answer(self._generated, self._generated, 0.4 * self._generated)
        return run

    def close(self) -> None:
        self.closed = True


def fake_load(path: str, **options: Any) -> FakeModel:
    """Takes what `load` takes; the path `missing` is an error, `slow` never finishes and `noisy` shows progress."""
    progress, notice = options.pop("on_progress"), options.pop("on_notice")
    if path == "missing":
        raise DataError("missing is not a store, a checkpoint directory or a model in the local cache")
    if path == "refuse":
        raise PocketMoEError("no")
    if path == "broken":
        raise ValueError("boom")
    if path == "slow":
        print("LOADING", file=sys.stderr, flush=True)
        threading.Event().wait()
    if path == "noisy":
        for done in range(1, 6):
            progress(SimpleNamespace(stage="trunk [red]x[/red]", done=done * 10**8, total=5 * 10**8, unit="bytes"))
        notice("converted on first use [bold]x[/bold]")
    return FakeModel(path, options)


if __name__ == "__main__":
    import pocketmoe.cli.session as session
    from pocketmoe.cli.main import main

    loading.load_model = fake_load
    if sys.argv[1].startswith("--double-press="):
        session.DOUBLE_PRESS_S = float(sys.argv.pop(1).partition("=")[2])
    main()
