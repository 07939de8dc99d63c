"""Choosing the next token by the rules of transformers' logits processors, in their order.

The processors themselves sort the whole vocabulary for `top_p`, which is 9 to 16 ms a token for 151,936 of them: a
fifth of what all else takes. Here only what can still be chosen is sorted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
    ignore_eos: bool = False
    """Go on where the model would end its answer, for measurements."""

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
    """A model directory's sampling defaults and end-of-answer token ids; greedy where it does not ask for sampling.
    Without a generation_config.json, config.json says what ends an answer, as in transformers."""
    file, config = path / "generation_config.json", path / "config.json"
    if not file.is_file():
        return Sampling(), _ends(config, _read_json(config)) if config.is_file() else set()
    raw = _read_json(file)
    ends = _ends(file, raw)
    try:
        if raw.get("do_sample") is False:
            return Sampling(temperature=0.0, repetition_penalty=raw.get("repetition_penalty") or 1.0), ends
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        options = {name: raw.get(name) for name in names} | {"max_tokens": raw.get("max_new_tokens")}
        return Sampling().with_options(**options), ends
    except (UsageError, TypeError) as error:
        raise DataError(f"{file} cannot be used: {error}") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is damaged ({error}); remove it or download it again") from None
    if not isinstance(content, dict):
        raise DataError(f"{file} is damaged (it holds no settings); remove it or download it again")
    return content


def _ends(file: Path, config: dict[str, Any]) -> set[int]:
    eos, text = config.get("eos_token_id"), config.get("text_config")
    if eos is None and isinstance(text, dict):
        eos = text.get("eos_token_id")
    ends = [end for end in (eos if isinstance(eos, list) else [eos]) if end is not None]
    if not all(isinstance(end, int) for end in ends):
        raise DataError(f"{file}: eos_token_id is {eos!r}, expected the number of a token or a list of them")
    return set(ends)


class Sampler:
    """One answer's choice of tokens.

    Args:
        seen: the prompt's token ids, for the repetition penalty.
    """

    def __init__(self, sampling: Sampling, seen: list[int]) -> None:
        self._rules = sampling
        self._seen = set(seen)
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def choose(self, logits: torch.Tensor) -> int:
        """The next token for logits [vocabulary]. Raises DataError when they are not finite."""
        ids, weights = self.candidates(logits)
        if len(ids) == 1:
            token = int(ids[0])
        else:
            reached = torch.from_numpy(weights).cumsum(0, dtype=torch.float64).numpy()  # a tenth of numpy's time
            drawn = torch.rand((), generator=self._generator, dtype=torch.float64).item() * reached[-1]
            token = int(ids[min(np.searchsorted(reached, drawn, side="right"), len(ids) - 1)])
        self._seen.add(token)
        return token

    def candidates(self, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that may follow, int64 [n], and how likely they are, float32 [n], the likeliest 1."""
        rules = self._rules
        scores = logits.float().numpy()
        if not np.isfinite(scores.max()):
            raise DataError(
                "the model's output is not a number (NaN); its weights are damaged or beyond the range of their dtype"
            )
        if rules.repetition_penalty != 1.0 and self._seen:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            before, scores = scores[seen], scores.copy()
            scores[seen] = np.where(before < 0, before * rules.repetition_penalty, before / rules.repetition_penalty)
        temperature = np.float32(rules.temperature)
        if temperature == 0:
            return np.array([scores.argmax()]), np.ones(1, np.float32)
        ids = np.arange(len(scores))
        if 0 < rules.top_k < len(scores):
            ids = np.flatnonzero(scores >= np.partition(scores, -rules.top_k)[-rules.top_k])
            scores = scores[ids]
        with np.errstate(over="ignore"):
            weights = np.exp((scores - scores.max()) / temperature)
        if rules.top_p < 1:
            total = weights.sum(dtype=np.float64)
            # Together, those below this weight are less than what top_p leaves out: they need not be sorted.
            above = np.flatnonzero(weights >= (1 - rules.top_p) * total / len(weights))
            order = above[np.argsort(-weights[above], kind="stable")]
            likelier = np.cumsum(weights[order], dtype=np.float64) - weights[order]
            kept = order[likelier < rules.top_p * total]
            ids, weights = ids[kept], weights[kept]
        if rules.min_p > 0:
            kept = weights >= rules.min_p
            ids, weights = ids[kept], weights[kept]
        return ids, weights
