"""An engine on the connection of a test."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

_SAVEPOINT: Final = "geventbatch_joined"


def joined_engine(connection: Connection) -> Engine:
    """Give an engine whose transactions are savepoints in the one of *connection*: for a `SQLAlchemyStore` in a test.

    What a batch commits is seen on *connection*, and by a session that is joined into its transaction, and goes when
    that is rolled back. Since there is one connection, one transaction at a time can be on it: turn batching off
    (`batching_off`). Whatever else the engine of *connection* has, types and serializers among it, this one has too.
    An operation that is interrupted is rolled back; a caller that is interrupted (a kill, a `gevent.Timeout`) while
    a statement is under way costs the test its connection, as with every driver.

    Args:
        connection: Of the test; its transaction begins here, if it has none. It has to stay open as long as the engine
            is used.

    Raises:
        RuntimeError: Of the store's transactions, and so a `LoadFailed`: another one is on the connection already.
    Switches: yes, as the driver does.
    """
    from sqlalchemy import Engine, StaticPool  # only who tests a store of it needs it

    if not connection.in_transaction():
        connection.begin()
    driver: Any = connection.connection.dbapi_connection
    if connection.dialect.name == "sqlite" and not driver.in_transaction:
        driver.execute("BEGIN")  # sqlite3 has not, and would take the end of the first savepoint for COMMIT
    dialect = copy(connection.dialect)
    _Savepoints(dialect)
    pool = StaticPool(lambda: driver, reset_on_return=None, dialect=dialect)
    return Engine(pool, dialect, connection.engine.url)


class _Savepoints:
    """Begins, commits and rolls back savepoints in place of transactions."""

    def __init__(self, dialect: Any) -> None:
        dialect.do_begin, dialect.do_commit, dialect.do_rollback = self.begin, self.commit, self.roll_back
        dialect.do_close = self.roll_back  # what was given up: the connection is the test's
        dialect.driver = f"{dialect.driver}, joined"  # which no store knows to send COMMIT by itself
        # -- mutable state ---------------------------------------------------------------------------------
        self._begun = False

    def begin(self, driver: Any) -> None:
        if self._begun:
            raise RuntimeError(
                "another transaction is on the test's connection, which takes one at a time: turn batching off "
                "(geventbatch.testing.batching_off)"
            )
        _execute(driver, f"SAVEPOINT {_SAVEPOINT}")
        self._begun = True

    def commit(self, driver: Any) -> None:
        if self._begun:
            self._begun = False
            _execute(driver, f"RELEASE SAVEPOINT {_SAVEPOINT}")

    def roll_back(self, driver: Any) -> None:
        if self._begun:
            self._begun = False
            _execute(driver, f"ROLLBACK TO SAVEPOINT {_SAVEPOINT}")
            _execute(driver, f"RELEASE SAVEPOINT {_SAVEPOINT}")


def _execute(driver: Any, statement: str) -> None:
    cursor = driver.cursor()
    try:
        cursor.execute(statement)
    finally:
        cursor.close()
