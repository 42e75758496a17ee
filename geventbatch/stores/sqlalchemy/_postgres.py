"""A batch's transaction on PostgreSQL, through any driver."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final
from zoneinfo import ZoneInfo

from sqlalchemy.exc import SQLAlchemyError

from geventbatch.stores._sql import bounds, commit
from geventbatch.stores.sqlalchemy._engines import beside
from geventbatch.stores.sqlalchemy._transaction import Transaction, remaining

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable
    from datetime import tzinfo

    from sqlalchemy import Engine

_LEVEL: Final = "geventbatch: level"
"""The key, in a connection's `info`, that says that its default isolation level is not READ COMMITTED."""


class PostgresTransaction(Transaction):
    """PostgreSQL through any driver. It knows the transaction's id from the load on, to ask for its outcome."""

    leaves_out = True

    _xid: str | None = None
    _threshold: int | None = None  # psycopg's `prepare_threshold`
    _is_direct = False  # no pooler is in between: the session is the one of the connect

    def begin(self) -> None:
        self._driver: Any = self.connection.connection.driver_connection
        self._prepare_nothing(self._driver)
        if self.locking and self.connection.info.get(_LEVEL):
            self.connection.exec_driver_sql(bounds.READ_COMMITTED)
        bound = bounds.postgres_bound_and_xid(remaining(), level=self.locking, backend=self._threshold is not None)
        row = self.connection.exec_driver_sql(bound).one()
        self._xid = row[1]
        self._is_direct = self._threshold is not None and row[-1] == _process_of(self._driver)
        if self.locking and row[2] != bounds.LEVEL:  # the default of the server, or of the role
            self.connection.info[_LEVEL] = True
            self.connection.rollback()
            self.begin()
        elif self._is_direct:
            self._prepare_again(self._driver)

    def before_writes(self) -> None:
        self._prepare_nothing(self._driver)  # the bound is another text each time
        self.connection.exec_driver_sql(bounds.postgres_bound(remaining()))
        if self._is_direct:
            self._prepare_again(self._driver)

    def end(self, error: BaseException | None = None, lost: Collection[Hashable] = ()) -> None:
        if not self.connection.closed and not self.connection.invalidated:
            self._prepare_again(self._driver)
        super().end(error, lost)

    def _prepare_nothing(self, driver: Any) -> None:
        """Turn off psycopg's prepared statements: behind a pooler, another client may have their session by then."""
        threshold = getattr(driver, "prepare_threshold", None)
        if threshold is not None:
            self._threshold = threshold
            driver.prepare_threshold = None

    def _prepare_again(self, driver: Any) -> None:
        if self._threshold is not None and driver is not None:  # else the connection is gone
            driver.prepare_threshold = self._threshold

    def has_failed(self) -> bool:
        if self.connection.invalidated:
            return True
        return self.status() in {commit.ACTIVE, commit.FAILED, commit.UNKNOWN}

    def in_time(self, error: BaseException | None) -> bool:
        if self.connection.closed or self.connection.invalidated:
            return super().in_time(error)
        # A statement that an operation's own Timeout has interrupted goes on in the server.
        return super().in_time(error) and self.status() not in {commit.ACTIVE, commit.UNKNOWN}

    def zone(self) -> tzinfo | None:
        info = getattr(self.connection.connection.driver_connection, "info", None)
        found: tzinfo | None = getattr(info, "timezone", None)
        if found is not None:
            return found
        ask = getattr(info, "parameter_status", None)  # psycopg2's
        name = None if ask is None else ask("TimeZone")
        with suppress(ValueError, OSError, LookupError):  # a zone that only the server knows
            return None if name is None else ZoneInfo(name)
        return None

    def was_not_committed(self) -> bool:
        if self.connection.closed or self.connection.invalidated:
            return False
        return commit.was_not_committed(self._driver)

    def status(self) -> int | None:
        """Return the transaction's status as the driver knows it: `commit.IDLE` and so on."""
        return commit.transaction_status(self._driver)

    def ask_outcome(self) -> bool | None:
        xid = self.xid()
        return super().ask_outcome() if xid is None else outcome(self.engine, self.key, xid, remaining())

    def xid(self) -> str | None:
        """Return the transaction's id; None before it is known."""
        return self._xid


def _process_of(driver: Any) -> int:
    """Return the pid of the server process, as of the connect; a pooler reports another number."""
    found: int = driver.info.backend_pid
    return found


def outcome(engine: Engine, key: Hashable, xid: str, seconds: float) -> bool | None:
    """Ask PostgreSQL until it knows whether a transaction was committed. None: unknown by then. Switches: yes."""

    def once(question: str) -> str | None:
        try:
            with beside(engine, key) as connection:
                status: str | None = connection.exec_driver_sql(question).scalar()
        except SQLAlchemyError:
            return commit.NO_ANSWER
        return status

    return commit.postgres_fate(xid, once, seconds)
