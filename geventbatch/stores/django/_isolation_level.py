"""The isolation level of a Django connection, for a batch that locks its row."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from geventbatch.stores._sql import bounds

if TYPE_CHECKING:
    from collections.abc import Callable

_made_so: Final[WeakSet[Any]] = WeakSet()
"""The driver connections to MySQL that a batch has set to READ COMMITTED."""


def leave() -> None:
    """Restore nothing."""


def read_committed(connection: Any) -> Callable[[], object]:
    """Make the next transaction READ COMMITTED; return what undoes it. Switches: at a new connection to MySQL."""
    if connection.vendor == "postgresql":
        return _of_driver(connection.connection)
    if connection.vendor == "mysql":
        _of_session(connection)
    return leave


def _of_driver(raw: Any) -> Callable[[], object]:
    """Set it in psycopg, whose BEGIN then says it, so that no further statement is sent."""
    from django.db.backends.postgresql.psycopg_any import IsolationLevel

    before = raw.isolation_level
    if before == IsolationLevel.READ_COMMITTED:
        return leave
    raw.isolation_level = IsolationLevel.READ_COMMITTED

    def restore() -> None:
        with suppress(Exception):  # else the connection is broken and not used again
            raw.isolation_level = before

    return restore


def _of_session(connection: Any) -> None:
    """Set it for the session, once. Django does so itself, but mysql-connector-python's backend does not."""
    raw = connection.connection
    if raw in _made_so or str(getattr(connection, "isolation_level", "")).lower() == bounds.LEVEL:
        return
    with connection.cursor() as cursor:
        cursor.execute(bounds.mysql_read_committed(mariadb=is_mariadb(connection)))
    _made_so.add(raw)


def is_mariadb(connection: Any) -> bool:
    """Return whether a MySQL connection is to MariaDB. Switches: the first time, to ask."""
    # mysql-connector-python's backend always says False.
    told = str(getattr(connection.connection, "server_info", ""))
    return bool(getattr(connection, "mysql_is_mariadb", False)) or "mariadb" in told.lower()
