"""The `pocketmoe` command: parse first, import torch after, and leave with a code that says how it went."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from .bench import bench
from .chat import chat
from .command import command_of
from .console import prepare_streams
from .convert import convert, verify
from .demo import demo
from .doctor import doctor
from .interrupt import BROKEN_PIPE, INTERRUPTED, TERMINATED, leave_now, leave_on_sigterm
from .plan import plan
from .replay import replay
from .run import run
from .stats import stats

# Plain help and plain errors: rich would cost a third of the time of --help.
app = typer.Typer(
    name="pocketmoe",
    help="Run Mixture-of-Experts models that are larger than your memory.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"pocketmoe {version('pocketmoe')}")
        raise typer.Exit


@app.callback()
def _pocketmoe(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


for _function in (chat, run, demo, convert, verify, plan, doctor, stats, replay, bench):
    app.command()(command_of(_function))


def main() -> None:
    """Entry point of the `pocketmoe` script."""
    prepare_streams()
    leave_on_sigterm()
    # transformers' notes, on CUDA packages that are not there above all, would stand in the middle of an answer.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app(prog_name="pocketmoe")
    except KeyboardInterrupt:  # outside every command
        leave_now(INTERRUPTED)
    except SystemExit as end:
        if end.code in (INTERRUPTED, TERMINATED, BROKEN_PIPE):
            leave_now(end.code)  # a normal exit would wait for reads that are still queued, and flush into the pipe
        raise


if __name__ == "__main__":
    main()
