"""A part of a bulk's save: the keys of one batch, of which all are saved or none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from django.db.models import Model

from geventbatch._safe_repr import said, shown
from geventbatch.errors import NotSaved, Rejected
from geventbatch.stores._sql.outcomes import outcomes_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from django.db.models import Field

    from geventbatch.stores.django._bulk_update import BulkUpdate, Planned
    from geventbatch.stores.django._row import Row
    from geventbatch.stores.django._turn import Turn


_NOTHING: Final[Mapping[Any, Any]] = {}


class Part:
    """The changes of one batch."""

    # -- mutable state, from `prepare` on -------------------------------------------------------------------
    _fields: dict[Any, list[Field[Any, Any]]]  # by key: what to write

    def __init__(self, turn: Turn, keys: list[Any], *, told: list[Any]) -> None:
        """Save what the batch of *turn* has changed at *keys*, with its rows and outcomes.

        *told* are all its keys: the operations were judged by those too that they have only read.
        """
        self.turn = turn
        self.batch = turn.batch
        self.told = told
        self.outcomes = outcomes_of([self.batch])
        self.rows: dict[Any, Row[Any]] = {key: turn.rows[key] for key in keys}
        self._read: Mapping[Any, Row[Any]] = _NOTHING  # by key: those that operations have only read
        if len(told) > len(keys):
            self._read = {key: turn.rows[key] for key in told if key in turn.rows and key not in self.rows}
        # -- mutable state ---------------------------------------------------------------------------------
        self._planned: dict[Any, Planned] = {}  # by key
        self.added = self.batch.rows

    def prepare(self) -> NotSaved | None:
        """Find what to write. Return why the batch cannot be saved, or None. Switches: no."""
        if self.turn.verdict is not None:
            return self.turn.verdict
        if not self.batch.completed:  # it only has to be compared, or to record outcomes
            self._fields = {key: [] for key in self.rows}
            return None
        try:
            for row in self.rows.values():
                row.check_key()
            self._fields = {key: row.changes() for key, row in self.rows.items()}
        except Exception as error:
            return self.refused(error)
        return None

    def refused(self, error: Exception) -> NotSaved:
        """Return what *error*, which is not of the database, means for the batch. Switches: no."""
        if isinstance(error, NotSaved):
            return error
        found = Rejected(f"{shown(self.batch.key)} was not saved, nothing was written: {said(error)}")
        found.__cause__ = error
        return found

    @property
    def inserts(self) -> bool:
        """Return whether it inserts the resource of a key."""
        return any(row.new for row in self.rows.values())

    @property
    def compared(self) -> dict[Any, Row[Any]]:
        """The rows by key: those to write, and those that the operations have only read."""
        return {**self.rows, **self._read} if self._read else self.rows

    @property
    def compares(self) -> bool:
        """Return whether its rows must be as they were loaded.

        They are locked for it until COMMIT. So what has only been read needs no write that others would notice.
        """
        return self.turn.guard.must_compare or self.writes or bool(self.outcomes and len(self.told) > 1)

    @property
    def writes(self) -> bool:
        """Return whether it writes a row, or has written one."""
        if not self.batch.completed:
            return False
        if self.batch.deleted_keys or self.added or self.turn.wrote or self.inserts:
            return True
        return any(self._fields.values()) or any(self._saves(key) for key in self.rows)

    def written(self) -> Iterator[tuple[type[Model], str]]:
        """Yield the models of the rows to write, each with "save", "delete" or "add". Switches: no."""
        beside = bool(self.added) or self.turn.wrote
        for key, row in self.compared.items():
            if key in self.batch.deleted_keys:
                yield self.turn.models[key], "delete"
            elif beside or (key in self.rows and (row.new or self._fields[key] or self._saves(key))):
                yield self.turn.models[key], "save"
        for added in self.added:
            if isinstance(added, Model):
                yield type(added), "add"

    def _saves(self, key: Any) -> bool:
        row = self.rows[key]
        return row.save_asked and row.computes(self.turn.models[key])

    def plan(self, together: BulkUpdate) -> NotSaved | None:
        """Let *together* write the rows that it can. Return why the batch cannot be saved, or None. Switches: no."""
        deleted = self.batch.deleted_keys
        try:
            for key, row in self.rows.items():
                if self._fields[key] and not row.new and key not in deleted:
                    found = together.plan(row, self._fields[key])
                    if found is not None:
                        self._planned[key] = found
        except Exception as error:
            return self.refused(error)
        return None

    @property
    def planned(self) -> Iterable[Planned]:
        """What is written together with the rows of others. Switches: no."""
        return self._planned.values()

    def write(self) -> None:
        """Write the rows, but those that are planned, and those that operations have added. Switches: yes."""
        beside = bool(self.added) or self.turn.wrote
        for key, row in self.rows.items():
            fields = self._fields[key]
            if key in self._planned:
                continue
            if key in self.batch.deleted_keys:
                row.delete()
            elif row.new:
                row.insert(commits=False)
            elif fields or self._saves(key):
                row.update(fields, commits=False)
            elif beside and not row.ours:
                row.touch()
        for row in self._read.values() if beside else ():
            if not (row.ours or row.new):
                row.touch()
