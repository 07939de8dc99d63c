"""The options that several commands share, as groups; `None` means that the library or the model decides."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import inf
from typing import Annotated, Any, NamedTuple

import typer

from ..cache.policy import policy_names
from ..offload.config import IO_MODES, KERNELS, KV_DTYPES, OffloadConfig
from ..offload.errors import UsageError

TRUNK_HELP = "Format of attention, embeddings and head: int8-g32, int4-g32 (-g64, -g128 each) or keep, as they ship."
Trunk = Annotated[
    str | None,
    typer.Option(help=f"{TRUNK_HELP} Default: int8-g32; keep with bf16, f16 and f32."),
]
Codec = Annotated[
    str | None,
    typer.Option(
        help="Record format: int4-g32-zp, int4-g32, int4-g32-asym (each also -g64, -g128), mxfp4, nf4, bf16, f16, f32. "
        "Default: what keeps the values of experts that ship packed, else int4-g32-zp."
    ),
]


Revision = Annotated[
    str | None,
    typer.Option(
        metavar="BRANCH|TAG|COMMIT", help="Of a model on the hub. Default: what is here of it, else the main branch."
    ),
]
KeepSource = Annotated[
    bool,
    typer.Option(help="Keep a model's files in the hub's cache. If not, each is removed as soon as it is converted."),
]

CONVERSION = ("codec", "trunk", "revision", "keep_source")
"""Options of `load` that only a download or conversion on first use knows; left out where they are not given."""


@dataclass(frozen=True)
class LoadOptions:
    """Fields are the keyword arguments of `pocketmoe.offload.load`.

    Raises:
        UsageError: a value that `OffloadConfig` refuses; said here, before torch is imported.
    """

    ram: Annotated[
        str | None,
        typer.Option(
            help="Hard limit for the whole process, as 4GB. Default: what it can use, or 85% of what is free."
        ),
    ] = None
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda|xpu", help="What computes; auto takes a GPU where torch can use one.")
    ] = OffloadConfig.device
    vram: Annotated[
        str | None, typer.Option(help="Hard limit for the GPU's memory, as 7GB. Default: what is free, less a rest.")
    ] = None
    deterministic: Annotated[
        bool, typer.Option(help="With a GPU: compute every expert there, for answers that are equal to the bit.")
    ] = OffloadConfig.deterministic
    context: Annotated[
        int | None, typer.Option(help="Tokens that prompt and answers may take together. Default: up to 4096.")
    ] = None
    kv: Annotated[
        str,
        typer.Option(
            metavar="|".join(KV_DTYPES), help="What keys and values are cached in; model is the dtype it computes in."
        ),
    ] = OffloadConfig.kv
    policy: Annotated[
        str, typer.Option(metavar="|".join(policy_names()), help="Which expert leaves the cache when it is full.")
    ] = OffloadConfig.policy
    prefetch: Annotated[bool, typer.Option(help="Read ahead what the next layer will probably need.")] = True
    warm_start: Annotated[
        bool, typer.Option(help="Fill free memory with what past runs of this model asked for most.")
    ] = True
    io: Annotated[str, typer.Option(metavar="|".join(IO_MODES), help="How experts are read from disk.")] = (
        OffloadConfig.io
    )
    kernels: Annotated[str, typer.Option(metavar="|".join(KERNELS), help="What computes the experts.")] = (
        OffloadConfig.kernels
    )
    threads: Annotated[int | None, typer.Option(help="Threads that compute. Default: one per core.")] = None
    trace: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Record which experts are chosen, for `pocketmoe replay`: no text."),
    ] = None
    trace_tokens: Annotated[
        bool, typer.Option("--trace-tokens", help="Record the token ids as well, from which the text can be read.")
    ] = False
    codec: Annotated[
        str | None,
        typer.Option(
            help="Record format when a checkpoint is converted on first use. Default: what keeps "
            "the values of experts that ship packed, else int4-g32-zp."
        ),
    ] = None
    trunk: Annotated[
        str | None,
        typer.Option(help="Format of the other large matrices, likewise. Default: int8-g32; keep with bf16, f16, f32."),
    ] = None
    revision: Revision = None
    keep_source: KeepSource = True

    def __post_init__(self) -> None:
        if self.policy not in policy_names():
            raise UsageError(f"policy must be one of {', '.join(policy_names())}, not {self.policy!r}")
        OffloadConfig.of(**{name: value for name, value in self.as_keywords().items() if name not in CONVERSION})

    def as_keywords(self) -> dict[str, Any]:
        values = asdict(self)
        return {n: value for n, value in values.items() if n not in CONVERSION or value != getattr(LoadOptions, n)}


class Rule(NamedTuple):
    """What a sampling parameter may be; `words` completes the sentence "NAME must be ..."."""

    kind: type[int] | type[float]
    words: str
    holds: Callable[[float], bool]


RULES = {
    "temperature": Rule(float, "a number from 0 (always the likeliest token)", lambda value: 0 <= value < inf),
    "top_p": Rule(float, "a number above 0 and at most 1", lambda value: 0 < value <= 1),
    "top_k": Rule(int, "0 (off) or a whole number above it", lambda value: value >= 0),
    "min_p": Rule(float, "a number from 0 to 1", lambda value: 0 <= value <= 1),
    "repetition_penalty": Rule(float, "a number above 0", lambda value: 0 < value < inf),
    "seed": Rule(int, "a whole number from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63),
    "max_tokens": Rule(int, "a whole number from 1", lambda value: value >= 1),
}


def check_sampling(name: str, value: float, label: str) -> None:
    """Raises UsageError when `value` is none that the sampling parameter `name` can have; NaN never is."""
    rule = RULES[name]
    if not rule.holds(value):
        raise UsageError(f"{label} must be {rule.words}, not {value}.")


def as_text(value: str | list[str] | None) -> str | list[str] | None:
    """Texts of the command line as UTF-8 whatever the locale says; what is none is replaced."""
    if isinstance(value, list):
        return [os.fsencode(text).decode("utf-8", "replace") for text in value]
    return value and os.fsencode(value).decode("utf-8", "replace")


@dataclass(frozen=True)
class SamplingOptions:
    """Fields are those of the library's `Sampling`; None leaves the model's own value.

    Raises:
        UsageError: a value is out of range.
    """

    temperature: Annotated[float | None, typer.Option(help="Above 1 wilder, below 1 tamer, 0 always the same.")] = None
    top_p: Annotated[
        float | None, typer.Option(help="Choose among the likeliest tokens that together hold this probability.")
    ] = None
    top_k: Annotated[int | None, typer.Option(help="Choose among this many of the likeliest tokens; 0 for all.")] = None
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest.")] = None
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 makes repetition less likely.")] = None
    seed: Annotated[int | None, typer.Option(help="The same seed and prompt give the same answer.")] = None
    max_tokens: Annotated[
        int | None,
        typer.Option(help="End the answer after this many tokens. Default, as for the others: the model's own."),
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End the answer before this text. May be repeated.", callback=as_text),
    ] = None

    def __post_init__(self) -> None:
        for name in RULES:
            if (value := getattr(self, name)) is not None:
                check_sampling(name, value, "--" + name.replace("_", "-"))
        if self.stop and "" in self.stop:
            raise UsageError("--stop must not be empty.")

    def as_keywords(self) -> dict[str, Any]:
        """Only what was given."""
        values = {name: value for name in RULES if (value := getattr(self, name)) is not None}
        return values | ({"stop": tuple(self.stop)} if self.stop else {})


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A store, a checkpoint directory, a GGUF file, or a model on the Hugging Face Hub as ORGANISATION/NAME, "
        "or ORGANISATION/NAME:Q4_K_M of its GGUF files.",
        show_default=False,
    ),
]
SystemOption = Annotated[
    str | None, typer.Option("--system", help="System prompt.", show_default=False, callback=as_text)
]
StatsOption = Annotated[bool, typer.Option("--stats", help="Print statistics after each answer.")]
HideThinking = Annotated[
    bool, typer.Option("--hide-thinking", help="Do not show what the model thinks before it answers.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
