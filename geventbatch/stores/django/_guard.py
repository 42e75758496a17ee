"""Guards a Django connection while operations run on it: sees what they send, and refuses what they may not do.

All operations of a batch share one transaction and its session. So no operation may end the transaction, leave a block
open in it, or change a setting that the next operation would meet. Django's own methods for that (`close`,
`set_rollback`) raise in the operation. A statement is checked before it is sent. If an operation still leaves something
behind, it is found when the operation returns, and that operation alone is refused.
"""

from __future__ import annotations

import copy
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import gevent
from django.db import Error, connections
from django.db.backends.signals import connection_created

from geventbatch._core.process import running
from geventbatch._safe_repr import shown
from geventbatch.errors import Conflict, NotSaved, Rejected, TooEarly
from geventbatch.stores._sql import errors, statements
from geventbatch.stores.django._changes import same
from geventbatch.stores.django._connection_class import GUARD, IN_PLACE, TRANSACTION_STATE, connection_class
from geventbatch.stores.django._connections import current
from geventbatch.stores.django._statements import functions_of, writes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from django.db.backends.base.base import BaseDatabaseWrapper

    from geventbatch._core.batch import Batch
    from geventbatch.stores.django._row import Row
    from geventbatch.stores.django._rows import Rows
    from geventbatch.stores.django._steps import Begun, Savepoints
    from geventbatch.stores.django._transaction import Execute, Transaction

T = TypeVar("T")

_NONE: Final[Any] = object()

_NO_SAVEPOINTS: Final[Mapping[str | None, tuple[bool, Any, int]]] = {}


class Guard:
    """Guards the connection of one attempt."""

    def __init__(
        self,
        connection: BaseDatabaseWrapper,
        transaction: Transaction,
        batch: Batch,
        row: Row[Any] | Rows,
        *,
        in_turn: bool = False,
    ) -> None:
        """Guard the operations of *batch*; *in_turn* with those of other batches, in a scope of many keys."""
        self.connection = connection
        self._transaction = transaction
        self._batch = batch
        self._row = row
        self._in_turn = in_turn
        # -- mutable state ---------------------------------------------------------------------------------
        self._class: type[BaseDatabaseWrapper] | None = None  # of the connection, while the guard is on
        self._elsewhere: Sequence[BaseDatabaseWrapper] = ()  # connections to other databases, guarded too
        self._blocks: tuple[Sequence[Any], Sequence[Any]] | None = None  # savepoints and blocks open before operations
        self._can_tell_end = False  # whether the client can tell that the transaction goes on
        self._aside = 0  # above 0 while the library or Django itself sends
        self._marks = 0
        self.mark = 0
        """Number of the transaction's state; a write that stays changes it."""
        self.asked = False
        """True if an operation has sent a query, which may have read another writer's change of the row."""
        self.early = False
        """True if the current operation has read the row from the database, without earlier unsaved changes."""
        self.hooks: list[set[Any]] = []
        """Of the callbacks given to `on_commit`: the sets of savepoints in their entries, which identify those."""
        self.savepoints: Savepoints | None = None
        """Set if operations are undone by savepoints."""
        # -- mutable state, of the current operation -------------------------------------------------------
        self.wrote = False
        self.has_point = False
        """True if a savepoint was considered before the operation's first statement."""
        self._wrong: Exception | None = None  # to raise when the operation returns, even if it swallowed it
        self._hooked = 0  # the number of `hooks` before
        self._savepoints = _NO_SAVEPOINTS  # the operation's own: (wrote, claimed, mark) when each was taken
        self._before: dict[str, Any] | None = None  # the connection's attributes before the first touch
        self._settings: dict[str, Any] | None = None  # the connection's settings before, likewise

    # -- around the operations ------------------------------------------------------------------------------

    def put_on(self) -> None:
        """Guard the connection from now on. Switches: no."""
        connection = self.connection
        values = vars(connection)
        values[GUARD] = self
        values["execute_wrappers"].insert(0, self._executes)
        if self._blocks is None:
            self._blocks = tuple(values["savepoint_ids"]), tuple(values["atomic_blocks"])
            self._can_tell_end = not self._transaction.has_ended()
        kind: Any = type(connection)
        self._class = kind
        connection.__class__ = connection_class(kind)
        if self._batch.alone:
            for alias in connections.settings if len(connections.settings) > 1 else ():
                other = current(alias)
                if other is not None and alias != connection.alias and other.connection is not None:
                    self.watch_elsewhere(other)

    def take_off(self) -> None:
        """Stop guarding the connection. Switches: no."""
        if self._class is None:
            return
        connection: Any = self.connection
        object.__setattr__(
            connection, "__class__", self._class
        )  # past the guard, which would count this as the operation's act
        self._class = None
        values = vars(connection)
        del values[GUARD]
        _remove(values["execute_wrappers"], self._executes)
        for other in self._elsewhere:
            _remove(other.execute_wrappers, self._refuse_elsewhere)
        self._elsewhere = ()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Count statements sent in this block as the library's, not the operation's. Switches: no."""
        self._aside += 1
        try:
            yield
        finally:
            self._aside -= 1

    def next(self) -> None:
        """Get ready for the next operation; the current one has ended and was judged. Switches: no."""
        if self._before is not None:
            self._restore(self._before)
        self.wrote, self._wrong, self._before, self._settings = False, None, None, None
        self.has_point = self.early = False
        self._hooked, self._savepoints = len(self.hooks), _NO_SAVEPOINTS

    def drop_hooks(self) -> None:
        """Drop the callbacks that the current operation has given to `on_commit`. Switches: no."""
        self.drop_hooks_behind(self._hooked)

    def drop_hooks_behind(self, count: int) -> None:
        """Drop the callbacks given to `on_commit` but the first *count*. Switches: no."""
        if len(self.hooks) > count:
            values = vars(self.connection)
            dropped = {id(one) for one in self.hooks[count:]}
            values["run_on_commit"] = [entry for entry in values["run_on_commit"] if id(entry[0]) not in dropped]
            del self.hooks[count:]

    def judge(self) -> NotSaved | None:
        """Return why the current operation has made the transaction unfit to be saved, or None. Switches: no."""
        self._aside += 1
        try:
            return self._judged()
        finally:
            self._aside -= 1

    def _judged(self) -> NotSaved | None:
        over = self._transaction.ended_by()
        if over is not None:
            return over
        if self.early or self._deletes_what_is_unsaved():
            told = f"an operation on {shown(self._batch.key)} has read, or deletes, a row with unsaved changes"
            return TooEarly(told)
        wrong = self._wrong or self.left_behind() or self._transaction.failed()
        if wrong is None:
            return None
        return _because(Rejected, f"{shown(self._batch.key)} was not saved, nothing was written: {wrong}", wrong)

    def left_behind(self) -> Exception | None:
        """Return how an operation has broken the transaction, as far as the client knows, or None. Switches: no."""
        key, values = self._batch.key, vars(self.connection)
        if values["connection"] is None or values["closed_in_transaction"]:
            return RuntimeError(
                f"an operation on {shown(key)} closed the connection of its batch, and its transaction with it"
            )
        if not values["in_atomic_block"] or (self._can_tell_end and self._transaction.has_ended()):
            return RuntimeError(
                f"an operation on {shown(key)} ended the transaction of its batch, which the batch does"
            )
        if (tuple(values["savepoint_ids"]), tuple(values["atomic_blocks"])) != self._blocks:
            return RuntimeError(
                f"an operation on {shown(key)} left a block of atomic() open, or ended one that is not its own: use it "
                "by a with statement"
            )
        return None

    def close_blocks(self) -> None:
        """Forget that the current operation has left blocks open, or has ended some. Switches: no."""
        values = vars(self.connection)
        if self._blocks is not None:
            values["savepoint_ids"][:], values["atomic_blocks"][:] = self._blocks
            values["in_atomic_block"] = True

    # -- what operations do to the connection ---------------------------------------------------------------

    def touched(self) -> None:
        """Note that the current operation reads or sets session state of the connection. Switches: no."""
        if self._aside:
            return
        self._batch.ask_scope()
        if self._before is None:
            values = vars(self.connection)
            self._before = {**values, "execute_wrappers": [*values["execute_wrappers"]]}

    def touched_settings(self) -> None:
        """Note that it reads or sets the connection's settings. Switches: no."""
        if self._settings is None and not self._aside:
            self._settings = copy.deepcopy(vars(self.connection)["settings_dict"])

    def _restore(self, before: dict[str, Any]) -> None:
        """Take back what the operation has set on the connection, before the next one meets it."""
        values = vars(self.connection)
        for name in [*values.keys() | before.keys()]:
            if name in TRANSACTION_STATE or name in IN_PLACE or name.startswith("_"):
                continue
            if name not in before:
                if not hasattr(self._class, name):  # else a `cached_property` of the connection, which may stay
                    del values[name]
            elif values.get(name, _NONE) is not before[name]:
                values[name] = before[name]
        values["execute_wrappers"][:] = before["execute_wrappers"]
        values["settings_dict"] = before["settings_dict"]
        if self._settings is not None and values["settings_dict"] != self._settings:
            values["settings_dict"].clear()
            values["settings_dict"].update(self._settings)
            for name in ("timezone", "timezone_name"):
                values.pop(name, None)

    def refuse(self, what: str, instead: str) -> None:
        """Raise `RuntimeError`, unless the library or Django itself makes the call."""
        if not self._aside:
            raise RuntimeError(
                f"an operation on {shown(self._batch.key)} called {what} on the connection of its batch, which shares "
                f"one transaction: {instead}. Nothing of this operation was saved"
            )

    @property
    def is_outermost(self) -> bool:
        """Return whether the operation has no open block of its own."""
        return self._blocks is not None and len(vars(self.connection)["savepoint_ids"]) <= len(self._blocks[0])

    def has_hooked(self) -> None:
        """Note that the current operation has given a callback to `on_commit`."""
        self.touched()
        self.hooks.append(vars(self.connection)["run_on_commit"][-1][0])

    def has_savepoint(self, sid: str | None) -> None:
        """Note that the operation has taken the savepoint *sid*."""
        self._savepoints = {**self._savepoints, sid: (self.wrote, self._row.claimed, self.mark)}

    def owns_savepoint(self, sid: str | None) -> None:
        """Raise `RuntimeError` unless *sid* is the operation's own: a rollback to it must not undo others' changes."""
        if not self._aside and sid not in self._savepoints:
            raise RuntimeError(
                f"an operation on {shown(self._batch.key)} used the savepoint {shown(sid)}, which is not its own: "
                "it would undo what others have done"
            )

    def is_rolled_back(self, sid: str | None) -> None:
        """Note that the operation's writes and locks since the savepoint *sid* are undone."""
        now = (self.wrote, self._row.claimed, self.mark)
        self.wrote, self._row.claimed, self.mark = self._savepoints.get(sid, now)

    def before_savepoint(self) -> None:
        """Take a savepoint to go back to, if one is due before the operation's own, or before an unseen write."""
        begun = self._begun(writes=True)
        if begun is not None and self.savepoints is not None:
            with self.aside():
                self.savepoints.take(begun)

    def _begun(self, *, writes: bool) -> Begun | None:
        """Return the transaction's state, if a savepoint to go back to must be taken now; else None."""
        if self.savepoints is None or self._aside or not self.savepoints.is_due(writes=writes):
            return None
        self.has_point = True
        return self.mark, self._transaction.wrote

    # -- around what Django executes ------------------------------------------------------------------------

    def _executes(self, execute: Execute, sql: Any, params: Any, many: bool, context: Any) -> Any:
        if self._aside:
            return self._executed(execute, sql, params, many, context)
        self._batch.ask_scope()
        if self._can_tell_end and self._transaction.has_ended():  # by the driver; another statement would begin anew
            self._wrong = self._wrong or self.left_behind()
            if self._wrong is not None:
                raise self._wrong
        text = self._text(sql)
        mysql = self.connection.vendor == "mysql"
        why = statements.forbidden(text, mysql=mysql)
        if why is not None:
            raise RuntimeError(f"an operation on {shown(self._batch.key)} was refused a statement: {why}")
        if mysql:
            self.refuse_ending(text)
        calls = not writes(text)
        if calls and not self._calls_what_writes(text):
            self.asked = True
            self.early = self.early or self._reads_what_is_unsaved(text, params)
            return self._executed(execute, sql, params, many, context, begun=self._begun(writes=False))
        own = calls or self._row.is_named_in(text)
        begun = self._begun(writes=True)
        self._writes()
        before = self._ask(self._row.now) if own else {}
        answer = self._executed(execute, sql, params, many, context, begun=begun)
        if own:
            self._ask(partial(self._check_untouched, before))
        return answer

    def refuse_ending(self, statement: str) -> None:
        """Raise `RuntimeError` if *statement* calls a MySQL procedure that may end the batch's transaction."""
        if not self._aside and functions_of(self.connection).may_end_transaction(statement, self._first_column):
            raise RuntimeError(
                f"an operation on {shown(self._batch.key)} was refused a statement: it calls a procedure that may end "
                "the transaction of its batch: call it outside of the batch"
            )

    def _reads_what_is_unsaved(self, query: str, params: Any) -> bool:
        """Return whether *query* may read the row, which lacks the unsaved changes of earlier operations."""
        batch, row = self._batch, self._row
        if not batch.completed or (batch.in_bulk and not self._in_turn) or not row.is_named_in(query):
            return False
        return row.misleads(query, params)

    def _deletes_what_is_unsaved(self) -> bool:
        """Return whether the row would be deleted with unsaved changes, which no trigger or `delete` would see."""
        batch = self._batch
        return bool(batch.deleted_keys) and batch.completed > 1 and self._row.is_lost_with(batch.deleted_keys)

    def _calls_what_writes(self, query: str) -> bool:
        """Return whether *query* calls a user's function that may write. If unbatched, it does not matter."""
        return not self._batch.alone and functions_of(self.connection).may_write(query, self._first_column)

    def _first_column(self, question: str, parameters: list[str]) -> list[str]:
        raw: Any = self.connection.connection  # past the operation's own wrappers
        with self.connection.wrap_database_errors, closing(raw.cursor()) as cursor:
            cursor.execute(question, parameters)
            return [name for name, *_ in cursor.fetchall()]

    def _writes(self) -> None:
        """Get ready for a write of the operation."""
        self._ask(self._row.verify)  # once: then no other writer can change it, and changes by triggers are ours
        self.wrote = True
        self.mark = self._marks = self._marks + 1
        if self.connection.vendor != "sqlite":  # on SQLite, `wrote` means that the write lock was taken
            self._transaction.wrote = True

    @property
    def must_compare(self) -> bool:
        """Return whether queries may have read another state of the row than the load, which other operations use."""
        return self.asked and not self._row.locks and len(self._batch.operations) > 1

    def compare(self) -> None:
        """Check that queries and the load saw one state of the row, if no save will. Raise `Conflict` else."""
        if self.must_compare:
            try:
                self._row.verify()
            except Error as error:
                raise errors.of_store(error, self._batch.key) from error

    def writes_unseen(self) -> None:
        """Get ready for a write that Django shows to no wrapper, such as `callproc`."""
        if not self._aside:
            self._batch.ask_scope()
            self.before_savepoint()
            self._writes()

    def _check_untouched(self, before: dict[str, object]) -> None:
        """Raise `RuntimeError` if the statement changed the resource's own row, which the save would overwrite."""
        if not same(self._row.now(), before):
            raise RuntimeError(
                f"an operation on {shown(self._batch.key)} changed the row of its resource by a query or another "
                "instance, which the save of the batch would write over: change the resource that the operation "
                "is given"
            )

    def _executed(self, execute: Execute, *call: Any, begun: Begun | None = None) -> Any:
        try:
            if begun is not None and self.savepoints is not None:
                return self.savepoints.send_behind(begun, execute, call)
            return execute(*call)
        except Exception as error:
            self._transaction.has_raised(error)
            raise

    def _ask(self, question: Callable[[], T]) -> T:
        """Return the answer to *question*. What it raises counts even if the operation swallows it."""
        try:
            with self.aside():
                return question()
        except Conflict as error:
            self._transaction.over = self._transaction.over or error
            raise
        except Exception as error:
            self._wrong = error
            raise

    def _text(self, sql: Any) -> str:
        as_string = getattr(sql, "as_string", None)  # a composed statement of psycopg's
        if as_string is not None:
            return cast("str", as_string(self.connection.connection))
        return sql.decode("utf-8", "replace") if isinstance(sql, bytes) else str(sql)

    # -- other databases ------------------------------------------------------------------------------------

    def watch_elsewhere(self, other: BaseDatabaseWrapper) -> None:
        """Guard the connection to another database, which the operation uses."""
        if self._class is not None and all(one is not other for one in self._elsewhere):
            other.execute_wrappers.insert(0, self._refuse_elsewhere)
            self._elsewhere = [*self._elsewhere, other]

    def _refuse_elsewhere(self, execute: Execute, sql: Any, params: Any, many: bool, context: Any) -> Any:
        attempt = running.get(gevent.getcurrent())
        if attempt is not None and attempt.batch is self._batch and writes(self._text(sql)):
            raise RuntimeError(
                f"an operation on {shown(self._batch.key)} would write to the database "
                f"{shown(context['connection'].alias)}, which is not in the transaction of its batch: write there "
                "behind run(), or in transaction.on_commit()"
            )
        return execute(sql, params, many, context)


def _because(kind: type[NotSaved], text: str, cause: BaseException) -> NotSaved:
    error = kind(text)
    error.__cause__ = cause
    return error


def _remove(wrappers: list[Any], wrapper: Any) -> None:
    while wrapper in wrappers:
        wrappers.remove(wrapper)


def _guard_connection(*, connection: BaseDatabaseWrapper, **_: object) -> None:
    """Guard *connection* too, if an operation has opened it to another database."""
    attempt = running.get(gevent.getcurrent())
    scope: Any = None if attempt is None else attempt.scope
    guard = getattr(getattr(scope, "of_many", scope), "guard", None)
    if isinstance(guard, Guard) and connection is not guard.connection:
        guard.watch_elsewhere(connection)


connection_created.connect(_guard_connection, dispatch_uid="geventbatch: guard")
