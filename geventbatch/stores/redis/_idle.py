"""Idle connections of redis-py's own pool, taken and returned without what the driver counts and announces meanwhile.

That takes the driver as long as a message to the server and its answer. Pools of other classes, watched ones, and those
with listeners or credentials that change are left to the driver. So are connections that are new, or not ready.
"""

from __future__ import annotations

from operator import attrgetter
from os import getpid
from typing import Any, Final

import redis

_observability: Any
try:
    from redis.observability import providers as _observability
except ImportError:  # older drivers cannot be watched
    _observability = None

_inside: Final = attrgetter("_lock", "_available_connections", "_in_use_connections")
"""Returns the parts of a pool, which have no public names. They change hands in a fork."""


def _known_pools() -> frozenset[type]:
    """Return the class of the pool, if the driver is known to keep its connections in these parts."""
    try:
        _, idle, used = _inside(redis.ConnectionPool())
    except AttributeError:
        return frozenset()
    is_known = redis.VERSION[0] in range(6, 9) and type(idle) is list and type(used) is set
    return frozenset([redis.ConnectionPool] if is_known else [])


_POOLS: Final = _known_pools()


def is_watched() -> bool:
    """Return whether the driver tells OpenTelemetry of its commands and connections. Switches: no."""
    return _observability is not None and _observability.get_observability_instance().get_provider_manager() is not None


def take_idle(pool: Any) -> Any:
    """Return an idle connection of *pool* that is ready; None if the pool is to be asked for one. Switches: no."""
    if not _is_known(pool):
        return None
    lock, idle, used = _inside(pool)
    with lock:
        if not idle or not _is_ready(idle[-1]):
            return None
        connection = idle.pop()
        used.add(connection)
        return connection


def release(pool: Any, connection: Any) -> None:
    """Return *connection* to *pool*. Switches: as listeners of the pool do."""
    if not _is_known(pool) or getattr(connection, "_should_reconnect", True):
        pool.release(connection)
        return
    lock, idle, used = _inside(pool)
    with lock:
        if connection in used:  # and was not forgotten in a reset
            used.remove(connection)
            idle.append(connection)


def _is_known(pool: Any) -> bool:
    if type(pool) not in _POOLS or pool.pid != getpid() or is_watched():
        return False
    options = pool.connection_kwargs
    return options.get("credential_provider") is None and options.get("event_dispatcher") is None


def _is_ready(connection: Any) -> bool:
    """Return whether *connection* is open, and has nothing to read: neither an answer to somebody else nor an end."""
    try:
        return getattr(connection, "_sock", None) is not None and not connection.can_read()
    except Exception:  # it has ended: the pool connects anew
        return False
