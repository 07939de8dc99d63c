"""ExpertCache: who is in which slot, and who may be made to leave."""

from __future__ import annotations

from typing import Protocol

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pocketmoe.cache.expert import ExpertId, Lookup
from pocketmoe.cache.manager import Admission, ExpertCache, SlotInUseError
from pocketmoe.cache.plain_cache import PlainCache
from pocketmoe.cache.policy import get_policy, policy_names
from pocketmoe.offload.native_cache import NativeCache
from pocketmoe.quant.native_library import load_native

WITH_LIBRARY = pytest.mark.skipif(load_native() is None, reason="the native library is not built")
EXPERTS = 20  # per layer, of the native ones


class Make(Protocol):
    def __call__(self, capacity: int = 8, layers: int = 2, floor: int = 2, policy: str = "lru") -> ExpertCache: ...


def plain(capacity: int = 8, layers: int = 2, floor: int = 2, policy: str = "lru") -> PlainCache:
    return PlainCache(capacity, get_policy(policy, capacity, layers * floor), layers, floor)


def native(capacity: int = 8, layers: int = 2, floor: int = 2, policy: str = "lru") -> NativeCache:
    library = load_native()
    assert library is not None
    return NativeCache(library, policy, capacity, layers * floor, [EXPERTS] * layers, floor)


@pytest.fixture(params=[plain, pytest.param(native, marks=WITH_LIBRARY)])
def make(request) -> Make:
    return request.param


def bring(cache: ExpertCache, *pairs: tuple[int, int], transient: bool = False) -> list[Admission]:
    """Admit experts and let them arrive at once."""
    admissions = []
    for pair in pairs:
        admission = cache.admit(ExpertId(*pair), transient=transient)
        assert admission is not None
        cache.arrived(ExpertId(*pair))
        admissions.append(admission)
    cache.check_integrity(idle=True)
    return admissions


def evicted(admission: Admission | None) -> tuple[int, int] | None:
    assert admission is not None
    return admission.evicted


def test_a_capacity_below_the_floors_is_refused_with_the_numbers(make):
    with pytest.raises(ValueError, match=r"^7 slots .* 2 layers .* 4 experts need 8"):
        make(capacity=7, floor=4)
    with pytest.raises(ValueError, match="at least 1 layer"):
        make(layers=0)


def test_lookup_splits_distinct_experts_in_the_order_of_the_request(make):
    cache = make()
    bring(cache, (0, 3), (0, 1))
    assert cache.lookup(0, [1, 5, 3, 5, 0]) == (((0, 1), (0, 3)), ((0, 5), (0, 0)))
    assert cache.lookup(1, [1, 3]) == ((), ((1, 1), (1, 3)))
    assert cache.lookup(1, []) == Lookup((), ())


def test_an_arriving_expert_is_a_miss_that_needs_no_new_read(make):
    cache = make()
    assert cache.admit(ExpertId(0, 1)) == Admission(slot=0, evicted=None)
    assert cache.lookup(0, [1]).misses == ((0, 1),)
    assert cache.is_arriving(ExpertId(0, 1))
    cache.arrived(ExpertId(0, 1))
    assert not cache.is_arriving(ExpertId(0, 1))
    assert cache.lookup(0, [1]).hits == ((0, 1),)


def test_a_victims_slot_goes_to_the_admitted_expert(make):
    cache = make(capacity=4)
    bring(cache, (0, 0), (0, 1), (1, 0), (1, 1))
    cache.lookup(0, [0])
    assert cache.admit(ExpertId(0, 2)) == Admission(slot=1, evicted=ExpertId(0, 1))
    assert cache.slot_of(ExpertId(0, 1)) is None
    assert cache.slot_of(ExpertId(0, 2)) == 1


def test_the_victim_is_known_before_the_admission_that_makes_it_leave(make):
    cache = make(capacity=4)
    bring(cache, (0, 0), (0, 1), (1, 0))
    assert cache.next_victim(0) is None  # a slot is free
    bring(cache, (0, 2))
    assert cache.next_victim(1) == (0, 0)
    with cache.locked([ExpertId(0, 0)]):
        assert cache.next_victim(1) == (0, 1) == evicted(cache.admit(ExpertId(1, 1)))


def test_an_admission_takes_no_other_layer_below_its_floor(make):
    cache = make(capacity=5)
    bring(cache, (0, 0), (0, 1), (0, 2), (1, 0), (1, 1))
    assert evicted(cache.admit(ExpertId(1, 2))) == (0, 0)
    assert evicted(cache.admit(ExpertId(1, 3))) == (1, 0), "layer 0 is at its floor, however old its experts are"
    assert cache.resident_count(0) == 2


def test_a_layer_may_fall_below_its_floor_only_for_itself(make):
    cache = make(capacity=4)
    bring(cache, (0, 0), (1, 0), (1, 1), (1, 2))
    assert evicted(cache.admit(ExpertId(0, 1))) == (0, 0)
    assert evicted(cache.admit(ExpertId(0, 2))) == (1, 0)
    assert cache.admit(ExpertId(0, 3)) is None, "both of layer 0 are arriving, layer 1 is at its floor"
    cache.check_integrity()


def test_locked_and_arriving_experts_never_leave_and_admit_says_so(make):
    cache = make(capacity=4)
    bring(cache, (0, 0), (0, 1), (0, 2))
    with cache.locked([ExpertId(0, 0), ExpertId(0, 2)]):
        assert cache.admit(ExpertId(1, 0)) == Admission(3, None)
        assert evicted(cache.admit(ExpertId(1, 1))) == (0, 1)
        assert cache.admit(ExpertId(1, 2)) is None
        assert cache.slot_of(ExpertId(1, 2)) is None
        cache.check_integrity()
    assert cache.admit(ExpertId(1, 2)) is None, "layer 0 is at its floor now"
    assert evicted(cache.admit(ExpertId(0, 3))) == (0, 0)


def test_locks_are_counted_and_released_by_an_exception(make):
    cache = make(capacity=4)
    bring(cache, (0, 0), (0, 1), (1, 0), (1, 1))
    oldest = ExpertId(0, 0)
    cache.lock([oldest])
    with pytest.raises(RuntimeError), cache.locked([oldest]):
        raise RuntimeError
    assert evicted(cache.admit(ExpertId(0, 2))) == (0, 1)
    cache.unlock([oldest])
    assert evicted(cache.admit(ExpertId(0, 3))) == (0, 0)
    with pytest.raises(AssertionError, match="not locked"):
        cache.unlock([oldest])


def test_a_lookup_can_be_locked_before_its_misses_are_admitted(make):
    cache = make(capacity=4)
    bring(cache, (0, 0), (0, 1), (1, 0), (1, 1))
    wanted = cache.lookup(0, [1, 2])
    with cache.locked(wanted):
        bring_one = cache.admit(ExpertId(0, 2))
        cache.arrived(ExpertId(0, 2))
        assert evicted(bring_one) == (0, 0)
        assert cache.admit(ExpertId(0, 3)) is None, "its own two are locked, layer 1 is at its floor"
    assert evicted(cache.admit(ExpertId(0, 3))) == (0, 1)


def test_transient_experts_leave_first_and_the_oldest_of_them_first(make):
    cache = make(capacity=6)
    bring(cache, (0, 0), (0, 1), (0, 2))
    bring(cache, (0, 3), (0, 4), transient=True)
    bring(cache, (1, 0))
    assert [evicted(cache.admit(ExpertId(1, index))) for index in (1, 2, 3)] == [(0, 3), (0, 4), (0, 0)]


def test_a_transient_expert_leaves_before_older_experts_of_other_layers(make):
    cache = make(capacity=6)
    bring(cache, (0, 0), (0, 1), (0, 2))
    for _ in range(20):
        cache.admit(ExpertId(1, 7), transient=True)
        cache.abandon(ExpertId(1, 7))
    bring(cache, (1, 0), (1, 1), (1, 2), transient=True)
    assert evicted(cache.admit(ExpertId(0, 3))) == (1, 0)


def test_an_expert_can_leave_as_soon_as_it_has_arrived(make):
    cache = make(capacity=5)
    bring(cache, (1, 0), (1, 1))
    for index in range(3):
        cache.admit(ExpertId(0, index))
    assert evicted(cache.admit(ExpertId(1, 2))) == (1, 0)
    cache.arrived(ExpertId(0, 1))
    cache.check_integrity()
    cache.lock([ExpertId(1, 1)])
    assert evicted(cache.admit(ExpertId(1, 3))) == (0, 1)


def test_a_requested_transient_expert_joins_the_policy_unless_told_otherwise(make):
    cache = make(capacity=6)
    bring(cache, (0, 3), (0, 4), transient=True)
    bring(cache, (0, 0), (0, 1), (1, 0), (1, 1))
    assert cache.lookup(0, [3], promote=True).hits == ((0, 3),)
    assert cache.lookup(0, [4], promote=False).hits == ((0, 4),)
    assert [cache.is_transient(ExpertId(0, index)) for index in (3, 4)] == [False, True]
    assert [evicted(cache.admit(ExpertId(1, index))) for index in (2, 3)] == [(0, 4), (0, 0)]


def test_a_transient_expert_chosen_while_arriving_joins_the_policy(make):
    cache = make(capacity=6)
    cache.admit(ExpertId(0, 0), transient=True)
    assert cache.lookup(0, [0]).misses == ((0, 0),)
    assert not cache.is_transient(ExpertId(0, 0))


def test_an_abandoned_read_frees_its_slot(make):
    cache = make(capacity=4)
    bring(cache, (0, 0), (0, 1), (1, 0), (1, 1))
    admission = cache.admit(ExpertId(0, 2), transient=True)
    cache.abandon(ExpertId(0, 2))
    cache.check_integrity(idle=True)
    assert cache.slot_of(ExpertId(0, 2)) is None
    assert len(cache) == 3
    assert admission is not None
    assert cache.admit(ExpertId(0, 3)) == Admission(admission.slot, None)
    with pytest.raises(AssertionError, match="not arriving"):
        cache.abandon(ExpertId(0, 2))


def test_recovering_frees_what_was_arriving_or_locked_and_keeps_the_others(make):
    cache = make(capacity=6)
    bring(cache, (0, 0), (0, 1), (1, 0), (1, 1))
    cache.admit(ExpertId(0, 2))
    cache.admit(ExpertId(1, 2), transient=True)
    cache.lock([ExpertId(0, 0), ExpertId(0, 0), ExpertId(0, 2), ExpertId(1, 7)])
    cache.recover()
    cache.check_integrity(idle=True)
    assert set(cache.residents()) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    bring(cache, *((0, index) for index in range(3, 9)))


@pytest.mark.parametrize("policy", policy_names())
def test_recovering_from_half_written_books_begins_anew(policy):
    def slot_lost(cache):
        cache._free.pop()

    def half_evicted(cache):
        cache._policy.remove(ExpertId(0, 0))

    def half_admitted(cache):
        cache._slots[0][ExpertId(0, 5)] = cache._free.pop()

    def torn_order(cache):
        books = vars(cache._policy)
        if "estimates" in books:
            books["estimates"].leave(1, 0)
        else:
            (books.get("_level") or books["_keys"]).popitem()

    for torn in (slot_lost, half_evicted, half_admitted, torn_order):
        cache = plain(capacity=6, policy=policy)
        cache.resize(7)
        bring(cache, (0, 0), (0, 1), (1, 0), (1, 1))
        list(cache._policy.victims(0))
        torn(cache)
        cache.recover()
        cache.check_integrity(idle=True)
        assert len(cache) == 0
        bring(cache, *((1, index) for index in range(10, 19)))
        assert len(cache) == 7


def test_admitting_a_resident_expert_is_a_bug_of_the_caller(make):
    cache = make()
    bring(cache, (0, 0))
    with pytest.raises(AssertionError, match="resident already, in slot 0"):
        cache.admit(ExpertId(0, 0))
    with pytest.raises(AssertionError, match="not in one of 2 layers"):
        cache.admit(ExpertId(2, 0))


def test_shrinking_empties_the_highest_slots_and_growing_adds_free_ones(make):
    cache = make(capacity=6)
    bring(cache, (0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2))
    assert sorted(cache.resize(4)) == [((0, 2), 4), ((1, 2), 5)]
    cache.check_integrity(idle=True)
    assert set(cache.residents().values()) == set(range(4))
    assert cache.resize(7) == []
    cache.check_integrity(idle=True)
    assert {admission.slot for admission in bring(cache, (0, 5), (0, 6), (0, 7))} == {4, 5, 6}
    with pytest.raises(ValueError, match="3 slots are too few"):
        cache.resize(3)


def test_where_records_can_move_the_first_victims_leave_instead(make):
    cache, moves = make(capacity=6), []
    bring(cache, (0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2))
    lost = cache.resize(4, lambda *move: moves.append(move))
    assert sorted(lost) == [((0, 0), 0), ((0, 1), 1)]
    assert moves == [((0, 2), 4, 0), ((1, 2), 5, 1)]
    assert cache.residents() == {(1, 0): 2, (1, 1): 3, (0, 2): 0, (1, 2): 1}
    cache.check_integrity(idle=True)


@pytest.mark.parametrize("busy", ["locked", "arriving"])
def test_shrinking_and_clearing_refuse_while_a_slot_is_in_use_and_change_nothing(make, busy):
    cache = make(capacity=5)
    bring(cache, (0, 0), (0, 1), (1, 0), (1, 1))
    cache.admit(last := ExpertId(1, 2))
    if busy == "locked":
        cache.arrived(last)
        cache.lock([last])
    before = cache.residents()
    for refused in (lambda: cache.resize(4), cache.clear):
        with pytest.raises(SlotInUseError, match="ExpertId"):
            refused()
        assert cache.residents() == before
        cache.check_integrity()


def test_a_cleared_cache_is_empty_and_usable(make):
    cache = make(capacity=4)
    bring(cache, (0, 0), (1, 0))
    bring(cache, (0, 1), transient=True)
    cache.clear()
    cache.check_integrity(idle=True)
    assert cache.residents() == {}
    assert bring(cache, (1, 0))[0].slot == 0


def test_check_integrity_notices_what_does_not_balance():
    for spoil, message in [
        (lambda cache: cache._slots[0].update({ExpertId(0, 0): 1}), "slots used and free"),
        (lambda cache: cache._policy.remove(ExpertId(0, 0)), "not both"),
        (lambda cache: cache._coming.add(ExpertId(1, 7)), "without a slot"),
        (lambda cache: cache._locks.update({ExpertId(0, 0): 0}), "lock counts"),
        (lambda cache: (cache._eviction.victim(0), cache._eviction._heads.reverse()), "remembered"),
    ]:
        cache = plain()
        bring(cache, (0, 0), (0, 1), (1, 0))
        spoil(cache)
        with pytest.raises(AssertionError, match=message):
            cache.check_integrity()
    cache = plain()
    cache.lock([ExpertId(0, 0)])
    with pytest.raises(AssertionError, match="1 experts are locked"):
        cache.check_integrity(idle=True)


class AnySchedule(RuleBasedStateMachine):
    """Any operations in any order: the books balance, and every victim is the one that a full search would find."""

    LAYERS, FLOOR = 3, 2
    make: Make
    layer = st.integers(0, LAYERS - 1)
    index = st.integers(0, 5)

    @initialize(name=st.sampled_from(policy_names()), extra=st.integers(0, 5))
    def start(self, name, extra):
        self.cache = type(self).make(self.LAYERS * self.FLOOR + extra, self.LAYERS, self.FLOOR, name)
        self.arriving: set[ExpertId] = set()
        self.locked: list[ExpertId] = []

    def expected_victim(self, layer: int) -> ExpertId | None:
        cache = self.cache
        for expert in cache.order():
            if expert in self.arriving or expert in self.locked:
                continue
            if expert.layer == layer or cache.resident_count(expert.layer) > self.FLOOR:
                return expert
        return None

    @rule(layer=layer, index=index, transient=st.booleans())
    def admit(self, layer, index, transient):
        expert, cache = ExpertId(layer, index), self.cache
        if cache.slot_of(expert) is not None:
            return
        full = len(cache) == cache.capacity
        victim, before = self.expected_victim(layer) if full else None, cache.residents()
        admission = cache.admit(expert, transient)
        if full and victim is None:
            assert admission is None
            assert cache.residents() == before
            return
        assert admission is not None
        assert admission.evicted == victim
        assert victim is None or admission.slot == before[victim]
        assert cache.is_transient(expert) == transient
        self.arriving.add(expert)

    @rule(layer=layer, indices=st.lists(index, max_size=4), promote=st.booleans())
    def lookup(self, layer, indices, promote):
        residents = self.cache.residents()
        wanted = self.cache.lookup(layer, indices, promote)
        assert sorted(wanted.hits + wanted.misses) == sorted({ExpertId(layer, index) for index in indices})
        assert all(expert in residents and expert not in self.arriving for expert in wanted.hits)
        assert all(expert not in residents or expert in self.arriving for expert in wanted.misses)
        assert self.cache.residents() == residents

    @precondition(lambda self: self.arriving)
    @rule(data=st.data(), failed=st.booleans())
    def read_ends(self, data, failed):
        expert = data.draw(st.sampled_from(sorted(self.arriving)))
        self.arriving.remove(expert)
        (self.cache.abandon if failed else self.cache.arrived)(expert)
        assert (self.cache.slot_of(expert) is None) == failed

    @rule(layer=layer, indices=st.lists(index, max_size=3))
    def lock(self, layer, indices):
        experts = [ExpertId(layer, index) for index in indices]
        self.cache.lock(experts)
        self.locked += experts

    @rule(count=st.integers(1, 6))
    def unlock(self, count):
        self.cache.unlock(self.locked[:count])
        del self.locked[:count]

    @rule(capacity=st.integers(LAYERS * FLOOR, LAYERS * FLOOR + 8))
    def resize(self, capacity):
        before = self.cache.residents()
        high = {expert: slot for expert, slot in before.items() if slot >= capacity}
        if set(high) & ({*self.locked} | self.arriving):
            with pytest.raises(SlotInUseError):
                self.cache.resize(capacity)
            assert self.cache.residents() == before
        else:
            assert dict(self.cache.resize(capacity)) == high

    @rule(capacity=st.integers(LAYERS * FLOOR, LAYERS * FLOOR + 8))
    def resize_with_moves(self, capacity):
        before, moves = self.cache.residents(), {}
        try:
            lost = dict(self.cache.resize(capacity, lambda expert, old, new: moves.update({expert: (old, new)})))
        except SlotInUseError:
            assert self.cache.residents() == before and not moves
            return
        assert len(lost) == max(0, len(before) - capacity)
        assert all(before[expert] == old >= capacity for expert, (old, _) in moves.items())
        stay = {expert: slot for expert, slot in before.items() if expert not in lost}
        assert self.cache.residents() == stay | {expert: new for expert, (_, new) in moves.items()}

    @rule()
    def tick(self):
        for _ in range(32):
            self.cache.tick()

    @invariant()
    def the_books_balance(self):
        if hasattr(self, "cache"):
            self.cache.check_integrity()


def schedules(of: Make) -> type:
    case = type("Schedules", (AnySchedule,), {"make": staticmethod(of)}).TestCase
    case.settings = settings(max_examples=80, stateful_step_count=50, deadline=None, derandomize=True)
    return case


TestAnySchedule = schedules(plain)
TestAnyScheduleNative = WITH_LIBRARY(schedules(native))
