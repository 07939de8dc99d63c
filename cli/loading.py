"""Opening a model for a command: progress while it loads, its plan, and its statistics kept at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..offload.errors import DataError
from .console import say
from .kept_runs import keep_run
from .options import LoadOptions
from .progress import StageProgress

if TYPE_CHECKING:
    from ..offload.model import Model


def load_model(path: str, **options: Any) -> Model:
    """`pocketmoe.offload.load`, imported late because `--help` needs none of it."""
    from ..offload.loading import load

    return load(path, **options)


@contextlib.contextmanager
def opened(path: str, options: LoadOptions) -> Iterator[Model]:
    """The loaded model; says where it sits, and at the end keeps its statistics and closes it."""
    with StageProgress() as progress:
        model = load_model(path, **options.as_keywords(), on_progress=progress.update, on_notice=progress.notice)
    try:
        if model.vram_plan is not None:
            say(str(model.vram_plan))
        say(str(model.plan))
        yield model
    finally:
        try:
            _keep_statistics(model)
        finally:
            model.close()
            if options.trace is not None:
                say(f"The routing was recorded: pocketmoe replay {options.trace}")


def _keep_statistics(model: Model) -> None:
    stats = model.stats(advice=True)
    if not stats.to_dict()["prompt_tokens"]:
        return  # nothing was asked
    try:
        keep_run(stats)
    except DataError as error:
        say(str(error))
