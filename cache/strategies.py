"""Strategies of placing experts on a machine with a GPU. They decide who is where; of time they know what costs say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from .expert import ExpertId, Lookup
from .hybrid import Split, TierCosts, Worth, split_misses, upload_budget, worth_admitting
from .manager import ExpertCache
from .policy import get_policy
from .replay import Step
from .routing import Routing

Arriving = Sequence[tuple[float, ExpertId]]
"""Misses whose copies are in flight, with the seconds until each arrives, ascending."""


class Strategy(Protocol):
    """The contract. What `split` copies, and what `prefetch` and `upload` return, goes over the link in that order."""

    waits: bool
    """Whether the GPU waits in each layer for the CPU to know what the router has chosen."""

    keeps_table: bool
    """Whether the GPU finds residents in a table and computes them while the CPU learns of the choice."""

    def __contains__(self, expert: object) -> bool:
        """Whether `expert` has a slot in VRAM."""
        ...

    def below(self, ram: ExpertCache, read: float) -> None:
        """RAM does not hold everything, but what is in `ram`; the rest is read from disk, in `read` seconds each."""
        ...

    def find(self, layer: int, chosen: Step) -> Lookup:
        """Which of a layer's chosen experts lie in VRAM; those that are arriving do not."""
        ...

    def split(self, hits: int, in_ram: Sequence[ExpertId], arriving: Arriving, link_busy: float) -> Split:
        """What becomes of the misses; see `hybrid.split_misses`."""
        ...

    def served(self, chosen: Step, copied: Sequence[ExpertId]) -> None:
        """A layer's choice is known, and what of it is copied to be computed; that may be admitted."""
        ...

    def prefetch(self, guess: Sequence[ExpertId], link_busy: float) -> list[ExpertId]:
        """Which experts, of those in RAM that the next layer is expected to choose, are uploaded; admitted already."""
        ...

    def upload(self, missed: Sequence[ExpertId], link_busy: float) -> list[ExpertId]:
        """Which of those that the CPU has just computed are uploaded for later tokens; admitted already."""
        ...

    def arrived(self, expert: ExpertId) -> None:
        """An upload has reached its slot."""
        ...

    def tick(self) -> None:
        """One token is done."""
        ...


class Static:
    """What is in VRAM stays there, and the CPU computes the rest."""

    keeps_table = False

    def __init__(self, residents: Sequence[ExpertId], waits: bool) -> None:
        self._residents = frozenset(residents)
        self.waits = waits

    def __contains__(self, expert: object) -> bool:
        return expert in self._residents

    def below(self, ram: ExpertCache, read: float) -> None:
        pass

    def find(self, layer: int, chosen: Step) -> Lookup:
        there = self._residents
        return Lookup(tuple(e for e in chosen if e in there), tuple(e for e in chosen if e not in there))

    def split(self, hits: int, in_ram: Sequence[ExpertId], arriving: Arriving, link_busy: float) -> Split:
        return Split((), tuple(in_ram))

    def served(self, chosen: Step, copied: Sequence[ExpertId]) -> None:
        pass

    def prefetch(self, guess: Sequence[ExpertId], link_busy: float) -> list[ExpertId]:
        return []

    def upload(self, missed: Sequence[ExpertId], link_busy: float) -> list[ExpertId]:
        return []

    def arrived(self, expert: ExpertId) -> None:
        raise AssertionError(f"{expert} was never uploaded")

    def tick(self) -> None:
        pass


def static_layers(slots: int, costs: TierCosts, routing: Routing) -> Static:
    """All experts of the last layers, of as many as fit: what llama.cpp's --n-cpu-moe does. Its GPU needs no word from
    the CPU where all experts of a layer are resident, and where none are the hand-over says everything."""
    first = routing.layers - slots // routing.experts
    return Static([expert for expert in routing.by_popularity() if expert.layer >= first], waits=False)


def static_experts(slots: int, costs: TierCosts, routing: Routing) -> Static:
    """The experts that were most popular in other sequences, whatever their layers."""
    return Static(routing.by_popularity()[:slots], waits=True)


class CopyMisses:
    """VRAM is a cache, at first of popular experts; every miss is copied there and computed by the GPU."""

    waits = keeps_table = True

    def __init__(self, slots: int, costs: TierCosts, routing: Routing, policy: str) -> None:
        self.costs = costs
        layers, floor = routing.layers, routing.top_k
        self.cache = ExpertCache(slots, get_policy(policy, slots, layers * floor), layers, floor)
        for expert in reversed(_fill(slots, routing)):  # the most popular last: it leaves last
            self.cache.admit(expert)
            self.cache.arrived(expert)

    def __contains__(self, expert: object) -> bool:
        return expert in self.cache

    def below(self, ram: ExpertCache, read: float) -> None:
        pass

    def find(self, layer: int, chosen: Step) -> Lookup:
        return self.cache.lookup(layer, [expert.index for expert in chosen])

    def split(self, hits: int, in_ram: Sequence[ExpertId], arriving: Arriving, link_busy: float) -> Split:
        return Split(tuple(in_ram), ())

    def served(self, chosen: Step, copied: Sequence[ExpertId]) -> None:
        with self.cache.locked(chosen):
            for expert in copied:
                if self.admits(expert, copied=True) and self.admit(expert):
                    self.cache.arrived(expert)

    def prefetch(self, guess: Sequence[ExpertId], link_busy: float) -> list[ExpertId]:
        return []

    def upload(self, missed: Sequence[ExpertId], link_busy: float) -> list[ExpertId]:
        return []

    def arrived(self, expert: ExpertId) -> None:
        self.cache.arrived(expert)

    def tick(self) -> None:
        self.cache.tick()

    def admit(self, expert: ExpertId) -> bool:
        """Give `expert` a slot; False where nobody may leave."""
        return self.cache.admit(expert) is not None

    def admits(self, expert: ExpertId, soon: float = 0.0, copied: bool = False) -> bool:
        """Whether `expert` should take the next victim's slot; `soon`: the probability that it is used at once."""
        return True

    def admit_some(self, experts: Sequence[ExpertId], link_busy: float, soon: float = 0.0) -> list[ExpertId]:
        """Admit what is worth it and absent, first come first served, as long as the link has room."""
        admitted: list[ExpertId] = []
        room = upload_budget(self.costs, link_busy)
        for expert in experts:
            if len(admitted) == room:
                break
            if expert not in self.cache and self.admits(expert, soon) and self.admit(expert):
                admitted.append(expert)
        return admitted


def _fill(slots: int, routing: Routing) -> list[ExpertId]:
    """The most popular experts, but of each layer as many as a token needs, most popular first."""
    of_layer, first, rest = [0] * routing.layers, [], []
    for expert in routing.by_popularity():
        of_layer[expert.layer] += 1
        (first if of_layer[expert.layer] <= routing.top_k else rest).append(expert)
    return [*first, *rest[: slots - len(first)]]


class CpuOnMiss(CopyMisses):
    """The CPU computes every miss, which is uploaded afterwards whenever the link has room."""

    def split(self, hits: int, in_ram: Sequence[ExpertId], arriving: Arriving, link_busy: float) -> Split:
        return Split((), (*in_ram, *(expert for _, expert in arriving)))

    def upload(self, missed: Sequence[ExpertId], link_busy: float) -> list[ExpertId]:
        return self.admit_some(missed, link_busy)


class Hybrid(CopyMisses):
    """Misses are divided so that a layer ends earliest; who stays in VRAM has to be worth its copy."""

    def __init__(self, slots: int, costs: TierCosts, routing: Routing) -> None:
        super().__init__(slots, costs, routing, "forecast")
        self._worth = Worth()
        self._recall = routing.recall
        self._ram: ExpertCache | None = None
        self._dearness = 1.0

    def below(self, ram: ExpertCache, read: float) -> None:
        self._ram, self._dearness = ram, self.costs.dearness(read)

    def split(self, hits: int, in_ram: Sequence[ExpertId], arriving: Arriving, link_busy: float) -> Split:
        ordered = self._worth.ordered(in_ram)
        return split_misses(hits, ordered, self.costs, arriving=arriving, link_busy=link_busy)

    def served(self, chosen: Step, copied: Sequence[ExpertId]) -> None:
        self._worth.use(chosen)
        super().served(chosen, copied)

    def prefetch(self, guess: Sequence[ExpertId], link_busy: float) -> list[ExpertId]:
        return self.admit_some(self._worth.ordered(guess), link_busy, soon=self._recall)

    def upload(self, missed: Sequence[ExpertId], link_busy: float) -> list[ExpertId]:
        return self.admit_some(self._worth.ordered(missed), link_busy)

    def tick(self) -> None:
        super().tick()
        self._worth.tick()

    def admit(self, expert: ExpertId) -> bool:
        admitted = super().admit(expert)
        if admitted and self._ram is not None:
            self._ram.demote(expert)  # two copies are one too many
        return admitted

    def admits(self, expert: ExpertId, soon: float = 0.0, copied: bool = False) -> bool:
        victim = self.cache.next_victim(expert.layer)
        elsewhere = victim is None or self._ram is None or victim in self._ram
        gain = soon + self._worth.gain(expert, victim, 1.0 if elsewhere else self._dearness)
        return worth_admitting(gain, self.costs, copied=copied)


HYBRID = "hybrid"
_STRATEGIES: dict[str, Callable[[int, TierCosts, Routing], Strategy]] = {
    "static-layers": static_layers,
    "static-experts": static_experts,
    "copy-lru": partial(CopyMisses, policy="lru"),
    "copy-forecast": partial(CopyMisses, policy="forecast"),
    "cpu-lru": partial(CpuOnMiss, policy="lru"),
    "cpu-forecast": partial(CpuOnMiss, policy="forecast"),
    HYBRID: Hybrid,
}


def strategy_names() -> tuple[str, ...]:
    """Names that `get_strategy` knows; the hybrid is the last."""
    return tuple(_STRATEGIES)


def get_strategy(name: str, slots: int, costs: TierCosts, routing: Routing) -> Strategy:
    """A new strategy for `slots` slots in VRAM. Raises KeyError for an unknown name."""
    return _STRATEGIES[name](slots, costs, routing)
