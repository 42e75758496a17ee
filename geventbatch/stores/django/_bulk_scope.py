"""One attempt of a bulk on rows of Django models: entering loads the rows of many keys, exiting saves them.

All is in one transaction. The batches of the bulk have their turns in it, one after the other. A batch that is lost or
refused is left out of the save. But statements that its operations have sent are in the transaction: then none of the
others can be committed either, and they are saved in another one.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import gevent
from django.db import Error
from django.db.transaction import atomic

from geventbatch._batch import batch_at_hand
from geventbatch._bulk.connected import by_component
from geventbatch._core.process import running
from geventbatch._safe_repr import shown
from geventbatch.errors import Conflict, NothingToSave, NotSaved, PartlySaved, Rejected, Repeated
from geventbatch.stores._give_back import give_back
from geventbatch.stores._sql import errors
from geventbatch.stores._sql.outcomes import OutcomesOfBulk, Recording, repeated_of
from geventbatch.stores.django._added_rows import add_rows
from geventbatch.stores.django._bulk_load import BulkLoad
from geventbatch.stores.django._bulk_update import BulkUpdate
from geventbatch.stores.django._foreign_code import apart
from geventbatch.stores.django._lease import Lease
from geventbatch.stores.django._on_commit import take
from geventbatch.stores.django._part import Part
from geventbatch.stores.django._row import Row, identity_of
from geventbatch.stores.django._transaction import Transaction, not_saved, send
from geventbatch.stores.django._turn import Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from types import TracebackType

    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.models import Field, Model

    from geventbatch._core.batch import Batch
    from geventbatch.stores.django._model_rows import ModelRows
    from geventbatch.stores.django._models import Models

_AT_ONCE: Final = 500
_TRIES: Final = 3


class BulkScope:
    """One attempt of many keys."""

    takes_rows = True
    deletes = True

    # -- mutable state, from entering on --------------------------------------------------------------------
    _connection: BaseDatabaseWrapper
    _transaction: Transaction
    _loading: BulkLoad
    _rows: dict[Hashable, Row[Any]]  # those that were loaded
    _resources: dict[Hashable, Any]  # the same, for the operations, or the error of the load; later: what to save

    def __init__(self, models: Models[Any], keys: list[Hashable]) -> None:
        self._models = models
        self._keys = keys
        batch = batch_at_hand()
        self._alone = batch.alone
        self._whole = _Whole(models, keys)
        self._lease = Lease(models.any.using, models.any.pool, alone=batch.alone)
        self._singly = False  # the database has refused to load all at once
        self._turns: dict[Batch, Turn] = {}
        self._turn: Turn | None = None  # the one at hand
        self._callbacks: list[Callable[[], object]] = []

    # -- load -----------------------------------------------------------------------------------------------

    def __enter__(self) -> dict[Hashable, Any]:
        self._connection = self._lease.begin()
        try:
            self._load()
        except Error as error:
            self._leave(error)
            if self._lease.renews(error) or self._loads_otherwise(error):
                return self.__enter__()
            if errors.kind(error) is errors.Kind.CONFLICT:
                raise errors.not_saved(error, self._whole.key) from error
            raise
        except BaseException as error:
            self._leave(error)
            raise
        if self._alone:
            self.turn()
        return self._resources

    def _load(self) -> None:
        rows = self._models.any
        self._transaction = Transaction(
            self._connection, self._whole, pipeline=rows.pipeline, locking=rows.locks(self._connection)
        )
        self._loading = BulkLoad(self._models, self._connection, self._transaction)
        self._transaction.begin()
        found = self._loading.load_singly(self._keys) if self._singly else self._loading.load(self._keys)
        self._rows = {key: row for key, row in found.items() if isinstance(row, Row)}
        self._resources = {key: row.instance if isinstance(row, Row) else row for key, row in found.items()}

    def _loads_otherwise(self, error: Error) -> bool:
        """Return whether to load again: without the xmin of a view, or each key by itself."""
        model = self._loading.model
        if model.has_xmin and errors.has_no_xmin(error):
            model.has_xmin = False
            return True
        if self._singly or len(self._keys) == 1 or errors.kind(error) not in errors.OF_OPERATION:
            return False
        self._singly = True
        return True

    # -- operations -----------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Let the batch at hand have its turn: its operations come next. Switches: no."""
        batch = batch_at_hand()
        self._end_turn()
        rows = {key: self._rows[key] for key in batch.loads if key in self._rows}
        self._turn = self._turns[batch] = Turn(batch, rows, self._transaction)
        self._turn.begin()

    def _end_turn(self) -> None:
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.end()

    @property
    def _at_hand(self) -> Turn:
        assert self._turn is not None  # noqa: S101 - an operation is
        return self._turn

    @property
    def guard(self) -> object:
        """Guards the connection during the turn at hand."""
        return None if self._turn is None else self._turn.guard

    def operation_raised(self, error: Exception) -> NotSaved | None:
        """Return the verdict on all keys after an operation raised *error*. Switches: no."""
        return self._at_hand.raised(error)

    def operation_returned(self) -> NotSaved | None:
        """Return the verdict on all keys after an operation that used the database returned. Switches: no."""
        return self._at_hand.returned()

    def generated(self, instance: Model, field: Field[Any, Any]) -> Any:
        """Return the database's value for the generated *field*. Switches: yes, if its source fields have changed."""
        turn = self._at_hand
        with turn.guard.aside():
            return turn.rows[turn.key_of(instance)].generated.value(instance, field)

    def save_asked(self, instance: Model) -> None:
        """Note that an operation has called `save`, which may compute a column of its own. Switches: no."""
        self._at_hand.rows[self.key_of(instance)].save_asked = True

    def key_of(self, instance: Model) -> Any:
        """Return the key whose resource is *instance*. Switches: no."""
        return self._at_hand.key_of(instance)

    def copied(self, value: object) -> object:
        """Return a copy of *value* if it lies in a column and can be changed; else itself. Switches: no."""
        return self._at_hand.copied(value)

    def owns(self, value: object) -> bool:
        """Return whether *value* is an instance of the operation's, or lies in one of its columns. Switches: no."""
        return self._at_hand.owns(value)

    def must_compare_of(self, batch: Batch) -> bool:
        """Return whether queries of *batch* may have read another state than the load. Switches: no."""
        turn = self._turns.get(batch)
        return turn is not None and turn.guard.must_compare

    def checkpoint(self) -> object:
        """Return a copy of the memory at the current key. Raises `CannotUndo`. Switches: no."""
        return self._at_hand.checkpoint(batch_at_hand().key)

    def restore(self, checkpoint: Any) -> Any:
        """Restore the memory at the current key. Raises `CannotUndo`. Switches: no."""
        return self._at_hand.restore(batch_at_hand().key, checkpoint)

    # -- save -----------------------------------------------------------------------------------------------

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        last = self._turn
        self._end_turn()
        if error is not None:
            self._leave(error, last)
            return
        try:
            lost = self._save()
        except BaseException as failed:
            self._leave(failed, last)
            raise
        give_back(self._whole.key, self._lease.end, saved=True, lost=lost)
        if lost:
            raise PartlySaved(lost)

    def _save(self) -> dict[Hashable, NotSaved]:
        """Save, and return why keys were not saved."""
        self._transaction.check()
        parts = self._parts()
        lost = {part: self._known(part) or found for part in parts if (found := part.prepare()) is not None}
        try:
            try:
                lost |= apart([part for part in parts if part not in lost], self._connection)
                self._claim(parts, lost)
                self._write(parts, lost)
            finally:
                for part in lost:
                    part.turn.guard.drop_hooks_behind(0)
                if not self._transaction.nested:
                    self._callbacks = take(self._connection)
        except Exception as error:
            self._transaction.resolve(error)
        if len(lost) == len(parts):
            self._callbacks = []
            self._transaction.roll_back(NothingToSave())
        else:
            self._check_save()
            self._transaction.commit()
        return {key: failed for part, failed in lost.items() for key in part.told}

    def _parts(self) -> list[Part]:
        """Return what to save, batch by batch."""
        bulk = batch_at_hand().bulk
        keys = by_component([key for key in self._resources if key in self._rows], bulk)
        for batch, turn in self._turns.items():
            if turn.wrote and batch not in keys and not batch.outcomes:
                raise Conflict(
                    f"{shown(self._whole.key)} was not saved, nothing was written: an operation on "
                    f"{shown(turn.batch.key)}, which is not saved, has sent statements in the same transaction"
                )
        told = by_component(bulk, bulk)
        others = [batch for batch in told if batch.outcomes or self.must_compare_of(batch)]
        return [
            Part(self._turns[batch], keys.get(batch, []), told=told[batch])
            for batch in dict.fromkeys([*keys, *others])
            if batch in self._turns
        ]

    def _claim(self, parts: list[Part], lost: dict[Part, NotSaved]) -> None:
        """Lock the rows to write that are not locked yet; lose the parts whose rows have changed since the load.

        If operations have sent statements, these may have changed any row of the bulk: each is compared, but for what
        its own batch may have changed.
        """
        writers = [turn for turn in self._turns.values() if turn.wrote]
        claims: dict[str | None, list[tuple[Part, Row[Any], bool]]] = {}
        for part in [one for one in parts if one not in lost]:
            whole = any(writer is not part.turn for writer in writers)
            for key, row in part.compared.items():
                if not row.new and (whole or (part.compares and not row.is_exclusive)):
                    claims.setdefault(self._models.of(key).name, []).append((part, row, whole))
        if claims:
            self._transaction.take_write_lock()
        for rows in self._models.in_order:
            if rows.name in claims:
                self._claim_rows(rows, claims[rows.name], lost)
        self._check_statements(parts, lost)

    def _claim_rows(
        self, rows: ModelRows[Any], claims: list[tuple[Part, Row[Any], bool]], lost: dict[Part, NotSaved]
    ) -> None:
        found = {}
        for first in range(0, len(claims), _AT_ONCE):
            pks = [row.instance.pk for _, row, _ in claims[first : first + _AT_ONCE]]
            selection = self._loading.selections[rows.name]
            query = selection.with_xmin(selection.locked(selection.plain().filter(pk__in=pks))).order_by("pk")
            with self._transaction.saving():
                for one in query:
                    found[identity_of(one, rows.model, self._connection)] = one
        for part, row, whole in claims:
            try:
                row.claim(found.get(row.identity), whole=whole)
            except Conflict as error:
                lost.setdefault(part, error)

    def _check_statements(self, parts: list[Part], lost: dict[Part, NotSaved]) -> None:
        """Raise `Rejected`, so that the keys are saved in halves, if statements of a lost part cannot be left out."""
        if len(lost) < len(parts) and any(part.turn.wrote for part in lost):
            part = next(part for part in lost if part.turn.wrote)
            raise Rejected(
                f"{shown(self._whole.key)} was not saved, nothing was written: an operation has sent statements in the "
                f"same transaction, and is not saved itself: {lost[part]}"
            ) from lost[part]

    # -- outcomes ---------------------------------------------------------------------------------------------

    def recorded(self, names: list[str]) -> dict[str, str]:
        """Return the recorded outcomes of these names. Switches: yes."""
        with nullcontext() if self._turn is None else self._turn.guard.aside():
            return self._outcomes().find(partial(send, self._connection), names)

    def _outcomes(self) -> OutcomesOfBulk:
        def place(key: Any) -> tuple[str, Hashable]:
            row = self._rows.get(key)  # None: its load has failed
            return self._models.of(key).place, key if row is None else row.key

        return OutcomesOfBulk(self._models.any.outcome_table(self._connection), str(self._whole.key), place)

    def _known(self, part: Part) -> NotSaved | None:
        """Return the error of *part* if outcomes are recorded: a repeated operation is not judged by the new state."""
        if not part.outcomes:
            return None
        return repeated_of([part.batch], self.recorded(list(part.outcomes))).get(part.batch)

    def _record(self, parts: list[Part]) -> dict[Part, NotSaved]:
        """Record the outcomes of *parts*. Return the errors of those of which some are recorded already."""
        repeated: dict[Part, NotSaved] = {}
        tries = _TRIES
        while True:
            left = [part for part in parts if part.outcomes and part not in repeated]
            if not left:
                return repeated
            found = self._insert({name: text for part in left for name, text in part.outcomes.items()})
            if found is None:
                return repeated
            if isinstance(found, Repeated):
                of_batch = repeated_of([part.batch for part in left], found.outcomes)
                repeated |= {part: of_batch[part.batch] for part in left if part.batch in of_batch}
            else:  # expired ones were in the way
                tries -= 1
                if not tries:
                    raise found

    def _insert(self, outcomes: dict[str, str]) -> NotSaved | None:
        """Insert *outcomes*. Return the error if that was impossible; nothing is inserted then."""
        recording = Recording(self._outcomes(), outcomes)
        sending = partial(send, self._connection)
        try:
            with atomic(using=self._connection.alias):
                recording.send(sending)
        except Error as error:
            found = recording.check(error, sending, _nothing, _nothing)
            if found is None:
                raise
            return found
        return None

    # -- write ------------------------------------------------------------------------------------------------

    def _write(self, parts: list[Part], lost: dict[Part, NotSaved]) -> None:
        left = [part for part in parts if part not in lost]
        stepwise = any(part.inserts or part.batch.rejections for part in left)
        if any(part.outcomes for part in left) or stepwise:
            self._transaction.take_write_lock()
        if not stepwise:
            self._write_all(parts, left, lost)
            return
        for part in left:
            failed = self._write_in_savepoint(part)
            if failed is not None:
                lost[part] = failed
                self._check_statements(parts, lost)

    def _write_all(self, parts: list[Part], left: list[Part], lost: dict[Part, NotSaved]) -> None:
        """Write what is *left* of *parts*, the rows of each model together, and COMMIT with the last statement."""
        together = BulkUpdate(self._transaction)
        for part in left:
            failed = part.plan(together)
            if failed is not None:
                lost[part] = self._known(part) or failed
        lost |= self._record([part for part in left if part not in lost])
        self._check_statements(parts, lost)
        left = [part for part in left if part not in lost and part.batch.completed]
        added = [row for part in left for row in part.added]
        models = {model for part in left for model in part.turn.models.values()}
        commits = not any(part.batch.conflicts for part in left) and not any(map(Row.computes, models))
        for part in left:
            part.write()
            together.add(part.planned)
        together.send(commits=commits and not added)
        add_rows(added, self._transaction, commits=commits)

    def _write_in_savepoint(self, part: Part) -> NotSaved | None:
        """Write *part*. Return why it is lost; nothing of it is written then."""
        try:
            with atomic(using=self._connection.alias):
                repeated = self._record([part]).get(part)
                if repeated is not None:
                    return repeated
                if part.batch.completed:
                    part.write()
                    add_rows(part.added, self._transaction, commits=False)
        except Error as error:
            kind = errors.kind(error)
            if kind not in {*errors.OF_OPERATION, errors.Kind.OTHER} or self._transaction.ended_by() is not None:
                raise
            for row in part.rows.values():
                if row.new and row.is_there():
                    return row.conflict()
            found = not_saved(error, part.batch.key)
            found.__cause__ = error
            return found
        except Exception as error:
            return part.refused(error)
        return None

    def _check_save(self) -> None:
        """Raise if a signal's receiver, or a model's own `save`, has ended the transaction or one of its blocks."""
        if self._transaction.is_committed:
            return
        guard = next(iter(self._turns.values())).guard
        wrong = guard.left_behind()
        if wrong is not None and self._transaction.has_ended():
            raise wrong  # a part may be saved
        if wrong is not None:
            raise Rejected(f"{shown(self._whole.key)} was not saved, nothing was written: {wrong}") from wrong

    # -- the end ------------------------------------------------------------------------------------------------

    def saved(self) -> None:
        """Call the callbacks given to `on_commit`. Switches: as they do."""
        self._lease.call_back(self._callbacks, self._whole.key)

    def _leave(self, error: BaseException, last: Turn | None = None) -> None:
        give_back(self._whole.key, self._end, error, last, saved=False)

    def _end(self, error: BaseException, last: Turn | None) -> None:
        try:
            if hasattr(self, "_transaction"):
                if last is not None and self._transaction.is_begun:
                    last.guard.close_blocks()
                self._transaction.roll_back(error)
        finally:
            self._lease.end()


def _nothing() -> None:
    """Do nothing: the savepoint has gone back already, and the transaction goes on."""


class _Whole:
    """What a transaction asks of its batch, for all batches of a bulk."""

    def __init__(self, models: Models[Any], keys: list[Hashable]) -> None:
        self.key: Any = keys[0] if len(keys) == 1 else _Keys(f"{len(keys)} rows of {models!r}")
        self._greenlet = gevent.getcurrent()

    def remaining(self) -> float:
        """Return the seconds until the deadline."""
        attempt = running.get(self._greenlet)
        return 0.001 if attempt is None else attempt.batch.remaining()


class _Keys(str):
    """Names many keys in messages, without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
