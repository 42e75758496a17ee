"""A batch's transaction on MySQL or MariaDB."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event

from geventbatch._safe_repr import said, shown
from geventbatch.errors import Conflict
from geventbatch.stores._sql import bounds
from geventbatch.stores.sqlalchemy._engines import ENDED, IN_DOUBT
from geventbatch.stores.sqlalchemy._transaction import Transaction, remaining

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable

    from sqlalchemy import Connection

_LEVEL: Final = "geventbatch: level"
"""The key, in a connection's `info`, that says that its session is READ COMMITTED."""


class MySQLTransaction(Transaction):
    """MySQL bounds SELECT by a hint, and lock waits by a setting of the session; MariaDB bounds any statement.

    The setting stays on the connection, and is sent only when it changes. READ COMMITTED, which a connection has from
    its first batch that locks, stays too.
    """

    def begin(self) -> None:
        if self.locking and _LEVEL not in self.connection.info:
            self.connection.exec_driver_sql(bounds.mysql_read_committed(mariadb=_is_mariadb(self.connection)))
            self.connection.info[_LEVEL] = True
        self.connection.info.pop(ENDED, None)
        self.connection.info.pop(IN_DOUBT, None)
        if not _is_mariadb(self.connection):
            self._bound_locks()
        event.listen(self.connection, "before_cursor_execute", self._bounded, retval=True)

    def end(self, error: BaseException | None = None, lost: Collection[Hashable] = ()) -> None:
        try:
            super().end(error, lost)
        finally:
            event.remove(self.connection, "before_cursor_execute", self._bounded)  # the connection would hold this

    def before_writes(self) -> None:
        if not _is_mariadb(self.connection):
            self._bound_locks()

    def has_failed(self) -> bool:
        return self.connection.invalidated or self.ended() is not None

    def check_whole(self) -> None:
        error = None if self.connection.invalidated else self.connection.info.pop(IN_DOUBT, None)
        if error is not None and self.connection.exec_driver_sql(bounds.MYSQL_ENDS).scalar():
            self.connection.info.setdefault(ENDED, error)
        super().check_whole()

    def ended(self) -> Conflict | None:
        if self.connection.closed or self.connection.invalidated:
            return None
        error = self.connection.info.get(ENDED)
        if error is None:
            return None
        conflict = Conflict(
            f"{shown(self.key)} was not saved: the server has ended the transaction of the batch ({said(error)})"
        )
        conflict.__cause__ = error
        return conflict

    def _bound_locks(self) -> None:
        statement = bounds.mysql_lock_bound(remaining())
        if self.connection.info.get("geventbatch") != statement:
            self.connection.exec_driver_sql(statement)
            self.connection.info["geventbatch"] = statement

    def _bounded(self, *call: Any) -> tuple[str, Any]:
        """Add the bound to a statement, as a listener of `before_cursor_execute`."""
        connection, _, statement, parameters, _, executemany = call
        mariadb = _is_mariadb(connection)
        if not (mariadb and executemany):
            statement = bounds.bounded_mysql(statement, remaining(), mariadb=mariadb)
        return statement, parameters


def _is_mariadb(connection: Connection) -> bool:
    return bool(getattr(connection.dialect, "is_mariadb", False))
