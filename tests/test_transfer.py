"""Reads in flight: who goes first, what can be withdrawn, and where errors end up."""

from __future__ import annotations

import threading

import pytest
from pocketmoe.cache.expert import ExpertId
from pocketmoe.cache.stats import RunStats
from pocketmoe.offload.transfer import SyncTransfers, ThreadedTransfers, Urgency

RECORD = 64
PATIENCE = 30  # seconds after which a test that hangs fails instead
DEMAND, AHEAD, IDLE, FILL = Urgency
A, B, C, D = (ExpertId(0, index) for index in range(4))


class FakeReader:
    """Fills a record with its expert's number. Reads of `gated` experts wait for `gate`; `failing` ones raise."""

    record_bytes = RECORD

    def __init__(self, gated=(), failing=()):
        self.gated, self.failing = set(gated), dict(failing)
        self.gate, self.entered, self.order = threading.Event(), threading.Event(), []

    def read_into(self, expert, view, start, stop):
        self.order.append(expert)
        if expert in self.gated:
            self.entered.set()
            assert self.gate.wait(PATIENCE)
        if expert in self.failing:
            raise self.failing[expert]
        view[start:stop] = bytes([expert.index + 1]) * (stop - start)


def view() -> memoryview:
    return memoryview(bytearray(RECORD))


def filled(expert) -> bytes:
    return bytes([expert.index + 1]) * RECORD


@pytest.fixture
def stats():
    return RunStats(1, RECORD)


@pytest.fixture
def threaded(stats):
    """Makes ThreadedTransfers and closes them, opening their reader's gate first."""
    made = []

    def threaded(reader, readers=1):
        made.append((reader, ThreadedTransfers(reader, stats, readers)))
        return made[-1][1]

    yield threaded
    for reader, transfers in made:
        reader.gate.set()
        transfers.close()
    stats.check()


@pytest.fixture
def busy(threaded):
    """One reader, held up by D: (reader, transfers, D's ticket)."""
    reader = FakeReader(gated=[D])
    transfers = threaded(reader)
    ticket = transfers.fetch(D, view(), DEMAND)
    assert reader.entered.wait(PATIENCE)
    return reader, transfers, ticket


def finish(transfers, *tickets):
    waiting = list(tickets)
    while waiting:
        done = transfers.wait_any(waiting)
        assert done
        waiting = [ticket for ticket in waiting if ticket not in done]


# The contract that both kinds keep


@pytest.fixture(params=["sync", "one thread", "four threads"])
def make(request, stats, threaded):
    if request.param == "sync":
        return lambda reader: SyncTransfers(reader, stats)
    return lambda reader: threaded(reader, 1 if request.param == "one thread" else 4)


@pytest.mark.parametrize("urgency", [DEMAND, AHEAD])
def test_each_record_lands_in_the_view_it_was_asked_for(make, stats, urgency):
    transfers = make(FakeReader())
    tickets = [transfers.fetch(expert, view(), urgency) for expert in (A, B, C, D)]
    finish(transfers, *tickets)
    for ticket in tickets:
        assert bytes(ticket.view) == filled(ticket.expert) and ticket.done and ticket.error is None
    counters = stats.per_layer[0]
    assert (counters.demand_reads, counters.prefetch_reads) == ((4, 0) if urgency is DEMAND else (0, 4))
    assert counters.bytes_read == 4 * RECORD


@pytest.mark.parametrize("error", [OSError("broken"), KeyError("odd"), SystemExit()], ids=repr)
def test_an_error_reaches_who_waits_for_that_read_and_nobody_else(make, stats, error):
    transfers = make(FakeReader(failing={B: error}))
    good, bad = transfers.fetch(A, view(), DEMAND), transfers.fetch(B, view(), DEMAND)
    finish(transfers, good)
    with pytest.raises(type(error)) as caught:
        finish(transfers, bad)
    assert caught.value is error and bad.done and bad.error is error
    after = transfers.fetch(C, view(), DEMAND)  # reading goes on
    finish(transfers, after)
    assert bytes(after.view) == filled(C)
    assert stats.per_layer[0].bytes_read == 2 * RECORD


def test_waiting_returns_every_read_that_is_done(make):
    transfers = make(FakeReader())
    tickets = [transfers.fetch(expert, view(), DEMAND) for expert in (A, B)]
    for ticket in tickets:
        finish(transfers, ticket)
    assert transfers.wait_any(iter(tickets)) == tickets


def test_a_read_that_is_done_can_be_promoted_and_not_cancelled(make):
    transfers = make(FakeReader())
    ticket = transfers.fetch(A, view(), AHEAD)
    finish(transfers, ticket)
    transfers.promote(ticket)
    assert not transfers.cancel(ticket) and not ticket.cancelled
    assert bytes(ticket.view) == filled(A)


def test_a_guess_counts_as_prefetch_even_when_it_is_waited_for(make, stats):
    transfers = make(FakeReader())
    ticket = transfers.fetch(A, view(), AHEAD)
    transfers.promote(ticket)
    finish(transfers, ticket)
    assert (stats.per_layer[0].demand_reads, stats.per_layer[0].prefetch_reads) == (0, 1)


def test_closing_twice_is_harmless(make):
    transfers = make(FakeReader())
    finish(transfers, transfers.fetch(A, view(), DEMAND))
    transfers.close()
    transfers.close()


# What only threads have


def test_demand_reads_go_before_prefetches_and_each_kind_in_its_order(busy):
    reader, transfers, blocked = busy
    ahead = [transfers.fetch(expert, view(), AHEAD) for expert in (A, B)]
    demand = transfers.fetch(C, view(), DEMAND)
    reader.gate.set()
    finish(transfers, blocked, demand, *ahead)
    assert reader.order == [D, C, A, B]


def test_a_promoted_prefetch_joins_the_demand_reads(busy):
    reader, transfers, blocked = busy
    first, second = (transfers.fetch(expert, view(), AHEAD) for expert in (A, B))
    demand = transfers.fetch(C, view(), DEMAND)
    transfers.promote(second)
    transfers.promote(second)
    reader.gate.set()
    finish(transfers, blocked, first, second, demand)
    assert reader.order == [D, C, B, A]
    assert second.urgency is DEMAND and first.urgency is AHEAD


def test_a_read_can_be_cancelled_until_it_begins(busy):
    reader, transfers, blocked = busy
    guess, promoted = (transfers.fetch(expert, view(), AHEAD) for expert in (A, B))
    demand = transfers.fetch(C, view(), DEMAND)
    transfers.promote(promoted)
    for ticket in (guess, promoted):
        assert transfers.cancel(ticket) and ticket.cancelled
        assert transfers.cancel(ticket), "it still is"
    assert not transfers.cancel(blocked)
    reader.gate.set()
    finish(transfers, blocked, demand)
    assert reader.order == [D, C] and bytes(guess.view) == bytes(RECORD)


def test_waiting_returns_as_soon_as_one_read_is_done(threaded):
    reader = FakeReader(gated=[A])
    transfers = threaded(reader, readers=2)
    slow, quick = transfers.fetch(A, view(), DEMAND), transfers.fetch(B, view(), DEMAND)
    assert transfers.wait_any([slow, quick]) == [quick] and not slow.done


def test_several_readers_are_in_the_disk_at_the_same_time(threaded):
    class Together(FakeReader):
        meeting = threading.Barrier(4, timeout=PATIENCE)

        def read_into(self, expert, view, start, stop):
            self.meeting.wait()  # passes only when four reads are under way at once
            super().read_into(expert, view, start, stop)

    transfers = threaded(Together(), readers=4)
    finish(transfers, *(transfers.fetch(expert, view(), DEMAND) for expert in (A, B, C, D)))


def test_few_guesses_are_read_at_a_time_however_many_readers_are_idle(threaded):
    reader = FakeReader(gated=[A, B, C])
    transfers = threaded(reader, readers=4)
    guesses = [transfers.fetch(expert, view(), AHEAD) for expert in (A, B, C)]
    finish(transfers, transfers.fetch(D, view(), DEMAND))  # by a reader that guesses have left idle
    assert not guesses[2].running and transfers.cancel(guesses[2])
    reader.gate.set()
    finish(transfers, *guesses[:2])
    last = transfers.fetch(C, view(), AHEAD)
    finish(transfers, last)


def test_draining_drops_what_has_not_begun_waits_for_the_rest_and_goes_on_afterwards(busy):
    reader, transfers, blocked = busy
    queued = [transfers.fetch(A, view(), DEMAND), transfers.fetch(B, view(), AHEAD), transfers.fetch(C, view(), AHEAD)]
    draining = threading.Thread(target=transfers.drain)
    draining.start()
    while not all(ticket.cancelled for ticket in queued):
        assert draining.is_alive()
    assert not blocked.done and draining.is_alive()
    reader.gate.set()
    draining.join(PATIENCE)
    assert not draining.is_alive() and blocked.done and reader.order == [D]
    finish(transfers, again := transfers.fetch(A, view(), DEMAND))
    assert bytes(again.view) == filled(A)


def test_closing_drops_what_has_not_begun_waits_for_the_rest_and_ends_the_threads(busy):
    reader, transfers, blocked = busy
    queued = [transfers.fetch(A, view(), DEMAND), transfers.fetch(B, view(), AHEAD)]
    closing = threading.Thread(target=transfers.close)
    closing.start()
    while not all(ticket.cancelled for ticket in queued):
        assert closing.is_alive()
    assert not blocked.done and closing.is_alive(), "a read under way writes into its slot: it is waited for"
    reader.gate.set()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert reader.order == [D] and bytes(blocked.view) == filled(D)
    assert not any(thread.name.startswith("reader-") and thread.is_alive() for thread in transfers._threads)


def test_asking_after_close_is_a_mistake_and_not_a_wait_for_ever(threaded):
    transfers = threaded(FakeReader())
    transfers.close()
    with pytest.raises(AssertionError, match="after close"):
        transfers.fetch(A, view(), DEMAND)


def test_idle_reads_begin_only_while_nothing_else_is_asked_for(busy):
    reader, transfers, ticket = busy
    idle = transfers.fetch(A, view(), IDLE)
    guess = transfers.fetch(B, view(), AHEAD)
    claimed = transfers.fetch(C, view(), IDLE)
    transfers.promote(claimed)
    reader.gate.set()
    finish(transfers, ticket, guess, idle, claimed)
    assert reader.order == [D, C, B, A]


def test_idle_guesses_do_not_wait_for_all_slots_to_be_filled(busy):
    reader, transfers, ticket = busy
    filling = [transfers.fetch(expert, view(), FILL) for expert in (A, B)]
    guess = transfers.fetch(C, view(), IDLE)
    reader.gate.set()
    finish(transfers, ticket, guess, *filling)
    assert reader.order == [D, C, A, B]


@pytest.mark.parametrize("urgency", [DEMAND, AHEAD])
def test_an_idle_read_does_not_begin_beside_another_one(threaded, urgency):
    reader = FakeReader(gated=[D])
    transfers = threaded(reader, readers=2)
    ticket = transfers.fetch(D, view(), urgency)
    assert reader.entered.wait(PATIENCE)
    idle = transfers.fetch(A, view(), IDLE)
    finish(transfers, transfers.fetch(B, view(), AHEAD))  # the other reader is awake, and takes this one
    assert not idle.running and transfers.cancel(idle)
    again = transfers.fetch(C, view(), IDLE)
    reader.gate.set()
    finish(transfers, ticket, again)


def test_a_waiter_that_an_interrupted_notify_left_behind_wakes_nobody_in_place_of_a_reader(threaded):
    transfers = threaded(FakeReader())
    while not transfers._work._waiters:  # the reader is about to wait
        pass
    with transfers._lock:
        stale = threading.Lock()
        stale.acquire()
        transfers._work._waiters.appendleft(stale)
    ticket = transfers.fetch(A, view(), DEMAND)
    waiting = threading.Thread(target=transfers.wait_any, args=([ticket],), daemon=True)
    waiting.start()
    waiting.join(1)
    assert ticket.done
