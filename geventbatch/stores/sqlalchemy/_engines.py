"""The engines of stores: what they see of their connections, and what becomes of them in a child of a fork.

No connection that the parent has opened is used in a child. The pool that an engine had at the fork is put aside, and
kept for ever: to close one of its connections, or to let it go, may end it for the parent too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy import Engine, event
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from geventbatch._core import process
from geventbatch._safe_repr import named
from geventbatch.stores._sql import errors

if TYPE_CHECKING:
    from sqlalchemy import ExceptionContext, Pool

_known: Final[WeakKeyDictionary[Engine, tuple[int, Pool]]] = WeakKeyDictionary()
"""The engines of stores: in which epoch each was last seen, with which pool."""

_put_aside: Final[list[tuple[str, Pool]]] = []
"""The parent's pools, each with the address of its engine."""


ENDED: Final = "geventbatch: ended"
"""Where a connection has, in its `info`, the error with which the server has ended its transaction."""

IN_DOUBT: Final = "geventbatch: in doubt"
"""Where it has the error with which the server may have done so."""


def check_engine(engine: object) -> None:
    """Raise unless *engine* is one."""
    if not isinstance(engine, Engine):
        raise TypeError(
            f"engine is {named(engine)}, but must be an Engine: pass sqlalchemy.create_engine(url), or what your "
            "sessions are bound to (of Flask-SQLAlchemy db.engine)"
        )


def watch(engine: Engine) -> None:
    """See the errors of its connections."""
    if not event.contains(engine, "handle_error", _sees_error):
        event.listen(engine, "handle_error", _sees_error)


def _sees_error(context: ExceptionContext) -> None:
    """An error has come out of the driver, whoever has sent what, and whoever swallows it."""
    error, connection = context.original_exception, context.connection
    usable = connection is not None and not connection.closed and not connection.invalidated
    if connection is not None and usable and errors.has_ended(error):
        connection.info.setdefault(ENDED, error)
    elif connection is not None and usable and errors.may_have_ended(error):
        connection.info[IN_DOUBT] = error
    # SQLAlchemy does not know all that mysql-connector-python says, nor what pg8000 leaves as its socket has raised it.
    if not context.is_disconnect and (errors.kind(error) is errors.Kind.LOST or isinstance(error, OSError)):
        context.is_disconnect = True


def remember(engine: Engine) -> None:
    """A store has been made with *engine*."""
    if engine not in _known:
        _known[engine] = process.here.epoch, engine.pool


def own(engine: Engine) -> Engine:
    """*engine*, with a pool that is this process's own. Switches: no."""
    if not process.here.epoch:  # this is no child of a fork
        return engine
    known = _known.get(engine)
    if known is None:
        remember(engine)
    elif known[0] != process.here.epoch:
        pool = known[1]
        if engine.pool is pool and not _is_memory(pool):  # else somebody has renewed it before us
            _put_aside.append((repr(engine.url), pool))
            engine.dispose(close=False)
        _known[engine] = process.here.epoch, engine.pool
    return engine


def inherited() -> list[str]:
    """The engines whose pools the parent had connections in when this process was forked."""
    here = process.here.epoch
    if not here:
        return []
    left = [(repr(engine.url), pool) for engine, (epoch, pool) in _known.items() if epoch != here]
    return sorted({url for url, pool in [*_put_aside, *left] if _has_connections(pool)})


def _is_memory(pool: Pool) -> bool:
    """Whether it holds a database in memory, which a fork copies."""
    return isinstance(pool, (SingletonThreadPool, StaticPool))


def _has_connections(pool: Any) -> bool:
    counts = (getattr(pool, name, None) for name in ("checkedin", "checkedout"))
    return not _is_memory(pool) and any(count() > 0 for count in counts if count is not None)
