"""The resource of one key in one attempt: made of its row, compared with it, and put back as it was."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from geventbatch._safe_repr import said, shown
from geventbatch.errors import CannotUndo, Rejected, ResourceMissing
from geventbatch.stores.sql._rows import unshared
from geventbatch.stores.sql._transaction import Change

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from geventbatch.stores._missing import Making
    from geventbatch.stores._sql.outcomes import OutcomeTable
    from geventbatch.stores.sql._connections import Connections
    from geventbatch.stores.sql._outcome_table import Statements
    from geventbatch.stores.sql._rows import Form, Rows, Watched
    from geventbatch.stores.sql._statements import Statement
    from geventbatch.stores.sql._transaction import Loaded, Transaction


@dataclass(frozen=True, kw_only=True)
class Table:
    """The statements and the options of one store, shared by its scopes."""

    connections: Connections
    name: str
    keys: tuple[str, ...]
    """The names of the key's values."""
    rows: Rows
    load: Statement
    load_many: Statement | None
    save: Statement
    insert: Statement | None
    delete: Statement | None
    missing: Literal["raise"] | Making
    outcomes: Statements | None

    def outcomes_in(self, transaction: Transaction) -> OutcomeTable:
        """Return the statements of the table of outcomes, for the database of *transaction*."""
        assert self.outcomes is not None  # noqa: S101 - else no operation has an idempotency key
        return self.outcomes.mysql if transaction.mysql else self.outcomes.postgresql

    def named(self, key: Any) -> dict[str, Any]:
        """Return the values of *key* by their names."""
        return {self.keys[0]: key} if len(self.keys) == 1 else dict(zip(self.keys, key, strict=True))


class Resource:
    """The resource of *key*."""

    # -- mutable state ---------------------------------------------------------------------------------------
    value: Any  # what operations get
    _form: Form | None  # None: there is no row
    _values: Sequence[Any]  # the row, as loaded
    _watched: Watched

    def __init__(self, table: Table, key: Hashable) -> None:
        self._table = table
        self.key = key

    def take(self, columns: tuple[str, ...], row: Sequence[Any] | None) -> Any:
        """Return the resource of what was loaded. Raises `ResourceMissing` if there is no *row*."""
        rows = self._table.rows
        if row is None:
            self._form = None
            self.value = self._made()
            return self.value
        self._form = rows.form(columns)
        self._values = unshared(row)
        self.value = self._remade(row)
        self._watched = rows.watched(self.value, self._form, self._values)
        return self.value

    def change(self, *, deleted: bool) -> Change | None:
        """Return what a save does; None if it has nothing to do. Raises `Rejected`."""
        table = self._table
        try:
            if deleted:
                return None if self._form is None else self._change(table.delete, {})
            if self._form is None:
                return self._change(table.insert, self.value)
            changed = self._watched.changed(self.value)
            if not changed:
                return None
            change = self._change(table.save, self.value)  # first: if a parameter is misspelt, it says so
            table.rows.check_saved(changed, self._form.columns)
            return change
        except Exception as error:
            raise Rejected(f"{shown(self.key)} was not saved, nothing was written: {said(error)}") from error

    def checkpoint(self) -> object:
        """Return a copy of the present resource. Raises `CannotUndo`. Switches: no."""
        try:
            return (deepcopy(self.value),)
        except Exception as error:
            raise CannotUndo(f"{shown(self.key)} cannot be copied: {said(error)}") from error

    def restore(self, checkpoint: Any) -> Any:
        """Return the resource as of *checkpoint*, or as loaded. Raises `CannotUndo`. Switches: no."""
        try:
            if checkpoint is not None:
                self.value = deepcopy(checkpoint[0])
            elif self._form is None:
                self.value = self._made()
            else:
                self.value = self._remade(unshared(self._values))
        except Exception as error:
            raise CannotUndo(f"{shown(self.key)} cannot be made once more as it was: {said(error)}") from error
        return self.value

    def look(self, transaction: Transaction) -> bool:
        """Return whether there is a row now. Switches: yes."""
        return bool(transaction.fetch(self._table.load.text, self._table.named(self.key)).rows)

    def _change(self, statement: Statement | None, resource: Any) -> Change:
        assert statement is not None  # noqa: S101 - refused before
        parameters = self._table.rows.parameters(resource, statement, self._table.named(self.key))
        return Change(statement, parameters, self.key, self.look)

    def _remade(self, row: Sequence[Any]) -> Any:
        assert self._form is not None  # noqa: S101 - of a row
        try:
            return self._form.make(row)
        except Exception as error:
            raise ValueError(
                f"the row of {shown(self.key)} in {self._table.name} cannot be read: {said(error)}"
            ) from error

    def _made(self) -> Any:
        missing = self._table.missing
        if missing == "raise":
            raise ResourceMissing(f"there is no {shown(self.key)} in {self._table.name}", key=self.key)
        made = missing(self.key)
        missing.check(made, getattr(self, "value", None), self.key)
        return made


def only(loaded: Loaded, key: Hashable) -> Any:
    """Return the one row that was loaded; None if there is none."""
    if len(loaded.rows) > 1:
        raise ValueError(
            f"load has found {len(loaded.rows)} rows for the key {shown(key)}, and has to find one at the most"
        )
    return loaded.rows[0] if loaded.rows else None
