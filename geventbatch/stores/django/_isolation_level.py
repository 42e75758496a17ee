"""The level of isolation of a connection of Django's, for a batch that locks its row."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from geventbatch.stores._sql import bounds

if TYPE_CHECKING:
    from collections.abc import Callable

_made_so: Final[WeakSet[Any]] = WeakSet()
"""The drivers' connections to MySQL whose sessions are READ COMMITTED since a batch has made them so."""


def leave() -> None:
    """Nothing is to be restored."""


def read_committed(connection: Any) -> Callable[[], object]:
    """Have the next transaction be so. Give what restores the level. Switches: on MySQL, for a new connection."""
    if connection.vendor == "postgresql":
        return _of_driver(connection.connection)
    if connection.vendor == "mysql":
        _of_session(connection)
    return leave


def _of_driver(raw: Any) -> Callable[[], object]:
    """Psycopg says it in its BEGIN, so that nothing is sent for it."""
    from django.db.backends.postgresql.psycopg_any import IsolationLevel

    before = raw.isolation_level
    if before == IsolationLevel.READ_COMMITTED:
        return leave
    raw.isolation_level = IsolationLevel.READ_COMMITTED

    def restore() -> None:
        with suppress(Exception):  # else it is broken, and nobody uses it again
            raw.isolation_level = before

    return restore


def _of_session(connection: Any) -> None:
    """Django by itself makes a session so, once, when it connects; the backend of mysql-connector-python does not."""
    raw = connection.connection
    if raw in _made_so or str(getattr(connection, "isolation_level", "")).lower() == bounds.LEVEL:
        return
    with connection.cursor() as cursor:
        cursor.execute(bounds.mysql_read_committed(mariadb=is_mariadb(connection)))
    _made_so.add(raw)


def is_mariadb(connection: Any) -> bool:
    """Whether a connection to MySQL is one to MariaDB. Switches: the first time, to ask."""
    # The backend of mysql-connector-python says False of any server.
    told = str(getattr(connection.connection, "server_info", ""))
    return bool(getattr(connection, "mysql_is_mariadb", False)) or "mariadb" in told.lower()
