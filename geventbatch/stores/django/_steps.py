"""An attempt judged step by step: a savepoint and a copy of the memory after each step, to go back to.

After a refused save, each step is written, so that the database judges it: `Steps`. If operations have only raised, and
memory alone cannot undo it, a savepoint is taken before an operation's first statement, if possible in one message with
it: `Savepoints`. An operation that sends nothing then costs no statement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

from geventbatch.errors import CannotUndo
from geventbatch.stores.django._messages import joined
from geventbatch.stores.django._transaction import send

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch._core.batch import Batch
    from geventbatch.stores.django._guard import Guard
    from geventbatch.stores.django._row import Row
    from geventbatch.stores.django._transaction import Transaction
    from geventbatch.stores.django._undo import Checkpoint, Undo

    Execute = Callable[..., Any]
    Begun = tuple[int, bool]  # the mark of the transaction's state, and its `wrote`

_SAVEPOINT: Final = "SAVEPOINT geventbatch"
_ANEW: Final = f"RELEASE {_SAVEPOINT}; {_SAVEPOINT}"
"""Savepoints of one name would pile up in PostgreSQL. MySQL replaces them, and takes one statement at a time."""


class _LastStep:
    """The memory after the last step."""

    # -- mutable state, from the beginning on ---------------------------------------------------------------
    _checkpoint: Checkpoint | None  # None if a value cannot be copied

    def __init__(self, guard: Guard, undo: Undo[Any], transaction: Transaction) -> None:
        self._guard = guard
        self._connection = guard.connection
        self._undo = undo
        self._transaction = transaction
        self.kept = 0
        """How many of the added rows are written."""

    def remember(self) -> None:
        """Make the present memory the one to go back to. Switches: no."""
        try:
            self._checkpoint = self._undo.checkpoint()
        except CannotUndo:
            self._checkpoint = None

    def put_back(self) -> None:
        """Restore the memory of the last step. Switches: no."""
        if self._checkpoint is None:
            raise CannotUndo("the resource's memory before the operation could not be copied")
        self._undo.put_back(self._checkpoint)

    def _forget_blocks(self) -> None:
        self._guard.close_blocks()
        connection = self._connection
        connection.needs_rollback = False
        cast("Any", connection).rollback_exc = None  # missing in Django's stubs

    def _roll_back(self) -> None:
        self._forget_blocks()
        send(self._connection, f"ROLLBACK TO {_SAVEPOINT}", None)


class Steps(_LastStep):
    """Steps that are written, each before the next one begins."""

    # -- mutable state, from `begin` on ---------------------------------------------------------------------
    _row_then: tuple[Any, ...]
    _wrote: bool

    def __init__(self, row: Row[Any], guard: Guard, undo: Undo[Any], transaction: Transaction, batch: Batch) -> None:
        super().__init__(guard, undo, transaction)
        self._row = row
        self._batch = batch

    def begin(self) -> None:
        """Make the present state the one to go back to. Switches: yes."""
        send(self._connection, _SAVEPOINT, None)
        self.remember()

    def keep(self) -> None:
        """Make the present state, which is written, the one to go back to. Switches: yes."""
        send(self._connection, _ANEW if self._connection.vendor == "postgresql" else _SAVEPOINT, None)
        self.remember()

    def remember(self) -> None:
        """Remember the row's state too."""
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


class Savepoints(_LastStep):
    """Steps of which only operations' own statements are written before the save."""

    # -- mutable state, from the beginning on ---------------------------------------------------------------
    _at: tuple[int, bool, bool] | None  # the last savepoint's `Begun`, and whether the row was claimed then

    def __init__(self, row: Row[Any], guard: Guard, undo: Undo[Any], transaction: Transaction) -> None:
        super().__init__(guard, undo, transaction)
        self._row = row
        self._at = None
        self._joins = transaction.pipelines
        guard.savepoints = self

    @property
    def is_in_memory(self) -> bool:
        """Return whether the current operation has changed nothing but memory. Switches: no."""
        kept = self._checkpoint
        return kept is not None and kept.mark == self._guard.mark and self._guard.judge() is None

    def undo(self) -> None:
        """Go back, in the transaction and in memory. Switches: yes.

        Raises:
            CannotUndo: No savepoint was taken when the operation began.
        """
        self._forget_blocks()
        if self.is_in_memory:  # it has only marked the transaction for rollback
            self.put_back()
            return
        at, kept = self._at, self._checkpoint
        if at is None or kept is None or at[0] != kept.mark:
            raise CannotUndo("an operation has used the transaction of its batch past Django")
        self._roll_back()
        self._guard.mark, self._transaction.wrote, self._row.claimed = at
        self.put_back()

    def is_due(self, *, writes: bool) -> bool:
        """Return whether a savepoint must precede a statement of the current operation. Switches: no.

        PostgreSQL takes no further statement after one that has failed, so there a query needs one too.
        """
        return not self._guard.has_point and (writes or self._connection.vendor == "postgresql")

    def take(self, begun: Begun) -> None:
        """Take a savepoint for an operation that has *begun* so, unless the last one will do. Switches: yes."""
        statement = self._due(begun)
        if statement is not None:
            send(self._connection, statement, None)
            mark, wrote = begun
            on_sqlite = self._connection.vendor == "sqlite"  # there, `wrote` is the write lock, which stays
            self._at = (mark, self._transaction.wrote if on_sqlite else wrote, self._row.claimed)

    def send_behind(self, begun: Begun, execute: Execute, call: tuple[Any, ...]) -> Any:
        """Send an operation's statement behind a savepoint, in one message if possible. Switches: yes."""
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
        """Return both statements as one text, or None if a wrapper, log or cursor would see that text."""
        connection, cursor = self._connection, context["cursor"].cursor
        if many or not self._joins or connection.queries_logged or len(vars(connection)["execute_wrappers"]) > 1:
            return None
        if not isinstance(sql, str) or type(cursor) is not cast("Any", connection.connection).cursor_factory:
            return None  # a server-side cursor, say
        try:
            return joined(cursor, [(statement, None), (sql, params)])
        except Exception:  # sending it will raise the same
            return None
