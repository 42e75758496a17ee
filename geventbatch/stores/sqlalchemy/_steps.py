"""An attempt that goes step by step: a savepoint of the session after each operation that returned.

SQLAlchemy's savepoints go back in memory too: changed instances are loaded again, added ones expunged. The user's
listeners are not called when a savepoint is released, since nothing is committed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm.exc import StaleDataError

from geventbatch._batch import current_batch
from geventbatch.errors import CannotUndo, NotSaved
from geventbatch.stores._sql import errors
from geventbatch.stores.sqlalchemy._added_rows import insert_rows
from geventbatch.stores.sqlalchemy._session_snapshot import SessionSnapshot
from geventbatch.stores.sqlalchemy._transaction import cause

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch.stores.sqlalchemy._guard import Guard
    from geventbatch.stores.sqlalchemy._loaded_resource import LoadedResource


class Steps:
    """The steps of one attempt."""

    def __init__(self, guard: Guard, loaded: LoadedResource, made: Callable[[], Any], look: Callable[[], bool]) -> None:
        """Begin after the load; *made* makes a missing resource, *look* returns whether its row is there by now."""
        self._guard = guard
        self._transaction = guard.transaction
        self._session = guard.session
        self._loaded = loaded
        self._made = made
        self._look = look
        # -- mutable state ---------------------------------------------------------------------------------
        self.rows = 0  # number of `Batch.rows` that are inserted
        self._is_new = loaded.identity is None  # the resource has no row yet, not even in this transaction
        self._mark = loaded.claimed, loaded.counted  # to reset after a rollback
        loaded.claim(self._transaction)  # before a savepoint, which would release the lock with it
        self._begin()

    def keep(self) -> None:
        """Write what the current operation has changed. Raises a `NotSaved`."""
        loaded, session = self._loaded, self._session
        rows = current_batch().rows[self.rows :]
        self._guard.has_written()
        loaded.flag_mutated()
        if not rows and not self._guard.acted and not loaded.changes():
            self._remember()
            return
        self._guard.writes += 1
        try:
            session.flush()
            self._guard.check_inserted(self._look)
            insert_rows(self._transaction.connection, rows, session)
        except Exception as error:
            self._guard.acted = True
            raise self._refused(error) from cause(error)
        self._release()
        self.rows += len(rows)
        self._is_new = False
        self._begin()

    def undo(self) -> Any:
        """Go back to the last step, in memory if nothing was sent. Raises the database's errors."""
        if not self._is_undone_in_memory():
            self._roll_back()
            if self._is_new:
                self._session.expunge_all()
                self._loaded.resource = self._made()
            else:
                self._session.expire_all()
                self._snapshot.put_plain_back()
            self._begin()
        return self._loaded.resource

    def _is_undone_in_memory(self) -> bool:
        guard = self._guard
        guard.has_written()
        if guard.nested is None or not guard.is_whole():
            return False
        try:
            self._snapshot.restore()
        except CannotUndo:
            return False
        guard.acted = False
        return True

    def _remember(self) -> None:
        """Copy what is not in the database."""
        self._snapshot = SessionSnapshot(self._guard, self._loaded, plain=True, columns=self._is_new)

    def _begin(self) -> None:
        """Set a savepoint; a new resource joins the session after it, until an operation has returned."""
        session, loaded = self._session, self._loaded
        if self._is_new:
            session.expunge_all()
        with session.silence(), self._transaction.holding_back():
            self._guard.nested = session.begin_nested()
        self._mark = loaded.claimed, loaded.counted
        if self._is_new:
            session.add(loaded.resource)
        self._guard.acted = False
        self._remember()

    def _release(self) -> None:
        nested, self._guard.nested = self._guard.nested, None
        assert nested is not None  # noqa: S101 - there is always one
        with self._session.silence(), self._transaction.holding_back():
            nested.commit()

    def _roll_back(self) -> None:
        nested, self._guard.nested = self._guard.nested, None
        if nested is not None:
            savepoint: Any = self._guard.savepoints[nested]
            nested.rollback()
            connection = self._transaction.connection
            with self._transaction.holding_back():  # unreleased savepoints would slow down each later one
                connection.dialect.do_release_savepoint(connection, savepoint._savepoint)  # noqa: SLF001 - its name
        self._loaded.claimed, self._loaded.counted = self._mark

    def _refused(self, error: Exception) -> NotSaved:
        """Return the `NotSaved` for *error*, which an operation's changes have caused."""
        if isinstance(error, StaleDataError):
            return self._guard.stale(error)
        if self._is_new and isinstance(error, IntegrityError) and errors.is_duplicate(error):
            self._roll_back()
            if self._look():
                return errors.inserted(self._guard.key)
        return self._transaction.not_saved(error)
