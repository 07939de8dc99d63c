"""From a plain function to a typer command: option groups are spelled out, and errors become one line."""

from __future__ import annotations

import contextlib
import errno
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints

import typer

from ..offload.errors import PocketMoEError
from .console import is_terminal, say_error
from .interrupt import BROKEN_PIPE, INTERRUPTED
from .options import DebugOption

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def command_of(function: Callable[..., None]) -> Callable[..., None]:
    """A typer command that calls `function`.

    A parameter whose type is a dataclass becomes one option per field, annotated there; `--debug` is added. Errors
    end the command with one line on stderr and their exit code.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    flat: list[Parameter] = []
    for parameter in signature(function).parameters.values():
        if parameter.name in groups:
            group = groups[parameter.name]
            types = get_type_hints(group, include_extras=True)
            flat += [_keyword(field.name, types[field.name], field.default) for field in fields(group)]
        else:
            flat.append(_keyword(parameter.name, hints[parameter.name], parameter.default))
    flat.append(_keyword("debug", DebugOption, False))

    def command(debug: bool = False, **values: Any) -> None:
        with errors_reported(debug):
            for name, group in groups.items():
                values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
            function(**values)
            sys.stdout.flush()  # a reader that has gone away is noticed here and not at exit

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    command.__signature__ = Signature(flat)  # type: ignore[attr-defined]
    return command


def _keyword(name: str, annotation: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


@contextlib.contextmanager
def errors_reported(debug: bool) -> Iterator[None]:
    """Turns what the block raises into one line on stderr and `typer.Exit` with the error's code."""
    try:
        yield
    except KeyboardInterrupt:
        if is_terminal(sys.stderr):
            print(file=sys.stderr)  # the shell's prompt goes below the ^C
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        raise typer.Exit(BROKEN_PIPE) from None
    except (typer.Exit, typer.Abort):
        raise
    except PocketMoEError as error:
        _report(error, str(error), debug)
        raise typer.Exit(error.exit_code) from None
    except Exception as error:
        _report(error, _described(error, debug), debug)
        raise typer.Exit(1) from None


def _described(error: Exception, debug: bool) -> str:
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return f"{error.filename or 'The output'} can not be written: {error.strerror}."
    described = f"{type(error).__name__}: {error}".rstrip(": ")
    return described + ("" if debug else " (not foreseen; --debug shows where)")


def _report(error: Exception, sentence: str, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    say_error(sentence)
