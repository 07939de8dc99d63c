"""`pocketmoe run`: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..offload.errors import UsageError
from .answer import ending_note, stream_answer
from .chat import chat, display_name
from .console import AnswerWriter, is_terminal, say
from .interrupt import INTERRUPTED
from .loading import opened
from .options import HideThinking, LoadOptions, ModelArgument, SamplingOptions, StatsOption, SystemOption, as_text

if TYPE_CHECKING:
    from ..offload.model import Model

FULL_CONTEXT = "give it more with --context N, or a shorter prompt."

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object with the answer and its statistics.")]


def run(
    model: ModelArgument,
    load: LoadOptions,
    sampling: SamplingOptions,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="Left out or -: from stdin.", show_default=False, callback=as_text),
    ] = None,
    system: SystemOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")] = False,
    json: JsonOption = False,
    stats: StatsOption = False,
    hide_thinking: HideThinking = False,
) -> None:
    """Answer one prompt on stdout. Without a prompt and on a terminal: chat."""
    if prompt is None and is_terminal(sys.stdin):
        if raw or json:
            raise UsageError(f"{'--json' if json else '--raw'} needs a prompt: as an argument or on stdin.")
        chat(model, load, sampling, system, stats, hide_thinking)
    if raw and system is not None:
        raise UsageError("--raw leaves out the chat template, so --system has no place; put it into the prompt.")
    text = prompt_text(prompt)
    with opened(model, load) as opened_model:
        options = sampling.as_keywords() | {"raw": raw} | ({} if system is None else {"system": system})
        show = {"as_json": json, "show_stats": stats, "hide_thinking": hide_thinking}
        answer_once(opened_model, display_name(model), text, options, **show)


def prompt_text(prompt: str | None) -> str:
    """The prompt, from stdin when it is None or `-`; one newline at the end of stdin is not part of it."""
    text = sys.stdin.read().removesuffix("\n").removesuffix("\r") if prompt in (None, "-") else prompt
    if not text or not text.strip():
        raise UsageError("The prompt is empty: give it as an argument or on stdin.")
    return text


def answer_once(
    model: Model,
    name: str,
    prompt: str,
    options: dict[str, Any],
    *,
    as_json: bool,
    show_stats: bool,
    hide_thinking: bool = False,
) -> None:
    """One answer on stdout, streamed or as one JSON object; `options` are those of `Model.stream`.

    Raises:
        typer.Exit: with 130 when Ctrl-C has stopped the answer; as JSON nothing is printed then.
    """
    out = AnswerWriter(hide_thinking=hide_thinking)
    writers = () if as_json else (out.write, out.write_thinking)
    outcome = stream_answer(lambda watch: model.stream(prompt, on_progress=watch, **options), *writers)
    out.end_line()
    if outcome.stopped_at is not None:
        say("(stopped)")
        raise typer.Exit(INTERRUPTED)
    if as_json:
        result = {"model": name, "text": outcome.text, "finish_reason": outcome.finish_reason}
        result |= {"thinking": outcome.thinking} if outcome.thinking else {}
        print(json.dumps(model.stats().to_dict() | result, ensure_ascii=False, allow_nan=False))
    if note := ending_note(outcome.finish_reason, model.context, FULL_CONTEXT):
        say(note)
    if show_stats:
        say(model.stats().summary())
