"""Strategies of placing experts on a machine with a GPU. They decide who is where; of time they know what costs say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from .expert import ExpertId, Lookup
from .hybrid import Split, TierCosts, upload_budget
from .manager import ExpertCache
from .plain_cache import PlainCache
from .policy import get_policy, policy_names
from .renewal import Renewal
from .replay import Step
from .routing import Routing

Arriving = Sequence[tuple[float, ExpertId]]
"""Misses whose copies are in flight, with the seconds until each arrives, ascending."""
POLICY = policy_names()[0]
"""The default of the runtime."""


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

    def tick(self, seconds: float) -> None:
        """One token is done, and took so long."""
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

    def tick(self, seconds: float) -> None:
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
        self.cache = PlainCache(slots, get_policy(policy, slots, layers * floor), layers, floor)
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
        with self.cache.locked(copied):
            for expert in copied:
                if self.admit(expert):
                    self.cache.arrived(expert)

    def prefetch(self, guess: Sequence[ExpertId], link_busy: float) -> list[ExpertId]:
        return []

    def upload(self, missed: Sequence[ExpertId], link_busy: float) -> list[ExpertId]:
        return []

    def arrived(self, expert: ExpertId) -> None:
        self.cache.arrived(expert)

    def tick(self, seconds: float) -> None:
        self.cache.tick()

    def admit(self, expert: ExpertId) -> bool:
        """Give `expert` a slot; False where nobody may leave."""
        return self.cache.admit(expert) is not None


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
        room = upload_budget(self.costs, link_busy)
        absent = [expert for expert in missed if expert not in self.cache]
        return [expert for expert in absent[:room] if self.admit(expert)]


class Hybrid(CopyMisses):
    """Misses are divided so that a layer ends earliest; who stays in VRAM has to be worth its copy."""

    def __init__(self, slots: int, costs: TierCosts, routing: Routing) -> None:
        super().__init__(slots, costs, routing, POLICY)
        self._renewal = Renewal(self.cache)
        self._recall = routing.recall

    def below(self, ram: ExpertCache, read: float) -> None:
        self._renewal = Renewal(self.cache, ram)
        self._renewal.read_s = read

    def split(self, hits: int, in_ram: Sequence[ExpertId], arriving: Arriving, link_busy: float) -> Split:
        return self._renewal.split(hits, in_ram, self.costs, arriving=arriving, link_busy=link_busy)

    def served(self, chosen: Step, copied: Sequence[ExpertId]) -> None:
        self._renewal.use(chosen)
        super().served(chosen, copied)

    def prefetch(self, guess: Sequence[ExpertId], link_busy: float) -> list[ExpertId]:
        return self._bring(guess, link_busy, soon=self._recall)

    def upload(self, missed: Sequence[ExpertId], link_busy: float) -> list[ExpertId]:
        self._renewal.computed(self.costs.cpu.of(len(missed)))
        return self._bring(missed, link_busy)

    def tick(self, seconds: float) -> None:
        super().tick(seconds)
        self._renewal.tick(seconds)

    def admit(self, expert: ExpertId) -> bool:
        return self._renewal.admit(expert, transient=not self._renewal.stays(expert, self.costs)) is not None

    def _bring(self, experts: Sequence[ExpertId], link_busy: float, soon: float = 0.0) -> list[ExpertId]:
        absent = [expert for expert in experts if expert not in self.cache]
        uploads = self._renewal.uploads(absent, self.costs, link_busy, soon)
        return [expert for expert in uploads if self._renewal.admit(expert) is not None]


HYBRID = "hybrid"
_STRATEGIES: dict[str, Callable[[int, TierCosts, Routing], Strategy]] = {
    "static-layers": static_layers,
    "static-experts": static_experts,
    "copy-lru": partial(CopyMisses, policy="lru"),
    f"copy-{POLICY}": partial(CopyMisses, policy=POLICY),
    "cpu-lru": partial(CpuOnMiss, policy="lru"),
    f"cpu-{POLICY}": partial(CpuOnMiss, policy=POLICY),
    HYBRID: Hybrid,
}


def strategy_names() -> tuple[str, ...]:
    """Names that `get_strategy` knows; the hybrid is the last."""
    return tuple(_STRATEGIES)


def get_strategy(name: str, slots: int, costs: TierCosts, routing: Routing) -> Strategy:
    """A new strategy for `slots` slots in VRAM. Raises KeyError for an unknown name."""
    return _STRATEGIES[name](slots, costs, routing)
