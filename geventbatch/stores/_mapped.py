"""Instances of the user's own mapped classes: a Session per batch, on its own connection and in its own transaction.

What an operation may do, and what becomes of it when the operation raises:

- It may change the resource, and, through `object_session(resource)`, query, add other objects and change those.
  It must not end the session or its transaction: a commit is refused, and after a rollback the operation is broken.
- What an operation has added is taken out again when it raises. That it has left everything else as it was is what
  `clean_errors` promise; an operation that cannot promise that raises something that is not among them, and is replayed
  out. So is every operation that raises after it has written to the database (a flush, a statement of its own), and
  every one that leaves the transaction or the session failed.
- In SQLite a first write locks the whole database until COMMIT, and other greenlets run in between. So operations write
  nothing there: the session does not flush by itself before a query, and a statement that writes is refused.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError
from sqlalchemy.orm.exc import StaleDataError

from geventbatch._processor import current_batch
from geventbatch._shown import shown
from geventbatch.errors import Conflict, NotSaved, Rejected, ResourceMissing
from geventbatch.stores import _sql
from geventbatch.stores._loaded import Loaded
from geventbatch.stores._outcomes import Outcomes, Recording
from geventbatch.stores._rows import insert_rows, is_instance
from geventbatch.stores._session import SCOPE
from geventbatch.stores._transaction import Transaction, load

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence
    from types import TracebackType

    from sqlalchemy.orm import Session, SessionTransaction

    from geventbatch.stores._mapping import Mapping

_EVENTS: Final = ("before_commit", "before_flush", "after_flush_postexec")
"""Of a session, in which others may want to add something to it."""


class MappedScope:
    """One batch over one instance: entering loads it into a session, leaving flushes and commits that."""

    takes_rows = True
    deletes = True

    # -- mutable state ---------------------------------------------------------------------------------------
    _transaction: Transaction
    _session: Session
    _root: SessionTransaction | None  # what the session has to be in still when it is saved
    _loaded: Loaded
    _row_key: Hashable  # as the row has it: a collation may find it by another one

    def __init__(self, mapping: Mapping, key: Hashable) -> None:
        self._mapping = mapping
        self._key = key
        self._added: list[tuple[int, object]] = []  # with how many operations had returned before
        self._wrote = -1  # when an operation last wrote: how many had returned before
        self._spoils = -1  # when an operation last wrote what would stay if it raised: likewise
        self._flushing = False  # now
        self._writing = False  # the load, or the save
        self._counted = False  # the version, for this batch

    def __enter__(self) -> Any:
        self._writing = True
        try:
            self._transaction, row = load(self._begin, self._fetch)
            self._root = self._session.get_transaction()
            resource, token = (self._made(), None) if row is None else (row[0], row[1:])
            self._loaded = Loaded(self._mapping, self._key, self._session, resource, token)
            self._row_key = self._key if row is None else self._mapping.key_of(resource, self._key)
        except BaseException as error:
            self._end(error)
            raise
        self._writing = False
        return resource

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._writing = True
        try:
            if error is None:
                self._save()
        except BaseException as raised:
            self._end(raised)
            if isinstance(raised, Rejected):
                self._look_again(raised)
            raise
        self._end(error)

    def operation_raised(self, error: Exception) -> NotSaved | None:
        """Take out what the operation has added; or say that its attempt cannot be saved any more. Switches: no."""
        turn = current_batch().completed
        refused = self._refusal(error, turn)
        self._loaded.operation_raised()
        if refused is None:
            mine = [added for when, added in self._added if when == turn]
            self._added = [(when, added) for when, added in self._added if when != turn]
            for added in mine:
                if added in self._session.new:
                    self._session.expunge(added)
        return refused

    def operation_returned(self) -> NotSaved | None:
        """Have what is behind the operation find what the database computes of what it has changed. Switches: no."""
        self._loaded.operation_returned(self._transaction)
        return None

    def recorded(self, keys: list[str]) -> dict[str, str]:
        """What is recorded of operations with these idempotency keys. Switches: yes."""
        return self._outcomes().find(self._transaction.send, keys)

    # -- load ------------------------------------------------------------------------------------------------

    def _begin(self) -> Transaction:
        mapping = self._mapping
        transaction = mapping.transaction(mapping.engine, self._key)
        event.listen(transaction.connection, "before_cursor_execute", self._executes)
        event.listen(transaction.connection, "commit", lambda _: self.refuse_commit())
        self._close_session()  # of a first try, on a connection that was lost
        session = self._session = mapping.sessions(bind=transaction.connection)
        session.info[SCOPE] = self
        return transaction

    def _fetch(self, transaction: Transaction) -> Any:
        mapping = self._mapping
        parameters = mapping.parameters(self._key)
        try:
            if mapping.lock is not None:
                transaction.precede(mapping.lock, parameters)
            return self._session.execute(mapping.load, parameters).unique().one_or_none()
        except (ValueError, TypeError, LookupError) as error:  # of a column's type
            raise ValueError(f"the {mapping.name} {shown(self._key)} cannot be decoded: {error}") from error

    def _made(self) -> Any:
        mapping = self._mapping
        if mapping.missing == "raise":
            raise ResourceMissing(f"there is no {mapping.name} {shown(self._key)}", key=self._key)
        resource = mapping.missing(self._key)
        if not isinstance(resource, mapping.mapper.class_):
            raise TypeError(f"missing made {shown(resource)} for {shown(self._key)}: it has to be a {mapping.name}")
        for attribute, value in zip(mapping.by, mapping.parameters(self._key).values(), strict=True):
            if getattr(resource, attribute.key) is None:
                setattr(resource, attribute.key, value)
        if mapping.version is not None and getattr(resource, mapping.version) is None:
            setattr(resource, mapping.version, 1)
        self._session.add(resource)
        return resource

    # -- operations ------------------------------------------------------------------------------------------

    def refuse_commit(self) -> None:
        """Something is to be committed: a savepoint, or all, which is for the batch to do."""
        if not self._writing and not self._session.in_nested_transaction():
            raise RuntimeError(
                f"an operation on {shown(self._key)} called commit() on its batch's session: the batch commits, once, "
                "after all of its operations"
            )

    def has_added(self, instance: object) -> None:
        """An operation has added *instance*."""
        if not self._writing:
            self._added.append((current_batch().completed, instance))

    @contextmanager
    def flushing(self) -> Iterator[None]:
        """The session flushes, as far as the user knows it to have something to flush."""
        if "_loaded" in self.__dict__:
            self._loaded.flag_mutated()
        self._flushing = True
        try:
            yield
        finally:
            self._flushing = False

    def is_forgotten(self) -> None:
        """What the session has loaded is about to be loaded anew."""
        if not self._writing:
            self._session.flush()

    def rolled_back(self) -> None:
        """A savepoint is gone."""
        self._loaded.rolled_back()

    def has_flushed(self) -> None:
        """The database has what the session has."""
        self._loaded.has_flushed()

    def flushes(self) -> None:
        """The session is about to flush: count the version, once."""
        session = self._session
        self._loaded.flushes(self._transaction)
        if self._loaded.changes():
            self._loaded.touch()
        deletes = self._loaded.resource in session.deleted
        if not deletes and not (self._loaded.resource in session.dirty and session.is_modified(self._loaded.resource)):
            return
        mapping = self._mapping
        if mapping.version is not None and not mapping.counts_itself and not deletes and not self._counted:
            self._counted = True
            setattr(self._loaded.resource, mapping.version, getattr(self._loaded.resource, mapping.version) + 1)

    def _executes(self, _: Any, __: Any, statement: str, *___: Any) -> None:
        """A statement is about to be sent on the connection: of the load, of an operation, of the save."""
        if _sql.without_prefix(statement).lstrip()[:6].upper().startswith(("SELECT", "SET ")):
            return
        if not self._writing:
            self._operation_writes()
        if "_loaded" in self.__dict__:
            self._loaded.claim(self._transaction)

    def _operation_writes(self) -> None:
        batch = current_batch()
        if not self._transaction.writes_anywhere and not batch.alone:
            raise RuntimeError(
                f"an operation on {shown(self._key)} would write to SQLite, and lock all of it while other greenlets "
                "run: add to the session, or to current_batch().add_row, what the batch is to write when it saves"
            )
        # What a flush writes was changed by those before, or by an operation that has to leave it as it was when it
        # raises; but for what it has added or deleted itself.
        added = any(when == batch.completed and one in self._session.new for when, one in self._added)
        self._wrote = max(self._wrote, 0)
        if not self._flushing or added or self._session.deleted:
            self._spoils = batch.completed

    def _refusal(self, error: Exception, turn: int) -> NotSaved | None:
        if isinstance(error, NotSaved):
            return error
        if isinstance(error, StaleDataError) or self._is_raced(error):
            return self._loaded.conflict()
        if isinstance(error, (DBAPIError, PendingRollbackError)):
            refused = self._transaction.not_saved(error)
            found = _sql.kind(error)
            lost = self._transaction.connection.invalidated
            if found is _sql.Kind.CONFLICT or (found is _sql.Kind.LOST and lost):  # else it is of another server
                return refused
        # What it has marked as deleted cannot be told from what others have.
        if self._spoils == turn or self._session.deleted or not self._is_whole():
            return Rejected(f"{shown(error)} left the transaction of {shown(self._key)} so that it cannot be saved")
        return None

    def _is_raced(self, error: Exception) -> bool:
        """Whether a query of an operation has flushed the new row, which somebody else has inserted by then."""
        return (
            self._loaded.identity is None
            and isinstance(error, IntegrityError)
            and _sql.is_duplicate(error)
            and not sa.inspect(self._loaded.resource).persistent
        )

    def _is_whole(self) -> bool:
        """Whether the session is still in the transaction that it has loaded in, and nothing has failed there."""
        session = self._session
        below = self._transaction.connection.get_transaction()
        if below is None or not below.is_active:  # a commit of the Connection was refused, half way
            return False
        return session.get_transaction() is self._root and session.is_active and not self._transaction.has_failed()

    # -- save ------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        batch = current_batch()
        session = self._session
        if not self._is_whole():
            raise Rejected(
                f"{shown(self._key)} was not saved: an operation ended the transaction of the batch, or went on after "
                "a statement had failed"
            )
        recording = Recording(self._outcomes(), batch.outcomes) if batch.outcomes else None
        if not batch.completed:  # whatever is in the session, nobody has made it
            self._transaction.write(lambda: None, recording)
            return
        if batch.deleted:
            self._delete()
        rows = batch.rows
        self._loaded.flag_mutated()
        if rows or self._wrote >= 0:
            self._loaded.touch()
        elif not self._transaction.writes_anywhere and not self._loaded.changes() and recording is None:
            return  # elsewhere a SELECT may have called a function that writes, so it is committed
        transaction = self._transaction
        transaction.committer = session.commit

        def write() -> None:
            try:
                session.flush()
                insert_rows(transaction.connection, rows, session)
            except StaleDataError as error:
                raise self._loaded.conflict() from error

        transaction.write(write, recording, collected=self._is_collected(rows))

    def _outcomes(self) -> Outcomes:
        mapping = self._mapping
        assert mapping.outcomes is not None  # noqa: S101 - else no operation has such a key
        columns = ", ".join([attribute.key for attribute in mapping.by])
        return Outcomes(mapping.outcomes, f"{mapping.mapper.local_table} by {columns}", self._row_key)

    def _is_collected(self, rows: Sequence[object]) -> bool:
        """Whether no statement of the flush needs an answer, and nothing is sent between it and COMMIT."""
        session = self._session
        return (
            self._loaded.needs_no_answer()
            and not session.new
            and not session.deleted
            and not any(is_instance(row) for row in rows)
            and all(len(list(getattr(session.dispatch, name))) == 1 for name in _EVENTS)  # those are ours
            and not list(session.dispatch.after_flush)
        )

    def _delete(self) -> None:
        session = self._session
        if self._loaded.resource in session.new:
            session.expunge(self._loaded.resource)
        elif self._loaded.resource in session:
            session.delete(self._loaded.resource)

    def _look_again(self, rejected: Rejected) -> None:
        """When the row that was to be inserted is there by now, another process was faster: that is a `Conflict`.

        So it is where nobody can look: the replay will see.
        """
        cause = rejected.__cause__
        if self._loaded.identity is None and isinstance(cause, IntegrityError) and _sql.is_duplicate(cause):
            mapping = self._mapping
            there: object = True
            with suppress(DBAPIError), mapping.connect(self._key) as connection:
                there = connection.execute(mapping.look, mapping.parameters(self._key)).first()
            if there is not None:
                raise Conflict(f"{shown(self._key)} was not saved: somebody else has inserted it meanwhile") from cause

    def _end(self, error: BaseException | None) -> None:
        transaction = self.__dict__.pop("_transaction", None)
        try:
            if transaction is not None:
                transaction.end(error)
        finally:
            self._close_session()

    def _close_session(self) -> None:
        session = self.__dict__.pop("_session", None)
        if session is not None:
            session.close()
