"""The ways of changing a contended row that the benchmarks compare: what a request does by itself, and batches."""

from __future__ import annotations

import json
import statistics
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import gevent
import psycopg
import sqlalchemy as sa
from gevent.hub import Waiter

from geventbatch import Processor
from geventbatch.stores import Reuse, SQLAlchemyStore

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self


LIMIT: Final = 10**12
"""No counter gets there; an UPDATE asks all the same, as an application would."""

POOL: Final = 20
"""Connections of a process that batches, which uses one for each key."""


class Way:
    """Adds one to the counter of a key; a context manager."""

    table: str
    """Where the counters are."""

    replays = 0
    """What had to be done again so far."""

    inside: Sequence[float] = ()
    """Seconds of load and save of each batch so far, where it batches."""

    def __enter__(self) -> Self:
        """Connect."""
        return self

    def __exit__(self, *error: object) -> None:
        """Let the connections go."""

    def add(self, key: str) -> None:
        """Return when it is saved."""
        raise NotImplementedError

    def cancel_waiting(self) -> None:
        """Have those end that have not begun yet: thousands would take long."""


# -- each request by itself ---------------------------------------------------------------------------------


class Pool:
    """Connections: first come, first served.

    Args:
        url: Of the database.
        size: How many.
    """

    def __init__(self, url: str, size: int) -> None:
        """See the class."""
        self._connections = [self.connected(url) for _ in range(size)]
        # -- mutable state ---------------------------------------------------------------------------------
        self._free = list(self._connections)
        self._waiters: deque[tuple[Waiter[Any], Any]] = deque()  # while there are some, none is free

    def connected(self, url: str) -> Any:
        """Give a new one."""
        return psycopg.connect(url, autocommit=True)

    def take(self) -> psycopg.Connection[Any]:
        """Wait for one."""
        if self._free:
            free: psycopg.Connection[Any] = self._free.pop()
            return free
        waiter: Waiter[psycopg.Connection[Any]] = Waiter()
        self._waiters.append((waiter, gevent.getcurrent()))
        return waiter.get()

    def give(self, connection: psycopg.Connection[Any]) -> None:
        """Let the next one have it."""
        if self._waiters:  # handed over: whoever comes meanwhile stands behind
            gevent.get_hub().loop.run_callback(self._waiters.popleft()[0].switch, connection)
        else:
            self._free.append(connection)

    def kill_waiters(self) -> None:
        """Have nobody wait any more."""
        waiting = [greenlet for _, greenlet in self._waiters]
        self._waiters.clear()
        gevent.killall(waiting)

    def close(self) -> None:
        """Close them all."""
        for connection in self._connections:
            connection.close()


class PerRequest(Way):
    """A request takes a connection of a pool, and sends statements.

    Args:
        url: Of the database.
        pool: Its connections.
    """

    table = "counters"

    def __init__(self, url: str, pool: int) -> None:
        """See the class."""
        self._pool = Pool(url, pool)

    def __exit__(self, *error: object) -> None:
        """See `Way`."""
        self._pool.close()

    def add(self, key: str) -> None:
        """See `Way`."""
        connection = self._pool.take()
        try:
            self.change(connection, key)
        finally:
            self._pool.give(connection)

    def cancel_waiting(self) -> None:
        """See `Way`."""
        self._pool.kill_waiters()

    def change(self, connection: psycopg.Connection[Any], key: str) -> None:
        """Do it on *connection*."""
        raise NotImplementedError


class Retry(PerRequest):
    """Read value and version, write unless the version has changed, else begin again."""

    def change(self, connection: psycopg.Connection[Any], key: str) -> None:
        """See `PerRequest`."""
        while True:
            value, version = _row(connection.execute("SELECT value, version FROM counters WHERE key = %s", (key,)))
            written = connection.execute(
                "UPDATE counters SET value = %s, version = %s WHERE key = %s AND version = %s",
                (value + 1, version + 1, key, version),
            )
            if written.rowcount:
                return
            self.replays += 1


class ForUpdate(PerRequest):
    """Lock the row, write, commit."""

    def change(self, connection: psycopg.Connection[Any], key: str) -> None:
        """See `PerRequest`."""
        with connection.transaction():
            (value,) = _row(connection.execute("SELECT value FROM counters WHERE key = %s FOR UPDATE", (key,)))
            connection.execute("UPDATE counters SET value = %s WHERE key = %s", (value + 1, key))


class Advisory(PerRequest):
    """Take an advisory lock of the key, read, write, commit, which lets the lock go."""

    def change(self, connection: psycopg.Connection[Any], key: str) -> None:
        """See `PerRequest`."""
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", (key,))
            (value,) = _row(connection.execute("SELECT value FROM counters WHERE key = %s", (key,)))
            connection.execute("UPDATE counters SET value = %s WHERE key = %s", (value + 1, key))


class Atomic(PerRequest):
    """Say it all in one statement."""

    def change(self, connection: psycopg.Connection[Any], key: str) -> None:
        """See `PerRequest`."""
        _row(
            connection.execute(
                "UPDATE counters SET value = value + 1 WHERE key = %s AND value < %s RETURNING value", (key, LIMIT)
            )
        )


def _row(cursor: psycopg.Cursor[Any]) -> Any:
    row = cursor.fetchone()
    assert row is not None
    return row


# -- batches ------------------------------------------------------------------------------------------------


class Batches(Way):
    """Batches of a `SQLAlchemyStore`.

    Args:
        url: Of the database.
        mode: Of the store.
        window: The processor's ``min_duration``, in seconds.
        max_bulk: Keys in one bulk; None for batches of one key.
        reuse: The store's ``reuse_resource``.
    """

    table = "documents"

    def __init__(
        self,
        url: str,
        mode: Literal["lock", "version"],
        window: float = 0.0,
        max_bulk: int | None = None,
        reuse: Reuse | None = None,
    ) -> None:
        """See the class."""
        self._engine = sa.create_engine(
            sa.make_url(url).set(drivername="postgresql+psycopg"), pool_size=POOL, max_overflow=0
        )
        # A conflict costs another attempt, and several processes have many.
        store: Any = SQLAlchemyStore.documents(self._engine, "documents", mode=mode, reuse_resource=reuse)
        options: dict[str, Any] = {"min_duration": window, "max_duration": 30, "max_attempts": 1000}
        if max_bulk is None:
            options |= {"open_resource": store}
        else:
            options |= {"open_resources": store.open_resources, "max_bulk": max_bulk, "max_batches": 2}
        self._processor = Processor(**options)
        # -- mutable state ---------------------------------------------------------------------------------
        self.inside: list[float] = []
        self._metrics = self._processor.subscribe_batch_metrics()
        self._watcher = gevent.spawn(self._watch)

    def __exit__(self, *error: object) -> None:
        """See `Way`."""
        self._processor.stop()
        self._watcher.join()
        if self._metrics.missed:
            raise AssertionError(f"{self._metrics.missed} batches were not looked at")
        self._engine.dispose()

    def add(self, key: str) -> None:
        """See `Way`."""
        self._processor.run(key, _add)

    def _watch(self) -> None:
        for metric in self._metrics:
            self.replays += max(0, metric.attempts - 1)
            self.inside.append(metric.load_duration + metric.save_duration)


def _add(document: dict[str, int]) -> int:
    document["value"] += 1
    return document["value"]


# -- the tables ---------------------------------------------------------------------------------------------


def create_tables(url: str) -> None:
    """Make them anew."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS counters, documents")
        connection.execute("CREATE TABLE counters (key text PRIMARY KEY, value bigint, version bigint)")
    engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"))
    SQLAlchemyStore.documents(engine, "documents").create_table()
    engine.dispose()


def begin_at_zero(url: str, keys: Sequence[str]) -> None:
    """Have a counter for each of *keys* in both."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("TRUNCATE counters, documents")
        connection.execute("INSERT INTO counters SELECT key, 0, 0 FROM unnest(%s::text[]) key", (list(keys),))
        connection.execute(
            "INSERT INTO documents (key, state, version) SELECT key, %s, 0 FROM unnest(%s::text[]) key",
            (json.dumps({"value": 0}), list(keys)),
        )


def check(url: str, table: str, answered: int, unanswered: int = 0) -> None:
    """Compare the counters in the database with the operations that were answered."""
    value = "value" if table == "counters" else "(state::json->>'value')::bigint"
    with psycopg.connect(url, autocommit=True) as connection:
        (counted,) = _row(connection.execute(f"SELECT sum({value}) FROM {table}"))  # noqa: S608 - our own names
    if not answered <= counted <= answered + unanswered:
        raise AssertionError(f"{answered} were answered, {unanswered} were not, but {counted} are in the database")


def server_settings(url: str) -> str:
    """Say what a COMMIT waits for."""
    with psycopg.connect(url) as connection:
        names = ("server_version", "fsync", "synchronous_commit")
        return ", ".join(f"{name} {_row(connection.execute(f'SHOW {name}'))[0]}" for name in names)


class ClosedLoop(NamedTuple):
    """What callers did who ran one operation after another."""

    every: list[float]
    """Seconds of each operation that was answered, from the first to the last."""
    counted: slice
    """Those of them that ended while time was taken."""
    took: float
    """The seconds for which time was taken."""

    @property
    def rate(self) -> float:
        """Operations per second."""
        return len(self.every[self.counted]) / self.took

    def percentile(self, percent: int) -> float:
        """Return the milliseconds that so many percent of the operations took at most."""
        ordered = sorted(self.every[self.counted])
        return ordered[len(ordered) * percent // 100] * 1000


def closed_loop(way: Way, run: Callable[[], object], callers: int, warm_up: float, seconds: float) -> ClosedLoop:
    """Let *callers* run one operation of *way* after another, and take time for *seconds*.

    If nobody was answered by then, as on a busy machine, time is taken until somebody is.
    """
    every: list[float] = []
    stopped = False

    def call() -> None:
        while not stopped:
            begun = time.perf_counter()
            run()
            every.append(time.perf_counter() - begun)

    greenlets = [gevent.spawn(call) for _ in range(callers)]
    gevent.sleep(warm_up)
    first, begun = len(every), time.perf_counter()
    gevent.sleep(seconds)
    while len(every) == first and not any(greenlet.dead for greenlet in greenlets):
        gevent.sleep(seconds)
    last, took, stopped = len(every), time.perf_counter() - begun, True
    way.cancel_waiting()
    gevent.joinall(greenlets, raise_error=True)
    return ClosedLoop(every, slice(first, last), took)


def spread(values: Sequence[float], form: str) -> str:
    """The median, and between what it lies."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
