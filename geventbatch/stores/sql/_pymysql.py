"""A batch's transaction through PyMySQL, on MySQL or MariaDB."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from pymysql.constants.SERVER_STATUS import SERVER_STATUS_IN_TRANS
from pymysql.cursors import Cursor

from geventbatch.stores._sql import bounds
from geventbatch.stores.sql._transaction import SAVEPOINT, UNFIT, Loaded, Transaction, grouped, lost, remaining, unfit

if TYPE_CHECKING:
    from pymysql.connections import Connection

    from geventbatch.stores.sql._transaction import Change, Save

_MATCHED: Final = re.compile(rb"Rows matched: (\d+)")

_bounded: Final[WeakKeyDictionary[Connection[Any], str]] = WeakKeyDictionary()
"""The statement that has bounded the waits for locks of a connection last."""


class PyMySQLTransaction(Transaction):
    """MariaDB bounds any statement; MySQL bounds SELECT by a hint, and waits for locks by a setting of the session.

    The setting stays on the connection, and is sent only when it changes.
    """

    mysql = True

    # -- mutable state ---------------------------------------------------------------------------------------
    _is_open = False  # something was sent since the last COMMIT or ROLLBACK
    _sends_rows = False  # the statements of the save itself are done

    def is_idle(self) -> bool:
        return not self.driver.server_status & SERVER_STATUS_IN_TRANS

    def begin(self) -> None:
        self._mariadb = "MariaDB" in self.driver.server_version
        self._cursor = Cursor(self.driver)  # each answer is fetched before the next statement is sent
        self._bound_locks()
        self.begin_again()

    def begin_again(self) -> None:
        if self.driver.get_autocommit():  # else any statement begins
            self.driver.begin()

    def fetch(self, text: str, parameters: Any) -> Loaded:
        cursor = self._executed(text, parameters)
        return Loaded(tuple([column[0] for column in cursor.description or ()]), list(cursor.fetchall()))

    def send(self, text: str, parameters: Any) -> Cursor:
        if not isinstance(parameters, list):
            return self._executed(text, parameters)
        self._is_open = True
        self._cursor.executemany(text, parameters)
        return self._cursor

    def write(self, save: Save) -> None:
        self._sends_rows = False
        self._bound_locks()
        if save.stays:
            self.send(SAVEPOINT, None)
        if save.recording is not None:
            save.recording.send(self.send)
        for change in save.changes:
            cursor = self._executed(change.statement.text, change.parameters)
            found = _found(cursor)
            if found != 1:
                raise lost(change, found)
        self._sends_rows = True
        for text, every in grouped(save.rows, mysql=True) if save.rows else ():
            try:
                self.send(text, every if len(every) > 1 else every[0])
            except UNFIT as error:
                raise unfit(text, error) from error
        self.commit_is_sent()
        self.driver.commit()
        self._is_open = False

    def is_at_fault(self, change: Change) -> bool:  # noqa: ARG002 - each was sent by itself
        return not self._sends_rows

    def roll_back(self) -> None:
        if self._is_open:
            self.driver.rollback()
            self._is_open = False

    def is_usable(self) -> bool:
        return bool(self.driver.open)

    def restore(self) -> None:
        pass

    def _executed(self, text: str, parameters: Any) -> Cursor:
        self._is_open = True
        self._cursor.execute(bounds.bounded_mysql(text, remaining(), mariadb=self._mariadb), parameters)
        return self._cursor

    def _bound_locks(self) -> None:
        if self._mariadb:
            return
        statement = bounds.mysql_lock_bound(remaining())
        if _bounded.get(self.driver) != statement:
            self._executed(statement, None)
            _bounded[self.driver] = statement


def _found(cursor: Any) -> int:
    """Return how many rows an UPDATE has found: its count has only those in which a value has become another one."""
    if cursor.rowcount == 0:
        told = _MATCHED.search(getattr(getattr(cursor, "_result", None), "message", None) or b"")
        if told is not None:
            return int(told[1])
    return int(cursor.rowcount)
