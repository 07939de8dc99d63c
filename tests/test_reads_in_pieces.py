"""Guesses at large records: they give way between two pieces, go on where they stopped, and end when they are wrong."""

from __future__ import annotations

import random
import sys
import threading
from queue import SimpleQueue

import pytest
from pocketmoe.cache.expert import ExpertId
from pocketmoe.cache.stats import RunStats
from pocketmoe.offload.transfer import ThreadedTransfers, Urgency

PIECE, RECORD = 16, 40
PATIENCE = 30  # seconds after which a test that hangs fails instead
DEMAND, AHEAD, IDLE, FILL = Urgency
A, B, C = (ExpertId(0, index) for index in range(3))
FIRST, SECOND, LAST = (0, 16), (16, 32), (32, 40)
WHOLE = (0, 40)


class SteppedReader:
    """Each piece begins when it is asked for, and ends when the test says so."""

    record_bytes = RECORD

    def __init__(self):
        self.begun = SimpleQueue()
        self.steps = {expert: threading.Semaphore(0) for expert in (A, B, C)}

    def read_into(self, expert, view, start, stop):
        self.begun.put((expert, (start, stop)))
        assert self.steps[expert].acquire(timeout=PATIENCE)
        view[start:stop] = content(expert)[start:stop]

    def next(self):
        return self.begun.get(timeout=PATIENCE)

    def step(self, expert, times=1):
        self.steps[expert].release(times)


def content(expert) -> bytes:
    return bytes(100 * expert.index + i for i in range(RECORD))


def view() -> memoryview:
    return memoryview(bytearray(RECORD))


@pytest.fixture
def reader():
    return SteppedReader()


@pytest.fixture
def stats():
    return RunStats(1, RECORD)


@pytest.fixture
def start(reader, stats):
    """Makes transfers that begin to read A, as urgent as is said: (transfers, A's ticket)."""
    made = []

    def start(urgency=AHEAD, readers=1):
        made.append(ThreadedTransfers(reader, stats, readers, piece_bytes=PIECE))
        ticket = made[-1].fetch(A, view(), urgency)
        assert reader.next() == (A, FIRST)
        return made[-1], ticket

    yield start
    for expert in reader.steps:
        reader.step(expert, 100)
    for transfers in made:
        transfers.close()
    stats.check()


def finish(transfers, *tickets):
    while not all(ticket.done for ticket in tickets):
        transfers.wait_any([ticket for ticket in tickets if not ticket.done])


@pytest.mark.parametrize("urgency", [AHEAD, IDLE, FILL])
def test_demand_is_read_whole_between_two_pieces_of_a_guess_which_then_goes_on_where_it_stopped(
    reader, start, stats, urgency
):
    transfers, guess = start(urgency)
    demand = transfers.fetch(B, view(), DEMAND)
    reader.step(A)
    for expert, span in ((B, WHOLE), (A, SECOND), (A, LAST)):
        assert reader.next() == (expert, span)
        reader.step(expert)
    finish(transfers, guess, demand)
    assert (bytes(guess.view), bytes(demand.view)) == (content(A), content(B))
    counters = stats.per_layer[0]
    assert (counters.demand_reads, counters.prefetch_reads, counters.bytes_read) == (1, 1, 2 * RECORD)
    assert stats.dropped_bytes == 0


def test_a_likely_guess_overtakes_one_for_an_idle_disk(reader, start):
    transfers, idle = start(IDLE)
    guess = transfers.fetch(B, view(), AHEAD)
    reader.step(A)
    assert reader.next() == (B, FIRST) and not guess.done
    reader.step(B, 3)
    reader.step(A, 2)
    finish(transfers, idle)
    assert [reader.next() for _ in range(4)] == [(B, SECOND), (B, LAST), (A, SECOND), (A, LAST)]


def test_guesses_are_read_one_after_the_other_even_if_a_reader_is_free(reader, start):
    transfers, guess = start(readers=2)
    transfers.fetch(B, view(), AHEAD)
    while not transfers._work._waiters:  # the other reader has nothing to do
        assert reader.begun.empty()
    reader.step(A, 3)
    finish(transfers, guess)
    assert [reader.next() for _ in range(3)] == [(A, SECOND), (A, LAST), (B, FIRST)]


def test_a_guess_does_not_go_on_beside_demand_even_if_a_reader_is_free(reader, start):
    transfers, guess = start(readers=2)
    demand = transfers.fetch(B, view(), DEMAND)
    assert reader.next() == (B, WHOLE)
    reader.step(A)
    while not transfers._work._waiters:  # A's reader has nothing to do
        assert reader.begun.empty()
    reader.step(B)
    assert reader.next() == (A, SECOND)
    reader.step(A, 2)
    finish(transfers, guess, demand)


def test_a_guess_that_is_promoted_in_mid_read_goes_on_from_there_to_its_end(reader, start, stats):
    transfers, guess = start()
    other = transfers.fetch(B, view(), DEMAND)
    transfers.promote(guess)
    reader.step(A, 2)
    assert reader.next() == (A, (PIECE, RECORD))
    finish(transfers, guess)
    assert bytes(guess.view) == content(A) and not other.done
    assert (stats.per_layer[0].demand_reads, stats.per_layer[0].prefetch_reads) == (0, 1)


def test_a_guess_that_is_cancelled_in_mid_read_ends_with_its_piece_and_its_bytes_are_counted(reader, start, stats):
    transfers, guess = start()
    assert not transfers.cancel(guess) and not guess.done, "its memory is being written into"
    reader.step(A)
    assert transfers.wait_any([guess]) == [guess] and guess.cancelled and transfers.cancel(guess)
    reader.step(B)
    finish(transfers, transfers.fetch(B, view(), DEMAND))
    assert reader.next() == (B, WHOLE), "no more of A"
    counters = stats.per_layer[0]
    assert (counters.prefetch_reads, counters.bytes_read, stats.dropped_bytes) == (0, PIECE + RECORD, PIECE)


def test_a_guess_that_was_overtaken_is_cancelled_at_once(reader, start):
    transfers, guess = start()
    transfers.fetch(B, view(), DEMAND)
    reader.step(A)
    assert reader.next() == (B, WHOLE)
    assert transfers.cancel(guess) and guess.done and guess.read == PIECE


@pytest.mark.parametrize("ended", [False, True])
def test_a_guess_that_was_cancelled_and_is_demanded_after_all_is_read_to_its_end(reader, start, stats, ended):
    transfers, guess = start()
    transfers.cancel(guess)
    if ended:
        reader.step(A)
        finish(transfers, guess)
    transfers.promote(guess)
    reader.step(A, 2)
    finish(transfers, guess)
    assert bytes(guess.view) == content(A) and not guess.cancelled
    assert stats.per_layer[0].bytes_read == RECORD and stats.dropped_bytes == 0


def test_the_last_piece_is_read_whether_the_guess_is_cancelled_or_not(reader, start):
    transfers, guess = start()
    reader.step(A, 2)
    assert [reader.next(), reader.next()] == [(A, SECOND), (A, LAST)]
    assert not transfers.cancel(guess)
    reader.step(A)
    finish(transfers, guess)
    assert not guess.cancelled and not transfers.cancel(guess) and bytes(guess.view) == content(A)


def test_draining_waits_for_one_piece_and_not_for_the_record(reader, start):
    transfers, guess = start()
    waiting = transfers.fetch(B, view(), DEMAND)
    draining = threading.Thread(target=transfers.drain)
    draining.start()
    while not waiting.done:
        assert draining.is_alive()
    reader.step(A)
    draining.join(PATIENCE)
    assert not draining.is_alive() and guess.cancelled and waiting.cancelled and reader.begun.empty()


def test_a_piece_that_fails_ends_the_read_and_the_pieces_before_it_are_counted(stats):
    class Failing:
        record_bytes = RECORD

        def read_into(self, expert, view, start, stop):
            if start:
                raise OSError("broken")

    transfers = ThreadedTransfers(Failing(), stats, readers=1, piece_bytes=PIECE)
    guess = transfers.fetch(A, view(), AHEAD)
    with pytest.raises(OSError, match="broken"):
        transfers.wait_any([guess])
    transfers.close()
    assert (stats.per_layer[0].bytes_read, stats.dropped_bytes) == (PIECE, PIECE)
    stats.check()


@pytest.fixture
def hasty():
    """Threads take turns so often that each of them is seen in the middle of everything."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_asked_for_promoted_and_cancelled_nothing_is_lost_or_written_late(stats, hasty, seed):
    class Reader:
        record_bytes = RECORD
        steps = threading.Semaphore(0)

        def read_into(self, expert, view, start, stop):
            assert self.steps.acquire(timeout=PATIENCE)
            view[start:stop] = content(expert)[start:stop]

    rng, reader, tickets, given_up = random.Random(seed), Reader(), [], set()
    transfers = ThreadedTransfers(reader, stats, 3, 2, PIECE)
    for _ in range(600):
        if rng.random() < 0.7:
            reader.steps.release()
            while reader.steps._value and transfers._running:
                pass
        ticket = rng.choice(tickets[-8:]) if tickets and rng.random() < 0.6 else None
        if ticket is None:
            tickets.append(
                transfers.fetch(rng.choice([A, B, C]), view(), rng.choice([DEMAND, AHEAD, AHEAD, AHEAD, IDLE, FILL]))
            )
        elif ticket in given_up:
            continue
        elif rng.random() < 0.2:
            transfers.promote(ticket)
        elif transfers.cancel(ticket):
            given_up.add(ticket)
            ticket.view[:] = bytes(RECORD)
        if rng.random() < 0.02:
            reader.steps.release(1000)
            transfers.drain()
            while reader.steps.acquire(blocking=False):
                pass
            assert all(ticket.done and not ticket.running for ticket in tickets)
    reader.steps.release(1000)
    finish(transfers, *tickets)
    transfers.close()
    for ticket in tickets:
        assert ticket.cancelled == (ticket.read < RECORD)
        read = 0 if ticket in given_up else ticket.read
        assert bytes(ticket.view) == content(ticket.expert)[:read] + bytes(RECORD - read)
    assert stats.total("bytes_read") == sum(ticket.read for ticket in tickets)
    assert stats.dropped_bytes == sum(ticket.read for ticket in tickets if ticket.read < RECORD) > 0
    stats.check()
