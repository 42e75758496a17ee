"""The part of the guard that sees each statement of operations, and the state of the attempt and of its operation.

- When a statement of an operation may read what earlier operations have changed, that is flushed first.
- After a statement that may have changed or deleted rows that the session holds, the batch is cut: the next operation
  is applied to the next load.
- In SQLite a first write locks the whole database until COMMIT, while other greenlets run: it is refused.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import WeakKeyDictionary

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.sql.elements import ReleaseSavepointClause, RollbackToSavepointClause, SavepointClause

from geventbatch._batch import current_batch
from geventbatch._safe_repr import shown
from geventbatch.stores._sql import bounds
from geventbatch.stores._sql.statements import first_word, forbidden, reads
from geventbatch.stores.sqlalchemy import _listeners
from geventbatch.stores.sqlalchemy._neighbours import Row, row_of
from geventbatch.stores.sqlalchemy._stale_reads import StaleReads, names_table
from geventbatch.stores.sqlalchemy._transaction import left_out
from geventbatch.stores.sqlalchemy._triggers import sent_by_flush

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    import sqlalchemy as sa
    from sqlalchemy.orm import InstanceState, SessionTransaction

    from geventbatch.stores.sqlalchemy._loaded_resource import LoadedResource
    from geventbatch.stores.sqlalchemy._loaded_resources import LoadedResources
    from geventbatch.stores.sqlalchemy._mapping import Mapping
    from geventbatch.stores.sqlalchemy._session import BatchSession
    from geventbatch.stores.sqlalchemy._transaction import Transaction

_SAVEPOINTS: Final = (SavepointClause, RollbackToSavepointClause, ReleaseSavepointClause)

_ABSENT: Final = object()
_NO_ROWS: Final[frozenset[Row | None]] = frozenset()


_ItemT = TypeVar("_ItemT")


def appended(items: Sequence[_ItemT], one: _ItemT) -> list[_ItemT]:
    """Append *one* to *items*, a list, or the empty tuple in place of one. Return the list."""
    if not isinstance(items, list):
        return [one]
    items.append(one)
    return items


class StatementGuard:
    """Guards the statements of one attempt's operations."""

    # -- mutable state ---------------------------------------------------------------------------------------
    shared: bool  # the transaction has other batches too, so that operations may send nothing that writes
    ours: bool  # the library is at work (load, save, …): no operation
    writes: int  # count of statements and flushes of operations that may write: each rules out an undo in memory
    wrote: bool  # an operation has sent something that writes
    rewrote: bool  # an operation's own statement may have changed or deleted rows that the session holds
    nested: SessionTransaction | None  # the library's savepoint between operations, if they go step by step
    asked: bool  # an operation has sent a query, which may have found a newer state of the row
    acted: bool  # an operation has done something that the guard checks, since the last step
    # Of what few operations do, the empty tuple stands for nothing: a list for each key of a bulk would cost much.
    added: Sequence[tuple[int, object]]  # objects that operations have added, with the number returned before
    _session_transaction: SessionTransaction | None  # the session's transaction of the load
    _connection_transaction: sa.RootTransaction | None  # the connection's transaction of the load
    _options: Any  # the connection's execution options
    _listener_count: int  # number of this session's own listeners
    _autoflush: bool  # of the user's own sessions
    flushing: bool  # a flush is running
    in_bulk: bool  # a bulk method of the session is running, for an operation
    unsure: bool  # the INSERT of the new resource has inserted no row, by its rowcount
    left_out: bool  # the last flush did not find a row that no other process can have changed
    called_what_writes: bool  # a flush, in such a transaction, has called a listener that has sent something
    _written: frozenset[Row | None]  # rows that flushes have written, in a transaction with other batches
    _flushed: int  # number of operations whose changes are flushed
    _holds_more: int  # number of operations that had returned when the session first held more than the load
    _stale_reads: StaleReads | None  # None while the session holds no more than the load
    # -- mutable state: the current operation ----------------------------------------------------------------
    _to_check: bool  # it is to be checked when it has returned
    _spoils: bool  # it has written something that would stay if it raised
    _reapplies: bool  # it is to be applied again after earlier operations' changes are written
    _forbidden: RuntimeError | None  # the error for something forbidden that it has done
    _failed: tuple[Exception, bool] | None  # its last flush, and whether that sent changes of earlier operations
    _writes_before: int  # `writes` when it began
    _new: Sequence[object]  # objects that it has added
    _deleted: bool  # it has deleted something by the session
    _unwritten: bool  # it has deleted something whose changes, by earlier operations, are in no transaction
    _assigned: Sequence[tuple[InstanceState[Any], str]]  # attributes that it has assigned, loaded differently
    _own_settings: Sequence[tuple[dict[Any, Any], Any, Any]]  # what it has set for itself: dict, name, value before

    def __init__(self, mapping: Mapping, key: Hashable, session: BatchSession, transaction: Transaction) -> None:
        """Guard *session*, which is about to load."""
        self.key = key
        self.connection = transaction.connection
        self.session = session
        self.transaction = transaction
        self._mapping = mapping
        self._mysql = transaction.engine.dialect.name in {"mysql", "mariadb"}
        self._loaded: LoadedResource | LoadedResources | None = None
        self.ours = True
        self.shared = False
        self.wrote = self.rewrote = self.asked = self.acted = False
        self.flushing = self.left_out = self.unsure = self.in_bulk = False
        self.writes = 0
        self.nested = None
        self._flushed, self._written, self.called_what_writes = 0, _NO_ROWS, False
        self._holds_more, self._stale_reads = 0, None
        self.added = self._own_settings = self._assigned = self._new = ()
        self._forget()

    @cached_property
    def savepoints(self) -> WeakKeyDictionary[SessionTransaction, sa.NestedTransaction]:
        """The connection's savepoints, by the session's."""
        return WeakKeyDictionary()

    def begin(self, loaded: LoadedResource | LoadedResources) -> None:
        """Begin, after the load, to guard operations."""
        self._loaded = loaded
        self._session_transaction = self.session.get_transaction()
        self._connection_transaction = self.connection.get_transaction()
        self._options = self.connection.get_execution_options()
        self._listener_count = _listeners.count(self.session)
        self._autoflush = self.session.autoflush
        self.ours = False

    @property
    def is_loading(self) -> bool:
        """Return whether no operation has run yet."""
        return self._loaded is None

    def end(self) -> None:
        """Forget the session, which holds the guard: without the cycle, both go as soon as nobody has them."""
        self.ours = True
        self._loaded = self._stale_reads = self._session_transaction = self.nested = None
        self._own_settings = ()
        self.__dict__.pop("session", None)

    @contextmanager
    def own(self) -> Iterator[None]:
        """Mark what happens in the block as the library's own."""
        before, self.ours = self.ours, True
        try:
            yield
        finally:
            self.ours = before

    def check_later(self) -> None:
        """Note that the current operation is to be checked when it has returned."""
        if not self.ours and not self._to_check:
            self._to_check = self.acted = True
            current_batch().ask_scope()

    def sets(self, where: dict[Any, Any], name: Any) -> None:
        """Note that the current operation sets *name*, for itself only."""
        if not self.ours and not self.flushing:
            self.check_later()
            self._own_settings = appended(self._own_settings, (where, name, where.get(name, _ABSENT)))

    def refuse(self, what: str, instead: str) -> None:
        """Raise if an operation calls *what* of the session."""
        if not self.ours:
            raise self._refused(f"called {what} of its batch's session: {instead}")

    def _refused(self, what: str) -> RuntimeError:
        """Return the error that the current operation gets; if it goes on after writing, nothing of it is saved."""
        self._spoils = True
        self.check_later()
        nothing = "" if self._reapplies else ". Nothing of this operation was saved"
        return RuntimeError(f"an operation on {shown(self.key)} {what}{nothing}")

    def _forget(self) -> None:
        """Reset the state of the current operation, which is over, and what it has set for itself."""
        for where, name, value in reversed(self._own_settings) if self._own_settings else ():
            if value is _ABSENT:
                dict.pop(where, name, None)
            else:
                dict.__setitem__(where, name, value)
        self._to_check = self._spoils = self._reapplies = self._unwritten = False
        self._forbidden = self._failed = None
        self._writes_before = self.writes
        self._assigned = self._new = self._own_settings = ()
        self._deleted = False
        if self._stale_reads is not None:
            self._stale_reads.end_operation()

    # -- what it sends -------------------------------------------------------------------------------------------

    def executes(self, _: Any, __: Any, statement: str, ___: Any, context: Any, *____: Any) -> None:
        """Check a statement that is about to be sent on the connection: by the load, an operation, or the save."""
        loaded = self._loaded
        if loaded is None:
            return
        if self.flushing and self.shared and not self.called_what_writes:
            self.called_what_writes = not (sent_by_flush(context) or reads(bounds.without_prefix(statement)))
        is_savepoint = context.compiled is not None and isinstance(context.compiled.statement, _SAVEPOINTS)
        calls = False
        if not self.ours:
            self.check_later()
            if self.connection.get_transaction() is not self._connection_transaction:
                raise self._refused("went on after the end of the transaction of its batch")
            if is_savepoint:
                self.writes += 1
            else:
                calls = self._looks_at(bounds.without_prefix(statement))
        # Claim before a savepoint too: a rollback to it would release a lock that was taken after it.
        if not loaded.claimed and (is_savepoint or calls or not reads(bounds.without_prefix(statement))):
            with self.own():
                loaded.claim(self.transaction)

    def _looks_at(self, statement: str) -> bool:
        """Check *statement*, of an operation or its flush. Return whether it calls a function that may write."""
        if not self.flushing:
            why = forbidden(statement, mysql=self._mysql)
            if why is not None:
                raise self._refused(f"sent what it may not send: {why}")
            self._refuse_ending(statement)
            self.flush_earlier(statement)
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
                stale_reads = self._stale_if_loaded()
                if stale_reads is not None:
                    stale_reads.executes(None if calls else statement)
                self.rewrote = True
                batch.cut()
        # A flush writes changes of earlier operations, or changes that this operation must undo if it raises. Only what
        # it added itself would stay behind.
        elif any(when == batch.completed and one in self.session.new for when, one in self.added):
            self._spoils = True
        return calls

    def _refuse_ending(self, statement: str) -> None:
        """Refuse a MySQL procedure that commits: changes of earlier operations would be applied twice."""
        if self._mysql and self._mapping.functions.may_end_transaction(statement, self._first_column):
            raise self._refused(
                "sent what it may not send: it calls a procedure that may end the transaction of its batch: call it "
                "outside of the batch"
            )

    def _calls_what_writes(self, query: str) -> bool:
        """Return whether *query* calls a user's function, which may write. An operation alone is undone whole."""
        return not current_batch().alone and self._mapping.functions.may_write(query, self._first_column)

    def _first_column(self, question: str, parameters: list[str]) -> list[str]:
        if self.connection.dialect.paramstyle == "qmark":
            question = question.replace("%s", "?")
        with self.own():
            return list(self.connection.exec_driver_sql(question, tuple(parameters)).scalars())

    def loads(self) -> None:
        """Note that the current operation makes the session hold more than was loaded for the batch."""
        if self._stale_reads is None and self._loaded is not None:
            self._holds_more = current_batch().completed
            self._stale_reads = StaleReads(self.session, self._loaded.resources)

    def _stale_if_loaded(self) -> StaleReads | None:
        """Return the stale reads, if earlier operations have loaded something."""
        return self._stale_reads if self._holds_more < current_batch().completed else None

    def _stale_if_returned(self) -> StaleReads | None:
        """Return the stale reads, if any operation has returned: an empty relationship may have needed no query."""
        if self._loaded is None or not current_batch().completed:
            return None
        self.loads()
        return self._stale_reads

    def has_inserted(self, cursor: Any, context: Any) -> None:
        """Note an INSERT of the new resource that has inserted no row."""
        loaded = self._loaded
        if loaded is None or not loaded.is_new or context.compiled is None or cursor.rowcount != 0:
            return
        self.unsure = self.unsure or loaded.inserts(context.compiled.statement.table)

    def check_inserted(self, look: Callable[[], bool]) -> None:
        """Raise if the row of a new resource was left out; a trigger may have put it elsewhere."""
        unsure, self.unsure = self.unsure, False
        if unsure and not look():
            raise left_out(self.key)

    def flush_earlier(self, statement: str | None = None) -> None:
        """Flush what earlier operations have changed, which *statement* of the current one has to find.

        On SQLite, where a flush is impossible, and where sessions do not flush by themselves (the current operation
        would find its own changes too), the changes have to be saved first.
        """
        if self.ours or not self._has_earlier_changes():
            return
        flushes = self.transaction.writes_anywhere and self.session.autoflush == self._autoflush
        if flushes and (self._autoflush or statement is None or not self._names_changed(statement)):
            self._refuse_in_shared("flush")
            self.session.flush()
        elif statement is None or self._reads_computed() or self._names_changed(statement):
            raise self._comes_too_early("asks for what earlier ones have changed")

    def _reads_computed(self) -> bool:
        """Return whether a query may read what the database computes from unwritten changes; these are saved first.

        A batch in which no operation reads that is saved at once. To find out after each operation would cost more.
        """
        return self._loaded is not None and not self.transaction.writes_anywhere and self._loaded.reads_computed()

    def has_written(self) -> None:
        """Note that all changes of the operations so far are flushed."""
        self._flushed = current_batch().completed

    def _has_earlier_changes(self) -> bool:
        """Return whether the session holds changes of earlier operations that are not flushed."""
        if self._loaded is None or self._flushed == current_batch().completed:
            return False
        self._loaded.flag_mutated()
        return self._loaded.changes()

    def _comes_too_early(self, what: str) -> RuntimeError:
        """Return the error of the current operation, which is applied again after earlier changes are written."""
        self._reapplies = True
        self.check_later()
        return self._refused(f"{what}: it is applied again when that is written")

    def _names_changed(self, statement: str) -> bool:
        """Return whether *statement* names a table with unflushed changes."""
        changed = (*self.session.new, *self.session.dirty, *self.session.deleted)
        return any(names_table(statement, instance_state(one).mapper) for one in changed)

    @contextmanager
    def flush(self) -> Iterator[None]:
        """Guard a flush of the session, in the block."""
        if self._loaded is not None:
            self._loaded.flag_mutated()
            if not self.ours and self._loaded.changes():
                self.check_later()
                self._refuse_on_sqlite("write")
                stale_reads = self._stale_if_loaded()
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
        """Guard a bulk method that an operation calls: if it fails, SQLAlchemy ends the transaction."""
        self._refuse_in_shared("write")
        self.flush_earlier()
        self.in_bulk = True
        try:
            yield
        except Exception as error:
            self._failed = error, False
            raise
        finally:
            self.in_bulk = False

    def _is_left_out(self) -> bool:
        """Return whether a trigger, a policy or an operation's statement is why a flush did not find a row.

        Otherwise another process has changed it.
        """
        if self.rewrote:
            return True
        with self.own(), suppress(SQLAlchemyError):
            return self._loaded is None or self._loaded.are_as_read(self.transaction)
        return False

    def flushes(self) -> None:
        """Count the version up, once, and compare dirty rows, before the session flushes."""
        loaded = self._loaded
        if loaded is None:  # the batch is over, and its connection is closed
            return
        self.writes += not self.ours
        loaded.flushes(self.transaction, rewrote=self.rewrote)
        if not self._mapping.locking and loaded.changes():
            loaded.touch()
        loaded.count()

    def has_flushed(self, context: Any) -> None:
        """Note that the database has what the session has; *context* is the flush's."""
        if self.shared:  # what is only listed was looked at
            found = [row_of(state) for state, (_, listed) in context.states.items() if not listed]
            self._written = self._written.union(found)
        if self._loaded is not None:
            self._loaded.has_flushed()

    def take_written(self) -> frozenset[Row | None]:
        """Return the rows that flushes have written since the last call, if the transaction has other batches too."""
        written, self._written = self._written, _NO_ROWS
        return written

    def rolled_back(self) -> None:
        """Note a rollback to a savepoint."""
        if self._loaded is not None:
            self._loaded.rolled_back()

    def _refuse_in_shared(self, what: str) -> None:
        """Refuse what would write to a transaction that other batches share: it could not be undone for this one."""
        if self.shared and not self.ours:
            self._reapplies = True
            raise self._refused(
                f"would {what} before the save of a bulk: it is applied again, in a transaction of its own key"
            )

    def _refuse_on_sqlite(self, what: str) -> None:
        self._refuse_in_shared(what)
        if not self.transaction.writes_anywhere and not current_batch().alone:
            raise self._refused(
                f"would {what} to SQLite, and lock all of it while other greenlets run: "
                "add to the session, or to current_batch().add_row, what the batch is to write when it saves"
            )

    def _holds(self, statement: str) -> bool:
        """Return whether *statement* names a table of which the session holds rows."""
        for state in self.session.identity_map.all_states():
            mappers = [state.mapper, *(one.mapper for one in state.mapper.relationships if one.key in state.dict)]
            if any(names_table(statement, mapper) for mapper in mappers):
                return True
        return False
