"""The engines of stores in a child of a fork: no connection that the parent has opened is used there.

The pool that an engine had at the fork is put aside, and kept for ever: to close one of its connections, or to let it
go, may end it for the parent too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy.pool import SingletonThreadPool, StaticPool

from geventbatch import _process

if TYPE_CHECKING:
    from sqlalchemy import Engine, Pool

_known: Final[WeakKeyDictionary[Engine, tuple[int, Pool]]] = WeakKeyDictionary()
"""The engines of stores: in which epoch each was last seen, with which pool."""

_put_aside: Final[list[tuple[str, Pool]]] = []
"""The parent's pools, each with the address of its engine."""


def remember(engine: Engine) -> None:
    """A store has been made with *engine*."""
    if engine not in _known:
        _known[engine] = _process.here.epoch, engine.pool


def own(engine: Engine) -> Engine:
    """*engine*, with a pool that is this process's own. Switches: no."""
    remember(engine)
    epoch, pool = _known[engine]
    if epoch != _process.here.epoch:
        if engine.pool is pool and not _is_memory(pool):  # else somebody has renewed it before us
            _put_aside.append((repr(engine.url), pool))
            engine.dispose(close=False)
        _known[engine] = _process.here.epoch, engine.pool
    return engine


def inherited() -> list[str]:
    """The engines whose pools the parent had connections in when this process was forked."""
    here = _process.here.epoch
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
