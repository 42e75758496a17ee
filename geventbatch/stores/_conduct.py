"""What operations do in the session of their batch, what they may, and what that means when one has returned or raised.

- What would reach the operations of other callers, or the save, is refused when it is done: ending the transaction,
  setting something in the session of the database, forgetting what the operations before have changed.
- What cannot be seen when it is done is looked at behind the operation, by what the client knows.
- An operation that raises, having written something of its own, has spoiled the transaction. One whose flush sent what
  those before had changed is not judged by what the database said to that.
- Behind a statement that may have changed or deleted what the session holds, the batch is cut: the next operation is
  applied to what the next load gives.
- In SQLite a first write locks the whole database until COMMIT, and other greenlets run in between: it is refused.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.sql.elements import ReleaseSavepointClause, RollbackToSavepointClause, SavepointClause

from geventbatch._processor import current_batch
from geventbatch._shown import shown
from geventbatch.errors import NotSaved, Rejected, Undecided
from geventbatch.stores import _listeners, _sql
from geventbatch.stores._as_loaded import given
from geventbatch.stores._derived import is_stale
from geventbatch.stores._statements import forbidden, reads

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from sqlalchemy.orm import InstanceState, SessionTransaction

    from geventbatch.stores._loaded import Loaded
    from geventbatch.stores._mapping import Mapping
    from geventbatch.stores._session import BatchSession
    from geventbatch.stores._transaction import Transaction

_SAVEPOINTS: Final = (SavepointClause, RollbackToSavepointClause, ReleaseSavepointClause)

_ABSENT: Final = object()


class Conduct:
    """Of the operations of one attempt."""

    # -- mutable state ---------------------------------------------------------------------------------------
    ours: bool  # what happens now is of the load, the save, or the library otherwise: not of an operation
    wrote: bool  # some operation has sent something that writes
    rewrote: bool  # and by a statement of its own, which may have changed or deleted what the session holds
    counted: bool  # the version, for this batch
    nested: SessionTransaction | None  # the savepoint that is open between operations
    acted: bool  # some operation has done something that was to be looked at, since the last step
    savepoints: WeakKeyDictionary[SessionTransaction, sa.NestedTransaction]  # of the session, and what they are below
    _root: SessionTransaction | None  # the transaction that the operations have to stay in
    _below: sa.RootTransaction | None  # likewise, of the connection
    _options: Any  # of the connection
    _heard: int  # listeners of this session alone
    _autoflush: bool  # as the user's own sessions have it
    flushing: bool  # now
    _flushed: int  # all that so many operations have changed is in the database
    _added: list[tuple[int, object]]  # by operations, with how many operations had returned before
    # -- mutable state: the operation at hand ----------------------------------------------------------------
    _seen: bool  # it is to be looked at
    _spoils: bool  # it wrote what would stay if it raised
    _early: bool  # it is to be applied again when what those before have changed is written
    _broke: RuntimeError | None  # what it has done that it may not
    _failed: tuple[Exception, bool] | None  # its last flush, and whether that sent what those before had changed
    _new: list[object]  # what it has added
    _deleted: bool  # it has deleted something by the session
    _given: list[tuple[InstanceState[Any], str]]  # attributes that have got what a load may give otherwise
    _set: list[tuple[dict[Any, Any], Any, Any]]  # what it has set for itself: where, by which name, what was there

    def __init__(self, mapping: Mapping, key: Hashable, session: BatchSession, transaction: Transaction) -> None:
        """In *session*, while it loads."""
        self.key = key
        self.connection = transaction.connection
        self.session = session
        self.transaction = transaction
        self._mapping = mapping
        self._mysql = transaction.engine.dialect.name in {"mysql", "mariadb"}
        self._loaded: Loaded | None = None
        self.ours = True
        self.wrote = self.rewrote = self.counted = self.acted = self.flushing = False
        self.nested = None
        self.savepoints = WeakKeyDictionary()
        self._flushed = 0
        self._added = []
        self._forget()

    def begin(self, loaded: Loaded) -> None:
        """What was loaded is there: from now on operations are applied."""
        self._loaded = loaded
        self._root = self.session.get_transaction()
        self._below = self.connection.get_transaction()
        self._options = self.connection.get_execution_options()
        self._heard = _listeners.count(self.session)
        self._autoflush = self.session.autoflush
        self.ours = False

    @contextmanager
    def own(self) -> Iterator[None]:
        """What happens in the block is the library's own."""
        before, self.ours = self.ours, True
        try:
            yield
        finally:
            self.ours = before

    # -- behind an operation -----------------------------------------------------------------------------------

    def returned(self) -> NotSaved | None:
        """Why the operation at hand, which has returned, does not count. Switches: no."""
        with self.own():
            unfit = self.unfit() or self._misfit()
            given, new, deleted = self._given, self._new, self._deleted
            self._forget()
            if unfit is None and self._loaded is not None:
                if is_stale(self.session, new, given, deleted=deleted):
                    current_batch().cut()
                self._loaded.operation_returned(self.transaction, given)
            return unfit

    def raised(self, error: Exception) -> NotSaved | None:
        """What it means for the transaction that the operation at hand has raised *error*. Switches: no.

        Where it means nothing, what the operation has added is taken out again.
        """
        with self.own():
            refused = self._refusal(error)
            if refused is None:
                refused = self._take_out(error)
            self._forget()
            if self._loaded is not None:
                self._loaded.operation_raised()
            return refused

    def _forget(self) -> None:
        """The operation at hand is over: what it has set for itself is as before."""
        for where, name, value in reversed(self._set) if hasattr(self, "_set") else ():
            if value is _ABSENT:
                dict.pop(where, name, None)
            else:
                dict.__setitem__(where, name, value)
        self._seen = self._spoils = self._early = False
        self._broke = self._failed = None
        self._given, self._new, self._deleted = [], [], False
        self._set = []

    def _refusal(self, error: Exception) -> NotSaved | None:
        loaded = self._loaded
        assert loaded is not None  # noqa: S101 - operations come behind the load
        if isinstance(error, NotSaved):
            return error
        if self._is_raced(error) or (isinstance(error, StaleDataError) and not self.rewrote):
            return loaded.conflict()
        conflict = self._conflict(error) or (self._failed and self._conflict(self._failed[0]))
        if conflict is not None:
            return conflict
        unfit = self.unfit() or self._misfit()
        if isinstance(unfit, Undecided):
            return unfit
        if unfit is not None or self._spoils:
            return Rejected(f"{shown(error)} left the transaction of {shown(self.key)} so that it cannot be saved")
        return None

    def _conflict(self, error: Exception) -> NotSaved | None:
        """What concerns everybody: a deadlock, a lost connection."""
        if not isinstance(error, (DBAPIError, PendingRollbackError)):
            return None
        refused = self.transaction.not_saved(error)
        found = _sql.kind(error)
        lost = self.connection.invalidated
        if found is _sql.Kind.CONFLICT or (found is _sql.Kind.LOST and lost):  # else it is of another server
            return refused
        return None

    def _is_raced(self, error: Exception) -> bool:
        """Whether a query of an operation has flushed the new row, which somebody else has inserted by then."""
        loaded = self._loaded
        return (
            loaded is not None
            and loaded.identity is None
            and isinstance(error, IntegrityError)
            and _sql.is_duplicate(error)
            and not instance_state(loaded.resource).persistent
        )

    def unfit(self) -> NotSaved | None:
        """Why the transaction cannot be saved any more."""
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
            verdict = (Undecided if others else Rejected)(f"{shown(self.key)} was not saved: {error}")
            verdict.__cause__ = error
            return verdict
        failed = self.transaction.has_failed()
        why = "went on after a statement of it had failed" if failed else "ended the transaction of its batch"
        return _rejected(RuntimeError(f"an operation on {shown(self.key)} {why}: nothing of it was saved"))

    def _misfit(self) -> Rejected | None:
        """What the operation at hand has left behind that would reach others."""
        if self._early:
            return Undecided(
                f"an operation on {shown(self.key)} is to be applied behind what those before have changed"
            )
        if self._broke is not None:
            return _rejected(self._broke)
        if self.connection.get_nested_transaction() is not self._savepoint():
            return self._misdeed("left a savepoint of the connection open", "use `with session.begin_nested()`")
        if self.connection.get_execution_options() != self._options:
            return self._misdeed(
                "set execution options of the connection", "pass them to execute(), for that statement only"
            )
        if _listeners.count(self.session) != self._heard:
            return self._misdeed(
                "added a listener to its batch's session", "have it listen to the sessionmaker, where the store is made"
            )
        return None

    def is_whole(self) -> bool:
        """Whether the session is still in the transaction that it has loaded in, and nothing has failed there."""
        session, below = self.session, self.connection.get_transaction()
        if below is None or below is not self._below or not below.is_active:  # a commit was refused, half way
            return False
        if session.get_transaction() is not self._root or not session.is_active:
            return False
        return not self.transaction.has_failed()

    def _savepoint(self) -> sa.NestedTransaction | None:
        """The innermost of the connection, that the session has begun."""
        nested = self.session.get_nested_transaction()
        return None if nested is None else self.savepoints.get(nested)

    def _misdeed(self, what: str, instead: str) -> Rejected:
        return _rejected(RuntimeError(f"an operation on {shown(self.key)} {what}: {instead}"))

    def _take_out(self, error: Exception) -> Rejected | None:
        """Take out what the operation at hand has added."""
        turn = current_batch().completed
        mine = [added for when, added in self._added if when == turn]
        self._added = [(when, added) for when, added in self._added if when != turn]
        mine = [added for added in mine if added in self.session.new]
        if not mine:
            return None
        if self._are_referred_to(mine):
            return Rejected(
                f"{shown(error)} left objects that were added in collections of others, in {shown(self.key)}"
            )
        for added in mine:
            if added in self.session.new:  # and no cascade has taken it out
                self.session.expunge(added)
        return None

    def _are_referred_to(self, mine: list[object]) -> bool:
        """Whether other objects of the session refer to one of those."""
        ours = {id(one) for one in mine}
        for one in (*self.session.dirty, *self.session.new):
            if id(one) in ours:
                continue
            state: InstanceState[Any] = instance_state(one)
            for relationship in state.mapper.relationships:
                if relationship.key in state.dict and any(
                    id(added) in ours for added in state.attrs[relationship.key].history.added or ()
                ):
                    return True
        return False

    # -- what an operation does ----------------------------------------------------------------------------------

    def sees(self) -> None:
        """The operation at hand does something that is to be looked at when it has returned."""
        if not self.ours and not self._seen:
            self._seen = self.acted = True
            current_batch().ask_scope()

    def sets(self, where: dict[Any, Any], name: Any) -> None:
        """The operation at hand sets *name* for itself."""
        if not self.ours and not self.flushing:
            self.sees()
            self._set.append((where, name, where.get(name, _ABSENT)))

    def refuse(self, what: str, instead: str) -> None:
        """Refuse *what* of the session to operations."""
        if not self.ours:
            raise self._refused(f"called {what} of its batch's session: {instead}")

    def _refused(self, what: str) -> RuntimeError:
        """What the operation at hand gets, of which nothing is to be saved unless it goes on without *what*."""
        self._spoils = True
        self.sees()
        return RuntimeError(f"an operation on {shown(self.key)} {what}")

    def refuse_commit(self) -> None:
        """Something is to be committed: a savepoint, or all, which is for the batch to do."""
        if not self.ours and self.session.get_nested_transaction() is self.nested:
            self.refuse("commit()", "the batch commits, once, after all of its operations")

    def begins_savepoint(self) -> None:
        """An operation begins one."""
        self.sees()
        if not self.ours:
            self._refuse_on_sqlite("begin a savepoint")

    def has_begun_savepoint(self, nested: SessionTransaction) -> None:
        """It is sent."""
        found = self.connection.get_nested_transaction()
        assert found is not None  # noqa: S101 - as above
        self.savepoints[nested] = found

    def has_added(self, instance: object) -> None:
        """An operation has added *instance*."""
        if not self.ours:
            self._added.append((current_batch().completed, instance))
            self._new.append(instance)
            state: InstanceState[Any] = sa.inspect(instance)
            for _, name in given(state, self._mapping.columns_of(state.mapper).as_loaded):
                self.is_given(state, name)

    def is_given(self, state: InstanceState[Any], name: str) -> None:
        """An operation has assigned something to attribute *name* that a load may give otherwise."""
        if not self.ours and not self.flushing:
            self.sees()
            self._given.append((state, name))

    def deletes(self, *instances: object) -> None:
        """An operation is about to delete *instances*: what those before have added is in the database, if alone."""
        turn = current_batch().completed
        mine = [added for when, added in self._added if when == turn]
        if self.ours or any(one is added for one in instances for added in mine):  # which SQLAlchemy refuses
            return
        if self._loaded is not None and self._loaded.adds():
            self.flush_others()

    def has_deleted(self) -> None:
        """An operation has marked something as deleted."""
        if self.ours:
            return
        self.sees()
        self._spoils = self._deleted = True
        assert self._loaded is not None  # noqa: S101 - as above
        if self._loaded.resource in self.session.deleted:
            current_batch().cut()

    def has_lost(self, instance: object) -> None:
        """The session does not hold *instance* any more."""
        if self.ours or self._loaded is None:
            return
        if instance is self._loaded.resource or instance_state(instance).modified:
            self.sees()
            self._broke = RuntimeError(
                f"an operation on {shown(self.key)} took {_shown(instance)} out of its batch's session, in which it is "
                "to be saved"
            )

    def lets_go(self, instance: object) -> None:
        """An operation wants *instance* to be expunged, which it may unless something has changed it."""
        if self.ours:
            return
        state: InstanceState[Any] = sa.inspect(instance)
        others = [one for one, *_ in state.mapper.cascade_iterator("expunge", state)]
        session, turn = self.session, current_batch().completed
        mine = [added for when, added in self._added if when == turn]
        for one in (instance, *others):
            kept = one in session.deleted or instance_state(one).modified
            if one in session.new:  # SQLAlchemy itself takes out what is removed from all that may hold it
                kept = not any(one is added for added in mine) and not _is_orphan(one)
            if kept or (self._loaded is not None and one is self._loaded.resource):
                raise self._refused(f"would take {_shown(one)} out of its batch's session, in which it is to be saved")

    def forgets(self) -> None:
        """What the session holds is about to be loaded anew: what others have changed must not be forgotten."""
        if not self.ours and self._has_others():
            raise self._comes_too_early("loads anew what those before it have changed")

    def asks(self, statement: Any, options: dict[str, Any]) -> None:
        """An operation executes *statement* in the session, which may load anew what that holds."""
        if self.ours:
            return
        given = {**statement.get_execution_options(), **(options.get("execution_options") or {})}
        loading = given.get("_sa_orm_load_options")
        anew = getattr(loading, "_populate_existing", False) and getattr(loading, "_refresh_state", None) is None
        if given.get("populate_existing") or anew:
            self.forgets()

    # -- what it sends -------------------------------------------------------------------------------------------

    def executes(self, _: Any, __: Any, statement: str, ___: Any, context: Any, *____: Any) -> None:
        """A statement is about to be sent on the connection: of the load, of an operation, of the save."""
        loaded = self._loaded
        if loaded is None:
            return
        is_savepoint = context.compiled is not None and isinstance(context.compiled.statement, _SAVEPOINTS)
        if not self.ours:
            self.sees()
            if self.connection.get_transaction() is not self._below:
                raise self._refused("went on behind the end of the transaction of its batch")
            if not is_savepoint:
                self._looks_at(_sql.without_prefix(statement))
        # A savepoint too: rolled back to, it would give up a lock that was taken behind it.
        if not loaded.claimed and (is_savepoint or not reads(_sql.without_prefix(statement))):
            with self.own():
                loaded.claim(self.transaction)

    def _looks_at(self, statement: str) -> None:
        """An operation sends *statement*, or a flush in one does."""
        if not self.flushing:
            why = forbidden(statement, mysql=self._mysql)
            if why is not None:
                raise self._refused(f"sent what it may not send: {why}")
            self.flush_others(statement)
        if reads(statement):
            return
        self._refuse_on_sqlite("write")
        self.wrote = True
        batch = current_batch()
        if not self.flushing:
            self._spoils = True
            if self._holds(statement):
                self.rewrote = True
                batch.cut()
        # What a flush writes was changed by those before, or by an operation that has to leave it as it was when it
        # raises; but for what it has added itself.
        elif any(when == batch.completed and one in self.session.new for when, one in self._added):
            self._spoils = True

    def flush_others(self, statement: str | None = None) -> None:
        """Have in the transaction what the operations before have changed, as *statement* of this one has to find it.

        In SQLite, where it cannot be, it has to be saved first; and where sessions flush nothing by themselves, since
        this operation would find its own changes too.
        """
        if self.ours or not self._has_others():
            return
        flushes = self.transaction.writes_anywhere and self.session.autoflush == self._autoflush
        if flushes and (self._autoflush or statement is None or not self._names_changed(statement)):
            self.session.flush()
        elif statement is None or self._names_changed(statement):
            raise self._comes_too_early("asks for what those before it have changed")

    def has_written(self) -> None:
        """All that the operations before have changed is in the transaction."""
        self._flushed = current_batch().completed

    def _has_others(self) -> bool:
        """Whether the session holds changes of those before the operation at hand that are not in the transaction."""
        if self._loaded is None or self._flushed == current_batch().completed:
            return False
        self._loaded.flag_mutated()
        return self._loaded.changes()

    def _comes_too_early(self, what: str) -> RuntimeError:
        """The operation at hand is to be applied behind what those before have changed, when that is written."""
        self._early = True
        self.sees()
        return self._refused(f"{what}: it is applied again when that is written")

    def _names_changed(self, statement: str) -> bool:
        """Whether *statement* names a table of which something is changed."""
        changed = (*self.session.new, *self.session.dirty, *self.session.deleted)
        return any(
            getattr(table, "name", "") in statement for one in changed for table in instance_state(one).mapper.tables
        )

    @contextmanager
    def flush(self) -> Iterator[None]:
        """The session flushes, as far as the user knows it to have something to flush."""
        if self._loaded is not None:
            self._loaded.flag_mutated()
            if not self.ours and self._loaded.changes():
                self.sees()
                self._refuse_on_sqlite("write")
        before, self.flushing = self.flushing, True
        completed = current_batch().completed
        try:
            yield
        except Exception as error:
            self._failed = error, completed > self._flushed
            raise
        finally:
            self.flushing = before
        self._flushed = completed

    def flushes(self) -> None:
        """The session is about to flush: count the version, once."""
        loaded, mapping, session = self._loaded, self._mapping, self.session
        assert loaded is not None  # noqa: S101 - as above
        loaded.flushes(self.transaction, rewrote=self.rewrote)
        if not mapping.locking and loaded.changes():
            loaded.touch()
        if mapping.version is None or mapping.counts_itself or self.counted or loaded.resource in session.deleted:
            return
        if loaded.resource in session.dirty and session.is_modified(loaded.resource):
            self.counted = True
            setattr(loaded.resource, mapping.version, getattr(loaded.resource, mapping.version) + 1)

    def has_flushed(self) -> None:
        """The database has what the session has."""
        if self._loaded is not None:
            self._loaded.has_flushed()

    def rolled_back(self) -> None:
        """A savepoint is gone."""
        if self._loaded is not None:
            self._loaded.rolled_back()

    def _refuse_on_sqlite(self, what: str) -> None:
        if not self.transaction.writes_anywhere and not current_batch().alone:
            raise self._refused(
                f"would {what} to SQLite, and lock all of it while other greenlets run: "
                "add to the session, or to current_batch().add_row, what the batch is to write when it saves"
            )

    def _holds(self, statement: str) -> bool:
        """Whether *statement* names a table of which the session holds something."""
        for state in self.session.identity_map.all_states():
            mappers = [state.mapper, *(one.mapper for one in state.mapper.relationships if one.key in state.dict)]
            if any(getattr(table, "name", "") in statement for mapper in mappers for table in mapper.tables):
                return True
        return False


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
