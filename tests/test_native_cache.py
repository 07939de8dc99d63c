"""The compiled cache does what the plain one does: the same hits, slots, victims and orders, whatever happens."""

from __future__ import annotations

import numpy as np
import pytest
from pocketmoe.cache.expert import ExpertId, Lookup
from pocketmoe.cache.manager import ExpertCache, SlotInUseError
from pocketmoe.cache.plain_cache import PlainCache
from pocketmoe.cache.policy import get_policy, policy_names
from pocketmoe.offload import native_cache
from pocketmoe.offload.native_cache import NativeCache, make_cache
from pocketmoe.quant.native_library import NativeError, load_native

pytestmark = pytest.mark.skipif(load_native() is None, reason="the native library is not built")
EXPERTS, FLOOR = (7, 12, 9), 2
LAYERS = len(EXPERTS)
CYCLE = LAYERS * FLOOR


def compiled(policy: str, capacity: int, experts: tuple[int, ...] = EXPERTS, floor: int = FLOOR) -> NativeCache:
    library = load_native()
    assert library is not None
    return NativeCache(library, policy, capacity, len(experts) * floor, experts, floor)


class Twins:
    """Two caches that are told the same. What they answer has to be equal."""

    def __init__(self, policy: str, capacity: int) -> None:
        self.plain = PlainCache(capacity, get_policy(policy, capacity, CYCLE), LAYERS, FLOOR)
        self.both: tuple[ExpertCache, ExpertCache] = self.plain, compiled(policy, capacity)
        self.arriving: list[ExpertId] = []
        self.locked: list[ExpertId] = []

    def tell(self, what: str, *args: object) -> object:
        first, second = (self._answer(cache, what, args) for cache in self.both)
        assert first == second, (what, args, first, second)
        return first

    def _answer(self, cache: ExpertCache, what: str, args: tuple[object, ...]) -> object:
        try:
            return getattr(cache, what)(*args)
        except SlotInUseError as error:
            return type(error)

    def compare(self) -> None:
        for what in ("residents", "order", "__len__", "check_integrity"):
            self.tell(what)
        for layer, count in enumerate(EXPERTS):
            self.tell("next_victim", layer)
            self.tell("resident_count", layer)
            for index in range(count):
                for what in ("slot_of", "is_arriving", "is_transient", "__contains__"):
                    self.tell(what, ExpertId(layer, index))


def idle(twins: Twins) -> list[list[int]]:
    """Of each layer those who are resident and not on their way."""
    there = [expert for expert in sorted(twins.plain.residents()) if expert not in twins.arriving]
    return [[expert.index for expert in there if expert.layer == layer] for layer in range(LAYERS)]


def request(twins: Twins, rng: np.random.Generator, layer: int, count: int) -> None:
    """One step of a layer, as the runtime takes it; some reads are left on their way, or fail."""
    popular = 1.0 / (1 + np.arange(EXPERTS[layer])) ** 1.2
    chosen = rng.choice(EXPERTS[layer], count, replace=False, p=popular / popular.sum()).tolist()
    wanted = twins.tell("lookup", layer, [*chosen, *chosen[:1]], bool(rng.integers(4)))
    assert isinstance(wanted, Lookup)
    twins.tell("lock", wanted.hits + wanted.misses)
    absent = [expert for expert in wanted.misses if not twins.plain.is_arriving(expert)]
    admitted = twins.tell("admit_all", absent, bool(rng.integers(5) == 0))
    assert isinstance(admitted, list)
    twins.arriving += absent[: len(admitted)]
    for expert in [expert for expert in twins.arriving if rng.integers(3)]:
        twins.arriving.remove(expert)
        twins.tell("abandon" if rng.integers(8) == 0 else "arrived", expert)
    if len(twins.arriving) > 3:
        twins.tell("arrived", twins.arriving.pop(0))
    twins.tell("unlock", wanted.hits + wanted.misses)


@pytest.mark.parametrize("policy", policy_names())
def test_two_caches_that_are_told_the_same_answer_the_same(policy):
    rng = np.random.default_rng(len(policy))
    twins = Twins(policy, CYCLE + 5)
    for token in range(90):
        for layer in range(LAYERS):
            for _ in range(0 if token % 7 == 6 else rng.integers(1, 3)):
                request(twins, rng, layer, EXPERTS[layer] if token % 23 == 9 else int(rng.integers(FLOOR + 1)))
            somebody = ExpertId(layer, int(rng.integers(EXPERTS[layer])))
            twins.tell(("demote", "promote", "is_transient", "slot_of")[rng.integers(4)], somebody)
            if rng.integers(6) == 0:
                twins.tell("lock", [somebody])
                twins.locked.append(somebody)
        twins.tell("use", [(layer, there[: token % 3]) for layer, there in enumerate(idle(twins))])
        twins.tell("tick")
        if token % 5 == 0:
            twins.tell("unlock", twins.locked)
            twins.locked.clear()
            moves: list[list[object]] = [[], []]
            for cache, noted in zip(twins.both, moves, strict=True):
                capacity = CYCLE + (token * 7) % 13
                moving = (lambda *move, noted=noted: noted.append(move)) if token % 2 else None
                noted.append(Twins._answer(twins, cache, "resize", (capacity, moving)))
            assert moves[0] == moves[1]
        if token % 31 == 30:
            twins.tell("recover")
            twins.arriving.clear()
            twins.locked.clear()
        if token % 9 == 0:
            twins.compare()
    twins.compare()


def test_more_tokens_than_are_remembered_are_compared_alike():
    rng, twins = np.random.default_rng(0), Twins("analog", CYCLE + 4)
    for token in range(700):
        for layer in range(LAYERS):
            request(twins, rng, layer, EXPERTS[layer] if token % 31 == 9 else int(rng.integers(4) * (token % 13 > 0)))
        twins.tell("tick")
        if token % 50 == 49 or token % 31 in (8, 9, 10):
            twins.tell("order")
    twins.compare()


@pytest.mark.parametrize("policy", policy_names())
def test_a_cleared_cache_begins_as_a_new_one(policy):
    old, new = compiled(policy, 40, (30, 30)), compiled(policy, 40, (30, 30))
    rng = np.random.default_rng(0)
    for cache in (old, new):
        if cache is old:
            for _ in range(50):
                serve(cache, rng.choice(30, 4, replace=False).tolist())
            cache.clear()
        assert [serve(cache, [token % 7, 7 + token % 3, 20 + token % 10]) for token in range(60)][-1] >= 0
    assert old.order() == new.order()
    assert old.residents() == new.residents()


def serve(cache: ExpertCache, indices: list[int]) -> int:
    """The hits of a token that chooses the same experts in both layers."""
    hits = 0
    for layer in range(cache.layers):
        wanted = cache.lookup(layer, indices)
        with cache.locked(wanted):
            for expert, _ in zip(wanted.misses, cache.admit_all(wanted.misses), strict=True):
                cache.arrived(expert)
        hits += len(wanted.hits)
    cache.tick()
    return hits


def test_what_does_not_exist_is_refused():
    cache = compiled("lru", 10)
    for layer, index in ((0, 12), (0, -1)):
        with pytest.raises(NativeError, match="bad argument"):
            cache.lookup(layer, [index])
    with pytest.raises(AssertionError, match="not in one of 3 layers"):
        cache.admit_all([ExpertId(3, 0)])
    with pytest.raises(AssertionError, match="not all there"):
        cache.use([(1, [0])])
    with pytest.raises(AssertionError, match="not resident"):
        cache.slots_of([ExpertId(0, 0)])
    cache.admit(ExpertId(0, 0))
    with pytest.raises(AssertionError, match="on their way"):
        cache.slots_of([ExpertId(0, 0)])


def test_books_that_do_not_balance_are_noticed_and_begun_anew():
    def lost(cache: NativeCache) -> None:
        cache._slots[0][1] = -1

    def twice(cache: NativeCache) -> None:
        cache._slots[0][1] = cache._slots[0][2]

    for spoil in (lost, twice):
        cache = compiled("lru", 10)
        for expert in (ExpertId(0, 1), ExpertId(0, 2)):
            cache.admit(expert)
            cache.arrived(expert)
        spoil(cache)
        with pytest.raises(AssertionError):
            cache.check_integrity()
        cache.recover()
        cache.check_integrity(idle=True)
        assert len(cache) == 0


def fill(cache: ExpertCache) -> None:
    """Take whatever is free for experts of layer 0, and put nobody where somebody is."""
    free = cache.capacity - len(cache)
    absent = [expert for index in range(12) if (expert := ExpertId(0, index)) not in cache]
    for expert in absent[:free]:
        cache.admit(expert)
        cache.arrived(expert)
    cache.check_integrity(idle=True)
    assert len(cache) == cache.capacity


@pytest.mark.parametrize("moves", [1, 3, 4])
def test_after_a_resize_that_was_interrupted_no_two_experts_share_a_slot(monkeypatch, moves):
    cache = compiled("lru", 12, (12, 12))
    fill(cache)
    cache.lookup(0, list(range(4)))  # so that those in slots 8 to 11 do not leave, but move
    steps = iter(range(moves))

    def interrupted(*_: object) -> None:
        if next(steps, None) is None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_resized", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.resize(8, interrupted)
    cache.recover()
    fill(cache)


def test_a_new_beginning_that_was_interrupted_has_changed_nothing(monkeypatch):
    cache = compiled("lru", 12, (12, 12))
    fill(cache)
    before = cache.residents()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_by_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.clear()
    cache.check_integrity(idle=True)
    assert cache.residents() == before


def test_of_equals_the_lower_expert_leaves_first_as_soon_as_nobody_uses_it():
    caches = PlainCache(8, get_policy("analog", 8, 2), 1, 2), compiled("analog", 8, (12,))
    for cache in caches:
        serve(cache, list(range(8)))  # a prompt: most of its experts were used at the same time
        serve(cache, [0, 1])
        with cache.locked([ExpertId(0, 2)]):
            assert cache.next_victim(0) == ExpertId(0, 3)
        assert cache.next_victim(0) == ExpertId(0, 2)


def test_a_request_may_name_more_experts_than_a_layer_has():
    cache = compiled("lru", 10)
    assert cache.lookup(1, [3] * 100 + [4]).misses == ((1, 3), (1, 4))


def test_a_running_model_has_the_compiled_cache_where_there_is_the_library(monkeypatch):
    assert isinstance(make_cache("analog", 20, CYCLE, EXPERTS, FLOOR), NativeCache)
    with pytest.raises(ValueError, match="Unknown eviction policy 'lruu'"):
        make_cache("lruu", 20, CYCLE, EXPERTS, FLOOR)
    with pytest.raises(ValueError, match="5 slots are too few"):
        make_cache("lru", 5, CYCLE, EXPERTS, FLOOR)
    monkeypatch.setattr(native_cache, "load_native", lambda: None)
    assert isinstance(make_cache("analog", 20, CYCLE, EXPERTS, FLOOR), PlainCache)
