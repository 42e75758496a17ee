"""The scope of one batch over one document."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from geventbatch._batch import batch_at_hand
from geventbatch._safe_repr import said, shown
from geventbatch.errors import (
    CannotUndo,
    Conflict,
    NothingToSave,
    NotSaved,
    Rejected,
    ResourceMissing,
)
from geventbatch.stores import _json
from geventbatch.stores._json import check_lossless
from geventbatch.stores._reuse import as_conflicts, outdated
from geventbatch.stores._sql import errors
from geventbatch.stores._sql.commit import polls
from geventbatch.stores._sql.keys import row_key
from geventbatch.stores._sql.outcomes import Outcomes, Recording, refuse_repeated
from geventbatch.stores.sqlalchemy import _engines
from geventbatch.stores.sqlalchemy._added_rows import insert_rows, insert_rows_in_savepoint, is_instance
from geventbatch.stores.sqlalchemy._documents import Row
from geventbatch.stores.sqlalchemy._load import load
from geventbatch.stores.sqlalchemy._savepoint import Savepoint
from geventbatch.stores.sqlalchemy._transaction import (
    LostRow,
    Transaction,
    cause,
    is_at_fault,
    is_doubtful,
    left_out,
    remaining,
)

if TYPE_CHECKING:
    from collections.abc import Hashable
    from types import TracebackType

    from geventbatch._core.batch import Batch
    from geventbatch.stores.sqlalchemy._documents import Documents


class DocumentScope:
    """One batch over one document: entering loads it, exiting saves it."""

    takes_rows = True
    deletes = True

    # -- mutable state ---------------------------------------------------------------------------------------
    reused: bool = False  # the state is cached: the save compares, even if there is nothing to save
    _transaction: Transaction  # missing before the save of a cached state
    _resource: Any = None
    _loaded: Row  # as in the transaction: updated by each step
    _unchanged: Any  # the snapshot of what was loaded
    _is_plain: bool  # the resource consists of JSON's types
    _before: int | None  # the loaded version
    _written: bool  # a step has written the document
    _rows_written: int  # number of `Batch.rows` that steps have inserted
    _sent: tuple[Any, dict[str, Any]] | None = None  # what the last save has sent for the document
    _snapshot: Any  # of the state after the last step
    _savepoint: Savepoint

    def __init__(self, documents: Documents, key: Hashable) -> None:
        self._documents = documents
        self._key = key
        self._written, self._rows_written = False, 0
        self._is_plain = documents.check is not None

    def __enter__(self) -> Any:
        self.reused = self._reuse()
        if self.reused:
            return self._resource
        try:
            return self.take(self._fetch())
        except BaseException as error:
            self._end(error)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        saved = None
        try:
            if error is None:
                saved = self._save_reused() if self.reused else self._save()
        except Rejected as refused:
            self._end(refused)
            batch = batch_at_hand()
            if batch.deleted:  # some operations would have sent something else alone
                raise
            if batch.rows and not (refused.of_schema and is_at_fault(self._begun, self._sent)):
                raise
            told = errors.of_save(refused, refused.__cause__)
            raise told from told.__cause__
        except BaseException as raised:
            self._end(raised)
            raise
        self._keep(saved)
        self._end(error)

    def take(self, loaded: Row) -> Any:
        """Return the resource of what was loaded."""
        self._loaded = loaded
        self._before = loaded.version
        if loaded.version is None:
            self._resource = self._made()
        else:
            self._unchanged = self._documents.unchanged(loaded)
            self._resource = self._decoded(loaded.state)
        return self._resource

    def change_of(
        self, batch: Batch, beside: object, *, deleted: bool
    ) -> tuple[Row | None, tuple[Any, dict[str, Any]] | None]:
        """Return the row after the save of *batch*, and the statement to send; None if the document is unchanged.

        With *beside*, other things are saved in the same transaction.
        """
        row: Row | None = self._loaded
        if deleted:
            row = None
        elif batch.completed:
            row = _with_state(self._loaded, self._encoded(self._loaded.state))
        return self._change(row, beside=bool(beside))

    def comparison(self) -> tuple[Any, dict[str, Any]] | None:
        """Return the statement that compares a document and counts its version up; None if it is locked, or missing."""
        documents, loaded = self._documents, self._loaded
        if documents.locking or loaded.version is None:
            return None
        is_loaded = {"_key": self._key, "_version": loaded.version, "_mark": loaded.mark}
        if documents.statements.mark.column is None:
            del is_loaded["_mark"]
        # Not the state: operations that raised may have changed it in place.
        return documents.statements.count, {**is_loaded, "_new": documents.version_after(loaded.version)}

    def lost(self, lost: Conflict, transaction: Transaction, batch: Batch) -> NotSaved:
        """Return the error for a row that was not found, or exists already, in *transaction*. Switches: yes."""
        held = (self._documents.locking or self._written) and not self.reused and self._loaded.version is not None
        if held or (transaction.leaves_out and is_doubtful(batch) and self._is_as_loaded(transaction)):
            return left_out(self._key)
        return lost

    @property
    def place(self) -> tuple[str, Hashable]:
        """The store's name and the row's own key, by which outcomes are named."""
        loaded = self._loaded.key
        return self._documents.name, self._key if loaded is None else row_key(self._key, loaded)

    def recorded(self, keys: list[str]) -> dict[str, str]:
        """Return the recorded outcomes of these idempotency keys. Switches: yes."""
        if not self.reused:
            return self._outcomes().find(self._transaction.send, keys)
        transaction = self._begun()  # a cached state has none before its save
        try:
            found = self._outcomes().find(transaction.send, keys)
        except BaseException as error:
            transaction.end(error)
            raise
        transaction.end(NothingToSave())
        return found

    # -- an operation that raised ----------------------------------------------------------------------------

    def checkpoint(self) -> object:
        """Return a copy of the resource as the operations so far have left it. Raises `CannotUndo`. Switches: no."""
        if self._is_plain:
            try:
                return _json.unpacked, _json.packed(self._resource)
            except ValueError:  # it contains what JSON loses, or cannot be packed
                pass
        try:
            return self._remade, self._documents.snapshot(self._encoded(self._loaded.state))
        except Exception as error:  # the operation at fault gets the error from the save
            raise CannotUndo(f"{shown(self._key)} cannot be copied: {said(error)}") from error

    def restore(self, checkpoint: Any) -> Any:
        """Return the resource as of *checkpoint*, or as loaded. Raises `CannotUndo`. Switches: no."""
        try:
            if checkpoint is not None:
                make, copy = checkpoint
                self._resource = make(copy)
            elif self._loaded.version is None:
                self._resource = self._made()
            else:
                self._resource = self._remade(self._unchanged)
        except Exception as error:
            raise CannotUndo(f"{shown(self._key)} cannot be made once more as it was: {said(error)}") from error
        return self._resource

    def _remade(self, snapshot: Any) -> Any:
        state = self._documents.restored(snapshot)
        resource = self._decoded(state)
        self._is_plain = self._documents.check is not None or (resource is state and self._documents.is_json)
        return resource

    # -- step by step ----------------------------------------------------------------------------------------

    @property
    def steps(self) -> bool:
        """Return whether operations can be judged step by step: not on SQLite, where all writers would wait for it."""
        return self._documents.has_steps and not self.reused

    def begin_steps(self) -> None:
        """Prepare to go back to what was loaded. Switches: yes."""
        self._savepoint = Savepoint(self._transaction)
        self._snapshot = None if self._loaded.version is None else self._documents.snapshot(self._loaded.state)
        try:
            self._transaction.before_writes()
        except Exception as error:
            raise self._transaction.not_saved(error) from cause(error)

    def keep(self) -> None:
        """Write the document and the added rows of an operation after a savepoint. Switches: yes."""
        batch = batch_at_hand()
        rows = batch.rows[self._rows_written :]
        state = self._encoded(self._loaded.state)
        snapshot = self._documents.snapshot(state)
        row, change = None, None
        same = isinstance(snapshot, (str, bytes)) and snapshot == self._snapshot
        if not same or (rows and not self._documents.locking):
            row, change = self._change(_with_state(self._loaded, state), beside=True)
        if change is None and not rows:
            return
        self._savepoint.write(partial(self._write_step, change, rows))
        if row is not None:
            self._loaded, self._snapshot = row, snapshot
        self._written = True
        self._rows_written = len(batch.rows)

    def undo(self) -> Any:
        """Return the resource as of the last step; the database has that already. Switches: no."""
        if self._loaded.version is None:
            self._resource = self._made()
        else:
            self._resource = self._decoded(self._documents.restored(self._snapshot))
        return self._resource

    def _write_step(self, change: tuple[Any, dict[str, Any]] | None, rows: list[object]) -> None:
        if change is not None:
            self._send(*change)
        insert_rows_in_savepoint(self._transaction.connection, rows)

    # -- inside ----------------------------------------------------------------------------------------------

    def _outcomes(self) -> Outcomes:
        documents = self._documents
        assert documents.outcomes is not None  # noqa: S101 - else no operation has an idempotency key
        return Outcomes(documents.outcomes, *self.place)

    def _reuse(self) -> bool:
        """Take the cached state; return whether there was one."""
        kept = self._documents.kept
        found = None if kept is None else kept.take(self._key)
        if found is None:
            return False
        self._loaded = found
        self._unchanged = found.state  # a text, or bytes
        self._before = found.version
        try:
            self._resource = self._documents.decode(found.state)
        except Exception:
            return False  # the real load raises it again
        return True

    def _keep(self, row: Row | None) -> None:
        """Cache what was saved, if it is immutable: the next batch decodes it."""
        kept = self._documents.kept
        if kept is not None and row is not None and isinstance(row.state, (str, bytes)):
            kept.put(self._key, row)

    def _fetch(self) -> Row:
        statements = self._documents.statements
        self._transaction, row = load(
            self._begun,
            lambda begun: begun.fetch(statements.load, {"_key": self._key}),
            partial(self._documents.question, self._key),
        )
        return Row(None, None) if row is None else statements.row_of(row)

    def _begun(self) -> Transaction:
        return self._documents.transaction(self._documents.engine, self._key)

    def _made(self) -> Any:
        missing = self._documents.missing
        if missing == "raise":
            raise ResourceMissing(f"there is no {shown(self._key)} in {self._documents.name}", key=self._key)
        made = missing(self._key)
        missing.check(made, self._resource, self._key)
        return made

    def _decoded(self, state: Any) -> Any:
        try:
            return self._documents.decode(state)
        except Exception as error:
            raise ValueError(
                f"the state of {shown(self._key)} in {self._documents.name} cannot be decoded: {said(error)}"
            ) from error

    def _save(self) -> Row | None:
        """Save, and return the row to cache, whose version this process has made; else None."""
        batch = batch_at_hand()
        rows = batch.rows[self._rows_written :]
        recording = Recording(self._outcomes(), batch.outcomes) if batch.outcomes else None
        row: Row | None = self._loaded
        change = None
        if batch.completed or self.reused:
            try:
                beside = rows or (self.reused and recording is not None)
                row, change = self.change_of(batch, beside, deleted=batch.deleted)
                self._sent = change
            except Rejected:
                if not self.reused:  # else a real load asks
                    refuse_repeated(self._key, batch, self.recorded)
                raise
        if change is None and not rows and recording is None and not self._written:
            if not self.reused:
                return None
            self._compare()
            return row
        if self.reused:
            self._begin()
        transaction = self._transaction
        is_written = change is not None or self._written
        if is_written and self._documents.kept is not None:
            transaction.fence = partial(self._fence, row)

        try:
            write = partial(self._write, change, rows)
            transaction.write(write, recording, collected=not any(is_instance(row) for row in rows))
        except LostRow as lost:
            raise (found := self.lost(lost, transaction, batch)) from found.__cause__
        return row if is_written else None

    def _write(self, change: tuple[Any, dict[str, Any]] | None, rows: list[object]) -> None:
        if change is not None:
            self._send(*change)
        if rows:  # asking for the connection costs something
            insert_rows(self._transaction.connection, rows)

    def _encoded(self, last: Any) -> Any:
        """Return the encoded state; *last* is the one before."""
        documents = self._documents
        try:
            state = documents.encode(self._resource)
            if documents.is_json:
                check_lossless(state)
            elif documents.check is not None and state != last:
                documents.check(self._resource)
            return state
        except Exception as error:
            raise Rejected(
                f"{shown(self._key)} was not saved, nothing was written: it cannot be encoded: {said(error)}"
            ) from error

    def _change(self, row: Row | None, *, beside: bool) -> tuple[Row | None, tuple[Any, dict[str, Any]] | None]:
        """Return the row after the save, and the statement to send; None if the document is unchanged."""
        statements, loaded = self._documents.statements, self._loaded
        values = {"_key": self._key, "_version": loaded.version}
        if statements.mark.column is not None:
            values["_mark"] = loaded.mark
        update, delete = statements.update, statements.delete
        if self._written:  # the version is counted up already
            update, delete = statements.update_again, statements.delete_again
        if row is None:
            return None, None if loaded.version is None else (delete, values)
        # Any state but a text or bytes may be the loaded object itself, changed in place. What is saved beside the
        # document was made for this state of it: if the row is not locked, its version is counted up for that.
        same = isinstance(row.state, (str, bytes)) and row.state == loaded.state
        if loaded.version is not None and same and (self._documents.locking or not beside):
            return row, None
        if not self._written or loaded.version is None:
            row = Row(row.state, self._documents.version_after(loaded.version), row.mark, row.key)
        if loaded.version is None:
            return row, (statements.add, {"_key": self._key, "_state": row.state, "_new": row.version})
        values["_state"], values["_new"] = row.state, row.version
        return row, (update, values)

    def _send(self, statement: Any, parameters: dict[str, Any]) -> None:
        try:
            self._transaction.change(statement, parameters)
        except LostRow as lost:
            raise (found := self.lost(lost, self._transaction, batch_at_hand())) from found.__cause__
        except IntegrityError as error:
            if self._loaded.version is None and errors.is_duplicate(error):
                raise errors.inserted(self._key) from error
            raise

    def _end(self, error: BaseException | None) -> None:
        transaction = self.__dict__.pop("_transaction", None)
        if transaction is not None:
            transaction.end(error)

    def _is_as_loaded(self, transaction: Transaction) -> bool:
        """Return whether the row is as loaded, or as absent as at the load."""
        statements, loaded = self._documents.statements, self._loaded
        with suppress(SQLAlchemyError):
            if transaction.has_failed():  # a collected save does
                transaction.connection.rollback()
            found = transaction.connection.execute(statements.look, {"_key": self._key}).one_or_none()
            there = Row(None, None) if found is None else statements.row_of(found)
            return (there.version, there.mark) == (loaded.version, loaded.mark)
        return False

    # -- a cached state --------------------------------------------------------------------------------------

    def _begin(self) -> None:
        try:
            self._transaction = self._begun()
        except Exception as error:
            raise errors.of_store(error, self._key) from error

    def _save_reused(self) -> Row | None:
        with as_conflicts(self._key):
            return self._save()

    def _compare(self) -> None:
        """Raise a `Conflict` unless the row has the cached version."""
        try:
            there = self._fetch()
        except Exception as error:
            raise errors.of_store(error, self._key) from error
        if there.version != self._loaded.version:
            raise outdated(self._key)

    def _fence(self, row: Row | None) -> bool | None:
        """Return whether the COMMIT whose answer is lost has saved *row*; if not, make sure that it never will.

        If the document is as loaded, that save may still be on its way: with another version, it finds no row. A
        version of other writers since tells nothing, nor does a missing document.
        """
        documents, statements = self._documents, self._documents.statements
        saved = None if row is None else row.version
        fence = documents.version_after(self._before)
        values = {"_key": self._key, "_version": self._before, "_new": fence}
        for _ in polls(remaining()):
            try:
                with _engines.beside(documents.engine, self._key) as connection:
                    connection.execute(statements.fence, values)
                    there = connection.execute(statements.load, {"_key": self._key}).one_or_none()
                    connection.commit()
            except SQLAlchemyError:  # the server is away, or the row still locked
                continue
            if there is None or there.version not in {saved, fence}:
                return None
            return bool(there.version == saved)
        return None


def _with_state(row: Row, state: Any) -> Row:
    return Row(state, row.version, row.mark, row.key)  # `_replace` takes a microsecond
