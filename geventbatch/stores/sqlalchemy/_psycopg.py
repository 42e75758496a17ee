"""A transaction through psycopg 3 in which BEGIN, bounds and SELECT are one round trip, and the save is another.

They are sent as one message of several statements, into which psycopg puts the values on the client. (Its pipeline mode
takes as many round trips, and a turn of the hub for each statement.) If a statement fails, PostgreSQL skips all later
ones of the message, COMMIT too. SQLAlchemy knows nothing of this. It gets cursors that send more than it has asked for,
or wait for less:

- The first statement of a transaction, and of a save that is not collected, takes along the statements before it.
- While a save is collected, nothing is sent before COMMIT. A change that finds no row is no error for PostgreSQL, so
  each change that has to find one is sent in a form that makes it one.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Final, cast

import psycopg
from psycopg.adapt import Transformer
from psycopg.pq import TransactionStatus
from sqlalchemy.exc import DBAPIError

from geventbatch.stores._give_back import give_back
from geventbatch.stores._sql import bounds, commit, errors
from geventbatch.stores._sql import statements as sql_statements
from geventbatch.stores._sql.joined import checked, insert_of_a_row
from geventbatch.stores._sql.libpq import exchange
from geventbatch.stores._sql.psycopg_text import encoded, join_each
from geventbatch.stores.sqlalchemy._commit_progress import COMMIT, DONE, SENT
from geventbatch.stores.sqlalchemy._engines import is_watched
from geventbatch.stores.sqlalchemy._postgres import PostgresTransaction
from geventbatch.stores.sqlalchemy._savepoint import SET
from geventbatch.stores.sqlalchemy._texts import fixed
from geventbatch.stores.sqlalchemy._transaction import LostRow, Transaction, cause, remaining

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
    from typing import Self

    from psycopg.abc import Params
    from psycopg.pq.abc import PGresult
    from sqlalchemy import Connection
    from sqlalchemy.sql.base import Executable

    from geventbatch.errors import NotSaved
    from geventbatch.stores._sql.outcomes import Recording
    from geventbatch.stores.sqlalchemy._texts import Fixed

_RETURNS: Final = re.compile(r"\bRETURNING\b", re.IGNORECASE)

_WRITES: Final = frozenset({"INSERT", "UPDATE", "DELETE"})
_CHANGES: Final = frozenset({"UPDATE", "DELETE"})


class JoinedTransaction(PostgresTransaction):
    """PostgreSQL in two round trips; in more if a save cannot be collected."""

    collects = True

    # -- mutable state ---------------------------------------------------------------------------------------
    _is_known: bool = False  # SQLAlchemy knows of the transaction, and executes its statements
    _is_unwatched: bool = False  # nobody listens to what SQLAlchemy executes, as was found in this transaction
    _failure: Exception | None  # what SQLAlchemy's next statement raises
    before: list[str]  # statements to send with the next one
    precedes: bool  # add what is executed to `before`
    collected: list[str] | None  # the statements of a save, while it is collected
    checked: int  # rows that the next statement has to change; 0: as its text says

    @property
    def connection(self) -> Connection:
        """SQLAlchemy's connection, which knows of the transaction from the first time that this is asked for.

        A batch whose statements are all fixed does not ask: SQLAlchemy, and psycopg's cursors, cost more than both
        messages and all that they wait for.
        """
        if not self._is_known:
            self._is_known = True
            self._make_known()
        return self._connection

    def begin(self) -> None:
        self._driver = cast("psycopg.Connection[Any]", self._connection.connection.driver_connection)
        self._autocommit = self._driver.autocommit
        self._cursor_factory = self._driver.cursor_factory
        self.precedes, self.collected, self.checked, self._failure = False, None, 0, None
        self.before = [
            bounds.BEGIN if self.locking else _begin(self._driver),
            bounds.postgres_bound_and_xid(remaining()),
        ]

    def _make_known(self) -> None:
        self._prepare_nothing(self._driver)
        self._driver.cursor_factory = cast("type[psycopg.Cursor[Any]]", partial(_Cursor, self))
        if self.status() in {TransactionStatus.INTRANS, TransactionStatus.INERROR}:
            self._connection.begin()
        elif not _TAKES_RESULTS:
            self.leave_begin_to_us()

    def leave_begin_to_us(self) -> None:
        """Have psycopg's own cursors send no BEGIN, for which they would wait, before the first message."""
        if self.status() == TransactionStatus.IDLE:
            self._driver.autocommit = True

    def begin_again(self) -> None:
        self._driver.autocommit = True
        self.before = [_begin(self._driver)]

    def before_writes(self) -> None:
        self.before = self.before or [bounds.postgres_bound(remaining())]  # unless BEGIN stands there, with a bound

    def precede(self, statement: Executable, parameters: dict[str, Any]) -> None:
        with self.holding_back():
            super().precede(statement, parameters)

    @contextmanager
    def holding_back(self) -> Iterator[None]:
        self.precedes = True
        try:
            yield
        finally:
            self.precedes = False

    def fetch(self, statement: Executable, parameters: dict[str, Any]) -> Sequence[Any] | None:
        known = self._fixed(statement)
        transformer = Transformer(self._driver)
        text = None if known is None else known.text.of(parameters, transformer)
        if known is None or text is None:
            return super().fetch(statement, parameters)
        message, self.before = encoded(self._driver, [*self.before, text]), []
        try:
            results = exchange(self._driver, message)
        except psycopg.Error as error:
            self._failure = error  # SQLAlchemy has to know that as if it had sent the statement
            try:
                return super().fetch(statement, parameters)
            except DBAPIError as wrapped:
                raise wrapped from error
        for result in results:
            self.take_xid(result)
        return known.row(results[-1], transformer)

    def _fixed(self, statement: Executable) -> Fixed | None:
        """Return the compiled form of *statement*; None if SQLAlchemy has to execute it."""
        if not self._is_known and not self._is_unwatched:
            self._is_unwatched = not is_watched(self.engine)
        return fixed(statement) if self._is_unwatched and not self._is_known else None

    def change(self, statement: Executable, parameters: dict[str, Any], rows: int = 1) -> None:
        if self.collected is None:
            super().change(statement, parameters, rows)
            return
        known = self._fixed(statement) if rows == 1 else None
        if known is not None and known.changing is not None:
            text = known.changing.of(parameters, Transformer(self._driver))
            if text is not None:
                self.collected.append(text)
                return
        self.checked = rows
        self.connection.execute(statement, parameters)

    def record(self, recording: Recording) -> None:
        """Send outcomes; in a save that is collected, let the server set the savepoint."""
        if self.collected is None:
            super().record(recording)
        else:
            self.collected += [SET, self.join(*recording.statement())]

    def write(
        self, writes: Callable[[], object], recording: Recording | None = None, *, collected: bool = True
    ) -> None:
        """Send all statements with COMMIT, and wait once. If not *collected*, wait for each, and for COMMIT."""
        if not collected:
            super().write(writes, recording)
            return
        try:
            statements = self._collect(writes, recording)
            self.check_whole()
            message = encoded(self._driver, [*statements, "COMMIT"])
            self._driver.pgconn.socket  # noqa: B018 - raises where the connection is closed
        except Exception as raised:
            self.check_repeated(raised, recording)
            raise self.not_saved(raised) from cause(raised)
        self._commit = {COMMIT: SENT}
        try:
            exchange(self._driver, message)
        except Exception as raised:
            self.check_repeated(raised, recording)
            self.resolve(_wrapped(raised))
        else:
            self._commit = {COMMIT: DONE}
            try:
                if self._is_known:
                    (self.committer or self._connection.commit)()  # it finds nothing left to send
            except Exception as raised:
                self.resolve(raised)

    def not_saved(self, error: Exception) -> NotSaved:
        if errors.is_marked(error):
            return errors.changed(self.key, LostRow)
        return super().not_saved(error)

    def check_whole(self) -> None:
        if self._is_known or self.status() not in {TransactionStatus.IDLE, TransactionStatus.INTRANS}:
            super().check_whole()

    def end(self, error: BaseException | None = None, lost: Collection[Hashable] = ()) -> None:
        if error is None and not self._is_known and self.status() == TransactionStatus.IDLE:
            give_back(self.key, self._connection.close, saved=True, lost=lost)
        else:
            Transaction.end(self, error, lost)  # the parent's would prepare again, as `close` does

    def in_time(self, error: BaseException | None) -> bool:
        return Transaction.in_time(self, error) and self.status() not in {commit.ACTIVE, commit.UNKNOWN}

    def close(self, error: BaseException | None) -> None:  # noqa: ARG002 - for the parent
        if self.status() != TransactionStatus.IDLE:
            self._driver.rollback()
        if self._driver.autocommit != self._autocommit:
            self._driver.autocommit = self._autocommit
        self._driver.cursor_factory = self._cursor_factory
        self._prepare_again(self._driver)
        self.connection.close()

    def discard(self) -> None:
        self._driver.cursor_factory = self._cursor_factory  # breaks a reference cycle
        super().discard()

    def status(self) -> int | None:
        found: int = self._driver.pgconn.transaction_status
        return found

    def raise_failure(self) -> None:
        """Raise what a message has raised that was sent without SQLAlchemy."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def checks(self, query: str) -> int:
        """Return how many rows this statement has to change for each set of parameters; 0: any number."""
        checked, self.checked = self.checked, 0
        return checked or int(_changes(query))

    def join(self, query: str, params: Params | None) -> str:
        """Return a statement with its values."""
        return self.join_each(query, [params])[0]

    def join_each(self, query: str, every: list[Any]) -> list[str]:
        """Return a statement, or a part of one, with each of these values."""
        return join_each(self._driver, query, every)

    def began(self, cursor: psycopg.Cursor[Any]) -> None:
        """Take the transaction's id from the answers, and leave *cursor* at the last one."""
        while True:
            if cursor.pgresult is not None:
                self.take_xid(cursor.pgresult)
            if not cursor.nextset():
                return

    def take_xid(self, result: PGresult) -> None:
        """Take the transaction's id, if *result* has it."""
        if result.nfields == len(_TOLD) and result.fname(0) == _TOLD[0] and result.fname(1) == _TOLD[1]:
            self._xid = (result.get_value(0, 1) or b"").decode()

    def _collect(self, writes: Callable[[], object], recording: Recording | None) -> list[str]:
        begin, self.before = self.before[:1], []  # BEGIN, if nothing was loaded
        self.collected = [*begin, bounds.postgres_bound(remaining())]
        try:
            if recording is not None:
                self.collected.append(self.join(*recording.statement()))
            writes()
            return self.collected
        finally:
            self.collected = None


_TOLD: Final = (b"set_config", b"pg_current_xact_id")
"""The columns of `bounds.postgres_bound_and_xid`'s answer."""


_TAKES_RESULTS: Final = all(hasattr(psycopg.Cursor, name) for name in ("_set_results", "_tx"))
"""A cursor can be given what `exchange` has received: for a third of what it costs to have it wait itself."""


class _Cursor(psycopg.Cursor[Any]):
    """The cursor with which SQLAlchemy executes a batch's statements."""

    def __init__(self, transaction: JoinedTransaction, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._transaction = transaction
        self._expected = 0  # rows of a collected statement

    @property
    def rowcount(self) -> int:
        """The number of expected rows while nothing is sent, since any other number makes the statement fail."""
        return self._expected or super().rowcount

    def execute(self, query: Any, params: Params | None = None, **options: Any) -> Self:
        transaction = self._transaction
        transaction.raise_failure()
        if transaction.collected is not None:
            self._collect(transaction.collected, query, [params])
            if self._expected:
                return self
            returns = _RETURNS.search(query) or sql_statements.first_word(query) not in _WRITES
            if returns:  # SQLAlchemy reads the result
                self._send(transaction.collected)
        elif transaction.precedes:
            transaction.before.append(transaction.join(query, params))
        elif transaction.before:
            transaction.before.append(transaction.join(query, params))
            self._send(transaction.before)
        else:
            super().execute(query, params, **options)
        return self

    def executemany(self, query: Any, params_seq: Iterable[Params], *, returning: bool = False) -> None:
        transaction = self._transaction
        if transaction.collected is not None:
            self._collect(transaction.collected, query, list(params_seq))
            return
        if transaction.before:
            before, transaction.before = transaction.before, []
            transaction.leave_begin_to_us()
            transaction.began(send(psycopg.Cursor(self.connection), before))
        super().executemany(query, params_seq, returning=returning)

    def _collect(self, collected: list[str], query: str, every: list[Any]) -> None:
        rows = self._transaction.checks(query)
        self._expected = rows * len(every)
        if rows:
            query = _checked(query, rows)
        elif len(every) > 1 and (inserts := insert_of_a_row(query)) is not None:
            head, values = inserts
            collected.append(head + ", ".join(self._transaction.join_each(values, every)))
            return
        collected += self._transaction.join_each(query, every)

    def _send(self, statements: list[str]) -> None:
        message = encoded(self.connection, statements)
        statements.clear()
        if not _TAKES_RESULTS:
            super().execute(message, prepare=False)
            self._transaction.began(self)
            return
        results = exchange(self.connection, message)
        for result in results:
            self._transaction.take_xid(result)
        self._tx = Transformer(self)  # as its `execute` does
        self._set_results(results[-1:])  # what SQLAlchemy has asked for


def send(cursor: psycopg.Cursor[Any], statements: list[str]) -> psycopg.Cursor[Any]:
    """Send *statements* as one message, and wait for the answers."""
    return cursor.execute(encoded(cursor.connection, statements), prepare=False)


@lru_cache(maxsize=1000)
def _changes(query: str) -> bool:
    """Return whether *query* changes rows, and returns none."""
    return sql_statements.first_word(query) in _CHANGES and not _RETURNS.search(query)


@lru_cache(maxsize=1000)
def _checked(query: str, rows: int) -> str:
    """Return a statement that fails unless *query* finds so many *rows*."""
    return checked(query if sql_statements.first_word(query) == "SELECT" else f"{query}\n RETURNING 1", rows)


def _begin(driver: psycopg.Connection[Any]) -> str:
    level = driver.isolation_level
    return "BEGIN" if level is None else f"BEGIN ISOLATION LEVEL {psycopg.IsolationLevel(level).name.replace('_', ' ')}"


def _wrapped(error: Exception) -> Exception:
    """Return a driver's error as SQLAlchemy wraps it, which callers expect."""
    if not isinstance(error, psycopg.Error):
        return error
    wrapped: Exception = DBAPIError.instance(None, None, error, psycopg.Error)
    wrapped.__cause__ = error
    return wrapped
