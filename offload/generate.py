"""Our token loop: prompt in chunks, then token by token, text as it becomes certain."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicCache

from ..cache.stats import RunStats
from .device import ran_out
from .errors import DeviceMemoryError, UsageError
from .hf_families import STEPWISE
from .kv_cache import announce_prompt, can_crop, new_kv_cache, take_back
from .lean import LeanDecoder
from .reasoning import Plain, Splitter
from .sampling import Sampler, Sampling
from .source import OnProgress, Progress

_NO_MEMORY = "the GPU's memory has run out; load with a smaller --vram (it leaves more free), or a shorter --context"


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer. `tokens` counts the answer's tokens so far; `finish_reason` comes with the last chunk:
    "stop" (end of answer or a stop text), "length" (max_tokens) or "context" (no room left). `thinking` is what the
    model thinks before it speaks; in a chunk with both, it comes first."""

    text: str
    tokens: int
    finish_reason: str | None = None
    thinking: str = ""


class Completion(NamedTuple):
    """A whole answer."""

    text: str
    prompt_tokens: int
    generated_tokens: int
    finish_reason: str
    thinking: str = ""


class Sequence:
    """One sequence of tokens and its KV cache.

    Args:
        model: a causal language model of transformers.
        context: most tokens.
        chunk: prompt tokens per forward pass.
        step_threads: torch's threads for a single token; None leaves them alone. Where native kernels do the hard work,
            what remains for torch is too small to share, and its idle threads would spin on the kernels' cores.
        lean: runs single tokens instead of the model's own modules; None = it cannot for this model.
        kv_dtype: what keys and values are kept in; None = the model's dtype.
        free_memory: makes room on a device that has run out of memory in a step of some tokens after those that are
            cached; False when it cannot.
        on_feed: is told the tokens of each forward before it runs.
    """

    def __init__(
        self,
        model: Any,
        context: int,
        chunk: int,
        step_threads: int | None = None,
        lean: LeanDecoder | None = None,
        kv_dtype: torch.dtype | None = None,
        free_memory: Callable[[int, int], bool] = lambda tokens, cached: False,
        on_feed: Callable[[list[int]], None] = lambda ids: None,
    ) -> None:
        self._model, self.context, self._chunk = model, context, chunk
        self._step_threads, self._lean, self._kv_dtype = step_threads, lean, kv_dtype
        self._stepwise = model.config.get_text_config().model_type in STEPWISE
        self._free_memory, self._on_feed = free_memory, on_feed
        self._threads = torch.get_num_threads()
        self.ids: list[int] = []
        """The tokens whose keys and values are cached."""
        self._cache = self._new_cache()

    def _new_cache(self) -> DynamicCache:
        return new_kv_cache(self._model.config, self.context, self._chunk, self._kv_dtype)

    def reset(self) -> None:
        self.ids = []
        self._cache = self._new_cache()

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens; starts over where the architecture cannot take tokens back."""
        if length < len(self.ids):
            if length == 0 or not can_crop(self._cache):
                self.reset()
            else:
                self._cache.crop(length - len(self.ids))
                del self.ids[length:]

    @contextmanager
    def few_threads(self) -> Iterator[None]:
        """Torch has as many threads as for a single token: sampling is too small to share, too."""
        if self._step_threads:
            torch.set_num_threads(self._step_threads)
        try:
            yield
        finally:
            torch.set_num_threads(self._threads)

    @torch.inference_mode()
    def feed(self, ids: list[int], on_progress: OnProgress | None = None) -> torch.Tensor:
        """Run new tokens through the model; returns the last one's logits [vocabulary]."""
        assert ids and len(self.ids) + len(ids) <= self.context, (len(self.ids), len(ids), self.context)
        if not self.ids:
            announce_prompt(self._cache, len(ids))
        logits, fed = None, 0
        while fed < len(ids):
            begin = len(self.ids)
            part = ids[fed : fed + (1 if begin and self._stepwise else self._chunk)]
            self._on_feed(part)
            try:
                if len(part) == 1 and self._step_threads:
                    torch.set_num_threads(self._step_threads)
                if len(part) == 1 and begin and self._lean is not None:
                    logits = self._lean.step(part[0], begin, self._cache)
                else:
                    logits = self._forward_in_memory(part, begin)
                self.ids += part
                fed += len(part)
            except BaseException:
                self.reset()  # some layers may have cached this chunk and others not
                raise
            finally:
                torch.set_num_threads(self._threads)
            if on_progress and len(ids) > self._chunk:
                on_progress(Progress("prompt", fed, len(ids), "tokens"))
        assert logits is not None
        return logits

    def _forward_in_memory(self, ids: list[int], begin: int) -> torch.Tensor:
        """`_forward`, once more with fewer expert slots if a device runs out of memory."""
        try:
            return self._forward(ids, begin)
        except (DeviceMemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
        # Not while the error is handled: it holds the tensors of the step that failed.
        if begin == 0:
            self._cache = self._new_cache()
            announce_prompt(self._cache, len(ids))
        elif not take_back(self._cache, begin):
            raise DeviceMemoryError(_NO_MEMORY)
        if not self._free_memory(len(ids), begin):
            raise DeviceMemoryError(_NO_MEMORY)
        try:
            return self._forward(ids, begin)
        except (DeviceMemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            raise DeviceMemoryError(_NO_MEMORY) from None

    def _forward(self, ids: list[int], begin: int) -> torch.Tensor:
        """The model's own forward pass: logits of the last token, [vocabulary]."""
        device = self._model.device
        output = self._model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.arange(begin, begin + len(ids), device=device)[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[0, -1].cpu()


class TextStream:
    """Token ids to text that never ends inside a character, and never shows what may yet become a stop text.

    Args:
        hidden: tokens that are no text; all special ones by default.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], hidden: Collection[int] | None = None) -> None:
        self._hidden = hidden
        self._tokenizer, self._stop = tokenizer, tuple(s for s in stop if s)
        self._ids: list[int] = []
        self._from = self._read = 0
        self._held = ""
        """Certain text that has not been given out."""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain."""
        self._ids.append(token)
        # Decode together with the token before: some tokenizers write a token differently at the start of a text.
        before, now = self._decode(self._ids[self._from : self._read]), self._decode(self._ids[self._from :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return self._give(now[len(before) :], final=False)

    def finish(self) -> str:
        """The rest, once no token follows."""
        before, now = self._decode(self._ids[self._from : self._read]), self._decode(self._ids[self._from :])
        self._read = len(self._ids)
        return self._give(now[len(before) :], final=True)

    def _decode(self, ids: list[int]) -> str:
        if self._hidden is None:
            return self._tokenizer.decode(ids, skip_special_tokens=True)
        return self._tokenizer.decode([i for i in ids if i not in self._hidden], skip_special_tokens=False)

    def _give(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = (
            0
            if final
            else max(
                (n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0
            )
        )
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out


def stream_answer(
    sequence: Sequence,
    tokenizer: Any,
    prompt: list[int],
    sampling: Sampling,
    ends: set[int],
    stats: RunStats,
    on_progress: OnProgress | None = None,
    generated: list[int] | None = None,
    after_step: Callable[[], None] = lambda: None,
    splitter: Splitter | None = None,
    hidden: Collection[int] | None = None,
) -> Iterator[Chunk]:
    """Feed a prompt and yield the answer piece by piece.

    Args:
        prompt: new tokens only; what `sequence` holds comes before them.
        ends: token ids that end the answer.
        generated: filled with the answer's token ids, the ending one included.
        after_step: called between forward passes.
        splitter: tells thoughts from the rest; without one, all is text.
        hidden: as in `TextStream`.

    Raises:
        UsageError: the prompt does not fit into the context.
    """
    if not prompt:
        raise UsageError("the prompt is empty")
    if len(sequence.ids) + len(prompt) >= sequence.context:
        raise UsageError(
            f"the prompt has {len(sequence.ids) + len(prompt):,} tokens, the context holds {sequence.context:,}; "
            f"shorten it, clear the conversation, or load with a larger context"
        )
    begin = time.perf_counter()
    stats.enter("prompt")
    sampler = Sampler(sampling, sequence.ids + prompt)
    logits = sequence.feed(prompt, on_progress)
    with sequence.few_threads():
        token = sampler.choose(logits)
    stats.record_prompt(len(prompt), time.perf_counter() - begin)
    stats.time_to_first_token_s = time.perf_counter() - begin
    stats.enter("answer")
    text, count, reason = TextStream(tokenizer, sampling.stop, hidden), 0, None
    splitter = splitter or Plain()
    steps, begin, forward = 0, time.perf_counter(), 0.0
    generated = generated if generated is not None else []
    while True:
        count += 1
        generated.append(token)
        piece = "" if token in ends else text.push(token)
        stats.record_answer(1, steps, time.perf_counter() - begin if steps else 0.0, forward)
        if token in ends or text.stopped:
            reason = "stop"
        elif sampling.max_tokens is not None and count >= sampling.max_tokens:
            reason = "length"
        elif len(sequence.ids) + 1 > sequence.context:
            reason = "context"
        if reason is not None:
            part, rest = splitter.push(piece + text.finish()), splitter.finish()
            stats.finish_reason = reason
            yield Chunk(part.text + rest.text, count, reason, part.thinking + rest.thinking)
            return
        if piece and any(part := splitter.push(piece)):
            yield Chunk(part.text, count, thinking=part.thinking)
        after_step()
        begin, steps = time.perf_counter(), 1
        logits = sequence.feed([token])
        forward = time.perf_counter() - begin
        with sequence.few_threads():
            token = sampler.choose(logits)
