"""The tickets application as `benchmarks.web` has it served, with what WAY names behind its endpoints.

"batched" is the application as it is, "default gc" the same with Python's own settings of the garbage collector. The
others have something else in the place of its processor: nothing at all, a mere wait, or a transaction for each
request, on a pool of POOL connections, first come, first served.
"""

from __future__ import annotations

import os
import time
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import gevent
from gevent.event import AsyncResult

from benchmarks.ways import Pool
from examples.tickets.domain import NotTheHolder, SeatTaken, Ticket, Train
from examples.tickets.settings import Settings
from examples.tickets.web import Tickets, create_app

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import psycopg

    from geventbatch import BatchMetric, Processor


WAIT = 0.002
"""Seconds, of those who only wait."""


class Nothing:
    """In the place of a processor: a ticket for everybody."""

    def run(self, train: str, operation: Any, seat: int, passenger: str, *, idempotency_key: str | None) -> Ticket:
        """Give it at once."""
        del operation, idempotency_key
        return Ticket(train, seat, passenger)

    def subscribe_batch_metrics(self) -> Iterator[BatchMetric]:
        """Give none: there are no batches."""
        return iter(())


class Waits(Nothing):
    """Every request waits, and nothing else happens: what greenlets cost that wait, whatever they wait for."""

    def __init__(self) -> None:
        # -- mutable state ---------------------------------------------------------------------------------
        self._next: AsyncResult[None] = AsyncResult()
        gevent.spawn(self._work)

    def run(self, train: str, operation: Any, seat: int, passenger: str, *, idempotency_key: str | None) -> Ticket:
        """Wait with all who have come since the last were let go."""
        self._next.wait()
        return super().run(train, operation, seat, passenger, idempotency_key=idempotency_key)

    def _work(self) -> None:
        while True:
            gevent.sleep(WAIT)
            shared, self._next = self._next, AsyncResult()
            shared.set()


class Change(NamedTuple):
    """A seat that has another holder."""

    train: str
    seat: int
    before: str | None
    after: str | None


class PerRequest(Nothing):
    """A transaction each, on the row of the train: its seats are an array."""

    def __init__(self) -> None:
        url = Settings.from_environment().database_url
        self._pool = Pool(url, int(os.environ["POOL"]))

    def run(self, train: str, operation: Any, seat: int, passenger: str, *, idempotency_key: str | None) -> Ticket:
        """Take a connection, and do it there."""
        books = operation is Train.book
        change = Change(train, seat, None, passenger) if books else Change(train, seat, passenger, None)
        connection = self._pool.take()
        try:
            saved = self.save(connection, change)
        finally:
            self._pool.give(connection)
        if not saved:
            raise (SeatTaken if books else NotTheHolder)(f"seat {seat} of {train}")
        return super().run(train, operation, seat, passenger, idempotency_key=idempotency_key)

    def save(self, connection: psycopg.Connection[Any], change: Change) -> bool:
        """Save it, unless the seat has another holder than it should have before."""
        raise NotImplementedError


class RowLock(PerRequest):
    """Lock the row, look, write, commit."""

    def save(self, connection: psycopg.Connection[Any], change: Change) -> bool:
        """See `PerRequest`."""
        with connection.transaction():
            found = connection.execute(
                "SELECT seats[%s] FROM trains WHERE name = %s FOR UPDATE", (change.seat, change.train)
            ).fetchall()
            if found != [(change.before,)]:
                return False
            connection.execute(
                "UPDATE trains SET seats[%s] = %s, changes = changes + 1 WHERE name = %s",
                (change.seat, change.after, change.train),
            )
        return True


class AtomicUpdate(PerRequest):
    """Say it all in one statement."""

    def save(self, connection: psycopg.Connection[Any], change: Change) -> bool:
        """See `PerRequest`."""
        written = connection.execute(
            "UPDATE trains SET seats[%s] = %s, changes = changes + 1 "
            "WHERE name = %s AND seats[%s] IS NOT DISTINCT FROM %s",
            (change.seat, change.after, change.train, change.seat, change.before),
        )
        return bool(written.rowcount)


class Measured(Tickets):
    """What the views share, and what its batches took."""

    def __init__(self, tickets: Tickets) -> None:
        super().__init__(**vars(tickets))
        # -- mutable state ---------------------------------------------------------------------------------
        self._operations: list[int] = []
        self._taken: list[float] = []
        self._counts = False

    def _count(self) -> None:
        for metric in self.processor.subscribe_batch_metrics():
            self._operations.append(metric.operation_count)
            self._taken.append(metric.load_duration + metric.save_duration)

    def measured(self) -> dict[str, float]:
        """Give the medians of the batches since the last call, operations and seconds; and the CPU seconds so far.

        The first call begins to count: a greenlet of the parent would not outlive its fork.
        """
        if not self._counts:
            self._counts = True
            gevent.spawn(self._count)
        found = {
            "operations": median(self._operations or [0]),
            "load_and_save": median(self._taken or [0.0]),
            "cpu": time.process_time(),
        }
        self._operations.clear()
        self._taken.clear()
        return found


BEHIND: dict[str, Callable[[], Nothing]] = {
    "nothing": Nothing,
    "only a wait": Waits,
    "row lock": RowLock,
    "atomic UPDATE": AtomicUpdate,
}

app = create_app(Settings.from_environment())
tickets = Measured(app.extensions["tickets"])
if os.environ["WAY"] in BEHIND:
    tickets.processor = cast("Processor[Train]", BEHIND[os.environ["WAY"]]())
app.extensions["tickets"] = tickets
app.add_url_rule("/measured", view_func=tickets.measured)
