"""`pocketmoe convert` and `pocketmoe verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..offload.errors import DataError
from .console import say, without_controls
from .options import Codec, KeepSource, Revision, Trunk
from .progress import StageProgress


def convert_model(source: str, dest: Path, **options: Any) -> Path:
    """`pocketmoe.offload.loading.convert_model`, imported late because `--help` needs none of it."""
    from ..offload.loading import convert_model

    return convert_model(source, dest, **options)


def verify_store(path: Path, **options: Any) -> list[str]:
    """`pocketmoe.offload.store.verify_store`, imported late because it brings torch."""
    from ..offload.store import verify_store

    return verify_store(path, **options)


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A checkpoint directory, a GGUF file, or a model on the Hugging Face Hub as ORGANISATION/NAME.",
            show_default=False,
        ),
    ],
    dest: Annotated[
        Path, typer.Argument(metavar="DEST", help="The store's directory, which is made.", show_default=False)
    ],
    codec: Codec = None,
    trunk: Trunk = None,
    revision: Revision = None,
    keep_source: KeepSource = True,
) -> None:
    """Convert a model into a store; one on the hub is downloaded.

    Needed once per model; an interrupted conversion goes on where it was.
    """
    with StageProgress() as progress:
        watch = {"on_progress": progress.update, "on_notice": progress.notice}
        of_hub = {"revision": revision, "keep_source": keep_source}
        store = convert_model(source, dest, codec=codec, trunk=trunk, **of_hub, **watch)
    say(f"Converted into {store}; try: pocketmoe chat {store}")


def verify(
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="A store's directory.", show_default=False)],
) -> None:
    """Check every checksum of a store."""
    with StageProgress() as progress:
        problems = verify_store(dest, on_progress=progress.update)
    for problem in problems:
        print(without_controls(problem))
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise DataError(f"{dest} has {count}; remove it and convert it again from its source.")
    print(without_controls(f"{dest} is as it was written: all checksums match."))
