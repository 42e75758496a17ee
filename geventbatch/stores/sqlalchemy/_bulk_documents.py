"""Documents of many keys that are loaded together and saved together, in one transaction.

Each is compared by itself: a lost one gets its error, and all others are saved. Rows are locked in the order of their
keys, so that two processes wait for each other and do not deadlock.

On PostgreSQL one statement has all documents. If the transaction collects a save, that is sent together with COMMIT, as
if none were lost; if one is, nothing was written, and the save is sent again, statement by statement. Other databases
get the statements of one document after the other.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from geventbatch._batch import batch_at_hand, current_batch
from geventbatch._safe_repr import shown
from geventbatch.errors import Conflict, NothingToSave, NotSaved, PartlySaved, Rejected, ResourceMissing
from geventbatch.stores._sql import errors
from geventbatch.stores._sql.keys import KeyColumn, normalize_all
from geventbatch.stores.sqlalchemy._added_rows import insert_rows, insert_rows_in_savepoint, is_instance
from geventbatch.stores.sqlalchemy._bulk_statements import fits, load_all, statements_for_all
from geventbatch.stores.sqlalchemy._document_scope import DocumentScope
from geventbatch.stores.sqlalchemy._documents import Row
from geventbatch.stores.sqlalchemy._key_columns import folds
from geventbatch.stores.sqlalchemy._mode import on_server
from geventbatch.stores.sqlalchemy._savepoint import Savepoint
from geventbatch.stores.sqlalchemy._transaction import LostRow, Transaction, left_out, load

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence
    from types import TracebackType

    from geventbatch.stores.sqlalchemy._bulk_statements import Together
    from geventbatch.stores.sqlalchemy._documents import Documents

_Change = tuple[Any, dict[str, Any]]


class BulkDocuments:
    """The ``open_resources`` of a `Processor`: documents of many keys in one transaction."""

    keeps_outcomes = False
    """It refuses operations with idempotency keys."""

    def __init__(self, documents: Documents, table: sa.Table, columns: Sequence[KeyColumn]) -> None:
        self._documents = documents
        self._columns = columns
        self.on_server = on_server(documents.engine)
        single, dialect = documents.statements, documents.engine.dialect.name
        has_arrays = dialect == "postgresql" and all(fits(column) for column in (table.c.key, table.c.state))
        load = load_all(table, single.selected, arrays=has_arrays, locking=documents.locking)
        by_row = sa.select(table.c.key, *single.selected).where(table.c.key == sa.bindparam("_key"))
        self._loads: Final = Loads(load, by_row, folds=folds(table.c.key))
        statements = statements_for_all(table, single.mark) if has_arrays else ()
        together = dict(zip((single.update, single.delete, single.add), statements, strict=False))
        self._together: Final[dict[Any, Any]] = together  # by the statement for one document

    def __repr__(self) -> str:
        return f"<documents in bulk of {self._documents.name}>"

    def __call__(self, keys: Iterable[Hashable]) -> BulkDocumentScope:
        """Open the resources at *keys*: what a processor calls. Switches: no."""
        return BulkDocumentScope(self._documents, self._loads, self._together, list(keys))

    def normalize_key(self, key: Hashable) -> Hashable:
        """Return the column's value for *key*, as `SQLAlchemyStore.normalize_key` does. Switches: no."""
        return normalize_all(key, self._columns)


class Lost(Conflict):
    """The conflict of one key, while the transaction goes on."""


class Loads(NamedTuple):
    """The statements that load documents."""

    many: Any
    one: Any
    """Selects the row's own key too."""
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

    def __init__(
        self,
        documents: Documents,
        loads: Loads,
        together: dict[Any, Any],
        keys: list[Hashable],
    ) -> None:
        self._documents = documents
        self._loads = loads
        self._together = together
        self._keys = keys
        self._name = f"{len(keys)} documents of {documents.name}"

    def __enter__(self) -> dict[Hashable, Any]:
        try:
            found = self._load(self._keys)
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
        self._end(error)
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

    # -- inside ----------------------------------------------------------------------------------------------

    def _begun(self) -> Transaction:
        return self._documents.transaction(self._documents.engine, self._name)

    def _load(self, keys: list[Hashable]) -> dict[Hashable, Row | Exception]:
        """Load the rows at *keys*; an error of one key stands in place of its row."""
        try:
            self._transaction, found = load(self._begun, partial(self._fetch, keys))
        except ResourceMissing as error:  # the database refuses one of the keys
            refused = self._refused(keys, error)
            left = [key for key in keys if key not in refused]
            return {**refused, **(self._load(left) if left else {})}
        return found

    def _refused(self, keys: list[Hashable], error: ResourceMissing) -> dict[Hashable, Row | Exception]:
        """Find the keys that the database refuses, by loading each half."""
        if len(keys) == 1:
            return {keys[0]: ResourceMissing(*error.args, key=keys[0])}
        refused: dict[Hashable, Row | Exception] = {}
        for half in (keys[: len(keys) // 2], keys[len(keys) // 2 :]):
            try:
                transaction, _ = load(self._begun, partial(self._fetch, half))
            except ResourceMissing as of_half:
                refused |= self._refused(half, of_half)
            else:
                transaction.end(NothingToSave())
        return refused

    def _fetch(self, keys: list[Hashable], transaction: Transaction) -> dict[Hashable, Row | Exception]:
        row_of = self._documents.statements.row_of
        rows = transaction.connection.execute(self._loads.many, {"_keys": keys})
        found: dict[Hashable, Row | Exception] = {row.key: row_of(row) for row in rows}
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
        matched = {key: found[key] for key in self._keys if key in found}
        taken = set(matched)
        for key in unmatched:
            row = transaction.connection.execute(self._loads.one, {"_key": key}).one_or_none()
            if row is None:
                continue
            if row.key in taken:
                matched[key] = Conflict(f"{shown(key)} names the row {shown(row.key)}, as another key of the bulk does")
            else:
                taken.add(row.key)
                matched[key] = self._documents.statements.row_of(row)
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
        bulk = batch_at_hand().bulk
        failed: dict[Hashable, Exception] = {}
        changes: dict[Hashable, _Change] = {}
        rows: dict[Hashable, list[object]] = {}
        for key in self._resources:
            if key not in self._scopes:
                continue
            try:
                _, change = self._scopes[key].change_of(bulk[key], bulk[key].rows)
            except Exception as error:
                failed[key] = error
                continue
            rows[key] = bulk[key].rows
            if change is not None:
                changes[key] = change
        if changes or any(rows.values()):
            failed |= self._write(changes, rows)
        return failed

    def _write(self, changes: dict[Hashable, _Change], rows: dict[Hashable, list[object]]) -> dict[Hashable, NotSaved]:
        if any(batch.rejections for batch in batch_at_hand().bulk.values()):
            return self._write_by_steps(changes, rows)
        collects = self._transaction.collects and not any(is_instance(row) for some in rows.values() for row in some)
        locking = self._documents.locking
        inserts = any(statement is self._documents.statements.add for statement, _ in changes.values())
        if collects and not (locking and inserts):  # a lost insert would release the locks too
            try:
                self._transaction.write(lambda: self._write_all(changes, rows))
                return {}
            except LostRow:
                if locking:
                    raise (left := left_out(self._name)) from left.__cause__
                if len(changes) == 1:
                    (key,) = changes
                    raise (why := self._lost(key)) from why.__cause__
            self._begin_again()
        failed: dict[Hashable, NotSaved] = {}

        def write_each() -> None:
            failed.update({key: self._lost(key) for key in self._write_each(changes, rows)})

        self._transaction.write(write_each, collected=False)
        return failed

    def _write_by_steps(
        self, changes: dict[Hashable, _Change], rows: dict[Hashable, list[object]]
    ) -> dict[Hashable, NotSaved]:
        """Write each key after a savepoint, since the database has refused a key before."""
        failed: dict[Hashable, NotSaved] = {}

        def write_all() -> None:
            savepoint = Savepoint(self._transaction)
            for key in sorted({*changes, *(key for key, some in rows.items() if some)}, key=str):
                try:
                    savepoint.write(partial(self._write_one, key, changes.get(key), rows[key]))
                except (Lost, Rejected) as error:
                    failed[key] = error

        self._transaction.write(write_all, collected=False)
        return failed

    def _write_one(self, key: Hashable, change: _Change | None, rows: list[object]) -> None:
        if change is not None and not self._is_written(*change):
            raise self._lost(key)
        insert_rows_in_savepoint(self._transaction.connection, rows)

    def _lost(self, key: Hashable) -> NotSaved:
        """Return the error for a row that was not found, or exists already."""
        return self._scopes[key].lost(errors.changed(key, Lost), self._transaction, batch_at_hand().bulk[key])

    def _begin_again(self) -> None:
        try:
            self._end(NothingToSave())
            self._transaction = self._begun()
        except Exception as error:
            raise errors.of_store(error, self._name) from error

    def _write_all(self, changes: dict[Hashable, _Change], rows: dict[Hashable, list[object]]) -> None:
        for statement, some in self._grouped(changes):
            self._transaction.change(*statement.of(some), rows=len(some))
        if not self._together:
            for key in sorted(changes, key=str):
                self._transaction.change(*changes[key])
        insert_rows(self._transaction.connection, [row for some in rows.values() for row in some])

    def _write_each(self, changes: dict[Hashable, _Change], rows: dict[Hashable, list[object]]) -> set[Hashable]:
        """Write, and return the keys whose rows were not as loaded."""
        connection = self._transaction.connection
        lost: set[Hashable] = set()
        if self._together:
            for statement, some in self._grouped(changes):
                asked, parameters = statement.of(some)
                saved = connection.execute(asked.returning(statement.key), parameters).scalars().all()
                lost |= some.keys() - set(saved) if len(saved) < len(some) else set()
        else:
            lost |= {key for key in sorted(changes, key=str) if not self._is_written(*changes[key])}
        insert_rows(connection, [row for key, some in rows.items() if key not in lost for row in some])
        return lost

    def _is_written(self, statement: Any, parameters: dict[str, Any]) -> bool:
        try:
            self._transaction.change(statement, parameters)
        except Conflict:
            return False
        except IntegrityError as error:
            if statement is self._documents.statements.add and errors.is_duplicate(error):
                return False
            raise
        return True

    def _grouped(self, changes: dict[Hashable, _Change]) -> Iterable[tuple[Together, dict[Hashable, dict[str, Any]]]]:
        """Yield the statements for many documents, in the order to send them, with their parameters by key."""
        for single, statement in self._together.items():
            some = {key: values for key, (asked, values) in changes.items() if asked is single}
            if some:
                yield statement, some

    def _end(self, error: BaseException | None) -> None:
        transaction = self.__dict__.pop("_transaction", None)
        if transaction is not None:
            transaction.end(error)
