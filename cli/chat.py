"""`pocketmoe chat`."""

from __future__ import annotations

from pathlib import Path

import typer

from ..offload.naming import exists
from .loading import opened
from .options import HideThinking, LoadOptions, ModelArgument, SamplingOptions, StatsOption, SystemOption
from .session import Session
from .settings import ChatSettings


def chat(
    model: ModelArgument,
    load: LoadOptions,
    sampling: SamplingOptions,
    system: SystemOption = None,
    stats: StatsOption = False,
    hide_thinking: HideThinking = False,
) -> None:
    """Chat with a model that may be larger than the memory it gets."""
    with opened(model, load) as opened_model:
        settings = ChatSettings(sampling.as_keywords(), show_stats=stats, hide_thinking=hide_thinking)
        code = Session(opened_model, display_name(model), settings, system).run()
    raise typer.Exit(code)


def display_name(model: str) -> str:
    """The last part of a path, or the hub's name."""
    return Path(model).expanduser().resolve().name if exists(Path(model).expanduser()) else model
