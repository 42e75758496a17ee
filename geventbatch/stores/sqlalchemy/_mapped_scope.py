"""The scope of one batch over one instance of a mapped class: a session on its own connection, in one transaction.

An operation may change the resource, and, through `object_session(resource)`, query, add other objects and change
those. `Guard` decides what it may do there, and what becomes of it when it raises. The scope loads, and saves what the
session then holds.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm.exc import StaleDataError

from geventbatch._batch import batch_at_hand
from geventbatch._safe_repr import said, shown
from geventbatch.errors import Rejected
from geventbatch.stores._give_back import give_back
from geventbatch.stores._sql import errors
from geventbatch.stores._sql.outcomes import Outcomes, Recording
from geventbatch.stores.sqlalchemy._batch_connection import BatchConnection
from geventbatch.stores.sqlalchemy._guard import Guard
from geventbatch.stores.sqlalchemy._load import load
from geventbatch.stores.sqlalchemy._loaded_resource import LoadedResource
from geventbatch.stores.sqlalchemy._mapped_work import MappedWork, made
from geventbatch.stores.sqlalchemy._session_snapshot import snapshot_of_load
from geventbatch.stores.sqlalchemy._steps import Steps
from geventbatch.stores.sqlalchemy._transaction import LostRow, Transaction, cause, is_doubtful, left_out

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence
    from types import TracebackType

    import sqlalchemy as sa

    from geventbatch._core.batch import Batch
    from geventbatch.stores.sqlalchemy._mapping import Mapping
    from geventbatch.stores.sqlalchemy._session import BatchSession


class MappedScope(MappedWork):
    """One batch over one instance: entering loads it into a session, exiting flushes and commits."""

    takes_rows = True
    deletes = True

    # -- mutable state ---------------------------------------------------------------------------------------
    _loaded: LoadedResource
    _row_key: Hashable  # as in the row: a collation may find it by another one
    _steps: Steps | None
    _held: bool  # the row was locked before the save
    _collected: bool  # the save is one message

    def __init__(self, mapping: Mapping, key: Hashable) -> None:
        super().__init__(mapping, key)
        self._steps = None
        self._held = self._collected = False

    def __enter__(self) -> Any:
        try:
            self._transaction, row = self._load()
            resource, token = (self._made(), None) if row is None else (row[0], row[1:])
            self._loaded = LoadedResource(self._mapping, self._key, self._session, resource, token)
            self._row_key = self._key if row is None else self._mapping.key_of(resource, self._key)
            self._first = snapshot_of_load(self._guard, self._loaded)
            self._guard.begin(self._loaded)
        except BaseException as error:
            self._end(error)
            raise
        return resource

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._guard.ours = True
        try:
            if error is None:
                self._save()
        except BaseException as raised:
            self._end(raised)
            if isinstance(raised, Rejected):
                self._look_again(raised)
            if isinstance(raised, LostRow) and self._collected:
                self._look_for_others()
            raise
        self._end(error)

    # -- step by step ------------------------------------------------------------------------------------------

    @property
    def steps(self) -> bool:
        """Return whether an attempt can go step by step: not on SQLite, where all writers would wait for it."""
        return self._transaction.writes_anywhere

    def begin_steps(self) -> None:
        """Begin to judge operations one by one. Switches: yes."""
        with self._guard.own():
            self._steps = Steps(self._guard, self._loaded, self._made, self._is_inserted)

    def keep(self) -> None:
        """Write what the current operation has changed; see `Steps`. Switches: yes."""
        assert self._steps is not None  # noqa: S101 - they have begun
        with self._guard.own():
            self._steps.keep()

    def undo(self) -> Any:
        """Go back to the state before it, and return the resource. Switches: yes."""
        assert self._steps is not None  # noqa: S101 - as above
        with self._guard.own():
            return self._steps.undo()

    def recorded(self, keys: list[str]) -> dict[str, str]:
        """Return the recorded outcomes of these idempotency keys. Switches: yes."""
        with self._guard.own():  # the query needs no changes of operations
            return self._outcomes().find(self._transaction.send, keys)

    # -- load ------------------------------------------------------------------------------------------------

    def _load(self) -> tuple[Transaction, Any]:
        mapping = self._mapping
        question = partial(mapping.question, self._key)
        try:
            return load(self._begin, self._fetch, question)
        except DBAPIError as error:
            if not (mapping.token and errors.has_no_xmin(error)):
                raise
            mapping.forget_token()
        return load(self._begin, self._fetch, question)

    def _begin(self) -> Transaction:
        mapping = self._mapping
        transaction = mapping.transaction(mapping.engine, self._key)
        self._close_session(saved=False)  # of a first try, whose connection was lost
        session = self._session = cast("BatchSession", mapping.sessions(bind=transaction.connection))
        guard = self._guard = Guard(mapping, self._key, session, transaction)
        session.begin_watch(guard)
        BatchConnection.hold(transaction.connection, guard)
        return transaction

    def _fetch(self, transaction: Transaction) -> Any:
        mapping = self._mapping
        parameters = mapping.parameters(self._key)
        try:
            if mapping.lock is not None:
                transaction.precede(mapping.lock, parameters)
            return self._session.execute(mapping.load, parameters).unique().one_or_none()
        except (ValueError, TypeError, LookupError) as error:  # of a column's type
            raise ValueError(f"the {mapping.name} {shown(self._key)} cannot be decoded: {said(error)}") from error

    def _made(self) -> Any:
        resource = made(self._mapping, self._key)
        self._session.add(resource)
        return resource

    # -- save ------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        batch = batch_at_hand()
        session, guard = self._session, self._guard
        unfit = guard.unfit()
        if unfit is not None:
            raise unfit
        if self.must_compare:
            self._compare(batch)
        recording = Recording(self._outcomes(), batch.outcomes) if batch.outcomes else None
        if not batch.completed:  # no operation counts: save nothing that is in the session
            if recording is not None:
                self._transaction.write(lambda: None, recording)
            return
        late = batch.deleted and self._loaded.adds()  # SQLAlchemy finds cascades of a deletion in the database only
        if batch.deleted and not late:  # before a flush writes what is to be deleted
            self._delete()
        self._end_savepoints()
        rows = batch.rows
        if rows or guard.wrote:
            self._touch()
        elif recording is None and self._is_idle():
            return
        if self._steps is not None:
            rows = rows[self._steps.rows :]
        transaction = self._transaction
        transaction.committer = session.commit
        self._held, self._collected = self._loaded.claimed, self._is_collected(rows)
        transaction.write(partial(self._write, rows, late=late), recording, collected=self._collected)

    def _compare(self, batch: Batch) -> None:
        """Check that queries and load have seen one state of the row, unless the save will find out."""
        self._loaded.flag_mutated()
        if batch.completed and (batch.rows or self._guard.wrote or self._loaded.changes()):
            return
        try:
            self._loaded.compare(self._transaction.connection)
        except DBAPIError as error:
            raise errors.of_store(error, self._key) from cause(error)

    def _write(self, rows: Sequence[object], *, late: bool) -> None:
        if late:
            self._flush(())
            self._delete()
        self._flush(rows)

    def _is_idle(self) -> bool:
        """Return whether there is nothing to commit. Except on SQLite, even a SELECT may have called what writes."""
        if self._transaction.writes_anywhere:
            return False
        self._loaded.flag_mutated()
        return not self._loaded.changes()

    def _touch(self) -> None:
        self._loaded.flag_mutated()
        if self._guard.rewrote and not self._mapping.locking and not self._is_inserted():
            self._session.expunge(self._loaded.resource)  # a statement of an operation has deleted the row
        else:
            self._loaded.touch()

    def _outcomes(self) -> Outcomes:
        mapping = self._mapping
        assert mapping.outcomes is not None  # noqa: S101 - else no operation has such a key
        return Outcomes(mapping.outcomes, mapping.outcome_place, self._row_key)

    def _is_collected(self, rows: Sequence[object]) -> bool:
        """Return whether no statement of the flush needs an answer, and none is sent between the flush and COMMIT."""
        return self._loaded.needs_no_answer() and self._needs_no_answer(rows) and self.has_only_our_listeners()

    def _delete(self) -> None:
        session = self._session
        if self._loaded.resource in session.new:
            session.expunge(self._loaded.resource)
        elif self._loaded.resource in session:
            session.delete(self._loaded.resource)

    def _look_again(self, rejected: Rejected) -> None:
        """Raise a `Conflict` if the row to insert is there: another process was faster.

        Raise it too if the query fails: the replay will see.
        """
        cause = rejected.__cause__
        if self._loaded.identity is None and isinstance(cause, IntegrityError) and errors.is_duplicate(cause):
            there = True
            with suppress(DBAPIError), self._mapping.connect(self._key) as connection:
                there = self._is_there(connection)
            if there:
                raise errors.inserted(self._key) from cause

    def _look_for_others(self) -> None:
        """Raise, after a save in one message that did not find the row, if no other process has changed it."""
        if not (self._held or is_doubtful(batch_at_hand())):
            return
        loaded, transaction = self._loaded, self._guard.transaction
        with suppress(DBAPIError), self._mapping.connect(self._key) as connection:
            there = self._held or loaded.is_there(connection)
            if there and (self._guard.rewrote or loaded.are_as_read(transaction, connection)):
                raise left_out(self._key, StaleDataError)

    def _is_there(self, connection: sa.Connection) -> bool:
        """Return whether there is a row at the key."""
        mapping = self._mapping
        return connection.execute(mapping.look, mapping.parameters(self._key)).first() is not None

    def _is_inserted(self) -> bool:
        """Return whether the batch's own transaction sees a row at the key."""
        return self._is_there(self._transaction.connection)

    def _end(self, error: BaseException | None) -> None:
        transaction = self.__dict__.pop("_transaction", None)
        try:
            if transaction is not None:
                transaction.end(error)
        finally:
            self._close_session(saved=error is None)

    def _close_session(self, *, saved: bool) -> None:
        session = self.__dict__.pop("_session", None)
        if session is not None:
            try:
                give_back(self._key, session.close, saved=saved)
            finally:
                session.end_watch()
