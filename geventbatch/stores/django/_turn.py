"""The turn of a batch in a bulk: its operations run while those of no other batch do, guarded as those of one key are.

All batches of a bulk share the connection and the transaction. So what an operation has written cannot be undone for
its batch alone: see `BulkScope`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geventbatch._safe_repr import said, shown
from geventbatch.errors import CannotUndo, NotSaved, Rejected
from geventbatch.stores.django._answers import asks_later, copied, lies_in
from geventbatch.stores.django._as_loaded import convert_values
from geventbatch.stores.django._guard import Guard
from geventbatch.stores.django._instance_class import forget_read, instance_class, set_class, take_related
from geventbatch.stores.django._rows import Rows
from geventbatch.stores.django._undo import Undo
from geventbatch.stores.django._verdict import verdict_on

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.db.models import Model

    from geventbatch._core.batch import Batch
    from geventbatch.stores.django._row import Row
    from geventbatch.stores.django._transaction import Transaction
    from geventbatch.stores.django._undo import Checkpoint


class Turn:
    """The operations of one batch, on its rows."""

    def __init__(self, batch: Batch, rows: dict[Any, Row[Any]], transaction: Transaction) -> None:
        """Let *batch*, of which no operation has run yet, have its turn on *rows*, by key."""
        self.batch = batch
        self.rows = rows
        self._connection = transaction.connection
        self._transaction = transaction
        self._whole = Rows(rows)
        self.guard = guard = Guard(self._connection, transaction, batch, self._whole, in_turn=True)
        self.models: dict[Any, type[Model]] = {key: type(row.instance) for key, row in rows.items()}
        """By key: the class of the instance, without the one of `instance_class`."""
        copies = batch.attempts > 1
        self._undo = {key: Undo(row, self.models[key], guard, copies=copies) for key, row in rows.items()}
        # -- mutable state ---------------------------------------------------------------------------------
        self.verdict: NotSaved | None = None
        """Why the batch cannot be saved, or None."""
        self._kept: tuple[int, int, NotSaved | None] = (0, 0, None)  # at the last copy: mark, callbacks, verdict

    @property
    def wrote(self) -> bool:
        """Return whether operations have written by statements of their own."""
        return self.guard.mark != 0

    def begin(self) -> None:
        """Guard the connection, and replace `save` and `delete` of the instances. Switches: no."""
        for key, row in self.rows.items():
            set_class(row.instance, instance_class(self.models[key]))
        self.guard.put_on()

    def end(self) -> None:
        """Take off what `begin` has put on. Switches: no."""
        self.verdict = self.guard.judge() or self.verdict
        self.guard.next()
        self.guard.take_off()
        for key, row in self.rows.items():
            set_class(row.instance, self.models[key])

    # -- operations -----------------------------------------------------------------------------------------

    def raised(self, error: Exception) -> NotSaved | None:
        """Return the verdict on all batches of the bulk after an operation raised *error*. Switches: no."""
        guard, key = self.guard, self.batch.key
        with guard.aside():
            verdict = verdict_on(error, self._whole, guard, self._transaction, self.batch)
        if verdict is None and guard.wrote:
            verdict = Rejected(
                f"an operation on key {shown(key)} has sent a statement that writes, and then raised: all keys of the "
                "bulk, which share the transaction, are applied again without it"
            )
        guard.drop_hooks()
        self._forget_read()
        guard.next()
        return verdict

    def returned(self) -> NotSaved | None:
        """Return the verdict on all batches of the bulk after an operation that used the database returned.

        A value that its column does not take concerns this batch alone: it is refused when the bulk is saved.
        Switches: no.
        """
        guard, key = self.guard, self.batch.key
        verdict = guard.judge() or self._whole.refused(key)
        if verdict is None and self.verdict is None:
            try:
                with guard.aside():
                    self._convert()
            except Exception as error:  # as `save` would raise it
                self.verdict = Rejected(f"{shown(key)} was not saved, nothing was written: {said(error)}")
                self.verdict.__cause__ = error
        self._forget_read()
        guard.next()
        return verdict

    def _convert(self) -> None:
        for key, row in self._at_hand():
            take_related(row.instance)
            convert_values(row.instance, self.models[key], self._connection)

    def _forget_read(self) -> None:
        for key, row in self._at_hand():
            if not row.computes(self.models[key]):
                forget_read(row.instance, self.models[key], self._undo[key].found)

    def _at_hand(self) -> Iterator[tuple[Any, Row[Any]]]:
        """Yield the keys and rows of the operation at hand."""
        for key in self.batch.keys:
            if key in self.rows:
                yield key, self.rows[key]

    def key_of(self, instance: Model) -> Any:
        """Return the key whose resource is *instance*. Switches: no."""
        return next(key for key, row in self.rows.items() if row.instance is instance)

    def copied(self, value: object) -> object:
        """Return a copy of *value* if it lies in a column and can be changed; else itself. Switches: no."""
        for key, row in self._at_hand():
            found = copied(row.instance, self.models[key], value, self._connection)
            if found is not value:
                return found
        return value

    def owns(self, value: object) -> bool:
        """Return whether *value* is an instance of the operation's, or lies in one of its columns. Switches: no."""
        return asks_later(value) or any(
            value is row.instance or lies_in(row.instance, self.models[key], value) for key, row in self._at_hand()
        )

    # -- undoing --------------------------------------------------------------------------------------------

    def checkpoint(self, key: Any) -> Checkpoint:
        """Return a copy of the memory at *key*. Raises `CannotUndo` if a value cannot be copied. Switches: no."""
        found = self._undo[key].checkpoint()
        self._kept = self.guard.mark, len(self.guard.hooks), self.verdict
        return found

    def restore(self, key: Any, checkpoint: Checkpoint | None) -> Model:
        """Go back to the last copy at *key*. Raises `CannotUndo` if memory is not enough. Switches: no."""
        mark, hooks, verdict = self._kept
        if mark != self.guard.mark:
            raise CannotUndo(
                f"operations on {shown(key)} have sent a statement that writes: memory alone cannot undo it"
            )
        undo = self._undo[key]
        undo.put_back_memory(undo.as_of(checkpoint))
        self.guard.drop_hooks_behind(hooks)
        self.verdict = verdict
        instance: Model = self.rows[key].instance
        return instance
