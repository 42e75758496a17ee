"""A transaction through psycopg 3's pipeline: BEGIN, bounds and SELECT are one round trip, and the save is another.

SQLAlchemy knows nothing of it. It is given cursors that send more than it asked them to, or wait for less:

- The first statement of a transaction, and of a save that is not collected, brings along what has to stand before it.
- While a save is collected, no statement is waited for, and COMMIT comes right behind the last one. If a statement
  fails, PostgreSQL skips all that come after it, COMMIT too. A change that finds no row is no failure for PostgreSQL,
  so each that has to find one is sent in a form that makes it one.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import psycopg
from sqlalchemy.exc import DBAPIError

from geventbatch.errors import Conflict, Rejected
from geventbatch.stores import _sql
from geventbatch.stores._transaction import PostgresTransaction, cause, remaining

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Self

    from psycopg.abc import Params
    from sqlalchemy.sql.base import Executable

_RETURNS: Final = re.compile(r"\bRETURNING\b", re.IGNORECASE)

_NO_ROW: Final = "rows were changed in place of 1"

_CHECKED: Final = (
    "WITH changed AS (%s RETURNING 1) SELECT CASE count(*) WHEN 1 THEN 1 "  # noqa: S608 - of a statement that SQLAlchemy has compiled
    "ELSE CAST(count(*) || ' " + _NO_ROW + "' AS integer) END FROM changed"
)
"""Fails, by a text that is no number, unless the statement changes exactly one row."""


def has_pipeline() -> bool:
    """Whether libpq has it (since PostgreSQL 14; the server may be older)."""
    return psycopg.Pipeline.is_supported()


class PipelinedTransaction(PostgresTransaction):
    """As its parent, in two round trips; in three where a save cannot be collected."""

    # -- mutable state ---------------------------------------------------------------------------------------
    before: list[str]  # to be sent with the next statement
    collecting: psycopg.Pipeline | None  # that of a save
    checked: bool  # the next statement has to change one row
    _xid_cursor: psycopg.Cursor[Any]

    def begin(self) -> None:
        self._driver = cast("psycopg.Connection[Any]", self.connection.connection.driver_connection)
        self._autocommit = self._driver.autocommit
        self._cursor_factory = self._driver.cursor_factory
        self._xid_cursor = psycopg.Cursor(self._driver)
        self.collecting, self.checked = None, False
        self.before = [_begin(self._driver), _sql.postgres_bound_and_xid(remaining())]
        # So that psycopg leaves BEGIN to us: of its own, it would wait for it.
        self._driver.autocommit = True
        self._driver.cursor_factory = cast("type[psycopg.Cursor[Any]]", partial(_Cursor, self))

    def xid(self) -> str | None:
        row = self._xid_cursor.fetchone() if self._xid_cursor.pgresult else None
        return None if row is None else str(row[1])

    def before_writes(self) -> None:
        self.before = [_sql.postgres_bound(remaining())]

    def change(self, statement: Executable, parameters: dict[str, Any]) -> None:
        if self.collecting is None:
            super().change(statement, parameters)
            return
        self.checked = True
        self.connection.execute(statement, parameters)

    def write(self, writes: Callable[[], object], *, collected: bool = True) -> None:
        """Send all of it and COMMIT, and wait once. Where not *collected*, wait for each statement and for COMMIT."""
        if not collected:
            super().write(writes)
            return
        sent = False
        try:
            with self.pipelined() as pipeline:
                self._send(_sql.postgres_bound(remaining()))
                self.collecting = pipeline
                try:
                    writes()
                finally:
                    self.collecting = None
                sent = True
                self._send("COMMIT")
        except Exception as raised:
            error = _wrapped(raised)
            if _NO_ROW in str(error):
                raise Conflict(f"{self.key!r} was not saved: somebody else changed it since it was loaded") from error
            if not sent:
                raise self.not_saved(error) from cause(error)
            self.settle(error)
        else:
            self.committer()  # which finds nothing left to send

    def commit_now(self) -> None:
        if self.has_failed():
            # COMMIT would be no error: PostgreSQL takes it for ROLLBACK.
            raise Rejected(f"{self.key!r} was not saved: a statement has failed, and who sent it went on")
        super().commit_now()

    def end(self, error: BaseException | None = None) -> None:
        if self.in_time(error) and not self.connection.closed:
            try:
                self._driver.rollback()  # nothing after COMMIT
                self._driver.autocommit = self._autocommit
                self._driver.cursor_factory = self._cursor_factory
            except BaseException as failed:
                self.discard()
                if not isinstance(failed, Exception):  # the deadline, or a kill
                    raise
        super().end(error)

    def discard(self) -> None:
        self._driver.cursor_factory = self._cursor_factory  # which leads back to here
        super().discard()

    def send_before(self) -> None:
        """Send what has to stand before a statement, without waiting for it."""
        before, self.before = self.before, []
        for statement in before:
            self._send(statement)

    def checks(self, query: str) -> bool:
        """Whether this statement has to change one row for each set of its parameters."""
        checked, self.checked = self.checked, False
        return checked or (query.startswith(("UPDATE", "DELETE")) and not _RETURNS.search(query))

    def _send(self, statement: str) -> None:
        cursor = self._xid_cursor if statement.startswith("SELECT set_config") else psycopg.Cursor(self._driver)
        cursor.execute(statement.encode(), prepare=False)  # its bound makes it another one each time

    @contextmanager
    def pipelined(self) -> Iterator[psycopg.Pipeline]:
        """Wait for nothing until the block is left; then for all at once."""
        waiting = self._driver.pipeline()
        pipeline = waiting.__enter__()
        try:
            yield pipeline
        except BaseException as error:
            if not isinstance(error, Exception):
                self._driver.close()  # else leaving would wait for answers, and nobody could interrupt it any more
            waiting.__exit__(type(error), error, error.__traceback__)
            raise
        try:
            waiting.__exit__(None, None, None)
        except Exception as error:
            interruption = _interruption(error)
            if interruption is not None:
                raise interruption from None
            raise


class _Cursor(psycopg.Cursor[Any]):
    """What SQLAlchemy executes a batch's statements with."""

    def __init__(self, transaction: PipelinedTransaction, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._transaction = transaction
        self._expected = 0  # rows, of a statement that is not waited for

    @property
    def rowcount(self) -> int:
        """While nobody waits: as many rows as there were parameters, since any other number makes it fail."""
        return self._expected or super().rowcount

    def execute(self, query: Any, params: Params | None = None, **options: Any) -> Self:
        transaction = self._transaction
        if transaction.collecting is not None:
            self._expected = int(transaction.checks(query))
            super().execute(_CHECKED % query if self._expected else query, params, **options)
            if _RETURNS.search(query):  # SQLAlchemy looks at what it returns
                transaction.collecting.sync()
        elif transaction.before:
            with transaction.pipelined():
                transaction.send_before()
                super().execute(query, params, **options)
        else:
            super().execute(query, params, **options)
        return self

    def executemany(self, query: Any, params_seq: Iterable[Params], *, returning: bool = False) -> None:
        transaction = self._transaction
        if transaction.collecting is not None:
            every = list(params_seq)
            self._expected = len(every) if transaction.checks(query) else 0
            super().executemany(_CHECKED % query if self._expected else query, every, returning=returning)
        elif transaction.before:
            with transaction.pipelined():
                transaction.send_before()
                super().executemany(query, params_seq, returning=returning)
        else:
            super().executemany(query, params_seq, returning=returning)


def _begin(driver: psycopg.Connection[Any]) -> str:
    level = driver.isolation_level
    return "BEGIN" if level is None else f"BEGIN ISOLATION LEVEL {psycopg.IsolationLevel(level).name.replace('_', ' ')}"


def _wrapped(error: Exception) -> Exception:
    """As SQLAlchemy wraps a driver's error: callers look for that."""
    if not isinstance(error, psycopg.Error):
        return error
    wrapped: Exception = DBAPIError.instance(None, None, error, psycopg.Error)
    wrapped.__cause__ = error
    return wrapped


def _interruption(error: BaseException) -> BaseException | None:
    """The kill or Timeout in whose course psycopg raised *error*, in its place."""
    one: BaseException | None = error
    while one is not None and isinstance(one, Exception):
        one = one.__context__
    return one
