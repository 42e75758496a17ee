"""Judges whether a batch can be saved after an operation on a Django model has raised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geventbatch._core.verdict import is_clean
from geventbatch._safe_repr import shown
from geventbatch.errors import NotSaved, Rejected
from geventbatch.stores._sql import errors
from geventbatch.stores.django._connections import is_closed

if TYPE_CHECKING:
    from geventbatch._core.batch import Batch
    from geventbatch.stores.django._guard import Guard
    from geventbatch.stores.django._row import Row
    from geventbatch.stores.django._rows import Rows
    from geventbatch.stores.django._transaction import Transaction


def verdict_on(
    error: Exception, row: Row[Any] | Rows, guard: Guard, transaction: Transaction, batch: Batch
) -> NotSaved | None:
    """Return why the transaction cannot be saved after an operation raised *error*, or None. Switches: no."""
    if guard.early or (error is transaction.over and isinstance(error, NotSaved)):
        return guard.judge()
    kind = errors.kind(error)
    lost = kind is errors.Kind.LOST and is_closed(guard.connection.connection)  # else another server was lost
    if lost or kind is errors.Kind.CONFLICT:
        return errors.not_saved(error, batch.key)
    undecided, found = row.refused(batch.key), guard.judge()
    if undecided is not None and (found is None or isinstance(found, Rejected)):
        return undecided
    if found is None and guard.wrote and is_clean(batch, error):  # else the scope finds it when it undoes
        return Rejected(f"an operation on key {shown(batch.key)} has sent a statement that writes, and then raised")
    if isinstance(found, Rejected) and kind not in {errors.Kind.OTHER, errors.Kind.TIMEOUT}:
        return errors.not_saved(error, batch.key)
    return found
