"""A batch's transaction on SQLite, whose driver blocks the process."""

from __future__ import annotations

import sqlite3
from typing import cast

from geventbatch._safe_repr import shown
from geventbatch.errors import NotSaved
from geventbatch.stores._sql import bounds, errors
from geventbatch.stores._sql.commit import polls
from geventbatch.stores.sqlalchemy._transaction import Transaction, remaining


class SQLiteTransaction(Transaction):
    """SQLite, whose driver blocks the whole process: the write lock is held from the first write to COMMIT.

    No greenlet switches in between, so that no batch ever waits for another one of its process. While another process
    writes, the batch polls every few milliseconds, and other greenlets run, instead of waiting in the driver.
    """

    leaves_out = True
    writes_anywhere = False

    def before_writes(self) -> None:
        driver = self._driver()
        if driver.in_transaction:
            return
        ((patience,),) = driver.execute("PRAGMA busy_timeout")
        driver.execute("PRAGMA busy_timeout = 0")
        try:
            self._lock(driver)
        finally:
            driver.execute(f"PRAGMA busy_timeout = {patience}")

    def begin_to_write(self) -> None:
        self.before_writes()

    def was_not_committed(self) -> bool:
        return not self.connection.invalidated and self._driver().in_transaction

    def _driver(self) -> sqlite3.Connection:
        return cast("sqlite3.Connection", self.connection.connection.driver_connection)

    def _lock(self, driver: sqlite3.Connection) -> None:
        error: sqlite3.OperationalError | None = None
        for _ in polls(bounds.bound_seconds(remaining())):
            try:
                driver.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as busy:
                if errors.kind(busy) is not errors.Kind.CONFLICT:
                    raise
                error = busy
        raise NotSaved(f"{shown(self.key)} was not saved: another process holds SQLite's write lock") from error

    def ask_outcome(self) -> bool | None:
        return None  # asking would block the process
