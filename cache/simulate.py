"""How fast a machine with a GPU would decode under each strategy of placing experts: a model of time, no measurement.

A token passes through the layers one after another. A layer is its trunk on the GPU, then its experts: those in VRAM on
the GPU, the others copied there or computed by the CPU at the same time (`hybrid.ends`), or read from disk first. The
link has a clock of its own: uploads that nobody waits for run through the following layers, and while they do, the CPU
loses what speed they take from the RAM. What a program reaches of the parts' speeds is said by the shares below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .expert import ExpertId, Lookup
from .hybrid import Cost, TierCosts, ends
from .machine import Machine, ModelShape, link_speed
from .manager import ExpertCache
from .plain_cache import PlainCache
from .policy import get_policy
from .replay import Step
from .routing import Routing
from .strategies import POLICY, Strategy, get_strategy
from .units import format_bytes

GPU_SHARE = 0.75
"""Of the VRAM's speed, reached by kernels that read weights for one token."""
RAM_SHARE = 0.8
"""Of the RAM's speed, reached by anything that streams."""
CPU_SHARE = 0.84
"""Of what streams, reached by the CPU's expert kernels (measured: docs/notes/cpu-speed.md)."""
LAUNCH = 15e-6
"""Seconds until a call of the GPU's expert kernels is under way."""
TRUNK_LAUNCH = 50e-6
"""Seconds that the small kernels of one layer's trunk take beside reading weights."""
SYNC = 40e-6
"""Seconds until the CPU knows what a router on the GPU has chosen, and has decided. Hits are computed meanwhile where
the GPU finds them itself; where all experts are in VRAM, nobody has to know."""
HAND_OVER = 40e-6
"""Seconds for activations to reach the CPU, wake its threads, and return."""
COPY_LATENCY, PER_COPY = 10e-6, 5e-6
"""Seconds before the first byte of a row of copies, and for each."""
RESERVED_VRAM = 1200 * 10**6
"""Bytes that the driver, the desktop and a forward's workspace take."""
RESERVED_RAM = 5 * 10**9
"""Bytes that the system, other programs, and Python with torch take."""


@dataclass(frozen=True)
class Setup:
    """A model on a machine: slots and seconds."""

    shape: ModelShape
    machine: Machine
    vram_slots: int
    ram_slots: int
    costs: TierCosts
    trunk: float
    """Seconds per layer."""
    head: float
    """Seconds per token for what is not in a layer."""
    read: float
    """Seconds to read one record from disk."""
    gpu_finds_hits: bool = True
    """Strategies that keep a table of residents on the GPU have their hits computed before the CPU knows of them."""

    @classmethod
    def of(cls, shape: ModelShape, machine: Machine, context: int = 8192, gpu_finds_hits: bool = True) -> Setup:
        """Trunk and KV cache first, the rest of the VRAM is slots.

        Raises:
            ValueError: less than layers x top-k slots are left in VRAM, or none in RAM; one sentence.
        """
        total = shape.layers * shape.experts
        fixed = RESERVED_VRAM + shape.layers * shape.trunk + shape.dense + shape.kv * context
        vram_slots = min(total, int(machine.vram - fixed) // shape.record)
        ram_slots = min(total, int(machine.ram - RESERVED_RAM) // shape.record)
        if vram_slots < (floor := shape.layers * shape.top_k):
            raise ValueError(
                f"{format_bytes(machine.vram)} of VRAM leave {max(0, vram_slots)} slots beside {format_bytes(fixed)} "
                f"for trunk, {context:,} tokens of context and the driver; {shape.name} needs {floor} slots, "
                f"{format_bytes(fixed + floor * shape.record)} in all."
            )
        if ram_slots < floor:
            raise ValueError(f"{format_bytes(machine.ram)} of RAM hold {max(0, ram_slots)} experts, not {floor}.")
        ram, gpu = RAM_SHARE * machine.ram_bandwidth, GPU_SHARE * machine.gpu_bandwidth
        link = min(link_speed(machine.link), ram)
        costs = TierCosts(
            copy=Cost(COPY_LATENCY, shape.record / link + PER_COPY),
            cpu=Cost(HAND_OVER, shape.record / (CPU_SHARE * ram)),
            gpu=Cost(LAUNCH, shape.record / gpu),
            cpu_slowdown=min(link / ram, 0.9),
        )
        trunk = shape.trunk / gpu + TRUNK_LAUNCH
        head, read = shape.dense / gpu, shape.record / machine.disk
        return cls(shape, machine, vram_slots, ram_slots, costs, trunk, head, read, gpu_finds_hits)


class Outcome(NamedTuple):
    """What a strategy did. Requests are hits, waited, copied, on_cpu and from_disk together."""

    strategy: str
    tokens: int
    seconds: float
    link_seconds: float
    """In which the link was busy."""
    uploads: int
    """Copies of which nobody had need when they began."""
    hits: int
    """In VRAM when chosen."""
    waited: int
    """On the link already when chosen, and waited for."""
    copied: int
    """Copied from RAM to be computed."""
    on_cpu: int
    """Computed by the CPU, from RAM."""
    from_disk: int
    """Read from disk, then computed by the CPU."""

    @property
    def requests(self) -> int:
        return self.hits + self.waited + self.copied + self.on_cpu + self.from_disk

    @property
    def hit_rate(self) -> float:
        return self.hits / self.requests

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def simulate(setup: Setup, routing: Routing, strategy: str) -> Outcome:
    """Decode all of `routing` with the strategy of that name (`strategies.strategy_names`)."""
    shape = setup.shape
    assert (routing.layers, routing.experts) == (shape.layers, shape.experts), f"{routing.layers} layers, {shape}"
    run = _Run(setup, get_strategy(strategy, setup.vram_slots, setup.costs, routing), routing)
    for at, (chosen, guess) in enumerate(routing.with_next_guesses(), 1):
        run.serve((at - 1) % shape.layers, chosen, guess)
        if at % shape.layers == 0:
            run.end_token()
    return Outcome(strategy, routing.tokens, run.now, run.link_seconds, run.uploads, *run.served)


class _Run:
    """The clocks of GPU, link and disk, and what lies in RAM."""

    def __init__(self, setup: Setup, strategy: Strategy, routing: Routing) -> None:
        self._setup, self._strategy = setup, strategy
        self.now = self._began = self._link_free = self.link_seconds = 0.0
        self.uploads = 0
        self._all_in_vram = setup.vram_slots == setup.shape.layers * setup.shape.experts
        self.served = [0, 0, 0, 0, 0]
        """As the last fields of an outcome."""
        self._flying: list[tuple[float, ExpertId]] = []  # uploads and when they arrive, ascending
        self._ram = self._filled_ram(routing)

    def serve(self, layer: int, chosen: Step, guess: Step) -> None:
        """One layer of one token; `guess` is what the next layer is expected to choose."""
        setup, strategy, costs = self._setup, self._strategy, self._setup.costs
        self.now += setup.trunk
        self._land()
        wanted = strategy.find(layer, chosen)
        finds = strategy.keeps_table and setup.gpu_finds_hits
        word = SYNC if strategy.waits and not (finds and self._all_in_vram) else 0.0
        self.now += word
        arriving = [(max(0.0, at - self.now), expert) for at, expert in self._flying if expert in wanted.misses]
        late = {expert for _, expert in arriving}
        in_ram, on_disk = self._look_in_ram(layer, [expert for expert in wanted.misses if expert not in late])
        busy = self._link_busy()
        copied, on_cpu = strategy.split(len(wanted.hits), in_ram, arriving, busy)
        waited = len(in_ram) + len(arriving) - len(copied) - len(on_cpu)
        self._use_link(costs.copy.of(len(copied)))
        strategy.served(chosen, copied)
        queued = self._link_busy()
        self._upload(strategy.prefetch([expert for expert in guess if self._has(expert)], queued))
        end = ends(
            len(wanted.hits),
            len(copied),
            len(on_cpu),
            costs,
            late=[at for at, _ in arriving[:waited]],
            link_busy=busy,
            behind=self._link_busy() - queued,
            ahead=word if finds else 0.0,
        )
        self.now += max(*end, self._disk_end(len(on_disk), end.cpu))
        self._upload(strategy.upload([*on_cpu, *on_disk], self._link_busy()))
        for at, group in enumerate((wanted.hits, range(waited), copied, on_cpu, on_disk)):
            self.served[at] += len(group)

    def end_token(self) -> None:
        self.now += self._setup.head
        self._strategy.tick(self.now - self._began)
        self._began = self.now
        if self._ram is not None:
            self._ram.tick()

    # The link

    def _link_busy(self) -> float:
        return max(0.0, self._link_free - self.now)

    def _use_link(self, seconds: float) -> None:
        self._link_free = self.now + self._link_busy() + seconds
        self.link_seconds += seconds

    def _upload(self, experts: Sequence[ExpertId]) -> None:
        for expert in experts:
            self._use_link(self._setup.costs.copy.of(1))
            self._flying.append((self._link_free, expert))
            self.uploads += 1

    def _land(self) -> None:
        while self._flying and self._flying[0][0] <= self.now:
            self._strategy.arrived(self._flying.pop(0)[1])

    # RAM and disk

    def _filled_ram(self, routing: Routing) -> ExpertCache | None:
        """The most popular experts that are not in VRAM; None when RAM holds everything."""
        slots, shape = self._setup.ram_slots, self._setup.shape
        if slots == shape.layers * shape.experts:
            return None
        ram = PlainCache(slots, get_policy(POLICY, slots, shape.layers * shape.top_k), shape.layers, shape.top_k)
        outside = [expert for expert in routing.by_popularity() if expert not in self._strategy]
        for expert in reversed(outside[:slots]):  # the most popular last: it leaves last
            ram.admit(expert)
            ram.arrived(expert)
        self._strategy.below(ram, self._setup.read)
        return ram

    def _has(self, expert: ExpertId) -> bool:
        return self._ram is None or expert in self._ram

    def _look_in_ram(self, layer: int, missed: list[ExpertId]) -> Lookup:
        """Which are in RAM; the others are from now on."""
        if self._ram is None or not missed:
            return Lookup(tuple(missed), ())
        found = self._ram.lookup(layer, [expert.index for expert in missed])
        with self._ram.locked(found):
            for expert in found.misses:
                self._ram.admit(expert)
                self._ram.arrived(expert)
        return found

    def _disk_end(self, reads: int, cpu_free: float) -> float:
        """When the CPU has computed what is read one after another, each as it comes."""
        read, each = self._setup.read, self._setup.costs.cpu.each
        return max(max(cpu_free, read) + reads * each, reads * read + each) if reads else 0.0
