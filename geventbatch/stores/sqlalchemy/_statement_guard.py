"""What operations send in the session of their batch; and what is known of the attempt, and of the operation at hand.

- What those before an operation have changed is in the transaction when a statement of it may ask for that.
- Behind a statement that may have changed or deleted what the session holds, the batch is cut: the next operation is
  applied to what the next load gives.
- In SQLite a first write locks the whole database until COMMIT, and other greenlets run in between: it is refused.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.sql.elements import ReleaseSavepointClause, RollbackToSavepointClause, SavepointClause

from geventbatch._processor import current_batch
from geventbatch._safe_repr import shown
from geventbatch.stores._sql import bounds
from geventbatch.stores._sql.statements import first_word, forbidden, reads
from geventbatch.stores.sqlalchemy import _listeners
from geventbatch.stores.sqlalchemy._stale_reads import StaleReads
from geventbatch.stores.sqlalchemy._transaction import left_out

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    import sqlalchemy as sa
    from sqlalchemy.orm import InstanceState, SessionTransaction

    from geventbatch.stores.sqlalchemy._loaded_resource import LoadedResource
    from geventbatch.stores.sqlalchemy._mapping import Mapping
    from geventbatch.stores.sqlalchemy._session import BatchSession
    from geventbatch.stores.sqlalchemy._transaction import Transaction

_SAVEPOINTS: Final = (SavepointClause, RollbackToSavepointClause, ReleaseSavepointClause)

_ABSENT: Final = object()


class StatementGuard:
    """Of the operations of one attempt."""

    # -- mutable state ---------------------------------------------------------------------------------------
    ours: bool  # what happens now is of the load, the save, or the library otherwise: not of an operation
    writes: int  # how often operations have sent, or flushed, what may write: each time, it cannot be undone in memory
    wrote: bool  # some operation has sent something that writes
    rewrote: bool  # and by a statement of its own, which may have changed or deleted what the session holds
    counted: bool  # the version, for this batch
    nested: SessionTransaction | None  # the savepoint that is open between operations
    asked: bool  # some operation has sent what reads, and may have found what somebody else has made of the row
    acted: bool  # some operation has done something that was to be looked at, since the last step
    savepoints: WeakKeyDictionary[SessionTransaction, sa.NestedTransaction]  # of the session, and what they are below
    _root: SessionTransaction | None  # the transaction that the operations have to stay in
    _below: sa.RootTransaction | None  # likewise, of the connection
    _options: Any  # of the connection
    _heard: int  # listeners of this session alone
    _autoflush: bool  # as the user's own sessions have it
    flushing: bool  # now
    in_bulk: bool  # the session writes what an operation has given it in bulk
    unsure: bool  # the row of a resource that is new was sent, and none was inserted, as the database says
    left_out: bool  # the last flush has not found a row that nobody else can have changed
    _flushed: int  # all that so many operations have changed is in the database
    _holds_more: int  # than was loaded, since an operation before which so many had returned
    _stale_reads: StaleReads | None  # what more
    _added: list[tuple[int, object]]  # by operations, with how many operations had returned before
    # -- mutable state: the operation at hand ----------------------------------------------------------------
    _seen: bool  # it is to be looked at
    _spoils: bool  # it wrote what would stay if it raised
    _early: bool  # it is to be applied again when what those before have changed is written
    _broke: RuntimeError | None  # what it has done that it may not
    _failed: tuple[Exception, bool] | None  # its last flush, and whether that sent what those before had changed
    _writes_before: int  # of `writes`
    _new: list[object]  # what it has added
    _deleted: bool  # it has deleted something by the session
    _unwritten: bool  # which those before have changed, and that is in no transaction
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
        self._loaded: LoadedResource | None = None
        self.ours = True
        self.wrote = self.rewrote = self.counted = self.asked = self.acted = False
        self.flushing = self.left_out = self.unsure = self.in_bulk = False
        self.writes = 0
        self.nested = None
        self.savepoints = WeakKeyDictionary()
        self._flushed = 0
        self._holds_more, self._stale_reads = 0, None
        self._added, self._set = [], []
        self._forget()

    def begin(self, loaded: LoadedResource) -> None:
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

    def _forget(self) -> None:
        """The operation at hand is over: what it has set for itself is as before."""
        for where, name, value in reversed(self._set) if self._set else ():
            if value is _ABSENT:
                dict.pop(where, name, None)
            else:
                dict.__setitem__(where, name, value)
        self._seen = self._spoils = self._early = self._unwritten = False
        self._broke = self._failed = None
        self._writes_before = self.writes
        self._given, self._new, self._set, self._deleted = [], [], [], False
        if self._stale_reads is not None:
            self._stale_reads.reads()  # so that all is in place again

    # -- what it sends -------------------------------------------------------------------------------------------

    def executes(self, _: Any, __: Any, statement: str, ___: Any, context: Any, *____: Any) -> None:
        """A statement is about to be sent on the connection: of the load, of an operation, of the save."""
        loaded = self._loaded
        if loaded is None:
            return
        is_savepoint = context.compiled is not None and isinstance(context.compiled.statement, _SAVEPOINTS)
        calls = False
        if not self.ours:
            self.sees()
            if self.connection.get_transaction() is not self._below:
                raise self._refused("went on behind the end of the transaction of its batch")
            if is_savepoint:
                self.writes += 1
            else:
                calls = self._looks_at(bounds.without_prefix(statement))
        # A savepoint too: rolled back to, it would give up a lock that was taken behind it.
        if not loaded.claimed and (is_savepoint or calls or not reads(bounds.without_prefix(statement))):
            with self.own():
                loaded.claim(self.transaction)

    def _looks_at(self, statement: str) -> bool:
        """An operation sends *statement*, or a flush in one does. Whether that calls a function that may write."""
        if not self.flushing:
            why = forbidden(statement, mysql=self._mysql)
            if why is not None:
                raise self._refused(f"sent what it may not send: {why}")
            self._refuse_ending(statement)
            self.flush_others(statement)
        calls = first_word(statement) == "CALL"
        if reads(statement):
            calls = not self.flushing and self._calls_what_writes(statement)
            if not calls:
                self.asked = True
                self.loads()
                return False
        self._refuse_on_sqlite("write")
        self.writes += 1
        self.wrote = True
        batch = current_batch()
        if not self.flushing:
            self._spoils = True
            if calls or self._holds(statement):
                stale_reads = self._loaded_before()
                if stale_reads is not None:
                    stale_reads.executes(None if calls else statement)
                self.rewrote = True
                batch.cut()
        # What a flush writes was changed by those before, or by an operation that has to leave it as it was when it
        # raises; but for what it has added itself.
        elif any(when == batch.completed and one in self.session.new for when, one in self._added):
            self._spoils = True
        return calls

    def _refuse_ending(self, statement: str) -> None:
        """Refuse a procedure of MySQL's that commits: what those before have changed would be applied twice."""
        if self._mysql and self._mapping.functions.may_end_transaction(statement, self._first_column):
            raise self._refused(
                "sent what it may not send: it calls a procedure that may end the transaction of its batch: call it "
                "outside of the batch"
            )

    def _calls_what_writes(self, query: str) -> bool:
        """Whether *query* calls a function of the user's, which may write. Who runs alone is undone whole."""
        return not current_batch().alone and self._mapping.functions.may_write(query, self._first_column)

    def _first_column(self, question: str, parameters: list[str]) -> list[str]:
        if self.connection.dialect.paramstyle == "qmark":
            question = question.replace("%s", "?")
        with self.own():
            return list(self.connection.exec_driver_sql(question, tuple(parameters)).scalars())

    def loads(self) -> None:
        """The operation at hand has the session hold more than was loaded for the batch."""
        if self._stale_reads is None and self._loaded is not None:
            self._holds_more = current_batch().completed
            self._stale_reads = StaleReads(self.session, self._loaded.resource)

    def _loaded_before(self) -> StaleReads | None:
        """What the session holds more, if those before the operation at hand have loaded of that."""
        return self._stale_reads if self._holds_more < current_batch().completed else None

    def _looked_before(self) -> StaleReads | None:
        """The same, if any have returned: to find nothing in a relationship, they may have sent nothing."""
        if self._loaded is None or not current_batch().completed:
            return None
        self.loads()
        return self._stale_reads

    def has_inserted(self, cursor: Any, context: Any) -> None:
        """A statement was executed that inserts something."""
        loaded = self._loaded
        if loaded is None or loaded.identity is not None or context.compiled is None or cursor.rowcount != 0:
            return
        self.unsure = self.unsure or context.compiled.statement.table in instance_state(loaded.resource).mapper.tables

    def check_inserted(self, look: Callable[[], bool]) -> None:
        """Raise where the row of a resource that is new was left out. It may have been put elsewhere, by a trigger."""
        unsure, self.unsure = self.unsure, False
        if unsure and not look():
            raise (found := left_out(self.key)) from found.__cause__

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
        elif statement is None or self._reads_computed() or self._names_changed(statement):
            raise self._comes_too_early("asks for what those before it have changed")

    def _reads_computed(self) -> bool:
        """Whether it may be for what the database computes, where that is not saved. Then it is saved before, always.

        A batch in which nobody reads that is saved at once. But to find that out behind each operation would cost more.
        """
        mapping = self._mapping
        if not mapping.has_computed or self.transaction.writes_anywhere:
            return False
        mapping.reads_computed = True
        return True

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
                stale_reads = self._loaded_before()
                if stale_reads is not None:
                    stale_reads.writes()
        if self._stale_reads is not None:
            self._stale_reads.flushes()
        before, self.flushing = self.flushing, True
        completed = current_batch().completed
        try:
            yield
        except Exception as error:
            self._failed = error, completed > self._flushed
            self.left_out = isinstance(error, StaleDataError) and self._is_left_out()
            raise
        finally:
            self.flushing = before
        self._flushed = completed

    @contextmanager
    def bulk(self) -> Iterator[None]:
        """An operation has the session write something in bulk: where that fails, SQLAlchemy ends the transaction."""
        self.flush_others()
        self.in_bulk = True
        try:
            yield
        except Exception as error:
            self._failed = error, False
            raise
        finally:
            self.in_bulk = False

    def _is_left_out(self) -> bool:
        """Whether it is not for somebody else that a flush has not found what it was to write.

        But by a trigger or a policy, or by a statement of an operation.
        """
        if self.rewrote:
            return True
        with self.own(), suppress(SQLAlchemyError):
            return self._loaded is None or self._loaded.are_as_read(self.transaction)
        return False

    def flushes(self) -> None:
        """The session is about to flush: count the version, once."""
        loaded, mapping, session = self._loaded, self._mapping, self.session
        assert loaded is not None  # noqa: S101 - as above
        self.writes += not self.ours
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
