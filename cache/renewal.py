"""Who comes up from RAM to VRAM, and who leaves it for that: the decisions, which runtime and simulator share.

An expert comes up because it was copied to be computed there; or in the link's idle time, if the hits that it is
expected to bring save more than its copy costs. A copy takes speed from the CPU, but only while that computes, so the
price is weighed by the share of the time in which it does: where nearly everything is a hit, uploads are nearly free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile

from .expert import ExpertId
from .hybrid import Split, TierCosts, Worth, split_misses, upload_budget, worth_uploading
from .manager import Admission, ExpertCache

_MEMORY = 0.95
"""What a token's times count for one token later."""
_CROWDED = 3.0
"""How much likelier the CPU is taken to compute during an upload than at other times: uploads follow misses, and misses
come together (docs/notes/gpu-simulated.md)."""


class Renewal:
    """Tell it every use and what every token took.

    Args:
        cache: of VRAM.
        below: of RAM; None where RAM holds everything.
    """

    def __init__(self, cache: ExpertCache, below: ExpertCache | None = None) -> None:
        self._cache, self._below = cache, below
        self._worth = Worth()
        self.read_s = 0.0
        """Seconds that reading a record from disk takes."""
        self._on_cpu = 0.0  # seconds of the present token
        self._cpu_s = self._token_s = 0.0  # decayed sums over tokens

    @property
    def cpu_share(self) -> float:
        """Share of the last tokens' time in which the CPU computed experts; 1 while nothing is known."""
        return min(1.0, self._cpu_s / self._token_s) if self._token_s else 1.0

    def use(self, experts: Iterable[ExpertId]) -> None:
        """These experts were chosen for the present token, wherever they lie."""
        self._worth.use(experts)

    def computed(self, seconds: float) -> None:
        """The CPU has computed experts of the present token for so long."""
        self._on_cpu += seconds

    def tick(self, seconds: float = 0.0) -> None:
        """One token is done, or a piece of a prompt. `seconds`: what it took, 0 if that says nothing about others."""
        self._worth.tick()
        if seconds:
            self._cpu_s = _MEMORY * self._cpu_s + self._on_cpu
            self._token_s = _MEMORY * self._token_s + seconds
        self._on_cpu = 0.0

    def split(
        self,
        hits: int,
        in_ram: Sequence[ExpertId],
        costs: TierCosts,
        *,
        arriving: Sequence[tuple[float, ExpertId]] = (),
        link_busy: float = 0.0,
        most: int | None = None,
    ) -> Split:
        """`split_misses`, the experts most worth having copied first; but only as many as lose nobody to the disk who
        is worth more."""
        ordered = self._worth.ordered(in_ram)
        split = split_misses(hits, ordered, costs, arriving=arriving, link_busy=link_busy, most=most)
        room = sum(1 for _ in takewhile(lambda expert: self.stays(expert, costs), split.copied))
        if room == len(split.copied):
            return split
        return split_misses(hits, ordered, costs, arriving=arriving, link_busy=link_busy, most=room)

    def stays(self, expert: ExpertId, costs: TierCosts) -> bool:
        """Whether an absent expert that is copied to be computed should keep the slot: whoever leaves for it is in RAM
        as well, or worth less."""
        victim = self._cache.next_victim(expert.layer)
        return not self._is_lost(victim) or self._gain(expert, victim, costs) > 0

    def uploads(
        self, experts: Iterable[ExpertId], costs: TierCosts, link_busy: float, soon: float = 0.0
    ) -> Iterator[ExpertId]:
        """Those of one layer's absent experts, most worth having first, whose copies pay in the link's idle time.

        The caller admits each before it asks for the next.

        Args:
            soon: the probability that they are used at once.
            link_busy: seconds until the link is free of what was asked of it before.
        """
        room, busy = upload_budget(costs, link_busy), min(1.0, _CROWDED * self.cpu_share)
        for expert in self._worth.ordered(experts):
            if not room:
                break
            gain = self._gain(expert, self._cache.next_victim(expert.layer), costs)
            if worth_uploading(soon + gain, costs, busy):
                room -= 1
                yield expert

    def admit(self, expert: ExpertId, transient: bool = False) -> Admission | None:
        """Give `expert` a slot in VRAM, see `ExpertCache.admit`, and set right in RAM who leaves that first: whoever is
        in VRAM as well."""
        victim = self._cache.next_victim(expert.layer)
        passing = victim is not None and self._cache.is_transient(victim)
        admission = self._cache.admit(expert, transient)
        if admission is not None and self._below is not None:
            if admission.evicted is not None and not passing:  # who only passed through is not wanted more than before
                self._below.promote(admission.evicted)
            if not transient:
                self._below.demote(expert)
        return admission

    def _gain(self, expert: ExpertId, victim: ExpertId | None, costs: TierCosts) -> float:
        """Hits, also below 0, that giving an absent expert the victim's slot is expected to bring."""
        return self._worth.gain(expert, victim, costs.dearness(self.read_s) if self._is_lost(victim) else 1.0)

    def _is_lost(self, victim: ExpertId | None) -> bool:
        """Whether somebody leaves VRAM who is not in RAM either."""
        return victim is not None and self._below is not None and victim not in self._below
