"""Guesses: each one is counted once, none takes a slot that is in use, and a wrong or failed one costs nobody else."""

from __future__ import annotations

import random

import pytest
from pocketmoe.cache.expert import ExpertId
from pocketmoe.cache.plain_cache import PlainCache
from pocketmoe.cache.policy import get_policy
from pocketmoe.cache.stats import RunStats
from pocketmoe.offload.prefetch import NoPrefetch, Prefetcher
from pocketmoe.offload.tiers import RamSlots
from pocketmoe.offload.transfer import SyncTransfers, ThreadedTransfers, Ticket, Urgency

RECORD, CAPACITY, FLOOR = 4096, 6, 2


class ManualTransfers:
    """Reads begin and end when the test says so."""

    def __init__(self):
        self.tickets: dict[ExpertId, Ticket] = {}
        self.waits = 0

    def fetch(self, expert, view, urgency):
        self.tickets[expert] = Ticket(expert, view, urgency)
        return self.tickets[expert]

    def begin(self, *indices, layer=1):
        for index in indices:
            self.tickets[ExpertId(layer, index)].running = True

    def finish(self, *indices, layer=1, error=None):
        for index in indices:
            ticket = self.tickets[ExpertId(layer, index)]
            self.end(ticket)
            ticket.error = error

    def end(self, ticket):
        """It has come to its end, whether it was to be dropped meanwhile or not."""
        ticket.running, ticket.done, ticket.cancelled = False, True, False

    def promote(self, ticket):
        ticket.urgency = Urgency.DEMAND

    def cancel(self, ticket):
        if not ticket.done:
            ticket.cancelled, ticket.done = True, not ticket.running
        return ticket.done and ticket.cancelled

    def wait_any(self, tickets):
        self.waits += 1
        tickets = list(tickets)
        if not any(ticket.done for ticket in tickets):
            self.end(tickets[0])
        ready = [ticket for ticket in tickets if ticket.done]
        for ticket in ready:
            if ticket.error is not None:
                raise ticket.error
        return ready

    def drain(self):
        pass

    def close(self):
        pass


class Bench:
    """A cache of two layers with a prefetcher."""

    def __init__(self, capacity=CAPACITY, depth=16, transfers=None):
        self.cache = PlainCache(capacity, get_policy("lru", capacity, 2 * FLOOR), 2, FLOOR)
        self.slots = RamSlots(capacity, RECORD)
        self.stats = RunStats(2, RECORD, slots=capacity)
        self.transfers = transfers or ManualTransfers()
        self.prefetch = Prefetcher(self.cache, self.slots, self.transfers, self.stats, depth)

    def outcomes(self, layer=1):
        c = self.stats.per_layer[layer]
        return {
            name: count
            for name in ("issued", "useful", "late", "wasted", "cancelled")
            if (count := getattr(c, f"prefetch_{name}"))
        }

    def fill(self, layer, *indices):
        """Make experts resident as demand reads do."""
        for index in indices:
            admission = self.cache.admit(ExpertId(layer, index))
            assert admission is not None
            self.prefetch.evicted(admission.evicted)
            self.cache.arrived(ExpertId(layer, index))

    def check(self):
        self.cache.check_integrity()
        self.stats.check()


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    bench.check()


def E(index, layer=1):
    return ExpertId(layer, index)


def test_a_guess_that_arrives_in_time_is_a_hit_and_useful_once(bench):
    bench.prefetch.request(1, [3, 4])
    assert bench.cache.is_arriving(E(3)) and bench.transfers.tickets[E(3)].urgency is Urgency.AHEAD
    bench.transfers.finish(3, 4)
    bench.prefetch.settle(1, {3, 7})
    wanted = bench.cache.lookup(1, [3, 7])
    assert wanted.hits == (E(3),) and wanted.misses == (E(7),)
    assert bench.prefetch.first_uses(wanted.hits) == 1
    assert bench.prefetch.first_uses(wanted.hits) == 0, "the second use is an ordinary hit"
    assert bench.outcomes() == {"issued": 2, "useful": 1}


def test_each_guess_reads_into_the_slot_that_it_owns(bench):
    bench.prefetch.request(1, [3, 4])
    for index in (3, 4):
        bench.transfers.tickets[E(index)].view[:] = bytes([index]) * RECORD
        slot = bench.cache.slot_of(E(index))
        assert set(bench.slots.record(slot).tolist()) == {index}


def test_a_guess_that_is_still_on_its_way_is_late_and_its_read_is_taken_over(bench):
    bench.prefetch.request(1, [3])
    bench.transfers.begin(3)
    bench.prefetch.settle(1, {3})
    assert bench.cache.lookup(1, [3]).misses == (E(3),)
    ticket = bench.prefetch.claim(E(3))
    assert ticket is bench.transfers.tickets[E(3)] and ticket.urgency is Urgency.DEMAND and ticket.ahead
    assert bench.outcomes() == {"issued": 1, "late": 1}
    bench.prefetch.drain()
    assert bench.transfers.waits == 0, "whoever claimed it waits for it"
    bench.cache.arrived(E(3))


def test_a_guess_that_the_router_did_not_choose_is_withdrawn_at_once_or_after_its_piece(bench):
    bench.prefetch.request(1, [3, 4])
    bench.transfers.begin(4)
    bench.prefetch.settle(1, {0})
    assert bench.transfers.tickets[E(3)].cancelled and bench.cache.slot_of(E(3)) is None
    assert bench.cache.is_arriving(E(4)), "a piece is being read: the slot stays taken"
    assert bench.outcomes() == {"issued": 2, "cancelled": 1}
    bench.transfers.tickets[E(4)].running, bench.transfers.tickets[E(4)].done = False, True
    bench.prefetch.settle(0, {0})
    assert bench.cache.slot_of(E(4)) is None and bench.outcomes() == {"issued": 2, "cancelled": 2}


def test_a_wrong_guess_that_arrived_is_wasted_when_it_loses_its_slot_unused(bench):
    bench.prefetch.request(1, [3])
    bench.transfers.finish(3)
    bench.prefetch.settle(1, {0})
    bench.prefetch.evicted(E(5))
    bench.prefetch.evicted(None)
    assert bench.outcomes() == {"issued": 1}
    bench.fill(1, *range(10, 10 + CAPACITY))  # guesses leave first
    assert bench.outcomes() == {"issued": 1, "wasted": 1}
    assert bench.prefetch.first_uses([E(3)]) == 0


def test_a_used_guess_is_not_wasted_when_it_leaves(bench):
    bench.prefetch.request(1, [3])
    bench.transfers.finish(3)
    bench.prefetch.settle(1, {3})
    bench.prefetch.first_uses(bench.cache.lookup(1, [3]).hits)
    bench.fill(1, *range(10, 10 + CAPACITY))
    assert E(3) not in bench.cache
    assert bench.outcomes() == {"issued": 1, "useful": 1}


def test_the_choice_of_another_layer_withdraws_nothing(bench):
    bench.prefetch.request(1, [3])
    bench.prefetch.settle(0, {0})
    assert not bench.transfers.tickets[E(3)].cancelled
    bench.prefetch.drain()


def test_what_is_resident_or_on_its_way_is_not_asked_for_again(bench):
    bench.fill(1, 3)
    bench.prefetch.request(1, [3, 4, 4])
    bench.prefetch.request(1, [4])
    assert set(bench.transfers.tickets) == {E(4)} and bench.outcomes() == {"issued": 1}


def test_at_most_depth_guesses_are_in_flight():
    bench = Bench(depth=2)
    bench.prefetch.request(1, [0, 1, 2, 3])
    assert set(bench.transfers.tickets) == {E(0), E(1)}
    bench.transfers.finish(0)
    bench.prefetch.settle(0, set())
    bench.prefetch.request(1, [2, 3])
    assert set(bench.transfers.tickets) == {E(0), E(1), E(2)}
    bench.check()


def test_a_rank_that_is_often_wrong_waits_for_an_idle_disk_and_is_read_no_more_when_it_goes_on_so():
    bench = Bench()

    def guess(right):
        """One token's guess of two experts, of which the second is or is not chosen; returns which were asked for."""
        bench.transfers.tickets.clear()
        bench.prefetch.request(1, [8, 9])
        asked = {expert.index: ticket.urgency for expert, ticket in bench.transfers.tickets.items()}
        bench.prefetch.settle(1, {8, 9} if right else {8, 7})
        bench.prefetch.drain()
        bench.cache.clear()
        return asked

    assert guess(right=False) == {8: Urgency.AHEAD, 9: Urgency.AHEAD}
    for _ in range(30):
        last = guess(right=False)
    assert last == {8: Urgency.AHEAD, 9: Urgency.IDLE}, "the first choice was always right, the second never"
    for _ in range(30):
        last = guess(right=False)
    assert last == {8: Urgency.AHEAD}
    for _ in range(150):
        last = guess(right=True)
    assert last == {8: Urgency.AHEAD, 9: Urgency.AHEAD}


def test_a_guess_never_takes_the_slot_of_a_locked_expert(bench):
    bench.fill(0, 0, 1, 2, 3, 4, 5)
    locked = [E(index, 0) for index in (0, 1, 2, 3, 4, 5)]
    bench.cache.lock(locked)
    bench.prefetch.request(1, [0, 1])
    assert bench.transfers.tickets == {} and bench.outcomes() == {}
    bench.cache.unlock(locked[:1])
    bench.prefetch.request(1, [0, 1])
    assert set(bench.transfers.tickets) == {E(0)} and E(0, 0) not in bench.cache
    assert all(expert in bench.cache for expert in locked[1:])
    bench.cache.unlock(locked[1:])


def test_a_guess_does_not_take_the_slot_of_another():
    bench = Bench(capacity=2 * FLOOR)
    bench.fill(0, 0, 1)
    bench.fill(1, 0, 1)  # 0 would leave first
    bench.prefetch.request(1, [0, 3])
    assert set(bench.transfers.tickets) == {E(3)} and E(0) in bench.cache and E(1) not in bench.cache
    bench.check()
    bench.prefetch.drain()
    bench.cache.check_integrity(idle=True)


def test_a_guess_that_pushes_an_unused_guess_out_counts_it_as_wasted():
    bench = Bench(capacity=4)
    bench.prefetch.request(1, [0, 1, 2, 3])
    bench.transfers.finish(0, 1, 2, 3)
    bench.prefetch.settle(1, {0})
    bench.prefetch.request(1, [4])
    assert bench.outcomes() == {"issued": 5, "wasted": 1}
    bench.check()


# Making room


def test_room_is_made_by_withdrawing_a_guess_before_waiting_for_one(bench):
    bench.prefetch.request(1, range(CAPACITY))
    bench.transfers.begin(0, 1)
    assert bench.cache.admit(E(0, 0)) is None, "every slot is a guess's"
    assert bench.prefetch.make_room() and bench.transfers.waits == 0
    assert bench.cache.slot_of(E(2)) is None
    assert bench.cache.admit(E(0, 0)) is not None
    bench.cache.arrived(E(0, 0))


def test_room_is_made_by_waiting_when_every_guess_is_under_way(bench):
    bench.prefetch.request(1, range(CAPACITY))
    bench.transfers.begin(*range(CAPACITY))
    assert bench.prefetch.make_room() and bench.transfers.waits == 1
    admission = bench.cache.admit(E(0, 0))
    assert admission is not None and admission.evicted == E(0), "the one that arrived gives its slot"
    bench.prefetch.evicted(admission.evicted)
    bench.cache.arrived(E(0, 0))
    assert bench.outcomes() == {"issued": CAPACITY, "wasted": 1}


def test_without_guesses_there_is_no_room_to_make(bench):
    assert not bench.prefetch.make_room() and bench.transfers.waits == 0


def test_draining_leaves_nothing_in_flight(bench):
    bench.prefetch.request(1, range(5))
    bench.transfers.begin(0, 1)
    bench.transfers.finish(2)
    bench.prefetch.drain()
    bench.cache.check_integrity(idle=True)
    assert bench.outcomes() == {"issued": 5, "cancelled": 2}


# Failures


@pytest.mark.parametrize("way", ["settle", "make_room", "drain"])
def test_a_guess_that_fails_gives_its_slot_back_and_raises_nothing(bench, way):
    bench.prefetch.request(1, [3])
    bench.transfers.finish(3, error=OSError("broken"))
    if way == "settle":
        bench.prefetch.settle(1, {3})
    elif way == "make_room":
        assert bench.prefetch.make_room()
    else:
        bench.prefetch.drain()
    assert bench.cache.slot_of(E(3)) is None
    assert bench.cache.lookup(1, [3]).misses == (E(3),)
    assert bench.outcomes() == {"issued": 1, "cancelled": 1}


@pytest.mark.parametrize("threads", [0, 2])
def test_a_guess_that_failed_does_not_stop_the_demand_read_of_the_same_expert(threads):
    class FailsOnce:
        record_bytes = RECORD
        calls = 0

        def read_into(self, expert, view, start, stop):
            self.calls += 1
            if self.calls == 1:
                raise OSError("broken")
            view[:] = b"\x07" * RECORD

    bench, reader = Bench(), FailsOnce()
    transfers = ThreadedTransfers(reader, bench.stats, threads) if threads else SyncTransfers(reader, bench.stats)
    prefetch = Prefetcher(bench.cache, bench.slots, transfers, bench.stats)
    prefetch.request(1, [3])
    prefetch.drain() if threads == 0 else _until_done(transfers, prefetch)
    prefetch.settle(1, {3})
    [missed] = bench.cache.lookup(1, [3]).misses
    assert not bench.cache.is_arriving(missed)
    admission = bench.cache.admit(missed)
    assert admission is not None
    ticket = transfers.fetch(missed, bench.slots.view(admission.slot), Urgency.DEMAND)
    assert transfers.wait_any([ticket]) == [ticket]
    bench.cache.arrived(missed)
    assert set(bench.slots.record(admission.slot).tolist()) == {7}
    transfers.close()
    counters = bench.stats.per_layer[1]
    assert (counters.demand_reads, counters.prefetch_reads, counters.bytes_read) == (1, 0, RECORD)
    bench.check()


def _until_done(transfers, prefetch):
    for ticket in list(prefetch._flying.values()):
        with pytest.raises(OSError, match="broken"):
            transfers.wait_any([ticket])


# All together


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_the_books_balance_and_every_guess_ends_in_one_way(seed):
    rng, bench = random.Random(seed), Bench(capacity=7, depth=4)
    prefetch, cache = bench.prefetch, bench.cache
    for _ in range(400):
        layer = rng.randrange(2)
        for ticket in list(prefetch._flying.values()):
            ticket.running = ticket.running or rng.random() < 0.5
            if ticket.running and rng.random() < 0.5:
                ticket.running, ticket.done = False, True
                ticket.error = OSError("broken") if rng.random() < 0.1 else None
        chosen = rng.sample(range(8), 2)
        prefetch.settle(layer, set(chosen))
        wanted = cache.lookup(layer, chosen)
        late = sum(map(cache.is_arriving, wanted.misses))
        bench.stats.record(layer, wanted, late, prefetch.first_uses(wanted.hits))
        cache.lock(wanted.hits)
        locked = {expert: cache.slot_of(expert) for expert in wanted.hits}
        for expert in wanted.misses:
            if cache.is_arriving(expert):
                prefetch.claim(expert)
            else:
                while (admission := cache.admit(expert)) is None:
                    assert prefetch.make_room()
                prefetch.evicted(admission.evicted)
            cache.lock([expert])
            locked[expert] = cache.slot_of(expert)
        prefetch.request(1 - layer, rng.sample(range(8), 3))
        assert locked == {expert: cache.slot_of(expert) for expert in locked}, "a guess took a slot in use"
        for expert in wanted.misses:
            cache.arrived(expert)
        cache.unlock(locked)
        bench.check()
        ended = sum(sum(v for k, v in bench.outcomes(i).items() if k != "issued") for i in range(2))
        issued = sum(bench.outcomes(i).get("issued", 0) for i in range(2))
        assert issued == ended + len(prefetch._flying) + len(prefetch._unused)
    prefetch.drain()
    cache.check_integrity(idle=True)
    assert all(sum(bench.outcomes(i).get(k, 0) for i in range(2)) for k in ("useful", "late", "wasted", "cancelled"))


def test_the_null_twin_never_reads_ahead():
    nothing = NoPrefetch()
    nothing.request(1, [0])
    nothing.settle(1, {0})
    nothing.evicted(E(0))
    nothing.drain()
    assert nothing.first_uses([E(0)]) == 0 and not nothing.make_room()
    with pytest.raises(AssertionError, match="never prefetched"):
        nothing.claim(E(0))
