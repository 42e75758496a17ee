"""The save of documents in bulk: all parts in one transaction, each part whole or not at all.

A part has the documents that operations have connected, and their rows. If one of its documents was changed by another
writer, or cannot be inserted, the part is lost: nothing of it is written, and all other parts are saved.

If the transaction collects a save, everything is sent together with COMMIT, as if no part were lost. If one is lost,
nothing was written. Then the rows are claimed: one statement locks them, in the order of their keys, and tells which
are not as loaded. What is left is sent together with COMMIT again. The next save of the store claims first, which costs
a round trip, and saves two if it loses too. Other transactions claim first, unless they send one statement only. After
a claim, a write can still miss its row: a new document meets another one, or the database leaves a row out. Then
everything written is undone by a savepoint, and written again without the lost parts.

The outcomes of all parts are recorded by one statement before anything is written, after a savepoint: if some are there
already, their parts are lost, and the locks stay.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy.exc import IntegrityError

from geventbatch._batch import batch_at_hand
from geventbatch.errors import Conflict, NotSaved, Rejected, Repeated
from geventbatch.stores._sql import errors
from geventbatch.stores._sql.outcomes import OutcomesOfBulk, Recording, repeated_of
from geventbatch.stores.sqlalchemy._added_rows import insert_rows, insert_rows_in_savepoint, is_instance
from geventbatch.stores.sqlalchemy._savepoint import Savepoint
from geventbatch.stores.sqlalchemy._transaction import LostRow, cause, left_out

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping

    from geventbatch._core.batch import Batch
    from geventbatch.stores.sqlalchemy._bulk_statements import Claim, Together
    from geventbatch.stores.sqlalchemy._document_scope import DocumentScope
    from geventbatch.stores.sqlalchemy._documents import Documents
    from geventbatch.stores.sqlalchemy._transaction import Transaction

Change = tuple[Any, dict[str, Any]]
"""A statement for one document, and its parameters."""


_TRIES: Final = 3


class Part(NamedTuple):
    """What is saved whole or not at all."""

    batch: Batch
    key: Hashable
    """One of its keys."""
    changes: dict[Hashable, Change]
    rows: list[object]
    outcomes: dict[str, str]


class Saving:
    """The statements that save documents in bulk, and what the last save of the store has found."""

    def __init__(self, together: dict[Any, Together], claim: Claim | None) -> None:
        self.together: Final = together
        """By the statement for one document, in the order to send them. Empty: each document has its own."""
        self.claim: Final = claim
        """None: the rows are locked since the load."""
        # -- mutable state ---------------------------------------------------------------------------------
        self.has_lost = False  # a part, in the last save that was no replay


class Lost(Conflict):
    """The conflict of one key, while the transaction goes on."""


def outcomes_in(
    documents: Documents, transaction: Transaction, scopes: Mapping[Hashable, DocumentScope]
) -> OutcomesOfBulk:
    """Return the outcomes of the documents that these *scopes* have loaded, by key."""
    assert documents.outcomes is not None  # noqa: S101 - else no operation has an idempotency key

    def place(key: Hashable) -> tuple[str, Hashable]:
        scope = scopes.get(key)  # None: its load has failed
        return (documents.name, key) if scope is None else scope.place

    return OutcomesOfBulk(documents.outcomes, str(transaction.key), place)


class BulkSave:
    """One save."""

    def __init__(
        self,
        documents: Documents,
        saving: Saving,
        scopes: Mapping[Hashable, DocumentScope],
        spelled: Mapping[Any, Hashable],
        parts: list[Part],
    ) -> None:
        self._documents = documents
        self._add: Final = documents.statements.add
        self._saving = saving
        self._scopes = scopes
        self._spelled = spelled
        # -- mutable state ---------------------------------------------------------------------------------
        self._left = parts  # that are not lost so far
        self._failed: dict[Hashable, NotSaved] = {}  # by a key of each lost part
        self._claimed = saving.claim is None
        self._tries = _TRIES  # to record outcomes, where expired ones are in the way
        self._transaction: Transaction
        self._is_replay = False

    def save(self, transaction: Transaction, begin_again: Callable[[], Transaction]) -> dict[Hashable, NotSaved]:
        """Save, and commit. Return the error of each part that was not saved, by one of its keys.

        If the save cannot go on in *transaction*, it does in one from *begin_again*.
        """
        self._transaction = transaction
        batches = set(batch_at_hand().bulk.values())
        rejected = any(batch.rejections for batch in batches)
        self._is_replay = any(batch.conflicts for batch in batches)
        if not rejected and self._can_collect():
            if self._is_replay or not self._saving.has_lost:
                if self._is_sent(self._send_all):
                    return self._failed
                self._transaction = begin_again()
            self._claim_now()
            if not self._inserts():
                if not self._left or self._is_sent(self._send_all):
                    return self._failed
                self._transaction, self._claimed = begin_again(), False
        self._transaction.write(self._write_by_steps if rejected else self._write_each, collected=False)
        return self._failed

    # -- as one message --------------------------------------------------------------------------------------

    def _can_collect(self) -> bool:
        if not self._transaction.collects or any(is_instance(row) for part in self._left for row in part.rows):
            return False
        return self._saving.claim is not None or not self._inserts()  # a lost insert would release the locks too

    def _inserts(self) -> bool:
        return any(statement is self._add for part in self._left for statement, _ in part.changes.values())

    def _is_sent(self, send: Callable[[], object]) -> bool:
        """Send everything with COMMIT. Return False if a row was lost, so that nothing was written."""
        try:
            self._transaction.write(send)
        except Rejected as error:
            # If it is COMMIT that was refused (a constraint is deferred), the transaction is over, with its savepoint.
            if not self._transaction.has_failed() or not self._makes_way(error):
                raise
            return not self._left or self._is_sent(send)
        except LostRow:
            if self._saving.claim is None:
                raise (left := left_out(self._transaction.key)) from left.__cause__
            self._remember(lost=True)
            if len(self._left) == 1 and len(self._left[0].changes) == 1:
                (key,) = self._left[0].changes
                raise (why := self._lost(key)) from why.__cause__
            return False
        return True

    def _send_all(self) -> None:
        transaction, changes = self._transaction, self._changes()
        self._record(self._left)
        if not self._claimed and self._count(changes) > 1:
            self._change_claimed(changes)
        for statement, some in self._grouped(changes):
            transaction.change(*statement.of(some), rows=len(some))
        if not self._saving.together:
            for key in sorted(changes, key=str):
                transaction.change(*changes[key])
        insert_rows(transaction.connection, [row for part in self._left for row in part.rows])

    def _change_claimed(self, changes: dict[Hashable, Change]) -> None:
        """Lock the rows first, since several statements would lock them in another order."""
        claim, some = self._saving.claim, self._loaded(changes)
        if claim is not None and some:
            self._transaction.change(*claim.of(some), rows=len(some))

    # -- outcomes --------------------------------------------------------------------------------------------

    def _recording(self, parts: Iterable[Part]) -> Recording | None:
        kept = {name: text for part in parts for name, text in part.outcomes.items()}
        if not kept:
            return None
        return Recording(outcomes_in(self._documents, self._transaction, self._scopes), kept)

    def _record(self, parts: Iterable[Part]) -> None:
        recording = self._recording(parts)
        if recording is not None:
            self._transaction.record(recording)

    def _makes_way(self, error: Rejected) -> bool:
        """Take out the parts whose outcomes are recorded already, or delete expired ones. Return False if none are."""
        found = self._in_the_way(error, self._left)
        if isinstance(found, Repeated):
            repeated = repeated_of([part.batch for part in self._left], found.outcomes)
            self._failed |= {part.key: repeated[part.batch] for part in self._left if part.batch in repeated}
            self._left = [part for part in self._left if part.batch not in repeated]
        elif found is not None:
            self._tries -= 1
            if not self._tries:
                raise found from None
        return found is not None

    def _in_the_way(self, error: Rejected, parts: Iterable[Part]) -> NotSaved | None:
        """Return the error in place of *error* if the INSERT of outcomes has caused that; they are undone then."""
        recording, why = self._recording(parts), error.__cause__
        if recording is None or why is None:
            return None
        return recording.check(why, self._transaction.send, Savepoint(self._transaction).go_back, lambda: None)

    # -- by a claim ------------------------------------------------------------------------------------------

    def _claim_now(self) -> None:
        transaction = self._transaction
        try:
            transaction.before_writes()
            self._claim()
        except Exception as error:
            raise transaction.not_saved(error) from cause(error)

    def _claim(self) -> None:
        """Lock the rows in the order of their keys. Parts of which one is not as loaded are lost."""
        claim, some = self._saving.claim, self._loaded(self._changes())
        self._remember(lost=False)
        if claim is None or self._claimed or not some:
            return
        found = self._transaction.connection.execute(*claim.of(some))
        self._claimed = True
        lost = some.keys() - claim.as_loaded(found, some, self._spelled)
        self._remember(lost=bool(lost))
        self._lose(lost)

    def _remember(self, *, lost: bool) -> None:
        if not self._is_replay:  # what has lost is alone there, and says nothing of the next bulk
            self._saving.has_lost = lost

    def _lose(self, keys: Iterable[Hashable]) -> bool:
        """Take out the parts of *keys*, whose rows are not as loaded. Return whether a part has written other rows."""
        lost = set(keys)
        left, half = [], False
        for part in self._left:
            its = [key for key in part.changes if key in lost]
            if its:
                self._failed[part.key] = self._lost(its[0])
                half = half or bool(part.outcomes) or len(its) < len(part.changes)
            else:
                left.append(part)
        self._left = left
        return half

    def _lost(self, key: Hashable) -> NotSaved:
        """Return the error for a row that was not found, or exists already."""
        batch = batch_at_hand().bulk[key]
        return self._scopes[key].lost(errors.changed(key, Lost), self._transaction, batch)

    # -- statement by statement ------------------------------------------------------------------------------

    def _write_each(self) -> None:
        if self._count(self._changes()) > 1 or self._connects():
            self._claim()
        savepoint = Savepoint(self._transaction) if self._connects() or self._recording(self._left) else None
        while self._is_half_written(savepoint):
            pass
        insert_rows(self._transaction.connection, [row for part in self._left for row in part.rows])

    def _connects(self) -> bool:
        return any(len(part.changes) > 1 for part in self._left)

    def _is_half_written(self, savepoint: Savepoint | None) -> bool:
        """Write what is left. If a part was lost that has written rows, undo everything, and return True."""
        if savepoint is None:
            return self._lose(self._write(self._changes()))
        lost: set[Hashable] = set()
        try:
            savepoint.write(lambda: lost.update(self._write_recorded()))
        except Rejected as error:
            if not self._makes_way(error):
                raise
            return True
        if not self._lose(lost):
            return False
        savepoint.go_back()
        return True

    def _write_recorded(self) -> set[Hashable]:
        self._record(self._left)
        return self._write(self._changes())

    def _write(self, changes: dict[Hashable, Change]) -> set[Hashable]:
        """Write, and return the keys whose rows were not as loaded."""
        if not self._saving.together:
            return {key for key in sorted(changes, key=str) if not self._is_written(*changes[key])}
        lost: set[Hashable] = set()
        for statement, some in self._grouped(changes):
            asked, parameters = statement.of(some)
            saved = self._transaction.connection.execute(asked.returning(statement.key), parameters).scalars().all()
            lost |= some.keys() - set(saved) if len(saved) < len(some) else set()
        return lost

    def _write_by_steps(self) -> None:
        """Write each part after a savepoint, since the database has refused one before."""
        self._claim()
        savepoint = Savepoint(self._transaction)
        for part in self._left:
            try:
                savepoint.write(partial(self._write_part, part))
            except (Lost, Rejected) as error:
                if isinstance(error, Lost):
                    savepoint.go_back()
                    self._failed[part.key] = error
                else:
                    self._failed[part.key] = self._in_the_way(error, [part]) or error

    def _write_part(self, part: Part) -> None:
        self._record([part])
        for key in sorted(part.changes, key=str):
            if not self._is_written(*part.changes[key]):
                raise self._lost(key)
        insert_rows_in_savepoint(self._transaction.connection, part.rows)

    def _is_written(self, statement: Any, parameters: dict[str, Any]) -> bool:
        try:
            self._transaction.change(statement, parameters)
        except Conflict:
            return False
        except IntegrityError as error:
            if statement is self._add and errors.is_duplicate(error):
                return False
            raise
        return True

    # -- what is left ----------------------------------------------------------------------------------------

    def _changes(self) -> dict[Hashable, Change]:
        return {key: change for part in self._left for key, change in part.changes.items()}

    def _loaded(self, changes: dict[Hashable, Change]) -> dict[Hashable, dict[str, Any]]:
        """Return the parameters of the changes to rows that the load has found."""
        return {key: values for key, (statement, values) in changes.items() if statement is not self._add}

    def _count(self, changes: dict[Hashable, Change]) -> int:
        """Return the number of statements that these take."""
        if not self._saving.together:
            return len(changes)
        return len({id(statement) for statement, _ in changes.values()})

    def _grouped(self, changes: dict[Hashable, Change]) -> Iterable[tuple[Together, dict[Hashable, dict[str, Any]]]]:
        """Yield the statements for many documents, in the order to send them, with their parameters by key."""
        for single, statement in self._saving.together.items():
            some = {key: values for key, (asked, values) in changes.items() if asked is single}
            if some:
                yield statement, some
