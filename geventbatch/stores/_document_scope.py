"""The scope of one batch over one document."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from geventbatch._processor import current_batch
from geventbatch.errors import Conflict, Rejected, ResourceMissing
from geventbatch.stores import _sql
from geventbatch.stores._commit import polls
from geventbatch.stores._documents import Row
from geventbatch.stores._json import check_lossless
from geventbatch.stores._key import row_key
from geventbatch.stores._outcomes import Outcomes, Recording
from geventbatch.stores._reuse import judging_nobody
from geventbatch.stores._rows import insert_rows, is_instance
from geventbatch.stores._transaction import Transaction, load, remaining

if TYPE_CHECKING:
    from collections.abc import Hashable
    from types import TracebackType

    from geventbatch._batch import Batch
    from geventbatch.stores._documents import Documents


class DocumentScope:
    """One batch over one document: entering loads it, leaving saves it."""

    takes_rows = True
    deletes = True

    # -- mutable state ---------------------------------------------------------------------------------------
    reused: bool  # it was not loaded: the save has to compare, also when there is nothing to save
    _transaction: Transaction  # not there before the save of what is reused
    _resource: Any
    _loaded: Row

    def __init__(self, documents: Documents, key: Hashable) -> None:
        self._documents = documents
        self._key = key

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
                with judging_nobody(self._key) if self.reused else nullcontext():
                    saved = self._save()
        except BaseException as raised:
            self._end(raised)
            raise
        self._keep(saved)
        self._end(error)

    def take(self, loaded: Row) -> Any:
        """Give the resource of what was loaded."""
        self._loaded = loaded
        self._resource = self._made() if loaded.version is None else self._decoded()
        return self._resource

    def change_of(self, batch: Batch, beside: object) -> tuple[Row | None, tuple[Any, dict[str, Any]] | None]:
        """Give what is there after the save of *batch*, and what to send; None when the document stays as it is.

        With *beside*, something is saved beside it.
        """
        row: Row | None = self._loaded
        if batch.deleted:
            row = None
        elif batch.completed:
            row = self._loaded._replace(state=self._encoded(self._loaded.state))
        return self._change(row, beside=bool(beside))

    def recorded(self, keys: list[str]) -> dict[str, str]:
        """What is recorded of operations with these idempotency keys. Switches: yes."""
        return self._outcomes().find(self._transaction.send, keys)

    # -- inside ----------------------------------------------------------------------------------------------

    def _outcomes(self) -> Outcomes:
        documents = self._documents
        assert documents.outcomes is not None  # noqa: S101 - else no operation has such a key
        key = self._key if self._loaded.key is None else row_key(self._key, self._loaded.key)
        return Outcomes(documents.outcomes, documents.name, key)

    def _reuse(self) -> bool:
        """Take what is kept, if it is."""
        kept = self._documents.kept
        found = None if kept is None else kept.take(self._key)
        if found is None:
            return False
        self._loaded = found
        try:
            self._resource = self._documents.decode(found.state)
        except Exception:
            return False  # nobody is told so before it was loaded
        return True

    def _keep(self, row: Row | None) -> None:
        """Keep what is there now. Only what nobody can change, since the next batch is to decode it."""
        kept = self._documents.kept
        if kept is not None and row is not None and isinstance(row.state, (str, bytes)):
            kept.put(self._key, row)

    def _fetch(self) -> Row:
        statements = self._documents.statements
        self._transaction, row = load(
            self._begun, lambda begun: begun.connection.execute(statements.load, {"_key": self._key}).one_or_none()
        )
        return Row(None, None) if row is None else statements.row_of(row)

    def _begun(self) -> Transaction:
        return self._documents.transaction(self._documents.engine, self._key)

    def _made(self) -> Any:
        missing = self._documents.missing
        if missing == "raise":
            raise ResourceMissing(f"there is no {self._key!r} in {self._documents.name}", key=self._key)
        return missing(self._key)

    def _decoded(self) -> Any:
        try:
            return self._documents.decode(self._loaded.state)
        except Exception as error:
            raise ValueError(
                f"the state of {self._key!r} in {self._documents.name} cannot be decoded: {error}"
            ) from error

    def _save(self) -> Row | None:
        """Save, and give what is there then, if its version is one that this process has made."""
        batch = current_batch()
        rows = batch.rows
        recording = Recording(self._outcomes(), batch.outcomes) if batch.outcomes else None
        row: Row | None = self._loaded
        change = None
        if batch.completed or self.reused:
            row, change = self.change_of(batch, rows or (self.reused and recording is not None))
        if change is None and not rows and recording is None:
            if not self.reused:
                return None
            self._compare()
            return row
        if self.reused:
            self._begin()
        transaction = self._transaction
        if change is not None and self._documents.kept is not None:
            transaction.fence = partial(self._fence, row)

        def write() -> None:
            if change is not None:
                self._send(*change)
            insert_rows(transaction.connection, rows)

        transaction.write(write, recording, collected=not any(is_instance(row) for row in rows))
        return None if change is None else row

    def _encoded(self, last: Any) -> Any:
        """The state, which was *last* before."""
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
                f"{self._key!r} was not saved, nothing was written: it cannot be encoded: {error}"
            ) from error

    def _change(self, row: Row | None, *, beside: bool) -> tuple[Row | None, tuple[Any, dict[str, Any]] | None]:
        """What is there after the save, and what to send; None when the document stays as it is."""
        statements, loaded = self._documents.statements, self._loaded
        is_loaded = {"_key": self._key, "_version": loaded.version}
        if statements.mark.column is not None:
            is_loaded["_mark"] = loaded.mark
        if row is None:
            return None, None if loaded.version is None else (statements.delete, is_loaded)
        # Anything but a text or bytes may be the very object that was loaded, and changed since. And what is saved
        # beside the document is right only beside the one that it was made for: where it is not locked, its version is
        # counted for that.
        same = isinstance(row.state, (str, bytes)) and row.state == loaded.state
        if loaded.version is not None and same and (self._documents.locking or not beside):
            return row, None
        row = row._replace(version=self._documents.version_after(loaded.version))
        values = {"_state": row.state, "_new": row.version}
        if loaded.version is None:
            return row, (statements.add, {"_key": self._key, **values})
        return row, (statements.update, {**is_loaded, **values})

    def _send(self, statement: Any, parameters: dict[str, Any]) -> None:
        try:
            self._transaction.change(statement, parameters)
        except IntegrityError as error:
            if self._loaded.version is None and _sql.is_duplicate(error):
                raise Conflict(f"{self._key!r} was not saved: somebody else has inserted it meanwhile") from error
            raise

    def _end(self, error: BaseException | None) -> None:
        transaction = self.__dict__.pop("_transaction", None)
        if transaction is not None:
            transaction.end(error)

    # -- what was not loaded ---------------------------------------------------------------------------------

    def _begin(self) -> None:
        try:
            self._transaction = self._begun()
        except Exception as error:
            raise _sql.not_saved(error, self._key) from error

    def _compare(self) -> None:
        """Raise a `Conflict` unless it is there as it was kept."""
        try:
            there = self._fetch()
        except Exception as error:
            raise _sql.not_saved(error, self._key) from error
        if there.version != self._loaded.version:
            raise Conflict(f"{self._key!r} was changed by somebody else since this process has saved it")

    def _fence(self, row: Row | None) -> bool | None:
        """Whether *row* was saved, by the COMMIT whose answer is lost; if not, see to it that it never will be.

        Where the document is still as it was loaded, that save may just not have arrived: with another version, it
        finds none to write to. What others have saved since tells nothing, nor does it that there is no document.
        """
        documents, statements = self._documents, self._documents.statements
        saved = None if row is None else row.version
        fence = documents.version_after(self._loaded.version)
        values = {"_key": self._key, "_version": self._loaded.version, "_new": fence}
        for _ in polls(remaining()):
            try:
                with documents.engine.begin() as connection:
                    connection.execute(statements.fence, values)
                    there = connection.execute(statements.load, {"_key": self._key}).one_or_none()
            except SQLAlchemyError:  # nobody answers, or what it locks is not free yet
                continue
            if there is None or there.version not in {saved, fence}:
                return None
            return bool(there.version == saved)
        return None
