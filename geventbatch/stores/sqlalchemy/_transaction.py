"""A database transaction of one batch, on one SQLAlchemy connection, from its load to its end.

It knows nothing of what is loaded and saved. The parent class is right for any database; its children bound statements
on the server, and know what is special about their database.

A `gevent.Timeout` may fire wherever a driver waits. A connection that was interrupted, or that no batch waits for any
more, is discarded (`Transaction.discard`): its pool makes a new one for the next batch.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.exc import (
    DBAPIError,
    DisconnectionError,
    IntegrityError,
    ResourceClosedError,
    TimeoutError,  # noqa: A004 - SQLAlchemy's name for it
)

from geventbatch._batch import current_batch
from geventbatch._safe_repr import shown
from geventbatch.errors import Conflict, NothingToSave, NotSaved, Rejected
from geventbatch.stores._give_back import give_back
from geventbatch.stores._sql import commit as _commit
from geventbatch.stores._sql import errors
from geventbatch.stores.sqlalchemy import _engines
from geventbatch.stores.sqlalchemy._batch_connection import BatchConnection
from geventbatch.stores.sqlalchemy._commit_progress import COMMIT, DONE, note_commits

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
    from datetime import tzinfo

    from sqlalchemy import Connection, CursorResult, Engine
    from sqlalchemy.sql.base import Executable

    from geventbatch._core.batch import Batch
    from geventbatch.stores._sql.outcomes import Recording

_SHORTEST: Final = 0.001
"""Seconds: the smallest value that `remaining` returns."""

OF_EVERYBODY: Final = (DisconnectionError, ResourceClosedError, TimeoutError)
"""Errors of SQLAlchemy's own that are no operation's fault: of its pool, of a connection."""

_DRIVERS: Final = frozenset(
    {"psycopg", "psycopg2", "pg8000", "pymysql", "mysqldb", "mysqlconnector", "mariadbconnector", "pysqlite"}
)
"""Drivers whose errors are known, by SQLAlchemy's names."""


class LostRow(Conflict):
    """A statement did not find the rows that it was to change."""


def is_doubtful(batch: Batch) -> bool:
    """Return whether to look for a row that a save did not find. Switches: no.

    Mostly another process has changed it, and the replay finds it. So it is looked for only if *batch* has had a
    conflict before, or has no other attempt.
    """
    return batch.conflicts > 0 or batch.dispatcher.options.max_attempts == 1


def left_out(key: Hashable, kind: type[Exception] = RuntimeError) -> Rejected:
    """Return the error in place of a `LostRow` if no other process can have changed the row. Switches: no."""
    error = kind(
        f"{shown(key)} was not saved, nothing was written: the database has left it out, by a trigger or by a policy "
        "that hides it"
    )
    rejected = Rejected(str(error))
    rejected.__cause__ = error
    return rejected


class Transaction:
    """One transaction. It takes its connection when it is made."""

    collects = False
    """It sends a save and COMMIT as one message, and waits once: if a statement fails, the server skips COMMIT."""

    leaves_out = False
    """A trigger or a policy can hide a row from a statement without an error."""

    writes_anywhere = True
    """A statement locks only the rows that it writes, so that operations may send some."""

    def __init__(self, engine: Engine, key: Hashable, *, locking: bool = False) -> None:
        self.engine = engine
        self.key = key
        self.locking = locking
        """The load locks the row, at READ COMMITTED: later statements read nothing older than the lock."""
        self.fence: Callable[[], bool | None] | None = None
        """Finds out by the row whether it was saved, and else keeps the save from being carried out later."""
        self._connection = _engines.own(engine).connect()
        self.committer: Callable[[], object] | None = None
        """Commits in place of the connection, and with it."""
        self.prepare: Callable[[], object] | None = None
        """Prepares the connection for the key's tenant."""
        self._commit: dict[Any, Any] = {COMMIT: None}
        self._has_raised = False  # a COMMIT, or what is called around it
        try:
            self.begin()
        except BaseException:
            give_back(key, self.discard, saved=False)
            raise

    @property
    def connection(self) -> Connection:
        """The batch's connection."""
        return self._connection

    # -- what a database adds --------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin, and bound the statements to come."""

    def before_writes(self) -> None:
        """Bound the statements of the save: less time is left."""

    def begin_again(self) -> None:
        """Begin a transaction again, after a rollback."""

    def begin_to_write(self) -> None:
        """Prepare to write, after a rollback."""

    def commit_now(self) -> None:
        """Send COMMIT, and wait for the answer."""
        (self.committer or self.connection.commit)()

    def has_failed(self) -> bool:
        """Return whether a statement has failed, so that the database refuses all later ones."""
        return False

    def ended(self) -> Conflict | None:
        """Return the error if the server has ended the transaction, so that the next statement would begin another."""
        return None

    def zone(self) -> tzinfo | None:
        """Return the time zone of the driver's moments; None if it is unknown, or there is none."""
        return None

    def ask_outcome(self) -> bool | None:
        """Return whether the COMMIT whose answer was lost was carried out. None: unknown."""
        return None if self.fence is None else self.fence()

    def was_not_committed(self) -> bool:
        """Return whether the driver knows that the COMMIT that raised was not carried out."""
        return False

    # -- the way of a batch ----------------------------------------------------------------------------------

    def precede(self, statement: Executable, parameters: dict[str, Any]) -> None:
        """Execute a statement whose answer is not needed, right before the next one at the latest."""
        self.connection.execute(statement, parameters)

    @contextmanager
    def holding_back(self) -> Iterator[None]:
        """Allow statements in the block, whose answers are not needed, to wait for the next statement."""
        yield

    def fetch(self, statement: Executable, parameters: dict[str, Any]) -> Sequence[Any] | None:
        """Execute the SELECT of one row, and return it; None if there is none."""
        return self.connection.execute(statement, parameters).one_or_none()

    def change(self, statement: Executable, parameters: dict[str, Any], rows: int = 1) -> None:
        """Execute a statement that changes the loaded row, or so many *rows*.

        Raises `LostRow` if it finds fewer.
        """
        options = {"preserve_rowcount": True}
        if self.connection.execute(statement, parameters, execution_options=options).rowcount != rows:
            raise errors.changed(self.key, LostRow)

    def send(self, statement: str, parameters: Any) -> CursorResult[Any]:
        """Execute a statement in the driver's own form."""
        options = {"preserve_rowcount": True}
        return self.connection.exec_driver_sql(statement, parameters, execution_options=options)

    def record(self, recording: Recording) -> None:
        """Send outcomes, for a save that takes the outcomes of many batches: after a savepoint."""
        recording.send(self.send)

    def write(
        self,
        writes: Callable[[], object],
        recording: Recording | None = None,
        *,
        collected: bool = True,  # noqa: ARG002 - for a child
    ) -> None:
        """Record outcomes, send the statements of a save by *writes*, and commit.

        Raises a `NotSaved` where it can. With *collected*, no statement needs the answer of another one.
        """
        try:
            self.before_writes()
            if recording is not None:
                recording.send(self.send)
            writes()
            self.check_whole()
        except Exception as error:
            self.check_repeated(error, recording)
            raise self.not_saved(error) from cause(error)
        self.commit()

    def check_whole(self) -> None:
        """Raise unless everything sent so far is in the transaction that COMMIT would commit now."""
        if (ended := self.ended()) is not None:
            raise ended
        if self.connection.invalidated:
            raise NotSaved(
                f"{shown(self.key)} was not saved, nothing was written: an operation lost the connection, and went on"
            )
        if self.has_failed():
            # COMMIT would raise nothing: PostgreSQL takes it for ROLLBACK.
            raise Rejected(
                f"{shown(self.key)} was not saved, nothing was written: an operation went on after a failed statement"
            )

    def _roll_back(self) -> None:
        self.connection.rollback()
        if self.prepare is not None:  # the rollback has reset its settings
            self.begin_again()
            self.prepare()

    def check_repeated(self, error: Exception, recording: Recording | None) -> None:
        """Raise the `NotSaved` for *error* if the INSERT of outcomes has caused it."""
        if recording is None:
            return
        found = recording.check(error, self.send, self._roll_back, self.begin_to_write)
        if found is not None:
            try:
                self.connection.commit()  # the deletion of expired outcomes
            except Exception as failed:
                raise self.not_saved(failed) from failed
            raise found from None

    def commit(self) -> None:
        """Commit. Raises a `NotSaved`; with any other error, the outcome is unknown."""
        self._commit = self.connection.info
        self._commit[COMMIT] = None
        try:
            self.commit_now()
        except Exception as error:
            self.resolve(error)

    def resolve(self, error: Exception) -> None:
        """Find out what became of a COMMIT that raised *error*: return if it was carried out, else raise."""
        self._has_raised = True
        _commit.resolve(exact(error), self.key, told=self.told(), ask=self._ask, not_saved=self.not_saved)

    def told(self) -> bool | None:
        """Return whether the COMMIT that raised was carried out, as far as this side knows. None: unknown."""
        step = self._commit[COMMIT]
        if step == DONE:  # a hook after it has raised
            return True
        return False if step is None or self.was_not_committed() else None

    def _ask(self) -> bool | None:
        give_back(self.key, self.discard, saved=None)  # it may be the pool's last connection
        return self.ask_outcome()

    def not_saved(self, error: Exception) -> NotSaved:
        """Return the `NotSaved` for *error*, which came before COMMIT was sent."""
        if isinstance(error, NotSaved):
            return error
        if errors.kind(error) is not errors.Kind.OTHER or isinstance(error, DBAPIError):
            return errors.not_saved(error, self.key)
        of_everybody = isinstance(error, OF_EVERYBODY) or (isinstance(error, OSError) and self.connection.invalidated)
        why = f"{shown(self.key)} was not saved, nothing was written: {getattr(error, 'orig', None) or error}"
        return NotSaved(why) if of_everybody else Rejected(why)

    def end(self, error: BaseException | None = None, lost: Collection[Hashable] = ()) -> None:
        """Return the connection to its pool, after a rollback if something is open.

        If *error* is no `Exception`, or no time is left, that rollback could not be interrupted, should it wait for a
        server that has gone. Then discard the connection. See `give_back` for errors.
        """
        try:
            give_back(self.key, self._end, error, saved=error is None, lost=lost)
        finally:
            self.committer = None  # it may hold all that is saved, and with it this
            self.let_go()

    def let_go(self) -> None:
        """Have the connection, which is closed, hold nothing of the batch."""
        BatchConnection.let_go(self.connection)

    def _end(self, error: BaseException | None) -> None:
        if self.connection.closed or self.connection.invalidated or not self.in_time(error):
            self.discard()
            return
        try:
            self.close(error)
        except BaseException:
            self.discard()
            raise

    def close(self, error: BaseException | None) -> None:
        """Return the connection to its pool, fit for its next user. Switches: yes."""
        if error is not None or self._has_raised:
            self._roll_back_refused()
        self.connection.close()

    def _roll_back_refused(self) -> None:
        """Roll back if a listener has refused a COMMIT: SQLAlchemy takes it for done, and rolls nothing back."""
        begun = self.connection.get_transaction()
        if begun is not None and not begun.is_active and not self.connection.invalidated:
            self.connection.connection.rollback()

    def in_time(self, error: BaseException | None) -> bool:
        """Return whether a statement may still be sent, after *error*."""
        return error is None or (isinstance(error, Exception) and remaining() > _SHORTEST)

    def discard(self) -> None:
        """Close the connection, in any state; its pool makes another one. Switches: no."""
        if self.connection.closed:
            return
        try:
            if not self.connection.invalidated:
                self.connection.invalidate()
        finally:
            self.connection.close()


def transaction_class(
    engine: Engine, *, pipeline: bool, locking: bool = False
) -> Callable[[Engine, Hashable], Transaction]:
    """Return the factory of transactions for a database, its driver, and the mode."""
    return partial(_class(engine, pipeline=pipeline), locking=locking)


def _class(engine: Engine, *, pipeline: bool) -> type[Transaction]:
    name = engine.dialect.name
    if engine.dialect.driver.partition(",")[0] not in _DRIVERS:  # "pysqlite, joined" for a test
        errors.tell_of_driver("SQLAlchemyStore", f"{name}+{engine.dialect.driver}")
    _engines.remember(engine)
    note_commits(engine.dialect)
    if name != "sqlite":
        _engines.watch(engine)
    if name == "postgresql":
        if pipeline and engine.dialect.driver == "psycopg":
            from geventbatch.stores.sqlalchemy._psycopg import JoinedTransaction

            return JoinedTransaction
        from geventbatch.stores.sqlalchemy._postgres import PostgresTransaction

        return PostgresTransaction
    if name in {"mysql", "mariadb"}:
        from geventbatch.stores.sqlalchemy._mysql import MySQLTransaction

        return MySQLTransaction
    if name == "sqlite":
        from geventbatch.stores.sqlalchemy._sqlite import SQLiteTransaction

        return SQLiteTransaction
    return Transaction


def is_at_fault(begin: Callable[[], Transaction], change: tuple[Any, dict[str, Any]] | None) -> bool:
    """Return whether *change*, a statement with its parameters, lacks a column, a table or a right by itself.

    Else one of the rows beside it is at fault. It is tried in another transaction, which is rolled back. Switches: yes.
    """
    if change is None:
        return False
    try:
        transaction = begin()
    except Exception:
        return False
    try:
        transaction.change(*change)
    except Exception as error:
        transaction.end(error)
        return errors.is_of_schema(error)
    except BaseException as error:
        transaction.end(error)
        raise
    transaction.end(NothingToSave())
    return False


def cause(error: Exception) -> BaseException | None:
    """Return what to raise ``from`` for *error*: itself, or the cause of a `NotSaved`."""
    return error.__cause__ if isinstance(error, NotSaved) else exact(error)


def exact(error: Exception) -> Exception:
    """Return *error*, or an `IntegrityError` in its place if the driver (pg8000) has another class for a constraint."""
    if not isinstance(error, DBAPIError) or isinstance(error, IntegrityError) or error.orig is None:
        return error
    if not (errors.state(error.orig) or "").startswith("23"):
        return error
    exacter = IntegrityError(error.statement, error.params, error.orig, connection_invalidated=False)
    exacter.__cause__ = error.__cause__
    return exacter


def remaining() -> float:
    """Return the seconds that the batch has left."""
    return current_batch().remaining()
