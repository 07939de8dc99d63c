"""Reads in flight: tickets, urgencies, cancel. Threads fill slots from the store while the caller computes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from enum import IntEnum
from typing import Protocol

from ..cache.expert import ExpertId


class Reader(Protocol):
    """What brings a record into memory; an `ExpertStore`, or a fake in tests."""

    record_bytes: int

    def read_into(self, expert: ExpertId, view: memoryview) -> None: ...


class ReadObserver(Protocol):
    """Who counts reads; called from the reading threads. `RunStats` is one."""

    def read_started(self) -> None: ...

    def read_finished(self, layer: int, nbytes: int, prefetch: bool = False) -> None: ...

    def read_failed(self) -> None: ...


class Urgency(IntEnum):
    """Why a record is read. Lower numbers go first."""

    DEMAND = 0
    """It is waited for."""
    AHEAD = 1
    """A guess: it will probably be waited for."""
    IDLE = 2
    """A poor guess: begins only while nothing else is read, one at a time."""
    FILL = 3
    """For a free slot. As idle reads, but they are many and none of them is wanted soon."""


class Ticket:
    """One read. `done` becomes true when the bytes are there or `error` says why not."""

    __slots__ = ("ahead", "cancelled", "done", "error", "expert", "started", "urgency", "view")

    def __init__(self, expert: ExpertId, view: memoryview, urgency: Urgency) -> None:
        self.expert, self.view, self.urgency = expert, view, urgency
        self.ahead = urgency is not Urgency.DEMAND  # began as a guess, even if it is waited for by now
        self.started = self.done = self.cancelled = False
        self.error: BaseException | None = None


class Transfers(Protocol):
    """The contract that `ThreadedTransfers` and its synchronous twin share."""

    def fetch(self, expert: ExpertId, view: memoryview, urgency: Urgency) -> Ticket:
        """Start to read a record into `view`, behind the reads that are more urgent or as urgent and older."""
        ...

    def promote(self, ticket: Ticket) -> None:
        """A prefetch is now waited for."""
        ...

    def cancel(self, ticket: Ticket) -> bool:
        """Drop a read that has not begun; returns whether it was dropped."""
        ...

    def wait_any(self, tickets: Iterable[Ticket]) -> list[Ticket]:
        """Wait until at least one of these reads is done; returns all that are. Raises what a read raised."""
        ...

    def drain(self) -> None:
        """Drop what has not begun and wait for the rest, whoever asked for it."""
        ...

    def close(self) -> None:
        """`drain`, and be ready for nothing more."""
        ...


class ThreadedTransfers:
    """`readers` threads, each with one blocking read at a time: the queue depth that the disk sees.

    Args:
        ahead: most guesses that are read at the same time: enough to keep the disk busy while there is no demand, few
            enough that demand does not have to wait for many, and that the others can still be cancelled.
    """

    def __init__(self, reader: Reader, observer: ReadObserver, readers: int = 4, ahead: int = 2) -> None:
        self._reader, self._observer = reader, observer
        self._most_ahead, self._running_ahead = ahead, 0
        self._running_demand = 0
        self._queues: list[deque[Ticket]] = [deque() for _ in Urgency]
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
            if ticket.urgency is not Urgency.DEMAND and not ticket.started and not ticket.cancelled:
                self._queues[ticket.urgency].remove(ticket)
                ticket.urgency = Urgency.DEMAND
                self._queues[Urgency.DEMAND].append(ticket)
                self._work.notify_all()  # guesses may have left readers idle

    def cancel(self, ticket: Ticket) -> bool:
        with self._lock:
            if ticket.started or ticket.cancelled:
                return False
            self._queues[ticket.urgency].remove(ticket)
            ticket.cancelled = True
            return True

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
            self._drop_waiting()
            while self._running_ahead or self._running_demand:
                self._finished.wait()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._drop_waiting()
            self._work.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                while (ticket := self._next()) is None:
                    if self._closed:
                        return
                    self._work.wait()
                ticket.started = True
                guessed = ticket.urgency is not Urgency.DEMAND
                self._running_ahead += guessed
                self._running_demand += not guessed
            _read(self._reader, self._observer, ticket)
            with self._lock:
                ticket.done = True
                self._running_ahead -= guessed
                self._running_demand -= not guessed
                self._finished.notify_all()
                if (guessed and self._queues[Urgency.AHEAD]) or any(self._queues[Urgency.IDLE :]):
                    self._work.notify_all()

    def _next(self) -> Ticket | None:
        urgency = next((urgency for urgency in Urgency if self._queues[urgency]), None)
        if urgency is None or not self._may_begin(urgency):
            return None
        return self._queues[urgency].popleft()

    def _may_begin(self, urgency: Urgency) -> bool:
        if urgency is Urgency.DEMAND:
            return True
        if urgency is Urgency.AHEAD:
            return self._running_ahead < self._most_ahead
        return not self._running_demand and not self._running_ahead

    def _drop_waiting(self) -> None:
        for queue in self._queues:
            for ticket in queue:
                ticket.cancelled = True
            queue.clear()


def _read(reader: Reader, observer: ReadObserver, ticket: Ticket) -> None:
    observer.read_started()
    try:
        reader.read_into(ticket.expert, ticket.view)
    except BaseException as error:  # handed to whoever waits
        observer.read_failed()
        ticket.error = error
    else:
        observer.read_finished(ticket.expert.layer, reader.record_bytes, prefetch=ticket.ahead)


class SyncTransfers:
    """The plain twin: every read is over when `fetch` returns. For tests and for comparing."""

    def __init__(self, reader: Reader, observer: ReadObserver) -> None:
        self._reader, self._observer = reader, observer

    def fetch(self, expert: ExpertId, view: memoryview, urgency: Urgency) -> Ticket:
        ticket = Ticket(expert, view, urgency)
        ticket.started = True
        _read(self._reader, self._observer, ticket)
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
