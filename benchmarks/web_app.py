"""The tickets application as `benchmarks.web` has it served, with what WAY names behind its endpoints.

"batched" is the application as it is. The others have something else in the place of its processor: nothing at all, or
a transaction for each request, on a pool of POOL connections, first come, first served.
"""

from __future__ import annotations

import os
import time
from statistics import median
from typing import TYPE_CHECKING, Any, cast

from benchmarks.ways import Pool
from examples.tickets.domain import NotTheHolder, SeatTaken, Ticket, Train
from examples.tickets.settings import Settings
from examples.tickets.web import Tickets, create_app

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import psycopg

    from geventbatch import BatchMetric, Processor


class Nothing:
    """In the place of a processor: a ticket for everybody."""

    def run(self, train: str, operation: Any, seat: int, passenger: str, *, idempotency_key: str | None) -> Ticket:
        """Give it at once."""
        del operation, idempotency_key
        return Ticket(train, seat, passenger)

    def subscribe_batch_metrics(self) -> Iterator[BatchMetric]:
        """Give none: there are no batches."""
        return iter(())


class PerRequest(Nothing):
    """A transaction each, on the row of the train: its seats are an array."""

    def __init__(self) -> None:
        url = Settings.from_environment().database_url
        self._pool = Pool(url, int(os.environ["POOL"]))

    def run(self, train: str, operation: Any, seat: int, passenger: str, *, idempotency_key: str | None) -> Ticket:
        """Take a connection, and do it there."""
        del idempotency_key
        connection = self._pool.take()
        try:
            if operation is Train.book:
                self.change(connection, train, seat, None, passenger, SeatTaken)
            else:
                self.change(connection, train, seat, passenger, None, NotTheHolder)
        finally:
            self._pool.give(connection)
        return Ticket(train, seat, passenger)

    def change(
        self,
        connection: psycopg.Connection[Any],
        train: str,
        seat: int,
        before: str | None,
        after: str | None,
        refused: type[Exception],
    ) -> None:
        """Have another holder of the seat."""
        raise NotImplementedError


class RowLock(PerRequest):
    """Lock the row, look, write, commit."""

    def change(
        self,
        connection: psycopg.Connection[Any],
        train: str,
        seat: int,
        before: str | None,
        after: str | None,
        refused: type[Exception],
    ) -> None:
        """See `PerRequest`."""
        with connection.transaction():
            row = connection.execute("SELECT seats[%s] FROM trains WHERE name = %s FOR UPDATE", (seat, train))
            if row.fetchall() != [(before,)]:
                raise refused(f"seat {seat} of {train}")
            connection.execute(
                "UPDATE trains SET seats[%s] = %s, changes = changes + 1 WHERE name = %s", (seat, after, train)
            )


class AtomicUpdate(PerRequest):
    """Say it all in one statement."""

    def change(
        self,
        connection: psycopg.Connection[Any],
        train: str,
        seat: int,
        before: str | None,
        after: str | None,
        refused: type[Exception],
    ) -> None:
        """See `PerRequest`."""
        written = connection.execute(
            "UPDATE trains SET seats[%s] = %s, changes = changes + 1 "
            "WHERE name = %s AND seats[%s] IS NOT DISTINCT FROM %s",
            (seat, after, train, seat, before),
        )
        if not written.rowcount:
            raise refused(f"seat {seat} of {train}")


class Measured(Tickets):
    """What the views share, and what its batches took."""

    def __init__(self, tickets: Tickets) -> None:
        super().__init__(**vars(tickets))
        # -- mutable state ---------------------------------------------------------------------------------
        self._operations: list[int] = []
        self._taken: list[float] = []

    def count(self) -> None:
        """See `Tickets`."""
        for metric in self.processor.subscribe_batch_metrics():
            self._operations.append(metric.operation_count)
            self._taken.append(metric.load_duration + metric.save_duration)

    def measured(self) -> dict[str, float]:
        """Give, since the last call, the medians of a batch: operations, and seconds of load and save. And CPU seconds."""
        found = {
            "operations": median(self._operations or [1]),
            "load_and_save": median(self._taken or [0.0]),
            "cpu": time.process_time(),
        }
        self._operations.clear()
        self._taken.clear()
        return found


BEHIND: dict[str, Callable[[], Nothing]] = {"nothing": Nothing, "row lock": RowLock, "atomic UPDATE": AtomicUpdate}

app = create_app(Settings.from_environment())
tickets = Measured(app.extensions["tickets"])
if os.environ["WAY"] in BEHIND:
    tickets.processor = cast("Processor[Train]", BEHIND[os.environ["WAY"]]())
app.extensions["tickets"] = tickets
app.add_url_rule("/measured", view_func=tickets.measured)
