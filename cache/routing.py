"""What a simulation decodes: recorded routing, or routing made up for a model of which nobody has recorded any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .expert import ExpertId
from .replay import Requests, Step, steps_of
from .trace import DECODE, Array, Trace

POPULAR, TASTE, MOOD, FADE = 1.2, 1.3, 1.0, 0.65
"""Made-up routing: how much a layer's favourites, a sequence's, and the latest tokens' count beside chance, and what is
left of a mood after a token. Chosen so that caches hit what they hit in the recorded routing of gpt-oss-20b."""
_SEQUENCE = 200  # tokens of a made-up one


@dataclass(frozen=True)
class Routing:
    """Steps of one layer and one token each, L per token, sequence after sequence."""

    steps: Sequence[Step]
    layers: int
    experts: int
    """Per layer."""
    top_k: int
    sequences: int
    popularity: Mapping[ExpertId, int]
    """Uses in other sequences than those of the steps."""
    guesses: Sequence[Step] = ()
    """For each step what was expected one layer earlier; none at all without prediction."""
    recall: float = 0.0
    """Share of the guesses that are right."""

    @property
    def tokens(self) -> int:
        return len(self.steps) // self.layers

    def by_popularity(self) -> list[ExpertId]:
        """All experts, the most popular first."""
        every = [ExpertId(layer, index) for layer in range(self.layers) for index in range(self.experts)]
        return sorted(every, key=lambda expert: -self.popularity.get(expert, 0))

    def with_next_guesses(self) -> Iterator[tuple[Step, Step]]:
        """Each step, and what the next layer of the same token is expected to choose."""
        for at, step in enumerate(self.steps, 1):
            yield step, self.guesses[at] if self.guesses and at % self.layers else ()


def recorded(trace: Trace, tokens: int) -> Routing:
    """Decoded tokens of every second sequence, about `tokens` of them in all; the other sequences say what is popular.

    A single sequence is cut in two. Raises ValueError when the trace holds fewer than two decoded tokens.
    """
    layers = trace.layers
    sequences = [steps_of(chosen) for chosen in Requests(trace).sequences if len(chosen)]
    if len(sequences) == 1:
        half = len(sequences[0]) // layers // 2 * layers
        sequences = [part for part in (sequences[0][:half], sequences[0][half:]) if part]
    if len(sequences) < 2:
        raise ValueError("the trace holds fewer than two decoded tokens: record a longer answer.")
    known, held_out = sequences[::2], sequences[1::2]
    stride = max(1, sum(map(len, held_out)) // (tokens * layers))  # from all over the collection
    steps: list[Step] = []
    used = 0
    for sequence in held_out[::stride]:
        if len(steps) < tokens * layers:
            steps += sequence[: tokens * layers - len(steps)]
            used += 1
    popularity = Counter(expert for sequence in known for step in sequence for expert in step)
    return Routing(steps, layers, trace.num_experts, trace.top_k, used, popularity)


def made_up(layers: int, experts: int, top_k: int, tokens: int, seed: int = 0) -> Routing:
    """`tokens` tokens of routing with favourites of each layer, of each sequence, and of the moment."""
    rng = np.random.default_rng(seed)
    shape = (layers, experts)
    favourites = -POPULAR * rng.gumbel(size=shape)  # many alike, and some that are hardly ever chosen
    rows: list[Array] = []
    sequences = max(2, -(-2 * tokens // _SEQUENCE))
    for _ in range(sequences):
        score, mood = favourites - TASTE * rng.gumbel(size=shape), rng.normal(size=shape)
        for _ in range(_SEQUENCE):
            mood = FADE * mood + np.sqrt(1 - FADE**2) * rng.normal(size=shape)
            chances = score + MOOD * mood + rng.gumbel(size=shape)
            rows.append(np.argpartition(-chances, top_k - 1, axis=1)[:, :top_k].astype(np.uint16))
    seq = np.repeat(np.arange(sequences), _SEQUENCE)
    return recorded(Trace(np.array(rows), seq, np.full(len(seq), DECODE), experts), tokens)


def with_guesses(routing: Routing, recall: float, seed: int = 0) -> Routing:
    """Guesses at top-k experts one layer ahead: each is right with the probability `recall`, else any of the layer."""
    rng = np.random.default_rng(seed)
    shape = (len(routing.steps), routing.top_k)
    right, other = (rng.random(shape) < recall).tolist(), rng.integers(routing.experts, size=shape).tolist()
    guesses = [
        tuple(dict.fromkeys(e if ok else ExpertId(e.layer, o) for e, ok, o in zip(step, oks, others, strict=False)))
        for step, oks, others in zip(routing.steps, right, other, strict=True)
    ]
    return replace(routing, guesses=guesses, recall=recall)
