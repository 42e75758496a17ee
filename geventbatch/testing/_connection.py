"""An engine on a test's connection."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

_SAVEPOINT: Final = "geventbatch_joined"


def joined_engine(connection: Connection) -> Engine:
    """Return an engine whose transactions are savepoints in the one of *connection*: for a `SQLAlchemyStore` in a test.

    A batch's commits are seen on *connection*, and by a session joined into its transaction, and are undone when that
    is rolled back. There is one connection, so one transaction at a time: turn batching off (`batching_off`). The new
    engine has all that the engine of *connection* has, such as types and serializers. If an operation is interrupted,
    it is rolled back. If its caller is interrupted (a kill, a `gevent.Timeout`) during a statement, the test loses its
    connection, as with every driver.

    Args:
        connection: The test's connection. Its transaction begins here, if it has none. It must stay open as long as the
            engine is used.

    Raises:
        RuntimeError: Raised by a store's transaction, so a `LoadFailed`: another one is on the connection already.
    Switches: yes, as the driver does.
    """
    from sqlalchemy import Engine, StaticPool  # needed only to test a store of SQLAlchemy's

    if not connection.in_transaction():
        connection.begin()
    driver: Any = connection.connection.dbapi_connection
    if connection.dialect.name == "sqlite" and not driver.in_transaction:
        driver.execute("BEGIN")  # sqlite3 has not sent it, and would take the end of the first savepoint for COMMIT
    dialect = copy(connection.dialect)
    _Savepoints(dialect)
    pool = StaticPool(lambda: driver, reset_on_return=None, dialect=dialect)
    return Engine(pool, dialect, connection.engine.url)


class _Savepoints:
    """Begins, commits and rolls back savepoints instead of transactions."""

    def __init__(self, dialect: Any) -> None:
        dialect.do_begin, dialect.do_commit, dialect.do_rollback = self.begin, self.commit, self.roll_back
        dialect.do_close = self.roll_back  # of a connection given up, which is the test's
        dialect.driver = f"{dialect.driver}, joined"  # so that no store sends COMMIT by itself
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
