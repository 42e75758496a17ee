"""An attempt that is judged step by step: a savepoint, and a copy of what was in memory then, to go back to.

Where a save was refused, each step is written, so that the database judges it: `Steps`. Where operations have only
raised, behind something that is not undone in memory, the savepoint is taken before the first statement of an
operation, in its message if it can be: `Savepoints`. An operation that sends nothing costs no statement then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

from geventbatch.errors import CannotUndo
from geventbatch.stores.django._messages import joined
from geventbatch.stores.django._transaction import send

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch import Batch
    from geventbatch.stores.django._guard import Guard
    from geventbatch.stores.django._row import Row
    from geventbatch.stores.django._transaction import Transaction
    from geventbatch.stores.django._undo import Checkpoint, Undo

    Execute = Callable[..., Any]
    Begun = tuple[int, bool]  # the mark of the transaction's state, and whether something may have been written in it

_SAVEPOINT: Final = "SAVEPOINT geventbatch"
_ANEW: Final = f"RELEASE {_SAVEPOINT}; {_SAVEPOINT}"
"""In PostgreSQL, those of one name would pile up; MySQL takes one statement at a time."""


class _Kept:
    """What the last step has left in memory."""

    # -- mutable state, from the beginning on ---------------------------------------------------------------
    _checkpoint: Checkpoint | None  # none where something cannot be copied

    def __init__(self, guard: Guard, undo: Undo[Any], transaction: Transaction) -> None:
        self._guard = guard
        self._connection = guard.connection
        self._undo = undo
        self._transaction = transaction
        self.kept = 0
        """Of the rows that were added, so many are written."""

    def remember(self) -> None:
        """Go back to here from now on. Switches: no."""
        try:
            self._checkpoint = self._undo.checkpoint()
        except CannotUndo:
            self._checkpoint = None

    def put_back(self) -> None:
        """Have in memory what was kept. Switches: no."""
        if self._checkpoint is None:
            raise CannotUndo("what was kept in memory cannot be copied")
        self._undo.put_back(self._checkpoint)

    def _forget_blocks(self) -> None:
        self._guard.close_blocks()
        connection = self._connection
        connection.needs_rollback = False
        cast("Any", connection).rollback_exc = None  # Django's stubs do not know it

    def _roll_back(self) -> None:
        self._forget_blocks()
        send(self._connection, f"ROLLBACK TO {_SAVEPOINT}", None)


class Steps(_Kept):
    """Each step is written before the next one."""

    # -- mutable state, from `begin` on ---------------------------------------------------------------------
    _row_then: tuple[Any, ...]
    _wrote: bool

    def __init__(self, row: Row[Any], guard: Guard, undo: Undo[Any], transaction: Transaction, batch: Batch) -> None:
        super().__init__(guard, undo, transaction)
        self._row = row
        self._batch = batch

    def begin(self) -> None:
        """Be ready to go back to what there is now. Switches: yes."""
        send(self._connection, _SAVEPOINT, None)
        self.remember()

    def keep(self) -> None:
        """All is written: go back to here from now on. Switches: yes."""
        send(self._connection, _ANEW if self._connection.vendor == "postgresql" else _SAVEPOINT, None)
        self.remember()

    def remember(self) -> None:
        """See `_Kept`."""
        super().remember()
        row = self._row
        self.kept = len(self._batch.rows)
        self._row_then = (row.loaded, row.new, row.ours, row.claimed)
        self._wrote = self._transaction.wrote

    def undo(self) -> None:
        """Go back, in the transaction and in memory. Switches: yes."""
        self._roll_back()
        self._transaction.wrote = self._wrote
        row = self._row
        row.loaded, row.new, row.ours, row.claimed = self._row_then
        self.put_back()


class Savepoints(_Kept):
    """Nothing is written before the save, but what operations write by themselves."""

    # -- mutable state, from the beginning on ---------------------------------------------------------------
    _at: tuple[int, bool, bool] | None  # how it stood when the savepoint was taken: `Begun`, and whether it had the row

    def __init__(self, row: Row[Any], guard: Guard, undo: Undo[Any], transaction: Transaction) -> None:
        super().__init__(guard, undo, transaction)
        self._row = row
        self._at = None
        self._joins = transaction.pipelines
        guard.savepoints = self

    @property
    def is_in_memory(self) -> bool:
        """Whether the operation at hand has changed nothing else. Switches: no."""
        kept = self._checkpoint
        return kept is not None and kept.mark == self._guard.mark and self._guard.judge() is None

    def undo(self) -> None:
        """Go back, in the transaction and in memory. Switches: yes.

        Raises:
            CannotUndo: No savepoint was taken where the operation began.
        """
        self._forget_blocks()
        if self.is_in_memory:  # it has marked the transaction for a rollback, and sent nothing
            self.put_back()
            return
        at, kept = self._at, self._checkpoint
        if at is None or kept is None or at[0] != kept.mark:
            raise CannotUndo("an operation has used the transaction of its batch past Django")
        self._roll_back()
        self._guard.mark, self._transaction.wrote, self._row.claimed = at
        self.put_back()

    def is_due(self, *, writes: bool) -> bool:
        """Whether one has to be taken before a statement of the operation at hand. Switches: no.

        After one that has failed, be it a query, PostgreSQL takes no further one.
        """
        return not self._guard.has_point and (writes or self._connection.vendor == "postgresql")

    def take(self, begun: Begun) -> None:
        """Take one for an operation that has *begun* like this, unless that which there is will do. Switches: yes."""
        statement = self._due(begun)
        if statement is not None:
            send(self._connection, statement, None)
            mark, wrote = begun
            on_sqlite = self._connection.vendor == "sqlite"  # where it says that there is the write lock, which stays
            self._at = (mark, self._transaction.wrote if on_sqlite else wrote, self._row.claimed)

    def send_behind(self, begun: Begun, execute: Execute, call: tuple[Any, ...]) -> Any:
        """Send a statement of the operation's behind one, in its message if it can be. Switches: yes."""
        statement, context = self._due(begun), call[-1]
        text = None if statement is None else self._joined(statement, *call)
        if text is None:
            with self._guard.aside():
                self.take(begun)
            return execute(*call)
        self._at = (*begun, self._row.claimed)
        answer = execute(text, None, False, context)  # noqa: FBT003 - as Django calls it
        for _ in range(1 + (statement == _ANEW)):
            context["cursor"].cursor.nextset()
        return answer

    def _due(self, begun: Begun) -> str | None:
        if self._at is None:
            return _SAVEPOINT
        if self._at[:2] == begun:
            return None
        return _ANEW if self._connection.vendor == "postgresql" else _SAVEPOINT

    def _joined(self, statement: str, sql: Any, params: Any, many: bool, context: Any) -> str | None:
        """One text of both, where nobody who looks at it would take it for the operation's."""
        connection, cursor = self._connection, context["cursor"].cursor
        if many or not self._joins or connection.queries_logged or len(vars(connection)["execute_wrappers"]) > 1:
            return None
        if not isinstance(sql, str) or type(cursor) is not cast("Any", connection.connection).cursor_factory:
            return None  # a cursor of the server's, say
        try:
            return joined(cursor, [(statement, None), (sql, params)])
        except Exception:  # which sending it will say
            return None
