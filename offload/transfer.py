"""Reads in flight: tickets, urgencies, cancel. Threads fill slots from the store while the caller computes.

A guess at a large record is read in pieces: between two of them it gives way to what is more urgent, and ends if it has
turned out wrong.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Iterable
from contextlib import suppress
from enum import IntEnum
from typing import Protocol

from ..cache.expert import ExpertId


class Reader(Protocol):
    """What brings a record into memory; an `ExpertStore`, or a fake in tests."""

    record_bytes: int

    def read_into(self, expert: ExpertId, view: memoryview, start: int, stop: int) -> None:
        """Read bytes `start` to `stop` of a record into the same place of `view`. Pieces come in their order."""
        ...


class ReadObserver(Protocol):
    """Who counts reads; called from the reading threads. `RunStats` is one."""

    def read_started(self) -> None: ...

    def read_paused(self, layer: int, nbytes: int) -> None: ...

    def read_finished(self, layer: int, nbytes: int, prefetch: bool = False) -> None: ...

    def read_failed(self) -> None: ...


class Urgency(IntEnum):
    """Why a record is read. Lower numbers go first."""

    DEMAND = 0
    """It is waited for."""
    AHEAD = 1
    """A guess: it will probably be waited for."""
    IDLE = 2
    """A poor guess: read only while nothing else is, one at a time."""
    FILL = 3
    """For a free slot. As idle reads, but they are many and none of them is wanted soon."""


class Ticket:
    """One read. Once it is `done`, nothing is written into `view` any more: the bytes are there, or `error` says why
    not, or the read was `cancelled`.

    Attributes:
        ahead: it began as a guess, even if it is waited for by now.
        read: bytes that have arrived.
        running: a thread is reading right now.
        cancelled: dropped, or to be dropped after the piece that is being read.
    """

    __slots__ = ("ahead", "cancelled", "done", "error", "expert", "read", "running", "urgency", "view")

    def __init__(self, expert: ExpertId, view: memoryview, urgency: Urgency) -> None:
        self.expert, self.view, self.urgency = expert, view, urgency
        self.ahead = urgency is not Urgency.DEMAND
        self.read = 0
        self.running = self.done = self.cancelled = False
        self.error: BaseException | None = None


class Transfers(Protocol):
    """The contract that `ThreadedTransfers` and its synchronous twin share."""

    def fetch(self, expert: ExpertId, view: memoryview, urgency: Urgency) -> Ticket:
        """Start to read a record into `view`, behind the reads that are more urgent or as urgent and older."""
        ...

    def promote(self, ticket: Ticket) -> None:
        """A guess is now waited for. If it was cancelled, it is read after all."""
        ...

    def cancel(self, ticket: Ticket) -> bool:
        """Drop a read; returns whether it is dropped. If not, it is complete, or being read right now: then it is done
        after this piece, and cancelled unless that was the last one."""
        ...

    def wait_any(self, tickets: Iterable[Ticket]) -> list[Ticket]:
        """Wait until at least one of these reads is done; returns all that are. Raises what a read raised."""
        ...

    def drain(self) -> None:
        """Drop all reads, whoever asked for them, and wait for the pieces that are being read."""
        ...

    def close(self) -> None:
        """`drain`, and be ready for nothing more."""
        ...


class ThreadedTransfers:
    """`readers` threads, each with one blocking read at a time: the queue depth that the disk sees.

    Args:
        ahead: most guesses that are read at the same time: enough to keep the disk busy while there is no demand, few
            enough that demand does not have to wait for many, and that the others can still be cancelled.
        piece_bytes: most bytes of a guess that are read at once; a multiple of 4 KiB. Larger records keep the disk busy
            one by one, so guesses at them are read one at a time, and only while nothing else is.
    """

    def __init__(
        self, reader: Reader, observer: ReadObserver, readers: int = 4, ahead: int = 2, piece_bytes: int = 4 << 20
    ) -> None:
        self._reader, self._observer = reader, observer
        self._most_ahead, self._piece_bytes = ahead, piece_bytes
        self._queues: list[deque[Ticket]] = [deque() for _ in Urgency]
        self._running: dict[Ticket, Urgency] = {}
        """What is being read, and how urgent it was when this piece began."""
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # always `notify_all`: `notify` that a Ctrl-C cuts short leaves
        # the waiter that it has woken in the list, and the next one would take it for the reader it is to wake
        self._finished = threading.Condition(self._lock)
        self._closed = False
        self._threads = [threading.Thread(target=self._run, name=f"reader-{i}", daemon=True) for i in range(readers)]
        for thread in self._threads:
            thread.start()

    def fetch(self, expert: ExpertId, view: memoryview, urgency: Urgency) -> Ticket:
        ticket = Ticket(expert, view, urgency)
        with self._lock:
            assert not self._closed, f"{expert} is asked for after close"
            self._queues[urgency].append(ticket)
            self._work.notify_all()
        return ticket

    def promote(self, ticket: Ticket) -> None:
        with self._lock:
            if ticket.urgency is Urgency.DEMAND or (ticket.done and not ticket.cancelled):
                return
            before, ticket.urgency = ticket.urgency, Urgency.DEMAND
            if ticket.running:
                ticket.cancelled = False
                return
            if ticket.done:
                ticket.done = ticket.cancelled = False
            else:
                self._queues[before].remove(ticket)
            self._queues[Urgency.DEMAND].append(ticket)
            self._work.notify_all()  # guesses may have left readers idle

    def cancel(self, ticket: Ticket) -> bool:
        with self._lock:
            if ticket.running:
                ticket.cancelled = True
            elif not ticket.done:
                self._queues[ticket.urgency].remove(ticket)
                ticket.cancelled = ticket.done = True
            return ticket.done and ticket.cancelled

    def wait_any(self, tickets: Iterable[Ticket]) -> list[Ticket]:
        tickets = list(tickets)
        with self._lock:
            while not (ready := [ticket for ticket in tickets if ticket.done]):
                self._finished.wait()
        for ticket in ready:
            if ticket.error is not None:
                raise ticket.error
        return ready

    def drain(self) -> None:
        with self._lock:
            self._drop_all()
            while self._running:
                self._finished.wait()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._drop_all()
            self._work.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                while not (queue := self._next_queue()):
                    if self._closed:
                        return
                    self._work.wait()
                ticket = queue.popleft()
                ticket.running = True
                self._running[ticket] = ticket.urgency
                stop = self._reader.record_bytes
                if ticket.urgency is not Urgency.DEMAND:
                    stop = min(stop, ticket.read + self._piece_bytes)
            _read(self._reader, self._observer, ticket, stop)
            with self._lock:
                del self._running[ticket]
                ticket.running = False
                if ticket.error is not None or ticket.read == self._reader.record_bytes:
                    ticket.done, ticket.cancelled = True, False
                elif ticket.cancelled:
                    ticket.done = True
                else:
                    self._queues[ticket.urgency].appendleft(ticket)
                if ticket.done:
                    self._finished.notify_all()

    def _next_queue(self) -> deque[Ticket] | None:
        """Where the next read is to be taken from; None while none may begin."""
        for urgency in Urgency:
            if self._queues[urgency]:
                return self._queues[urgency] if self._may_begin(urgency) else None
        return None

    def _may_begin(self, urgency: Urgency) -> bool:
        running = self._running.values()
        if urgency is Urgency.DEMAND:
            return True
        if urgency is not Urgency.AHEAD or self._reader.record_bytes > self._piece_bytes:
            return not running
        return sum(other is not Urgency.DEMAND for other in running) < self._most_ahead

    def _drop_all(self) -> None:
        for ticket in self._running:
            ticket.cancelled = True
        for queue in self._queues:
            for ticket in queue:
                ticket.cancelled = ticket.done = True
            queue.clear()


def _read(reader: Reader, observer: ReadObserver, ticket: Ticket, stop: int) -> None:
    """Read on, up to byte `stop`."""
    layer, nbytes = ticket.expert.layer, stop - ticket.read
    observer.read_started()
    try:
        reader.read_into(ticket.expert, ticket.view, ticket.read, stop)
    except BaseException as error:  # handed to whoever waits
        observer.read_failed()
        ticket.error = error
        return
    ticket.read = stop
    if stop < reader.record_bytes:
        observer.read_paused(layer, nbytes)
    else:
        observer.read_finished(layer, nbytes, prefetch=ticket.ahead)


def finish_one(transfers: Transfers, guesses: Collection[Ticket]) -> None:
    """Wait until one of these reads is done, and have the others end with their pieces if none is yet."""
    if not any(ticket.done for ticket in guesses):
        for ticket in guesses:
            transfers.cancel(ticket)
    with suppress(Exception):  # a guess that failed: the demand read that follows meets the error itself
        transfers.wait_any(guesses)


class SyncTransfers:
    """The plain twin: every read is over when `fetch` returns. For tests and for comparing."""

    def __init__(self, reader: Reader, observer: ReadObserver) -> None:
        self._reader, self._observer = reader, observer

    def fetch(self, expert: ExpertId, view: memoryview, urgency: Urgency) -> Ticket:
        ticket = Ticket(expert, view, urgency)
        _read(self._reader, self._observer, ticket, self._reader.record_bytes)
        ticket.done = True
        return ticket

    def promote(self, ticket: Ticket) -> None:
        ticket.urgency = Urgency.DEMAND

    def cancel(self, ticket: Ticket) -> bool:
        return False

    def wait_any(self, tickets: Iterable[Ticket]) -> list[Ticket]:
        ready = [ticket for ticket in tickets if ticket.done]
        for ticket in ready:
            if ticket.error is not None:
                raise ticket.error
        return ready

    def drain(self) -> None:
        pass

    def close(self) -> None:
        pass
