"""Documents of many keys that are loaded together and saved together, in one transaction.

Those that operations have connected are saved together or not at all; the others are saved as if these were not there.
Rows are locked in the order of their keys, so that two processes wait for each other and do not deadlock. On PostgreSQL
one statement has all documents; other databases get the statements of one document after the other. For the save, see
`_bulk_save`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import sqlalchemy as sa

from geventbatch._batch import batch_at_hand, current_batch
from geventbatch._bulk.connected import by_component
from geventbatch._safe_repr import shown
from geventbatch.errors import Conflict, NothingToSave, NotSaved, PartlySaved
from geventbatch.stores._sql import errors
from geventbatch.stores._sql.keys import KeyColumn, normalize_all
from geventbatch.stores._sql.outcomes import outcomes_of, repeated_of
from geventbatch.stores.sqlalchemy._bulk_save import BulkSave, Part, Saving, outcomes_in
from geventbatch.stores.sqlalchemy._bulk_statements import Claim, ask_all, fits, load_all, statements_for_all
from geventbatch.stores.sqlalchemy._document_scope import DocumentScope
from geventbatch.stores.sqlalchemy._documents import Row
from geventbatch.stores.sqlalchemy._key_columns import folds
from geventbatch.stores.sqlalchemy._load import Question, load_each
from geventbatch.stores.sqlalchemy._mode import on_server

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterable, Sequence
    from types import TracebackType

    from geventbatch.errors import Repeated
    from geventbatch.stores._reuse import Kept
    from geventbatch.stores.sqlalchemy._documents import Documents
    from geventbatch.stores.sqlalchemy._transaction import Transaction


class BulkDocuments:
    """The ``open_resources`` of a `Processor`: documents of many keys in one transaction."""

    all_or_nothing = True
    """What operations have connected is saved together or not at all."""

    def __init__(
        self, documents: Documents, table: sa.Table, columns: Sequence[KeyColumn], kept: Kept[Any] | None
    ) -> None:
        self._documents = documents
        self._kept = kept
        self._columns = columns
        self.keeps_outcomes = documents.outcomes is not None
        self.on_server = on_server(documents.engine)
        single, dialect = documents.statements, documents.engine.dialect.name
        has_arrays = dialect == "postgresql" and all(fits(column) for column in (table.c.key, table.c.state))
        load = load_all(table, single.selected, arrays=has_arrays, locking=documents.locking)
        by_row = sa.select(table.c.key, *single.selected).where(table.c.key == sa.bindparam("_key"))
        ask = ask_all(table, arrays=has_arrays)
        self._loads: Final = Loads(load, by_row, ask, folds=folds(table.c.key))
        statements = statements_for_all(table, single.mark) if has_arrays else ()
        together: dict[Any, Any] = dict(
            zip((single.update, single.count, single.delete, single.add), statements, strict=False)
        )
        claim = None if documents.locking else Claim(table, single.mark, arrays=has_arrays)
        self._saving: Final = Saving(together, claim)

    def __repr__(self) -> str:
        return f"<documents in bulk of {self._documents.name}>"

    def __call__(self, keys: Iterable[Hashable]) -> BulkDocumentScope:
        """Open the resources at *keys*: what a processor calls. Switches: no."""
        named = list(keys)
        if self._kept is not None:
            self._kept.drop(named)
        return BulkDocumentScope(self._documents, self._loads, self._saving, named)

    def normalize_key(self, key: Hashable) -> Hashable:
        """Return the column's value for *key*, as `SQLAlchemyStore.normalize_key` does. Switches: no."""
        return normalize_all(key, self._columns)


class Loads(NamedTuple):
    """The statements that load documents."""

    many: Any
    one: Any
    """Selects the row's own key too."""
    ask: Any
    """Asks about keys in the form of `many`, and reads no row."""
    folds: bool
    """The database may take several keys for one."""


class BulkDocumentScope:
    """Batches of many keys, one of each: entering loads their documents, exiting saves them."""

    takes_rows = True
    deletes = True

    # -- mutable state ---------------------------------------------------------------------------------------
    _transaction: Transaction
    _resources: dict[Hashable, Any]
    _scopes: dict[Hashable, DocumentScope]  # of the loaded ones
    _spelled: dict[Any, Hashable]  # by the key in the row: the key of the bulk, where they differ

    def __init__(
        self,
        documents: Documents,
        loads: Loads,
        saving: Saving,
        keys: list[Hashable],
    ) -> None:
        self._documents = documents
        self._loads = loads
        self._saving = saving
        self._keys = keys
        self._name = f"{len(keys)} documents of {documents.name}"
        self._spelled = {}

    def __enter__(self) -> dict[Hashable, Any]:
        try:
            found = self._load()
            self._scopes = {}
            self._resources = {key: made for key in self._keys if (made := self._made(key, found.get(key))) is not None}
        except BaseException as error:
            self._end(error)
            raise
        return self._resources

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        lost: dict[Hashable, Exception] = {}
        try:
            if error is None:
                lost = self._save()
        except BaseException as raised:
            self._end(raised)
            raise
        self._end(error, lost)
        if lost:
            raise PartlySaved(lost)

    def checkpoint(self) -> object:
        """Return a copy of the current key's resource. Raises `CannotUndo`. Switches: no."""
        return self._scopes[current_batch().key].checkpoint()

    def restore(self, checkpoint: object) -> Any:
        """Return the current key's resource as of *checkpoint*, or as loaded. Raises `CannotUndo`. Switches: no."""
        key = current_batch().key
        resource = self._resources[key] = self._scopes[key].restore(checkpoint)
        return resource

    def recorded(self, names: list[str]) -> dict[str, str]:
        """Return the recorded outcomes of these names. Switches: yes."""
        return outcomes_in(self._documents, self._transaction, self._scopes).find(self._transaction.send, names)

    # -- inside ----------------------------------------------------------------------------------------------

    def _begun(self) -> Transaction:
        return self._documents.transaction(self._documents.engine, self._name)

    def _load(self) -> dict[Hashable, Row | Exception]:
        """Load the rows; an error of one key stands in place of its row."""
        transaction, found = load_each(lambda _: self._begun(), self._fetch, self._keys, self._question)
        if transaction is not None:
            self._transaction = transaction
        return found

    def _question(self, key: Hashable) -> Question:
        return Question(key, self._loads.ask, {"_keys": [key]})

    def _fetch(self, keys: Sequence[Hashable], transaction: Transaction) -> dict[Hashable, Row | Exception]:
        self._spelled = {}  # of a load of other keys
        row_of = self._documents.statements.row_of
        rows = transaction.connection.execute(self._loads.many, {"_keys": keys}).all()
        found: dict[Hashable, Row | Exception] = {row[0]: row_of(row, 1) for row in rows}
        unmatched = [key for key in keys if key not in found]
        if unmatched and (self._loads.folds or len(found) + len(unmatched) > len(keys)):
            self._match(transaction, unmatched, found)
        return found

    def _match(
        self, transaction: Transaction, unmatched: list[Hashable], found: dict[Hashable, Row | Exception]
    ) -> None:
        """Ask which row each of *unmatched* is, as the database may take several keys for one.

        The key that is in the row's own form has it first. A bulk has each row once.
        """
        bulk = batch_at_hand().bulk
        matched = {key: found[key] for key in self._keys if key in found}
        taken: dict[Hashable, Hashable] = dict(zip(matched, matched, strict=True))  # by the row's key
        for key in unmatched:
            row = transaction.connection.execute(self._loads.one, {"_key": key}).one_or_none()
            if row is None:
                continue
            other = taken.get(row.key)
            if other is None:
                taken[row.key] = self._spelled[row.key] = key
                matched[key] = self._documents.statements.row_of(row, 1)
                continue
            told = f"{shown(key)} names the row {shown(row.key)}, as {shown(other)} does"
            if bulk[key] is not bulk[other]:
                matched[key] = Conflict(f"{told}, of the same bulk")
            else:  # another round would have both again
                matched[key] = ValueError(f"{told}, which operations connect with it: always name it as the row does")
        found.clear()
        found.update(matched)

    def _made(self, key: Hashable, row: Row | Exception | None) -> Any:
        """Return the resource, or the error of its load; None if it is missing, and none is made."""
        if isinstance(row, Exception):
            return row
        scope = DocumentScope(self._documents, key)
        if row is None and self._documents.missing == "raise":
            return None
        try:
            resource = scope.take(row or Row(None, None))
        except Exception as error:
            return error
        self._scopes[key] = scope
        return resource

    def _save(self) -> dict[Hashable, Exception]:
        """Save, and return the errors of documents that were not saved."""
        failed: dict[Hashable, Exception] = {}
        parts: list[Part] = []
        bulk = batch_at_hand().bulk
        loaded = [key for key in self._scopes if key in bulk]
        for batch, keys in by_component(loaded, bulk).items():
            part = self._part(Part(batch, keys[0], {}, batch.rows, outcomes_of([batch])), keys, failed)
            if part is not None and (part.changes or part.rows or part.outcomes):
                parts.append(part)
        if parts:
            save = BulkSave(self._documents, self._saving, self._scopes, self._spelled, parts)
            failed |= save.save(self._transaction, self._begin_again)
        return failed

    def _part(self, part: Part, keys: Sequence[Hashable], failed: dict[Hashable, Exception]) -> Part | None:
        """Return *part* with the changes of *keys*; None if one cannot be encoded, whose error is put into *failed*."""
        deleted = part.batch.deleted_keys
        for beside in (bool(part.rows), True):  # what one key has become was made for the present state of all
            for key in keys:
                if key in part.changes:
                    continue
                try:
                    scope = self._scopes[key]
                    if key in self._resources:
                        _, change = scope.change_of(part.batch, beside, deleted=key in deleted)
                    else:  # it was only read, and the others depend on that
                        change = scope.comparison() if part.changes or part.rows else None
                except Exception as error:
                    failed[key] = self._repeated(part) or error
                    return None
                if change is not None:
                    part.changes[key] = change
            if beside or len(keys) <= 1 or not part.changes:
                break
        return part

    def _repeated(self, part: Part) -> Repeated | None:
        """Return the error of *part* if outcomes are recorded: a repeated operation is not judged by the new state."""
        if not part.outcomes:
            return None
        try:
            found = self.recorded(list(part.outcomes))
        except NotSaved:
            raise
        except Exception as error:
            raise errors.of_store(error, self._name) from error
        return repeated_of([part.batch], found).get(part.batch)

    def _begin_again(self) -> Transaction:
        try:
            self._end(NothingToSave())
            self._transaction = self._begun()
        except Exception as error:
            raise errors.of_store(error, self._name) from error
        return self._transaction

    def _end(self, error: BaseException | None, lost: Collection[Hashable] = ()) -> None:
        transaction = self.__dict__.pop("_transaction", None)
        if transaction is not None:
            transaction.end(error, lost)
