"""Renders chat templates in a process of its own, which whoever asked can kill.

A template comes with the model, so it is a stranger's program: it runs in Jinja's sandbox, on data that came as JSON,
in a process that has little memory. What a template may use is what transformers offers it
(https://huggingface.co/docs/transformers/chat_templating). Imports nothing of ours, and not transformers, which would
take a second and three times the memory.
"""

from __future__ import annotations

import contextlib
import json
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MEMORY = 256 << 20
"""Bytes of address space, where the system can limit it."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant has said; training wants to know, here its content is rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """A namespace that keeps nothing under the names that Python's internals have."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")
        super().__setitem__(name, value)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=4)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": _Namespace,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),  # without the attributes of a type
    }
    return environment.from_string(template)


def render(template: str, context: dict[str, Any]) -> dict[str, str]:
    """{"text": what the template makes of its context}, or {"refused": why not}; {"refused": ""} for lack of memory."""
    try:
        return {"text": _compiled(template).render(**context)}
    except MemoryError:
        return {"refused": ""}
    except Exception as error:  # a template can raise anything that Python can
        return {"refused": str(error) or type(error).__name__}


def main() -> None:
    """One JSON request per line of stdin, one JSON answer per line of stdout, until stdin ends."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows; elsewhere not everywhere
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        try:
            answer = json.dumps(render(**json.loads(line)))
        except MemoryError:
            answer = json.dumps({"refused": ""})
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()
