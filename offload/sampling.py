"""Choosing the next token: transformers' own logits processors, the model's own defaults."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .errors import DataError, UsageError, require_known


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when an answer ends. `temperature` 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """Only the k likeliest tokens; 0 for all."""
    min_p: float = 0.0
    """Only tokens at least this fraction as likely as the likeliest."""
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    """Most tokens of one answer; None until the context is full."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it."""

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "1 or more"),
        )
        for name, good, rule in checks:
            if not good:
                raise UsageError(f"{name} must be {rule}, not {getattr(self, name)}")

    def with_options(self, **options: Any) -> Sampling:
        """A copy with some fields replaced; None keeps the present value. Raises UsageError for unknown names."""
        require_known(options, [field.name for field in fields(self)], "sampling option")
        chosen = {name: value for name, value in options.items() if value is not None}
        if isinstance(stop := chosen.get("stop"), str):
            chosen["stop"] = (stop,)
        elif stop is not None:
            chosen["stop"] = tuple(stop)
        return replace(self, **chosen)


def read_generation_config(path: Path) -> tuple[Sampling, set[int]]:
    """A model directory's sampling defaults and end-of-answer token ids; greedy where it does not ask for sampling."""
    file = path / "generation_config.json"
    if not file.is_file():
        return Sampling(), set()
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is damaged ({error}); remove it or download it again") from None
    eos = raw.get("eos_token_id")
    ends = {int(i) for i in (eos if isinstance(eos, list) else [eos]) if i is not None}
    if raw.get("do_sample") is False:
        return Sampling(temperature=0.0, repetition_penalty=raw.get("repetition_penalty") or 1.0), ends
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    options = {name: raw.get(name) for name in names} | {"max_tokens": raw.get("max_new_tokens")}
    return Sampling().with_options(**options), ends


class Sampler:
    """One answer's choice of tokens.

    Args:
        seen: the prompt's token ids, for the repetition penalty.
    """

    def __init__(self, sampling: Sampling, seen: list[int]) -> None:
        self._greedy = sampling.temperature == 0
        self._seen = list(seen)
        self._penalised = sampling.repetition_penalty != 1.0
        self._processors = LogitsProcessorList()
        if self._penalised:
            self._processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if not self._greedy:
            if sampling.temperature != 1.0:
                self._processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                self._processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1.0:
                self._processors.append(TopPLogitsWarper(float(sampling.top_p)))
            if sampling.min_p > 0.0:
                self._processors.append(MinPLogitsWarper(float(sampling.min_p)))
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def choose(self, logits: torch.Tensor) -> int:
        """The next token for logits [vocabulary]. Raises DataError when they are not finite."""
        if not torch.isfinite(logits).any() or torch.isnan(logits).any():
            raise DataError(
                "the model's output is not a number (NaN); its weights are damaged or beyond the range of their dtype"
            )
        scores = logits.float()[None]
        if self._processors:
            ids = torch.tensor([self._seen]) if self._penalised else torch.empty(1, 0, dtype=torch.long)
            scores = self._processors(ids, scores)  # type: ignore[arg-type]
        if self._greedy:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(torch.softmax(scores[0], -1), 1, generator=self._generator))
        self._seen.append(token)
        return token
