"""An attempt that is judged step by step: a savepoint behind what was kept, and a copy of what was in memory then."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

from django.db.models import Model
from django.db.models.fields.files import FieldFile

from geventbatch.stores._django_changes import IMMUTABLE
from geventbatch.stores._django_transaction import send

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

    from geventbatch import Batch
    from geventbatch.stores._django_guard import Guard
    from geventbatch.stores._django_row import Row
    from geventbatch.stores._django_transaction import Transaction

M = TypeVar("M", bound=Model)

_SAVEPOINT: Final = "SAVEPOINT geventbatch"


class Steps(Generic[M]):
    """What the last step has left."""

    # -- mutable state, from `begin` on ---------------------------------------------------------------------
    _values: dict[str, Any]
    _adding: bool
    _row: tuple[Any, ...]
    _hooks: list[Any]
    _wrote: bool

    def __init__(self, row: Row[M], connection: BaseDatabaseWrapper, transaction: Transaction, batch: Batch) -> None:
        self.row = row
        self.kept = 0
        """Of the rows that were added, so many are written."""
        self._connection = connection
        self._transaction = transaction
        self._batch = batch

    def begin(self) -> None:
        """Be ready to go back to what there is now. Switches: yes."""
        send(self._connection, _SAVEPOINT, None)
        self._remember()

    def keep(self) -> None:
        """All is written: go back to here from now on. Switches: yes."""
        # Savepoints of one name would pile up in PostgreSQL; MySQL takes one statement at a time.
        again = self._connection.vendor == "postgresql"
        send(self._connection, f"RELEASE {_SAVEPOINT}; {_SAVEPOINT}" if again else _SAVEPOINT, None)
        self._remember()

    def undo(self, guard: Guard) -> None:
        """Go back, in the transaction and in memory. Switches: yes."""
        guard.close_blocks()
        connection = self._connection
        connection.needs_rollback = False
        cast("Any", connection).rollback_exc = None  # Django's stubs do not know it
        send(connection, f"ROLLBACK TO {_SAVEPOINT}", None)
        connection.run_on_commit = [*self._hooks]
        self._transaction.wrote = self._wrote
        row = self.row
        row.loaded, row.new, row.ours, row.claimed = self._row
        values = vars(row.instance)
        state = row.instance._state
        values.clear()
        values.update(_copied(row.instance, self._values))
        state.adding = self._adding
        vars(state).pop("fields_cache", None)

    def _remember(self) -> None:
        row = self.row
        self.kept = len(self._batch.rows)
        self._values = _copied(row.instance, vars(row.instance))
        self._adding = row.instance._state.adding
        self._row = (row.loaded, row.new, row.ours, row.claimed)
        self._hooks = [*self._connection.run_on_commit]
        self._wrote = self._transaction.wrote


def can_copy(instance: Model) -> bool:
    """Whether what operations change in it can be undone. Switches: no."""
    try:
        _copied(instance, vars(instance))
    except Exception:  # of a value of a type of the user's
        return False
    return True


def _copied(instance: Model, values: dict[str, Any]) -> dict[str, Any]:
    """*values* of *instance*, of which those of its columns are not reached by later changes."""
    names = {field.attname for field in instance._meta.concrete_fields}
    return {name: _copy(value) if name in names else value for name, value in values.items()}


def _copy(value: Any) -> Any:
    if type(value) in IMMUTABLE:
        return value
    return value.name if isinstance(value, FieldFile) else copy.deepcopy(value)  # a file makes itself of its name
