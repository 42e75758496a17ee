"""The transaction of one batch on one connection of the user's pool, from its load to its end.

The children know their driver: how it begins and bounds statements, and which statements it can send together.

A `gevent.Timeout` may fire wherever a driver waits. A connection that was interrupted is discarded.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from geventbatch._batch import batch_at_hand, current_batch
from geventbatch._safe_repr import named, said, shown
from geventbatch.errors import Conflict, NotSaved, Rejected, ResourceMissing
from geventbatch.stores._give_back import give_back
from geventbatch.stores._sql import commit as _commit
from geventbatch.stores._sql import errors
from geventbatch.stores._sql.keys import shortened
from geventbatch.stores._sql.statements import forbidden
from geventbatch.stores.sql._statements import SEVERAL, inserts, is_several

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterable, Iterator

    from geventbatch.stores._sql.outcomes import Recording
    from geventbatch.stores.sql._connections import Connections
    from geventbatch.stores.sql._statements import Statement

_SHORTEST: Final = 0.001
"""Seconds: the smallest value that `remaining` returns."""

_DEAD: Final = 10
"""Connections that the server has ended while they were at rest, which one load survives."""

UNFIT: Final = (KeyError, IndexError, TypeError)
"""What psycopg2 and PyMySQL raise for a statement with other parameters than it is sent with."""

SAVEPOINT: Final = "SAVEPOINT geventbatch"
GO_BACK: Final = "ROLLBACK TO SAVEPOINT geventbatch"

T = TypeVar("T")


class Loaded(NamedTuple):
    """What a load has found."""

    columns: tuple[str, ...]
    rows: list[Any]


class Change(NamedTuple):
    """A statement that has to change exactly one row, with its parameters."""

    statement: Statement
    parameters: dict[str, Any]
    key: Hashable
    look: Callable[[Transaction], bool]
    """Returns whether there is a row of the key now, in another transaction."""


class Inserted(Conflict):
    """Somebody else has inserted rows of these *keys*."""

    def __init__(self, keys: Sequence[Hashable]) -> None:
        super().__init__(*errors.inserted(keys[0]).args)
        self.keys = keys


class Save(NamedTuple):
    """All that one save writes."""

    changes: Sequence[Change]
    rows: Sequence[object] = ()
    recording: Recording | None = None
    stays: bool = False
    """If an insert fails, only what is written is undone, by a savepoint: the rows stay locked for another save."""

    @property
    def statement(self) -> str | None:
        """What each of its operations would send for its row if saved alone; None if not all would send the same."""
        statements = {change.statement for change in self.changes}
        if len(statements) != 1:
            return None
        (one,) = statements
        return None if one.option == "delete" else one.text


class Transaction(ABC):
    """One transaction. It takes its connection when it is made."""

    mysql = False

    def __init__(self, connections: Connections, lent: Any, driver: Any, key: Hashable) -> None:
        self.connections = connections
        self.key = key
        self.driver = driver
        # -- mutable state ---------------------------------------------------------------------------------
        self._lent: Any = lent  # None: it is given back
        self._sends_commit = False
        self._is_committed = False  # the server has said so
        self.is_over = False  # the server has refused COMMIT itself: no lock is left, and no savepoint
        try:
            self._check_idle()
            self.begin()
        except BaseException:
            give_back(key, self.discard, saved=False)
            raise

    # -- what a driver does ------------------------------------------------------------------------------------

    @abstractmethod
    def is_idle(self) -> bool:
        """Return whether the connection is in no transaction, as far as the driver knows. Switches: no."""

    @abstractmethod
    def begin(self) -> None:
        """Prepare to begin, and to bound the statements to come."""

    @abstractmethod
    def fetch(self, text: str, parameters: dict[str, Any]) -> Loaded:
        """Execute a SELECT of the load. Switches: yes."""

    @abstractmethod
    def send(self, text: str, parameters: Any) -> Any:
        """Execute a statement, for a list of parameters too, and return its cursor. Switches: yes."""

    @abstractmethod
    def write(self, save: Save) -> None:
        """Record outcomes, change rows, insert *rows*, and commit. Switches: yes."""

    @abstractmethod
    def roll_back(self) -> None:
        """Roll back. Switches: yes."""

    @abstractmethod
    def begin_again(self) -> None:
        """Begin, after a rollback. Switches: yes."""

    @abstractmethod
    def is_usable(self) -> bool:
        """Return whether the connection works, and waits for no answer. Switches: no."""

    @abstractmethod
    def restore(self) -> None:
        """Give the connection the settings that it had, after the transaction. Switches: no."""

    def refuses_key(self, error: Exception) -> bool:
        """Return whether the load has raised *error* for the value of its key, so that no row can have it."""
        return isinstance(error, UnicodeEncodeError)  # the driver makes no text of it

    def has_refused_commit(self) -> bool:
        """Return whether the server, which was sent COMMIT, has refused that, and no statement before. Switches: no."""
        return True  # COMMIT is a message of its own

    @abstractmethod
    def is_at_fault(self, change: Change) -> bool:
        """Return whether *change*, of a save that lacks a column, table or right, fails without its rows beside too.

        Else one of the rows is at fault. Called after a rollback. Switches: yes.
        """

    def was_not_committed(self) -> bool:
        """Return whether the driver knows that the COMMIT that raised was not carried out."""
        return False

    def ask_outcome(self) -> bool | None:
        """Return whether the COMMIT whose answer was lost was carried out. None: unknown. Switches: yes."""
        return None

    # -- the way of a batch ------------------------------------------------------------------------------------

    def save(self, save: Save) -> None:
        """Save and commit.

        Raises:
            NotSaved: Nothing was written. If *save* stays, the transaction goes on after `Inserted` and `Repeated`,
                unless it is over.
            Exception: The driver's error of a COMMIT whose outcome is unknown.
        Switches: yes.
        """
        try:
            self.write(save)
            self._is_committed = True
        except Exception as error:
            if not self._sends_commit or errors.of_commit(error, self.key) is not None:
                refused = self._explained(error, save)
                raise refused from refused.__cause__ or _cause(error)
            _commit.resolve(error, self.key, told=self._told(), ask=self._ask, not_saved=self.not_saved)

    def commit_is_sent(self) -> None:
        """Note that the next message has COMMIT in it."""
        self._sends_commit = True

    def end(self, error: BaseException | None = None, lost: Collection[Hashable] = ()) -> None:
        """Return the connection to its pool, after a rollback if something is open; `give_back` says what *lost* is.

        If *error* is no `Exception`, or no time is left, it is discarded: a rollback could not be interrupted, should
        it wait for a server that has gone.
        """
        give_back(self.key, self._end, error, saved=error is None, lost=lost)

    def discard(self) -> None:
        """Close the connection, in any state. Switches: no."""
        lent, self._lent = self._lent, None
        if lent is not None:
            self.connections.discard(lent)

    def not_saved(self, error: Exception) -> NotSaved:
        """Return the `NotSaved` for *error*, which came before COMMIT was sent, or from the server."""
        if isinstance(error, NotSaved):
            return error
        if errors.kind(error) is not errors.Kind.OTHER:
            return errors.not_saved(error, self.key)
        why = f"{shown(self.key)} was not saved, nothing was written: {error}"
        return NotSaved(why) if isinstance(error, OSError) else Rejected(why)

    # -- inside ------------------------------------------------------------------------------------------------

    def _check_idle(self) -> None:
        """Raise if the connection is in a transaction, which is somebody else's: COMMIT would commit his work."""
        if not self.is_idle():
            self.connections.forget(self._lent)
            self._lent = None
            raise RuntimeError(
                f"{shown(self.connections.pool)} returned a connection that is in a transaction, or closed: each batch "
                "needs a connection of its own"
            )

    def _explained(self, error: Exception, save: Save) -> NotSaved:
        """Return the error of a save that was not carried out. Switches: yes, to look at what is in the way."""
        self.is_over = self._sends_commit and self.has_refused_commit()  # a constraint was deferred
        self._sends_commit = False
        refused, own = self.not_saved(error), save.statement
        if own is not None and not save.rows:
            refused = errors.of_save(refused, error, own)
        if not (errors.is_duplicate(error) or errors.is_of_schema(error) or isinstance(refused, Inserted)):
            return refused
        stays = save.stays and not self.is_over
        undo = self._go_back if stays else self.roll_back
        try:
            if save.recording is not None:
                begin = _nothing if stays else self.begin_again
                found = save.recording.check(error, self.send, undo, begin)
                if found is not None:
                    if not stays:
                        self.send("COMMIT", None)  # the deletion of expired outcomes
                    return found
            undo()
            if own is not None and save.rows and errors.is_of_schema(error) and self.is_at_fault(save.changes[0]):
                return errors.of_save(refused, error, own)
            inserted = [one.key for one in save.changes if one.statement.option == "insert" and one.look(self)]
        except Exception as failed:
            return self.not_saved(failed)
        return Inserted(inserted) if inserted else refused

    def _go_back(self) -> None:
        self.send(GO_BACK, None)

    def _told(self) -> bool | None:
        return False if self.was_not_committed() else None

    def _ask(self) -> bool | None:
        give_back(self.key, self.discard, saved=None)  # it may be the pool's last connection
        return self.ask_outcome()

    def _end(self, error: BaseException | None) -> None:
        if self._lent is None:
            return
        is_over = self._is_committed and error is None
        if not is_over and not (self.is_usable() and _may_send(error)):
            self.discard()
            return
        try:
            if not is_over:
                self.roll_back()
            self.restore()
        except BaseException:
            self.discard()
            raise
        lent, self._lent = self._lent, None
        self.connections.take_back(lent)


def _may_send(error: BaseException | None) -> bool:
    """Return whether a ROLLBACK may be sent, and would be answered, after *error*."""
    if error is None:
        return True
    in_time = isinstance(error, Exception) and remaining() > _SHORTEST
    return in_time and errors.kind(error) is not errors.Kind.LOST


def begun(connections: Connections, key: Hashable) -> Transaction:
    """Begin a transaction on a connection of its own. Switches: yes."""
    lent = connections.lend(remaining)
    try:
        driver = connections.raw(lent)
        kind = _kind_of(driver)
    except BaseException:
        give_back(key, connections.discard, lent, saved=False)
        raise
    return kind(connections, lent, driver, key)


def load(connections: Connections, key: Hashable, fetch: Callable[[Transaction], T]) -> tuple[Transaction, T]:
    """Begin a transaction and *fetch* what a batch loads; return both.

    The server may have ended idle connections of the pool, which the first statement finds out: then another one is
    taken. Raises `Conflict` for a deadlock or a serialization failure, and `ResourceMissing` if the database, or the
    driver, refuses the value of the key itself: so no row has it. Switches: yes.
    """
    for left in range(_DEAD, -1, -1):
        transaction = begun(connections, key)
        try:
            return transaction, fetch(transaction)
        except Exception as error:
            refuses_key = transaction.refuses_key(error)
            transaction.end(error)
            kind = errors.kind(error)
            if left and kind is errors.Kind.LOST and not isinstance(error, NotSaved):
                continue
            if refuses_key:
                raise ResourceMissing(f"no row can have the key {shortened(key)}: {error}", key=key) from error
            if kind is errors.Kind.CONFLICT:
                raise Conflict(f"{shown(key)} could not be loaded: {error}") from error
            raise
        except BaseException as error:
            transaction.end(error)
            raise
    raise AssertionError


def grouped(rows: Iterable[object], *, mysql: bool) -> Iterator[tuple[str, list[Any]]]:
    """Yield the statements of the rows of `Batch.add_row`, each with the parameters of all neighbours that have it."""
    for text, pairs in groupby((_pair(row, mysql=mysql) for row in rows), lambda pair: pair[0]):
        yield text, [pair[1] for pair in pairs]


def lost(change: Change, found: int) -> NotSaved:
    """Return the error of a statement that has changed so many rows as *found*, and not one. Switches: no.

    Data may hide a row from it, but do not make several of one: that fails the batch, in a bulk once it stands alone.
    """
    option = change.statement.option
    if option != "insert":
        told = f"{option} has found {found} rows, and has to find the one that was loaded. Compare its WHERE with that"
        told += " of load"
        if not found:
            told += "; or the database has left the row out, by a trigger or by a policy that hides it"
    elif found:
        told = f"insert has inserted {found} rows, and has to insert one"
    else:
        return Inserted([change.key])
    error = RuntimeError(f"{shown(change.key)} was not saved, nothing was written: {told}")
    is_alone = len(set(batch_at_hand().bulk.values())) < 2  # noqa: PLR2004 - one batch, or no bulk
    refused = NotSaved(str(error)) if found and is_alone else Rejected(str(error))
    refused.__cause__ = error
    return refused


def remaining() -> float:
    """Return the seconds that the batch has left."""
    return current_batch().remaining()


def is_mysql(driver: Any) -> bool:
    """Return whether *driver* is a connection to MySQL or MariaDB."""
    return _kind_of(driver).mysql


def _pair(row: object, *, mysql: bool) -> tuple[str, Any]:
    match row:
        case (str() as text, (Mapping() | Sequence()) as parameters) if not isinstance(parameters, (str, bytes)):
            why = forbidden(text, mysql=mysql)
            if why is not None:
                raise RuntimeError(f"add_row() was given {shown(text)}: {why}")
            if is_several(text, mysql=mysql):
                raise ValueError(f"add_row() was given {shown(text)}, {SEVERAL}: add each row by itself")
            if not inserts(text):
                raise ValueError(
                    f"add_row() was given {shown(text)}, but takes an INSERT only: nobody would learn how many rows "
                    "another statement finds, and operations would not see what it changes. Change the row of a key "
                    "by its resource, for several keys in run_across()"
                )
            return text, parameters
    raise TypeError(
        f"add_row() was given {named(row)}: pass a pair of an INSERT and its parameters, as "  # noqa: S608 - a message
        '("INSERT INTO log (text) VALUES (%(text)s)", {"text": "…"})'
    )


def unfit(text: str, error: Exception) -> ValueError:
    """Return the error of a row's statement whose parameters the driver cannot put into it."""
    return ValueError(
        f"add_row() was given {shown(text)}, whose parameters do not fit it: {type(error).__name__}: {said(error)}"
    )


def _nothing() -> None:
    pass


def _cause(error: Exception) -> BaseException | None:
    return error.__cause__ if isinstance(error, NotSaved) else error


_kinds: Final[dict[type, type[Transaction]]] = {}
"""By the type of a driver's connection."""


def _kind_of(driver: Any) -> type[Transaction]:
    found = _kinds.get(type(driver))
    if found is None:
        found = _kinds[type(driver)] = _found_kind(driver)
    return found


def _found_kind(driver: Any) -> type[Transaction]:
    module = sys.modules.get("psycopg")
    if module is not None and isinstance(driver, module.Connection):
        from geventbatch.stores.sql._psycopg import PsycopgTransaction

        return PsycopgTransaction
    module = sys.modules.get("psycopg2.extensions")
    if module is not None and isinstance(driver, module.connection):
        from geventbatch.stores.sql._psycopg2 import Psycopg2Transaction

        return Psycopg2Transaction
    module = sys.modules.get("pymysql.connections")
    if module is not None and isinstance(driver, module.Connection):
        from geventbatch.stores.sql._pymysql import PyMySQLTransaction

        return PyMySQLTransaction
    raise TypeError(
        f"the pool returned {named(driver)}, but must return a connection of psycopg 3, psycopg2 or PyMySQL; for "
        "another driver use a SQLAlchemyStore"
    )
