"""The connections of a store: lent by the user's pool, or by a function of his, one for each batch.

A child of a fork uses no connection that the parent has opened: a pool that had some at the fork is refused there.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

import gevent

from geventbatch._batch import current_batch
from geventbatch._core import process
from geventbatch._safe_repr import named, shown
from geventbatch.stores._give_back import give_back
from geventbatch.stores._sql.commit import polls

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

_PATIENCE: Final = 0.9
"""The share of the batch's time that it waits for psycopg's pool, which tries to connect again and again: so the batch
ends by an error that tells this, and not by its deadline."""

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
        self._lent: dict[int, Any] = {}  # by `id`
        _known.add(self)

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

    def discard(self, connection: Any) -> None:
        """Close a connection, in any state; the pool makes another one. Switches: no."""
        self._lent.pop(id(connection), None)
        self._drop(connection)

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
        return self.pool()

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

    def _get(self, remaining: Callable[[], float]) -> Any:  # noqa: ARG002 - the pool waits, or raises, as it was made
        return self.pool.connection(False)  # noqa: FBT003 - not shared with others; of no name in all versions


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
        try:
            return self.pool.getconn()
        except Exception as error:
            if not _is_exhausted(error):
                raise
            refused = error
        for _ in polls(remaining()):
            try:
                return self.pool.getconn()
            except Exception as error:
                if not _is_exhausted(error):
                    raise
        raise refused

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


def _is_exhausted(error: Exception) -> bool:
    return type(error).__name__ == "PoolError" and "exhausted" in str(error)


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
            connections._lent.clear()  # noqa: SLF001 - of this module; the parent's batches have them


process.after_fork(_keep_unused)
