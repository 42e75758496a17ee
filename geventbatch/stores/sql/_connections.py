"""The connections of a store: lent by the user's pool, or by a function of his, one for each batch.

A child of a fork uses no connection that the parent has opened: a pool that had some at the fork is refused there.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

import gevent
from gevent.event import Event

from geventbatch._batch import current_batch
from geventbatch._core import process
from geventbatch._core.fair_semaphore import FairSemaphore
from geventbatch._safe_repr import named, shown
from geventbatch._wrapper import innermost
from geventbatch.stores._give_back import give_back
from geventbatch.stores._sql.commit import polls

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

_PATIENCE: Final = 0.9
"""The share of the batch's time that it waits for psycopg's pool, which tries to connect again and again: so the batch
ends by an error that tells this, and not by its deadline."""

_LOOK_AGAIN: Final = 0.01
"""Seconds after which the batch whose turn it is asks a pool again that other code uses too."""

MEND: Final = (
    "make the pool without connections before the fork (psycopg2: ThreadedConnectionPool(0, n, …), then pool.minconn = "
    "n; psycopg 3: open=False, and pool.open() in the worker), or pass a function that returns a connection"
)

_known: Final[WeakSet[Connections]] = WeakSet()


class Connections:
    """Lends connections of *pool*. The base is for a function: it returns one, whose ``close`` ends or returns it."""

    def __init__(self, pool: Any) -> None:
        """Lend connections of *pool*."""
        process.notice_fork()
        self.pool: Final = pool
        # -- mutable state ---------------------------------------------------------------------------------
        self.epoch = process.here.epoch
        self._begin()
        _known.add(self)

    def _begin(self) -> None:
        self._lent: dict[int, Any] = {}  # by `id`
        self._waiting = 0  # batches that wait for a connection
        self._line = FairSemaphore(1)  # its slot is the turn to ask the pool again
        self._returned = Event()  # since that turn has asked it

    def lend(self, remaining: Callable[[], float]) -> Any:
        """Return a connection that nobody else has; wait *remaining()* seconds for it at the most. Switches: yes."""
        process.notice_fork()
        if self.epoch != process.here.epoch:
            raise RuntimeError(
                f"{shown(self.pool)} had connections when this process was forked, which are its parent's: {MEND}"
            )
        connection = self._get(remaining)
        if id(connection) in self._lent:
            raise RuntimeError(
                f"{shown(self.pool)} returned a connection that another batch has: it has to return another one for "
                "each call; pass a pool"
            )
        self._lent[id(connection)] = connection
        return connection

    def take_back(self, connection: Any) -> None:
        """Return a connection, in no transaction. Switches: yes.

        A pool may wait for a lock, or for a server. If the deadline or a kill ends that wait, another greenlet closes
        the connection: outside of the deadline, so that the pool does not go on counting it.
        """
        self._lent.pop(id(connection), None)
        try:
            self._put(connection)
        except Exception:
            raise
        except BaseException:
            if process.has_hub():
                gevent.spawn(self._drop, connection)
            raise
        if self._waiting:
            self._returned.set()

    def discard(self, connection: Any) -> None:
        """Close a connection, in any state; the pool makes another one. Switches: no."""
        self._lent.pop(id(connection), None)
        try:
            self._drop(connection)
        finally:
            if self._waiting:
                self._returned.set()

    def forget(self, connection: Any) -> None:
        """Leave a connection alone that is somebody else's. Switches: no."""
        self._lent.pop(id(connection), None)

    @contextmanager
    def beside(self, key: Hashable) -> Iterator[Any]:
        """Yield another connection than the batch's, to look at what became of the batch of *key*. Switches: yes."""
        connection = self.lend(current_batch().remaining)
        try:
            yield connection
        except BaseException:
            give_back(key, self.discard, connection, saved=None)
            raise
        give_back(key, self.take_back, connection, saved=None)

    def count(self) -> int:
        """Return how many connections are open, as far as that is known. Switches: no."""
        return len(self._lent)

    def raw(self, connection: Any) -> Any:
        """Return the driver's own connection. Switches: no."""
        while hasattr(connection, "_con"):  # DBUtils, which would send again what has failed
            connection = connection._con  # noqa: SLF001 - it has no public name
        return connection

    def _get(self, remaining: Callable[[], float]) -> Any:  # noqa: ARG002 - for the children
        connection = self.pool()
        if connection is None:
            raise TypeError(f"{shown(self.pool)} returned None, but has to return a connection: is its return missing?")
        return connection

    def _first_come(self, remaining: Callable[[], float], take: Callable[[], Any], most: int) -> Any:
        """Return what *take* returns, which asks the pool and returns None while it has none left of *most*.

        Whoever comes while others wait is behind them: the pool itself would serve the newcomer. Switches: yes.
        """
        found = None if self._waiting else take()
        if found is not None:
            return found
        seconds = remaining() * _PATIENCE
        self._waiting += 1
        try:
            if process.has_hub():
                silent: Any = False  # it raises nothing
                with gevent.Timeout(seconds, silent), self._line:
                    found = self._next(take)
            else:
                found = next((one for _ in polls(seconds) if (one := take()) is not None), None)
        finally:
            self._waiting -= 1
        if found is None:
            raise TimeoutError(
                f"the pool gave no connection within {seconds:.3g} s: batches have {len(self._lent)} of its {most} "
                "connections. All of them were in use: make the pool larger, or max_batches smaller; callers that took "
                "one before run() hold it while they wait"
            )
        return found

    def _next(self, take: Callable[[], Any]) -> Any:
        """Return the next one that *take* returns. Woken by `take_back` and `discard`; other code does not tell us."""
        while True:
            self._returned.clear()
            found = take()
            if found is not None:
                return found
            self._returned.wait(_LOOK_AGAIN)

    def _put(self, connection: Any) -> None:
        connection.close()

    def _drop(self, connection: Any) -> None:
        raw = self.raw(connection)
        try:
            _close(raw)
        finally:
            if raw is not connection:
                connection.close()


class OfDBUtils(Connections):
    """A ``PooledDB`` of DBUtils."""

    def count(self) -> int:
        return len(getattr(self.pool, "_idle_cache", "?")) + len(self._lent)

    def _get(self, remaining: Callable[[], float]) -> Any:
        connection = self._first_come(remaining, self._take, self.pool._maxconnections)  # noqa: SLF001 - it has no name
        steady = connection._con  # noqa: SLF001 - likewise
        if _is_closed(self.raw(connection)):  # the pool could not connect, or was told not to look
            try:
                fresh = steady._create()  # noqa: SLF001 - likewise
            except BaseException:
                connection.close()
                raise
            steady._store(fresh)  # noqa: SLF001 - likewise
        return connection

    def _take(self) -> Any:
        pool = self.pool
        if 0 < pool._maxconnections <= pool._connections:  # noqa: SLF001 - likewise
            return None  # it would raise, or let newcomers overtake who waits in it
        try:
            return pool.connection(False)  # noqa: FBT003 - not shared with others; of no name in all versions
        except sys.modules["dbutils.pooled_db"].TooManyConnectionsError:  # others came while it waited for its lock
            return None


class OfPsycopg(Connections):
    """A ``psycopg_pool.ConnectionPool``."""

    def count(self) -> int:
        return 0 if self.pool.closed else int(self.pool.get_stats().get("pool_size", 0))  # it counts what it will open

    def _get(self, remaining: Callable[[], float]) -> Any:
        seconds = remaining() * _PATIENCE
        try:
            return self.pool.getconn(timeout=seconds)
        except sys.modules["psycopg_pool"].PoolTimeout as error:
            failed = self.pool.get_stats().get("connections_errors", 0)
            raise type(error)(
                f"the pool gave no connection within {seconds:.3g} s: batches have {len(self._lent)} of "
                f"its {self.pool.max_size} connections, and it has failed to connect {failed} times so far (the logger "
                "psycopg.pool has the server's words). Callers that took one before run() hold it while they wait"
            ) from error

    def _put(self, connection: Any) -> None:
        self.pool.putconn(connection)

    def _drop(self, connection: Any) -> None:
        connection.close()
        self.pool.putconn(connection)


class OfPsycopg2(Connections):
    """A pool of psycopg2, which raises if no connection is left; so it is asked again until one is."""

    def count(self) -> int:
        return len(self.pool._pool) + len(self.pool._used)  # noqa: SLF001 - it has no public names

    def _get(self, remaining: Callable[[], float]) -> Any:
        return self._first_come(remaining, self._take, self.pool.maxconn)

    def _take(self) -> Any:
        try:
            return self.pool.getconn()
        except Exception as error:
            if not _is_exhausted(error):
                raise
        return None

    def _put(self, connection: Any) -> None:
        self.pool.putconn(connection)

    def _drop(self, connection: Any) -> None:
        self.pool.putconn(connection, close=True)


def connections_of(pool: Any) -> Connections:
    """Return what lends connections of *pool*. Raises a `TypeError` if it is nothing that does."""
    kind = _kind(pool)
    if kind is None:
        raise TypeError(
            f"pool is {named(pool)}, but must be a psycopg_pool.ConnectionPool, a psycopg2.pool.ThreadedConnectionPool"
            ", a dbutils.pooled_db.PooledDB, or a function that returns a connection of its own for each call"
        )
    return kind(pool)


def _kind(pool: Any) -> Callable[[Any], Connections] | None:
    module = sys.modules.get("psycopg_pool")
    if module is not None and isinstance(pool, module.ConnectionPool):
        return OfPsycopg
    module = sys.modules.get("psycopg2.pool")
    if module is not None and isinstance(pool, module.AbstractConnectionPool):
        return OfPsycopg2
    module = sys.modules.get("dbutils.pooled_db")
    if module is not None and isinstance(pool, module.PooledDB):
        return OfDBUtils
    return Connections if callable(pool) and not isinstance(pool, type) else None


def _is_closed(raw: Any) -> bool:
    return not getattr(raw, "open", True) or bool(getattr(raw, "closed", False))


def _is_exhausted(error: Exception) -> bool:
    return type(error).__name__ == "PoolError" and "exhausted" in str(error)


def size_of(store: Any) -> int | None:
    """Return how many connections the pool of *store* has at most. None: it is no `SQLStore`, or that is unknown."""
    own = getattr(innermost(store), "__dict__", {})  # without asking a store of the user's for a name of ours
    connections = getattr(own.get("_table"), "connections", None)
    if not isinstance(connections, Connections):
        return None
    names = ("max_size", "maxconn", "_maxconnections")  # of psycopg_pool, psycopg2 and DBUtils
    return next((size for name in names if (size := getattr(connections.pool, name, None))), None)


def refused() -> list[str]:
    """Return the pools whose batches fail, since they had connections when this process was forked."""
    return sorted(shown(one.pool) for one in _known if one.epoch != process.here.epoch)


def _close(raw: Any) -> None:
    force = getattr(raw, "_force_close", None)  # PyMySQL: its `close` would wait to say goodbye
    (raw.close if force is None else force)()


def _keep_unused() -> None:
    """Go on, in a child of a fork, with the pools that had no connections then: all that they open is the child's."""
    for connections in list(_known):
        if connections.epoch == process.here.epoch - 1 and (
            type(connections) is Connections or not connections.count()
        ):
            connections.epoch = process.here.epoch
            connections._begin()  # noqa: SLF001 - of this module; the parent's batches have and wait for the others


process.after_fork(_keep_unused)
