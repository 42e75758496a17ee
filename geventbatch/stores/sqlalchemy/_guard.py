"""The guard of a batch's session: what operations may do there, and what it means when one has returned or raised.

- It refuses what would reach the operations of other callers, or the save: ending the transaction, setting something in
  the database's session, forgetting what earlier operations have changed.
- What it cannot see as it happens, it checks after the operation, from the client's own state.
- An operation that raises after it has written has spoiled the transaction. One whose flush has sent changes of earlier
  operations is not to blame for the database's error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.orm.exc import StaleDataError

from geventbatch._batch import batch_at_hand, current_batch
from geventbatch._core.verdict import is_clean as _is_clean
from geventbatch._safe_repr import said, shown
from geventbatch.errors import Apart, NotSaved, Rejected, TooEarly, Undecided
from geventbatch.stores._sql import errors
from geventbatch.stores.sqlalchemy import _listeners
from geventbatch.stores.sqlalchemy._computed import is_stale
from geventbatch.stores.sqlalchemy._dirty_rows import history_of
from geventbatch.stores.sqlalchemy._loaded_values import assigned_attributes
from geventbatch.stores.sqlalchemy._statement_guard import StatementGuard, appended

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState, SessionTransaction


class Guard(StatementGuard):
    """Guards the session for the operations of one attempt."""

    # -- behind an operation -----------------------------------------------------------------------------------

    def returned(self) -> NotSaved | None:
        """Return why the current operation, which has returned, does not count. Switches: no."""
        self.ours = True
        try:
            unfit = (self.unfit() or self._misfit()) if self._to_check else None
            given, new, deleted = self._assigned, self._new, self._deleted
            wrote = self.writes != self._writes_before
            unfit = unfit or self._too_early() or self._deletes_too_early()
            self._forget()
            if unfit is None and self._loaded is not None:
                if (given or new or deleted) and is_stale(self.session, new, given, deleted=deleted):
                    current_batch().cut()
                self._loaded.operation_returned(self.transaction, given, wrote=wrote)
            return self._or_apart(unfit)
        finally:
            self.ours = False

    def raised(self, error: Exception) -> NotSaved | None:
        """Return what the current operation's *error* means for the transaction. Switches: no.

        If it means nothing, the operation is undone elsewhere; after an error that is declared clean, its added objects
        are removed here.
        """
        self.ours = True
        try:
            is_clean = _is_clean(batch_at_hand(), error)
            refused = self._refusal(error, is_clean=is_clean)
            if refused is None and is_clean:
                refused = self._take_out(error)
            self._forget()
            if self._loaded is not None:
                self._loaded.operation_raised()
            return self._or_apart(refused)
        finally:
            self.ours = False

    def _or_apart(self, verdict: NotSaved | None) -> NotSaved | None:
        """Return *verdict*; but where it concerns earlier operations, other batches are to be spared in their bulk."""
        if self.shared and isinstance(verdict, Undecided):
            return Apart(f"an operation on {shown(self.key)} needs a transaction without other keys")
        return verdict

    def _refusal(self, error: Exception, *, is_clean: bool) -> NotSaved | None:
        loaded = self._loaded
        assert loaded is not None  # noqa: S101 - operations run after the load
        if isinstance(error, NotSaved):
            return error
        if self._is_raced(error) or (isinstance(error, StaleDataError) and not (self.rewrote or self.left_out)):
            return loaded.conflict()
        conflict = self._conflict(error) or (self._failed and self._conflict(self._failed[0]))
        if conflict is not None:
            return conflict
        unfit = (self.unfit() or self._misfit()) if self._to_check else None
        too_early = None if isinstance(error, DBAPIError) else self._too_early()
        if isinstance(unfit, Undecided) or too_early is not None:
            return too_early or unfit
        if unfit is not None or (self._spoils and is_clean):
            return Rejected(f"{shown(error)} left the transaction of {shown(self.key)} so that it cannot be saved")
        return None

    def _too_early(self) -> TooEarly | None:
        """Return the error of an operation that has made a stale read, which it would not make alone."""
        if self._stale_reads is None or not self._stale_reads.end_operation():
            return None
        return TooEarly(
            f"an operation on {shown(self.key)} has read, after a change of its own, what earlier ones had loaded: it "
            "is applied again, to the next load"
        )

    def _deletes_too_early(self) -> TooEarly | None:
        """Return the error of an operation that deletes what earlier ones have changed: a trigger has to see that."""
        batch, loaded = current_batch(), self._loaded
        if batch.deleted_keys and not self._unwritten and loaded is not None and batch.completed - 1 > self._flushed:
            loaded.flag_mutated()
            self._unwritten = loaded.changes()
        if not self._unwritten:
            return None
        return TooEarly(
            f"an operation on {shown(self.key)} deletes what earlier ones have changed: it is applied again, to "
            "the next load"
        )

    def stale(self, error: StaleDataError) -> NotSaved:
        """Return what it means that a flush of the library's own did not find a row."""
        assert self._loaded is not None  # noqa: S101 - as above
        if self.left_out:
            return Rejected(f"{shown(self.key)} was not saved, nothing was written: {said(error)}")
        return self._loaded.conflict()

    def _conflict(self, error: Exception) -> NotSaved | None:
        """Return the error if it concerns all operations: a deadlock, a lost connection."""
        if not isinstance(error, (DBAPIError, PendingRollbackError)):
            return None
        refused = self.transaction.not_saved(error)
        found = errors.kind(error)
        lost = self.connection.invalidated
        if found is errors.Kind.CONFLICT or (found is errors.Kind.LOST and lost):  # else from another server
            return refused
        return None

    def _is_raced(self, error: Exception) -> bool:
        """Return whether an operation's query has flushed the new row, which another process has inserted first."""
        loaded = self._loaded
        return (
            loaded is not None
            and isinstance(error, IntegrityError)
            and errors.is_duplicate(error)
            and loaded.is_raced()
        )

    def unfit(self) -> NotSaved | None:
        """Return why the transaction cannot be committed any more."""
        connection = self.connection
        if connection.closed or connection.invalidated:
            return _rejected(RuntimeError(f"an operation on {shown(self.key)} gave up the connection of its batch"))
        ended = self.transaction.ended()
        if ended is not None:
            return ended
        if self.is_whole():
            return None
        if self._failed is not None:
            error, others = self._failed
            conflict = self._conflict(error)
            if conflict is not None:
                return conflict
            verdict = (Undecided if others else Rejected)(f"{shown(self.key)} was not saved: {said(error)}")
            verdict.__cause__ = error
            return verdict
        failed = self.transaction.has_failed()
        why = "went on after a statement of it had failed" if failed else "ended the transaction of its batch"
        return _rejected(RuntimeError(f"an operation on {shown(self.key)} {why}: nothing of it was saved"))

    def _misfit(self) -> Rejected | None:
        """Return the error for what the current operation has left behind that would reach others."""
        if self._reapplies:
            return Undecided(
                f"an operation on {shown(self.key)} needs what earlier ones have changed: it is applied again when "
                "that is written"
            )
        if self._forbidden is not None:
            return _rejected(self._forbidden)
        if self.connection.get_nested_transaction() is not self._savepoint():
            return self._misdeed("left a savepoint of the connection open", "use `with session.begin_nested()`")
        if self.connection.get_execution_options() != self._options:
            return self._misdeed(
                "set execution options of the connection", "pass them to execute(), for that statement only"
            )
        if _listeners.count(self.session) != self._listener_count:
            return self._misdeed(
                "added a listener to its batch's session", "have it listen to the sessionmaker, where the store is made"
            )
        return None

    def is_whole(self) -> bool:
        """Return whether the session is still in the transaction of the load, in which nothing has failed."""
        session, below = self.session, self.connection.get_transaction()
        if below is None or below is not self._connection_transaction:
            return False
        if not below.is_active:  # a listener has refused a commit
            return False
        if session.get_transaction() is not self._session_transaction or not session.is_active:
            return False
        return not self.transaction.has_failed()

    def _savepoint(self) -> sa.NestedTransaction | None:
        """Return the connection's innermost savepoint that the session has begun."""
        nested = self.session.get_nested_transaction()
        return None if nested is None else self.savepoints.get(nested)

    def _misdeed(self, what: str, instead: str) -> Rejected:
        return _rejected(RuntimeError(f"an operation on {shown(self.key)} {what}: {instead}"))

    def _take_out(self, error: Exception) -> Rejected | None:
        """Expunge what the current operation has added; return an error if other objects refer to it."""
        mine = [added for added in self._own_added() if added in self.session.new]
        self.added = [(when, added) for when, added in self.added if when != current_batch().completed]
        if not mine:
            return None
        if self._are_referred_to(mine):
            return Rejected(
                f"{shown(error)} left objects that it had added in collections of others, in {shown(self.key)}: "
                "nothing of it was saved"
            )
        for added in mine:
            if added in self.session.new:  # no cascade has expunged it
                self.session.expunge(added)
        return None

    def _own_added(self) -> list[object]:
        """Return what the current operation has added."""
        turn = current_batch().completed
        return [added for when, added in self.added if when == turn]

    def _are_referred_to(self, mine: list[object]) -> bool:
        """Return whether other objects of the session refer to one of *mine*."""
        ours = {id(one) for one in mine}
        for one in (*self.session.dirty, *self.session.new):
            if id(one) in ours:
                continue
            state: InstanceState[Any] = instance_state(one)
            for relationship in state.mapper.relationships:
                if relationship.key in state.dict and any(
                    id(added) in ours for added in history_of(state, relationship.key).added or ()
                ):
                    return True
        return False

    # -- what an operation does ----------------------------------------------------------------------------------

    def refuse_commit(self) -> None:
        """Refuse a commit of the whole transaction to operations: the batch commits."""
        if not self.ours and self.session.get_nested_transaction() is self.nested:
            self.refuse("commit()", "the batch commits, once, after all of its operations")

    def begins_savepoint(self) -> None:
        """Note that an operation begins a savepoint; refuse that on SQLite."""
        self.check_later()
        if not self.ours:
            self._refuse_on_sqlite("begin a savepoint")

    def has_begun_savepoint(self, nested: SessionTransaction) -> None:
        """Note the connection's savepoint of *nested*, which was just sent."""
        found = self.connection.get_nested_transaction()
        assert found is not None  # noqa: S101 - as above
        self.savepoints[nested] = found

    def has_added(self, instance: object) -> None:
        """Note that an operation has added *instance*."""
        if not self.ours:
            self.loads()
            self.added = appended(self.added, (current_batch().completed, instance))
            self._new = appended(self._new, instance)
            stale_reads = self._stale_if_returned()
            if stale_reads is not None:
                stale_reads.has_added(instance)
            state: InstanceState[Any] = sa.inspect(instance)
            found = list(assigned_attributes(state, self._mapping.columns_of(state.mapper).as_loaded))
            if found and not self.flushing:
                current_batch().ask_scope()
                self._assigned = [*self._assigned, *found]

    def has_assigned(self, state: InstanceState[Any], name: str) -> None:
        """Note that an operation has assigned to *name* a value that a load may return differently."""
        if not self.ours and not self.flushing:
            if not self._assigned:
                current_batch().ask_scope()
            self._assigned = appended(self._assigned, (state, name))
            stale_reads = self._stale_if_returned()
            if stale_reads is not None:
                stale_reads.assigns(state, name)

    def deletes(self, *instances: object) -> None:
        """Flush before an operation deletes *instances*, so that what earlier ones have added is in the database."""
        if self.ours or any(one is added for one in instances for added in self._own_added()):  # SQLAlchemy refuses
            return
        if self._loaded is not None and self._loaded.adds():
            self.flush_earlier()

    def has_deleted(self) -> None:
        """Note that an operation has marked something as deleted."""
        if self.ours:
            return
        self.check_later()
        self._spoils = self._deleted = True
        stale_reads = self._stale_if_returned()
        if stale_reads is not None:
            stale_reads.has_deleted()
        assert self._loaded is not None  # noqa: S101 - as above
        if any(self._loaded.has(one) for one in self.session.deleted):
            current_batch().cut()
        if self._has_earlier_changes() and any(instance_state(one).modified for one in self.session.deleted):
            self._unwritten = True

    def has_lost(self, instance: object) -> None:
        """Note that the session has lost *instance*."""
        if self.ours or self._loaded is None:
            return
        current_batch().cut()  # others may refer to it still, and what later operations change in it would be lost
        if self._loaded.has(instance) or instance_state(instance).modified:
            self.check_later()
            self._forbidden = RuntimeError(
                f"an operation on {shown(self.key)} took {_shown(instance)} out of its batch's session, in which it is "
                "to be saved. Nothing of this operation was saved"
            )

    def check_expunge(self, instance: object) -> None:
        """Refuse to expunge *instance* if it has changes, or is the resource."""
        if self.ours:
            return
        state: InstanceState[Any] = sa.inspect(instance)
        others = [one for one, *_ in state.mapper.cascade_iterator("expunge", state)]
        session, mine = self.session, self._own_added()
        for one in (instance, *others):
            kept = one in session.deleted or instance_state(one).modified
            if one in session.new:  # SQLAlchemy itself expunges an instance that was removed from all its parents
                kept = not any(one is added for added in mine) and not _is_orphan(one)
            if kept or (self._loaded is not None and self._loaded.has(one)):
                raise self._refused(f"would take {_shown(one)} out of its batch's session, in which it is to be saved")

    def check_refresh(self) -> None:
        """Refuse to refresh instances while earlier operations' changes are not flushed, since they would be lost."""
        if not self.ours and self._has_earlier_changes():
            raise self._comes_too_early("loads anew what earlier ones have changed")

    def check_execute(self, statement: Any, options: dict[str, Any]) -> None:
        """Check a *statement* that an operation executes, which may refresh instances."""
        if self.ours:
            return
        given = {**statement.get_execution_options(), **(options.get("execution_options") or {})}
        loading = given.get("_sa_orm_load_options")
        anew = getattr(loading, "_populate_existing", False) and getattr(loading, "_refresh_state", None) is None
        if given.get("populate_existing") or anew:
            self.check_refresh()


def _is_orphan(instance: object) -> bool:
    state: InstanceState[Any] = instance_state(instance)
    return bool(state.mapper._is_orphan(state))  # noqa: SLF001 - nothing public tells


def _rejected(error: RuntimeError) -> Rejected:
    refused = Rejected(str(error))
    refused.__cause__ = error
    return refused


def _shown(instance: object) -> str:
    state: InstanceState[Any] = instance_state(instance)
    return f"the {type(instance).__name__} {state.identity or ''}".strip()
