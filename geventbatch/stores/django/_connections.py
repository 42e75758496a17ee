"""Django connections for batches, each lent to the greenlet that runs the batch.

Django keeps a connection for each greenlet as long as that lives, so every worker would keep one for ever. Here a batch
borrows a connection and returns it at its end: there are never more connections than batches that ran at one time.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import gevent
from django.db import connections
from django.db.backends.signals import connection_created
from django.db.utils import load_backend
from django.dispatch import receiver

from geventbatch._core import process
from geventbatch.stores._sql import errors

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper


def current(alias: str) -> BaseDatabaseWrapper | None:
    """Return the connection of this greenlet (or thread), or None if it has none yet."""
    handler: Any = connections
    found: BaseDatabaseWrapper | None = getattr(handler._connections, alias, None)  # `all` took 10 µs
    return found


def check_backend(alias: str, *, locking: bool) -> None:
    """Warn of a database with unknown errors; refuse an isolation level that does not fit locking. Switches: no.

    Raises:
        ValueError: The level is REPEATABLE READ or SERIALIZABLE.
    """
    settings = connections.settings.get(alias)
    if settings is None:  # Django reports it
        return
    vendor = load_backend(settings["ENGINE"]).DatabaseWrapper.vendor
    level = settings["OPTIONS"].get("isolation_level")
    if vendor == "postgresql" and level is not None:
        from django.db.backends.postgresql.psycopg_any import IsolationLevel

        level = IsolationLevel(level).name
    insisted = str(level).replace("_", " ").upper()
    if locking and vendor != "sqlite" and insisted in {"REPEATABLE READ", "SERIALIZABLE"}:
        raise ValueError(
            f'mode "lock" is for READ COMMITTED, but OPTIONS of the database {alias!r} has isolation_level {insisted}: '
            'a caller that has waited for a locked row would get an error. Pass mode="version", or take it out'
        )
    if vendor not in {"postgresql", "mysql", "sqlite"}:
        errors.tell_of_driver("DjangoStore", f"the database {alias!r} ({settings['ENGINE']})")


_put_aside: list[tuple[str, object]] = []
"""The parent's connections and pools, each with its alias. Closing or collecting them here would end them there."""

_epochs: WeakKeyDictionary[BaseDatabaseWrapper, int] = WeakKeyDictionary()
"""The epoch (see `process`) in which each wrapper last connected."""

_imported: int = process.here.epoch


@receiver(connection_created, weak=False, dispatch_uid="geventbatch")
def _connected(connection: BaseDatabaseWrapper, **_: object) -> None:
    process.notice_fork()
    _epochs[connection] = process.here.epoch


def own(alias: str) -> BaseDatabaseWrapper:
    """Return the connection of this greenlet, replaced if the parent process opened it. Switches: no."""
    process.notice_fork()
    connection: BaseDatabaseWrapper = connections[alias]
    if connection.connection is not None and _epochs.get(connection, _imported) != process.here.epoch:
        _put_aside.append((alias, connection))
        connection = connections[alias] = connections.create_connection(alias)
    return connection


def inherited() -> list[str]:
    """Return the databases to which the parent is known to have had connections at the fork."""
    if not process.here.epoch:
        return []
    left = [one.alias for one, epoch in _epochs.items() if epoch != process.here.epoch]
    return sorted({f"Django's database {alias!r}" for alias in [*left, *(alias for alias, _ in _put_aside)]})


def by_extension() -> list[str]:
    """Return the databases to which mysql-connector-python is going to connect by its C extension, if it is there."""
    return [
        f"Django's database {alias!r}"
        for alias, database in connections.settings.items()
        if database["ENGINE"] == "mysql.connector.django" and not database["OPTIONS"].get("use_pure")
    ]


def _forked() -> None:
    """Put aside Django's own pools: their threads are in the parent. Django makes new ones. No I/O here."""
    backend: Any = sys.modules.get("django.db.backends.postgresql.base")
    pools: dict[str, object] = getattr(backend and backend.DatabaseWrapper, "_connection_pools", {})
    _put_aside.extend(pools.items())
    pools.clear()


process.after_fork(_forked)


_pools: dict[tuple[str, float, object], Pool] = {}


def pool(alias: str, max_age: float, prepare: object = None) -> Pool:
    """Return the pool that a database's stores share; stores that *prepare* connections have others. Switches: no."""
    return _pools.setdefault((alias, max_age, prepare), Pool(alias, max_age))


def close_idle(alias: str | None = None) -> None:
    """Close the idle connections of all stores, or of those that use the database *alias*. Switches: no."""
    for (name, *_), one in list(_pools.items()):
        if alias in {None, name}:
            one.close()


class Pool:
    """The idle connections to one database, the last used on top."""

    def __init__(self, alias: str, max_age: float) -> None:
        """Open no connection yet."""
        self._alias = alias
        self._max_age = max_age
        # -- mutable state ---------------------------------------------------------------------------------
        self._epoch = process.here.epoch
        self._idle: list[BaseDatabaseWrapper] = []
        self._idle_since: list[float] = []  # monotonic seconds, one for each in `_idle`
        self._checked = False

    def __len__(self) -> int:
        """Return the number of idle connections."""
        return len(self._idle)

    def lend(self) -> tuple[BaseDatabaseWrapper, bool]:
        """Make a connection this greenlet's. Also return whether the server may have closed it meanwhile.

        It may if the connection comes from a pool, ours or Django's.

        Switches: the first time in a process.
        """
        self._notice_fork()
        self._check_greenlets()
        connection = self._pop() or self._make()
        connection.close_if_unusable_or_obsolete()
        reused = connection.connection is not None or _is_pooled(connection)
        connections[self._alias] = connection
        return connection, reused

    def give_back(self, connection: BaseDatabaseWrapper, before: BaseDatabaseWrapper | None) -> None:
        """Take *connection* from this greenlet, in any state, and restore the greenlet's connection *before*."""
        if before is None:
            with suppress(AttributeError):
                del connections[self._alias]
        else:
            connections[self._alias] = before
        close_others(self._alias)
        if not is_sound(connection):
            discard(connection)
            return
        connection.errors_occurred = False
        try:
            connection.close_if_unusable_or_obsolete()
        except BaseException:
            discard(connection)
            raise
        self._idle.append(connection)
        self._idle_since.append(time.monotonic())
        self._drop_oldest()

    def renew(self, connection: BaseDatabaseWrapper) -> None:
        """Close all idle connections, after the server has ended *connection*, which was idle too. Switches: yes."""
        self.close()
        if _is_pooled(connection):
            # Django's pool would give out others that were ended. Its check replaces them.
            with suppress(Exception):
                cast("Any", connection).pool.check()  # since Django 5.1, but not in its stubs

    def close(self) -> None:
        """Close the idle connections."""
        self._notice_fork()
        self._idle_since.clear()
        idle, self._idle = self._idle, []
        for connection in idle:
            discard(connection)

    def _pop(self) -> BaseDatabaseWrapper | None:
        if not self._idle:
            return None
        self._idle_since.pop()
        return self._idle.pop()

    def _drop_oldest(self) -> None:
        """Close the connection at the bottom if it is too old: after a peak, no batch would ever use it."""
        if time.monotonic() - self._idle_since[0] > self._max_age:
            self._idle_since.pop(0)
            discard(self._idle.pop(0))

    def _make(self) -> BaseDatabaseWrapper:
        connection = connections.create_connection(self._alias)
        settings = {**connection.settings_dict, "AUTOCOMMIT": True, "OPTIONS": {**connection.settings_dict["OPTIONS"]}}
        if not settings["OPTIONS"].get("pool"):  # else Django's pool decides on the age
            settings["CONN_MAX_AGE"] = self._max_age
        if connection.vendor == "sqlite":
            # SQLite waits for a lock by blocking the process. A replay waits without that.
            settings["OPTIONS"]["timeout"] = 0.05
        connection.settings_dict = settings
        connection.inc_thread_sharing()  # Django takes a greenlet for a thread
        return connection

    def _notice_fork(self) -> None:
        process.notice_fork()
        if self._epoch != process.here.epoch:
            self._epoch = process.here.epoch
            _put_aside.extend((self._alias, one) for one in self._idle)
            self._idle, self._idle_since = [], []

    def _check_greenlets(self) -> None:
        """Raise `RuntimeError` if all greenlets share one Django connection, which several batches would then use."""
        if self._checked:
            return
        connections[self._alias]  # which opens one for this greenlet
        if gevent.spawn(current, self._alias).get() is not None:
            raise RuntimeError(
                "Django was imported before gevent patched threading, so that all greenlets share one database "
                "connection: call gevent.monkey.patch_all() before anything else is imported (with gunicorn --preload, "
                "in gunicorn.conf.py)"
            )
        self._checked = True


def _is_pooled(connection: BaseDatabaseWrapper) -> bool:
    """Return whether Django has a pool of its own for *connection*."""
    return connection.vendor == "postgresql" and bool(connection.settings_dict["OPTIONS"].get("pool"))


def is_sound(connection: BaseDatabaseWrapper) -> bool:
    """Return whether *connection* is open, idle and in no transaction, as far as the client knows."""
    raw: Any = connection.connection
    if raw is None or connection.in_atomic_block or connection.closed_in_transaction:
        return False
    if connection.vendor == "postgresql":
        return not raw.closed and raw.info.transaction_status == 0
    if connection.vendor == "sqlite":
        return not raw.in_transaction
    return bool(getattr(raw, "open", True)) and not connection.errors_occurred


def is_closed(raw: Any) -> bool:
    """Return whether the driver connection *raw* is closed, as far as the client knows. Switches: no."""
    return raw is None or bool(getattr(raw, "closed", False)) or not getattr(raw, "open", True)


def discard(connection: Any) -> None:
    """Close *connection* for good, in any state, without asking the server. Switches: no."""
    if connection.connection is not None:
        if connection.vendor == "postgresql" and not is_sound(connection):
            with suppress(Exception):  # the driver's pool would ask the server for a rollback first
                connection.connection.close()
        with suppress(Exception):
            connection._close()  # unlike `close`, whatever the transaction
        connection.connection = None


def close_others(alias: str) -> None:
    """Close the connections to other databases that operations used in this greenlet."""
    for other in connections.all(initialized_only=True):
        if other.alias != alias:
            discard(other)
            del connections[other.alias]
