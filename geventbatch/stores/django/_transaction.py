"""The transaction of a batch on a Django connection: how it begins, sends statements together, and ends.

Django sees an ordinary `atomic()` block, so operations may use `atomic()` and `on_commit` as everywhere. It differs in
three ways:

- psycopg 3 sends several statements as one message: BEGIN, the bound and the SELECT in one round trip, the last
  statement and COMMIT in another. If one fails, PostgreSQL skips those behind it, COMMIT too. (psycopg's pipeline mode
  does the same, but takes a turn of the hub for each statement.)
- On SQLite the transaction begins with the first statement that writes. From then on, no other writer can begin, and
  one that waits blocks the whole process, even the greenlet that holds the lock.
- Inside an outer transaction (``batching=False`` inside `atomic()`), it is a savepoint.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from math import inf
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from django.db import Error, InterfaceError, OperationalError, connections, transaction

from geventbatch._safe_repr import said, shown
from geventbatch.errors import Conflict, NotSaved, Rejected
from geventbatch.stores._sql import bounds, errors
from geventbatch.stores._sql import commit as _commit
from geventbatch.stores._sql.commit import polls
from geventbatch.stores.django._connections import discard, is_closed
from geventbatch.stores.django._isolation_level import is_mariadb, leave, read_committed
from geventbatch.stores.django._messages import Together, begins

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from django.db.backends.base.base import BaseDatabaseWrapper

    from geventbatch.stores.django._messages import Written

    Execute = Callable[..., Any]
    Statement = tuple[str, Sequence[object] | None]

_READS: Final = frozenset({"SELECT", "PRAGMA", "EXPLAIN"})
_IN_TRANS: Final = 1
"""MySQL's SERVER_STATUS_IN_TRANS."""
_AS_IT_IS: Final = nullcontext()
_SOON: Final = 0.01
"""Seconds before the deadline within which no server is asked any more."""


class Bounded(Protocol):
    """A batch, or all batches of a bulk."""

    @property
    def key(self) -> Hashable:
        """Its key, for messages."""
        raise NotImplementedError

    def remaining(self) -> float:
        """Return the seconds until its deadline."""
        raise NotImplementedError


class Transaction:
    """One attempt's transaction."""

    def __init__(
        self, connection: BaseDatabaseWrapper, batch: Bounded, *, pipeline: bool, locking: bool = False
    ) -> None:
        """Begin nothing yet; send nothing before `begin`."""
        self.connection = connection
        self.nested = connection.in_atomic_block
        """True inside an outer transaction, which commits."""
        self.wrote = False
        """True if a statement of an operation may have written something; on SQLite, if the write lock is taken."""
        self.pipelines = False
        """True if several statements can share a round trip: psycopg 3 inserts their values. Set by `begin`."""
        self.only = False
        """True if the save writes nothing but what it sends with COMMIT."""
        self.over: Exception | None = None
        """The server's error, or the `Conflict`, that has ended the transaction: see `ended_by`."""
        self._batch = batch
        self._pipeline = pipeline
        self._locking = locking
        self._give_level_back: Callable[[], object] = leave
        self._atomic = transaction.atomic(using=connection.alias)
        self._stack = ExitStack()  # the wrappers around what Django executes
        self._xid: str | None = None
        self._begun = False
        self.may_be_committed = False
        self._in_doubt: Exception | None = None  # an error with which MySQL may have ended the transaction
        self.committed = False  # confirmed by the server

    # -- begin ----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin the transaction. With psycopg and on SQLite nothing is sent yet. Switches: yes, to connect."""
        lazily = self.connection.vendor == "sqlite" and not self.nested
        with _disabled(self.connection, "_start_transaction_under_autocommit") if lazily else ExitStack():
            self._atomic.__enter__()
        self._begun = True
        self.pipelines = self._can_pipeline()
        if self.nested:
            return
        cast("Any", self.connection).rollback_exc = None  # Django leaves an earlier transaction's there
        if self.pipelines:
            raw: Any = self.connection.connection
            # psycopg must not send BEGIN, for which it would wait: `loading` does. (Its setter waits, too.)
            raw._autocommit = True
        elif self._locking:
            self._give_level_back = read_committed(self.connection)
        if self.connection.vendor == "mysql":
            self._stack.enter_context(self.connection.execute_wrapper(self._bound_mysql))
        if lazily:
            self._stack.enter_context(self.connection.execute_wrapper(self._begin_to_write))

    @contextmanager
    def loading(self, *first: Statement) -> Iterator[None]:
        """Send *first* and the block's statement in one round trip, behind a bound for all statements to come."""
        if self.nested or self.connection.vendor != "postgresql":
            for statement in first:
                send(self.connection, *statement)
            yield
            return
        bound = (bounds.postgres_bound_and_xid(self._batch.remaining()), None)
        begin = bounds.BEGIN if self._locking else _begin(self.connection.connection)
        before = [*([(begin, None)] if self.pipelines else []), bound, *first]
        together = Together(self, before)
        with self.connection.execute_wrapper(together):
            yield
        together.send()  # if Django knew without a statement that there is no such row
        _, self._xid = together.answers[0]
        if self.pipelines:
            raw: Any = self.connection.connection
            raw._autocommit = False  # as Django believes; the setter refuses inside a transaction

    def saving(self, *checks: Statement, commits: Written | None = None) -> AbstractContextManager[object]:
        """Send the block's statement behind a fresh bound and *checks*; with COMMIT if *commits* describes it.

        With COMMIT, the statement fails unless it writes all its rows. A trigger may leave some out, or a policy hide
        them, and Django would find that out only after COMMIT.
        """
        if self.nested or not self.pipelines:
            return _AS_IT_IS
        before = [(bounds.postgres_bound(self._batch.remaining()), None), *checks]
        return self.connection.execute_wrapper(Together(self, before, commits=commits))

    def _can_pipeline(self) -> bool:
        raw: Any = self.connection.connection
        client_cursor = getattr(sys.modules.get("psycopg"), "ClientCursor", None)
        return self._pipeline and client_cursor is not None and issubclass(_cursor_class(raw), client_cursor)

    # -- around what Django executes ------------------------------------------------------------------------

    def _begin_to_write(self, execute: Execute, sql: Any, params: Any, many: bool, context: Any) -> Any:
        if not self.wrote and not begins(sql, _READS):
            self.take_write_lock()
        return execute(sql, params, many, context)

    def take_write_lock(self) -> None:
        """On SQLite, begin and take the write lock; try again while another writer has it. Switches: yes."""
        if self.connection.vendor != "sqlite" or self.nested or self.wrote:
            return
        raw: Any = self.connection.connection
        for _ in polls(inf):
            try:
                with self.connection.wrap_database_errors:
                    raw.execute("BEGIN IMMEDIATE")
                break
            except Error as error:
                if errors.kind(error) is not errors.Kind.CONFLICT or self._batch.remaining() < _SOON:
                    raise
        self.connection.errors_occurred = False
        self.wrote = True

    def _bound_mysql(self, execute: Execute, sql: Any, params: Any, many: bool, context: Any) -> Any:
        if isinstance(sql, str):
            sql = bounds.bounded_mysql(sql, self._batch.remaining(), mariadb=is_mariadb(self.connection))
        try:
            return execute(sql, params, many, context)
        except Error as error:
            self.has_raised(error)
            raise

    # -- end ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise unless what was sent so far can be committed. Switches: no."""
        over = self.ended_by()
        if over is not None:
            raise over
        failed = self.failed()
        if failed is not None:
            raise Rejected(
                f"{shown(self._batch.key)} was not saved, nothing was written: a statement failed ({failed})"
            ) from failed
        if self.connection.closed_in_transaction or self.connection.connection is None:
            told = f"{shown(self._batch.key)} was not saved, nothing was written: an operation closed its connection"
            raise NotSaved(told)

    def failed(self) -> BaseException | None:
        """Return why nothing can be committed any more, or None. Switches: no."""
        if self.connection.needs_rollback:
            reason = getattr(self.connection, "rollback_exc", None)
            return reason or transaction.TransactionManagementError("the transaction was marked for rollback")
        raw: Any = vars(self.connection)["connection"]
        if self.connection.vendor != "postgresql" or raw is None:
            return None
        status = _commit.transaction_status(raw)
        if status == _commit.FAILED:
            return transaction.TransactionManagementError("an earlier statement of the transaction has failed")
        if raw.closed or status not in {_commit.IDLE, _commit.IN_TRANSACTION}:
            return transaction.TransactionManagementError("a statement was interrupted, and goes on in the server")
        return None

    def has_raised(self, error: Exception) -> None:
        """Note that a statement raised *error*: even if swallowed, it may have ended the transaction. Switches: no."""
        if self.over is not None:
            return
        lost = errors.kind(error) is errors.Kind.LOST and is_closed(self.connection.connection)
        if lost or errors.has_ended(error):
            self.over = error
        elif errors.may_have_ended(error):
            self._in_doubt = error

    def _resolve_doubt(self) -> None:
        """Ask MySQL whether it ended the transaction after too long a lock wait. Switches: yes, after such an error."""
        error, self._in_doubt = self._in_doubt, None
        if error is not None and self.over is None:
            with self.connection.cursor() as cursor:
                cursor.execute(bounds.MYSQL_ENDS)
                if cursor.fetchone()[0]:
                    self.over = error

    def ended_by(self) -> NotSaved | None:
        """Return the error to raise if the transaction was ended by no fault of an operation, or None. Switches: no."""
        if self.over is None or isinstance(self.over, NotSaved):
            return self.over
        found = errors.not_saved(self.over, self._batch.key)
        if errors.has_ended(self.over) or errors.may_have_ended(self.over):
            found = Conflict(
                f"{shown(self._batch.key)} was not saved, nothing was written: the server has ended its transaction "
                f"({self.over})"
            )
        found.__cause__ = self.over
        return found

    @property
    def is_begun(self) -> bool:
        """Return whether it has begun, and neither `commit` nor `roll_back` has ended it."""
        return self._begun

    @property
    def is_committed(self) -> bool:
        """Return whether the server has confirmed COMMIT, sent with the last statement or asked about afterwards."""
        return self.committed or not self._begun

    def has_ended(self) -> bool:
        """Return whether the transaction is no longer open, as far as the client knows. Switches: no."""
        raw: Any = vars(self.connection)["connection"]  # past the guard, which would count it
        vendor = self.connection.vendor
        if vendor == "postgresql":
            return raw is not None and not raw.closed and _commit.transaction_status(raw) == _commit.IDLE
        if vendor == "sqlite":
            return self.wrote and not self.nested and not raw.in_transaction
        status = getattr(raw, "server_status", None)  # PyMySQL's
        return vendor == "mysql" and isinstance(status, int) and not status & _IN_TRANS

    def commit(self) -> None:
        """Commit, unless the last statement has done it. If nested, release the savepoint.

        Raises:
            NotSaved: Certainly nothing was committed.
            Error: The driver's own error; the outcome is unknown.
        Switches: yes.
        """
        self._stack.close()
        if not self._begun:  # found to be committed
            return
        if not self.committed:
            self._resolve_doubt()
            self.check()
        self.may_be_committed = True
        self._begun = False
        self.connection.run_commit_hooks_on_set_autocommit_on = False
        try:
            self._atomic.__exit__(None, None, None)
        except Exception as error:
            self.resolve(_commit_error(error))
        self._give_level_back()

    def resolve(self, error: Exception) -> None:
        """Return if the transaction was committed in spite of *error*; else raise the right error. Switches: yes."""
        told = self._known_outcome()
        _commit.resolve(error, self._batch.key, told=told, ask=self._ask_outcome, not_saved=self._not_saved)
        self.leave_broken()

    def _not_saved(self, error: Exception) -> NotSaved:
        return not_saved(error, self._batch.key)

    def _known_outcome(self) -> bool | None:
        """Return whether COMMIT was carried out, as far as the client knows; None if it does not know."""
        if self.committed or self.connection.run_commit_hooks_on_set_autocommit_on:
            return True  # set when the driver has committed
        if not self.may_be_committed:
            return False
        raw: Any = self.connection.connection
        if raw is None:
            return None
        if self.connection.vendor == "sqlite":
            return False if raw.in_transaction else None
        return False if _commit.was_not_committed(raw) else None

    def roll_back(self, error: BaseException) -> None:
        """Roll back because of *error*. If the connection cannot be used any more, close it, which rolls back too.

        Switches: yes, unless it is closed.
        """
        self._stack.close()
        in_time = self.nested or self._batch.remaining() > _SOON  # a late server may not answer at all
        if not isinstance(error, Exception) or not in_time or self._is_broken(error):
            self.leave_broken()
        elif self._begun:
            self._begun = False
            with suppress(Error):
                self._atomic.__exit__(type(error), error, error.__traceback__)
            self._give_level_back()

    def begin_to_write(self) -> None:
        """Begin again after a rollback, for something that is to be committed. Switches: yes."""
        if self.connection.vendor == "sqlite" and not self.nested:
            self.wrote = False
            self.begin()
            self.take_write_lock()

    def leave_broken(self) -> None:
        """Close the connection without asking the server, which rolls back. Switches: no."""
        self._stack.close()
        connection = self.connection
        connection.run_on_commit = []
        discard(connection)
        if connection.in_atomic_block:
            connection.closed_in_transaction = connection.needs_rollback = True
        if self._begun:
            self._begun = False
            self._atomic.__exit__(NotSaved, NotSaved(), None)

    def _is_broken(self, error: BaseException | None) -> bool:
        if error is not None and errors.kind(error) is errors.Kind.LOST:
            return True
        raw: Any = self.connection.connection
        return (
            self.connection.vendor == "postgresql"
            and raw is not None
            and (
                raw.closed
                or _commit.transaction_status(raw) not in {_commit.IDLE, _commit.IN_TRANSACTION, _commit.FAILED}
            )
        )

    def _ask_outcome(self) -> bool | None:
        """Ask the server on another connection. Return None if it does not know or cannot be asked."""
        if self._xid is None:
            return None
        return _commit.postgres_fate(self._xid, self._ask_once, self._batch.remaining() - _SOON)

    def _ask_once(self, question: str) -> str | None:
        asking = connections.create_connection(self.connection.alias)
        try:
            with asking.cursor() as cursor:
                cursor.execute(question)
                row = cursor.fetchone()
        except Error:  # it may be restarting
            return _commit.NO_ANSWER
        else:
            return None if row is None else row[0]
        finally:
            discard(asking)


def not_saved(error: Exception, key: Any) -> NotSaved:
    """Return what a scope raises for *error*, which came before COMMIT was sent. Switches: no."""
    of_connection = isinstance(error, (InterfaceError, OperationalError))
    if of_connection or errors.kind(error) is not errors.Kind.OTHER:
        return errors.not_saved(error, key)
    return Rejected(f"{shown(key)} was not saved, nothing was written: {said(error)}")


def _cursor_class(raw: Any) -> type:
    factory = getattr(raw, "cursor_factory", None)
    return factory if isinstance(factory, type) else object


def _begin(raw: Any) -> str:
    level = raw.isolation_level
    return "BEGIN" if level is None else f"BEGIN ISOLATION LEVEL {level.name.replace('_', ' ')}"


@contextmanager
def _disabled(connection: BaseDatabaseWrapper, method: str) -> Iterator[None]:
    """Replace *method* of *connection* by one that does nothing, within the block."""
    setattr(connection, method, lambda: None)
    try:
        yield
    finally:
        delattr(connection, method)


def _commit_error(error: Exception) -> Exception:
    """Return the error that came out of COMMIT: Django's errors while it cleaned up have it as their context."""
    found, one = error, error.__context__
    while one is not None:
        if isinstance(one, Exception) and one is not found.__cause__:  # skip the driver's, which Django has wrapped
            found = one
        one = one.__context__
    return found


def send(connection: BaseDatabaseWrapper, statement: str, parameters: Any) -> Any:
    """Execute a statement and return the cursor."""
    cursor = connection.cursor()
    if isinstance(parameters, list):
        cursor.executemany(statement, parameters)
    else:
        cursor.execute(statement, parameters)
    return cursor
