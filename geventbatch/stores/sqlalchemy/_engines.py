"""The engines of stores: listening to their connections' errors, and new pools in a child of a fork.

A child uses no connection that the parent has opened. The pool that an engine had at the fork is put aside, and kept
for ever: to close one of its connections, or to garbage collect it, may end it for the parent too.
"""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Connection, Engine, event
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from geventbatch._core import process
from geventbatch._safe_repr import named
from geventbatch.stores._give_back import give_back
from geventbatch.stores._sql import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from sqlalchemy import Dialect, ExceptionContext, Pool

_known: Final[WeakKeyDictionary[Engine, tuple[int, Pool]]] = WeakKeyDictionary()
"""The engines of stores, with the epoch of last use, and the pool."""

_pooled: Final[WeakSet[Engine]] = WeakSet()
"""Engines of which a statement has failed, since the session was another one than that in which it was prepared."""

_put_aside: Final[list[tuple[str, Pool]]] = []
"""The parent's pools, each with its engine's URL."""


ENDED: Final = "geventbatch: ended"
"""The key, in a connection's `info`, of the error with which the server has ended its transaction."""

_MISTAKEN_SESSION: Final = frozenset({"26000", "42P05"})
"""SQLSTATEs: the session knows no prepared statement of that name; or it knows one already."""

IN_DOUBT: Final = "geventbatch: in doubt"
"""The key of the error with which the server may have done so."""


_listeners: Final[WeakKeyDictionary[Engine, Counter[str]]] = WeakKeyDictionary()
"""The library's own listeners, by event: they need not be told of what only a store of documents sends."""

_TOLD: Final = ("before_execute", "after_execute", "before_cursor_execute", "after_cursor_execute", "begin", "commit")
"""The events of a transaction that goes well."""


def listen(engine: Engine, name: str, listener: Callable[..., object]) -> None:
    """Have *engine* call a listener of the library's own that looks at connections which it knows, and no others."""
    event.listen(engine, name, listener)
    _listeners.setdefault(engine, Counter())[name] += 1


def is_watched(engine: Engine) -> bool:
    """Return whether the application, or a tool of it, sees or changes what the engine sends. Switches: no."""
    dialect = engine.dialect
    # SQLAlchemy's own flags are much quicker read than the listeners; other releases may have none.
    return bool(
        (getattr(engine, "_has_events", True) and _has_listeners(engine))
        or (getattr(dialect, "_has_events", True) and _changes(dialect))
        or getattr(Connection, "_has_events", True)  # listeners of all connections of all engines
        or engine.get_execution_options()
        or engine.logger.isEnabledFor(logging.INFO)
    )


def _has_listeners(engine: Engine) -> bool:
    own, all_ = _listeners.get(engine, _NONE), engine.dispatch
    return any(len(getattr(all_, name)) > own.get(name, 0) for name in _TOLD)


def _changes(dialect: Dialect) -> bool:
    return bool(dialect.dispatch.do_execute or dialect.dispatch.do_execute_no_params)


_NONE: Final[dict[str, int]] = {}


def check_engine(engine: object) -> None:
    """Raise unless *engine* is an `Engine`."""
    if not isinstance(engine, Engine):
        raise TypeError(
            f"engine is {named(engine)}, but must be an Engine: pass sqlalchemy.create_engine(url), or what your "
            "sessions are bound to (of Flask-SQLAlchemy db.engine)"
        )


def watch(engine: Engine) -> None:
    """Listen to the errors of its connections."""
    # psycopg and psycopg2 know by themselves what has ended a transaction.
    sees = _sees_session if engine.dialect.driver in {"psycopg", "psycopg2"} else _sees_error
    if not event.contains(engine, "handle_error", sees):
        event.listen(engine, "handle_error", sees)


def _sees_error(context: ExceptionContext) -> None:
    """Note an error of the driver, whatever has sent the statement, and even if it is swallowed."""
    error, connection = context.original_exception, context.connection
    usable = connection is not None and not connection.closed and not connection.invalidated
    if connection is not None and usable and errors.has_ended(error):
        connection.info.setdefault(ENDED, error)
    elif connection is not None and usable and errors.may_have_ended(error):
        connection.info[IN_DOUBT] = error
    # SQLAlchemy misses some lost connections of mysql-connector-python, and the bare OSError of pg8000.
    if not context.is_disconnect and (errors.kind(error) is errors.Kind.LOST or isinstance(error, OSError)):
        context.is_disconnect = True


def pooled() -> list[str]:
    """Return the URLs of the engines that prepare statements behind a pooler."""
    return sorted(repr(engine.url) for engine in _pooled)


def _sees_session(context: ExceptionContext) -> None:
    """Note that a pooler is in between."""
    if context.engine is not None and errors.state(context.original_exception) in _MISTAKEN_SESSION:
        _pooled.add(context.engine)


def remember(engine: Engine) -> None:
    """Note that a store was made with *engine*."""
    process.notice_fork()
    if engine not in _known:
        _known[engine] = process.here.epoch, engine.pool


def _keep_unused() -> None:
    """Keep the pools in a child of a fork in which the parent has opened nothing: all that they open is the child's."""
    for engine, (epoch, pool) in list(_known.items()):
        if epoch == process.here.epoch - 1 and engine.pool is pool and not _has_connections(pool):
            _known[engine] = process.here.epoch, pool


process.after_fork(_keep_unused)


def drivers() -> set[str]:
    """Return the names of the drivers of stores."""
    return {engine.dialect.driver for engine in _known}


def own(engine: Engine) -> Engine:
    """Return *engine*, with a pool of this process. Switches: no."""
    process.notice_fork()
    if not process.here.epoch:  # this is no child of a fork
        return engine
    known = _known.get(engine)
    if known is None:
        remember(engine)
    elif known[0] != process.here.epoch:
        pool = known[1]
        if engine.pool is pool and not _is_memory(pool):  # else the user has renewed it already
            _put_aside.append((repr(engine.url), pool))
            engine.dispose(close=False)
        _known[engine] = process.here.epoch, engine.pool
    return engine


@contextmanager
def beside(engine: Engine, key: Hashable) -> Iterator[Connection]:
    """Yield another connection than the batch's, to look at what became of the batch of *key*. Switches: yes."""
    connection = own(engine).connect()
    try:
        yield connection
    finally:
        give_back(key, connection.close, saved=None)


def inherited() -> list[str]:
    """Return the URLs of the engines with connections in their pools when this process was forked."""
    here = process.here.epoch
    if not here:
        return []
    left = [(repr(engine.url), pool) for engine, (epoch, pool) in _known.items() if epoch != here]
    return sorted({url for url, pool in [*_put_aside, *left] if _has_connections(pool)})


def _is_memory(pool: Pool) -> bool:
    """Return whether *pool* holds a database in memory, which a fork copies."""
    return isinstance(pool, (SingletonThreadPool, StaticPool))


def _has_connections(pool: Any) -> bool:
    counts = (getattr(pool, name, None) for name in ("checkedin", "checkedout"))
    return not _is_memory(pool) and any(count() > 0 for count in counts if count is not None)
