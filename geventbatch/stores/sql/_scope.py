"""The scope of one batch on one row: entering loads and locks it, exiting saves it and commits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from geventbatch._batch import batch_at_hand
from geventbatch.errors import Rejected
from geventbatch.stores._sql.outcomes import Outcomes, Recording, refuse_repeated
from geventbatch.stores.sql._resource import Resource, only
from geventbatch.stores.sql._transaction import Save, load

if TYPE_CHECKING:
    from collections.abc import Hashable
    from types import TracebackType

    from geventbatch._core.batch import Batch
    from geventbatch.stores.sql._resource import Table
    from geventbatch.stores.sql._transaction import Change, Loaded, Transaction


R = TypeVar("R")


class Scope(Generic[R]):
    """One batch on one row."""

    takes_rows = True
    deletes_if = "pass delete= to the SQLStore, the DELETE of the row at %(key)s"

    # -- mutable state ---------------------------------------------------------------------------------------
    _transaction: Transaction | None = None

    def __init__(self, table: Table, key: Hashable) -> None:
        self._table = table
        self._key = key
        self._resource = Resource(table, key)

    @property
    def deletes(self) -> bool:
        """Return whether `Batch.delete` is obeyed."""
        return self._table.delete is not None

    def __enter__(self) -> R:
        try:
            self._transaction, found = load(self._table.connections, self._key, self._fetch)
            resource: R = self._resource.take(found.columns, only(found, self._key))
        except BaseException as error:
            self._end(error)
            raise
        return resource

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if error is None:
                self._save()
        except BaseException as raised:
            self._end(raised)
            raise
        self._end(error)

    def checkpoint(self) -> object:
        """Return a copy of the present resource. Raises `CannotUndo`. Switches: no."""
        return self._resource.checkpoint()

    def restore(self, checkpoint: object | None) -> Any:
        """Return the resource as of *checkpoint*, or as loaded. Raises `CannotUndo`. Switches: no."""
        return self._resource.restore(checkpoint)

    def recorded(self, keys: list[str]) -> dict[str, str]:
        """Return the recorded outcomes of these idempotency keys. Switches: yes."""
        return self._outcomes().find(self._begun.send, keys)

    # -- inside ----------------------------------------------------------------------------------------------

    @property
    def _begun(self) -> Transaction:
        assert self._transaction is not None  # noqa: S101 - entered
        return self._transaction

    def _fetch(self, transaction: Transaction) -> Loaded:
        return transaction.fetch(self._table.load.text, self._table.named(self._key))

    def _outcomes(self) -> Outcomes:
        return Outcomes(self._table.outcomes_in(self._begun), self._table.name, self._key)

    def _save(self) -> None:
        batch = batch_at_hand()
        recording = Recording(self._outcomes(), batch.outcomes) if batch.outcomes else None
        change = self._change(batch) if batch.completed else None
        if change is not None or batch.rows or recording is not None:
            self._begun.save(Save([change] if change is not None else [], batch.rows, recording))

    def _change(self, batch: Batch) -> Change | None:
        try:
            return self._resource.change(deleted=batch.deleted)
        except Rejected:
            refuse_repeated(self._key, batch, self.recorded)
            raise

    def _end(self, error: BaseException | None) -> None:
        transaction, self._transaction = self._transaction, None
        if transaction is not None:
            transaction.end(error)
