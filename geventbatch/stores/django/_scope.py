"""One attempt of a batch on one row of a Django model: entering loads the row, exiting saves it."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from django.db import Error
from django.db.models import Field, Model

from geventbatch._batch import batch_at_hand
from geventbatch._safe_repr import said, shown
from geventbatch.errors import NothingToSave, NotSaved, Rejected
from geventbatch.stores._give_back import give_back
from geventbatch.stores._sql import errors
from geventbatch.stores._sql.outcomes import Outcomes, Recording
from geventbatch.stores.django._added_rows import add_rows
from geventbatch.stores.django._answers import asks_later, copied, lies_in
from geventbatch.stores.django._as_loaded import convert_values
from geventbatch.stores.django._guard import Guard
from geventbatch.stores.django._instance_class import forget_read, instance_class, take_related
from geventbatch.stores.django._lease import Lease
from geventbatch.stores.django._on_commit import take
from geventbatch.stores.django._row import Row
from geventbatch.stores.django._steps import Savepoints, Steps
from geventbatch.stores.django._transaction import Transaction, send
from geventbatch.stores.django._undo import Checkpoint, Undo
from geventbatch.stores.django._verdict import verdict_on

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from django.db.backends.base.base import BaseDatabaseWrapper

    from geventbatch._core.batch import Batch
    from geventbatch.stores.django._model_rows import ModelRows

M = TypeVar("M", bound=Model)


class Scope(Generic[M]):
    """One attempt of a batch on one row."""

    takes_rows = True
    deletes = True

    # -- mutable state, from entering on --------------------------------------------------------------------
    _connection: BaseDatabaseWrapper
    _transaction: Transaction
    _row: Row[M]
    _class: type[M]  # the instance's own, without the one of `_instance_class`
    _undo: Undo[M]

    def __init__(self, rows: ModelRows[M], key: Any) -> None:
        self._rows = rows
        self._key = key
        self._batch: Batch = batch_at_hand()
        self._lease = Lease(rows.using, rows.pool, alone=self._batch.alone)
        self.guard: Guard | None = None
        """Guards the connection, from the load on."""
        self._steps: Steps | Savepoints | None = None  # set if each operation is judged by itself
        self._callbacks: list[Callable[[], object]] = []
        self._recording: Recording | None = None  # of the outcomes not sent yet

    # -- load -----------------------------------------------------------------------------------------------

    def __enter__(self) -> M:
        self._connection = self._lease.begin()
        try:
            self._load()
        except Error as error:
            self._leave(error)
            if self._lease.renews(error):
                return self.__enter__()
            if self._rows.has_xmin and errors.has_no_xmin(error):
                self._rows.has_xmin = False
                return self.__enter__()
            if errors.kind(error) is errors.Kind.CONFLICT:
                raise errors.not_saved(error, self._key) from error
            raise
        except BaseException as error:
            self._leave(error)
            raise
        return self._row.instance

    def _load(self) -> None:
        self._transaction = Transaction(
            self._connection, self._batch, pipeline=self._rows.pipeline, locking=self._rows.locks(self._connection)
        )
        self._transaction.begin()
        self._row = Row(self._rows, self._key, self._connection, self._transaction)
        self._row.load()
        self._take_over()

    def _take_over(self) -> None:
        """Watch what operations do. Replace `save` and `delete` of the instance, since the scope saves."""
        self._class = type(self._row.instance)
        self.guard = Guard(self._connection, self._transaction, self._batch, self._row)
        self._undo = Undo(self._row, self._class, self.guard, copies=self._batch.attempts > 1)
        self._watch()

    def _watch(self) -> None:
        instance: Any = self._row.instance
        instance.__class__ = instance_class(self._class)
        self._guard.put_on()

    def _hand_back(self) -> NotSaved | None:
        """Take the guard off the connection and the instance. Return why the batch cannot be saved, or None."""
        guard = self._guard
        verdict = guard.judge()
        guard.next()
        guard.take_off()
        instance: Any = self._row.instance
        instance.__class__ = self._class
        return verdict

    @contextmanager
    def _between(self) -> Iterator[NotSaved | None]:
        """Run no operation in this block, which gets the `_hand_back`; raise the right error. Switches: no."""
        verdict = self._hand_back()
        try:
            yield verdict
        except NotSaved:
            raise
        except Exception as error:
            self._transaction.has_raised(error)
            over = self._transaction.ended_by()
            if over is not None:
                raise over from over.__cause__
            self._transaction.resolve(error)
        finally:
            self._watch()

    @property
    def _guard(self) -> Guard:
        assert self.guard is not None  # noqa: S101 - it is loaded
        return self.guard

    # -- operations -----------------------------------------------------------------------------------------

    def recorded(self, keys: list[str]) -> dict[str, str]:
        """Return the recorded outcomes of operations with these idempotency keys. Switches: yes."""
        with self._guard.aside():
            return self._outcomes().find(partial(send, self._connection), keys)

    def _outcomes(self) -> Outcomes:
        rows = self._rows
        return Outcomes(rows.outcome_table(self._connection), rows.place, self._row.key)

    def operation_raised(self, error: Exception) -> NotSaved | None:
        """Return the verdict on the batch after an operation raised *error*. Switches: no."""
        guard = self._guard
        with guard.aside():
            verdict = verdict_on(error, self._row, guard, self._transaction, self._batch)
        guard.drop_hooks()
        self._forget_read()
        guard.next()
        return verdict

    def operation_returned(self) -> NotSaved | None:
        """Return the verdict on the batch after an operation that used the database returned. Switches: no."""
        instance, guard = self._row.instance, self._guard
        verdict = guard.judge() or self._row.refused(self._key)
        if verdict is None:
            try:
                with guard.aside():
                    take_related(instance)
                    convert_values(instance, self._class, self._connection)
            except Exception as error:  # as `save` would raise it
                verdict = Rejected(f"{shown(self._key)} was not saved, nothing was written: {said(error)}")
                verdict.__cause__ = error
        self._forget_read()
        guard.next()
        return verdict

    def _forget_read(self) -> None:
        """Make the next operation read related objects anew, unless the model's own `save` may need them."""
        if not self._row.computes(self._class):
            forget_read(self._row.instance, self._class, self._undo.found)

    def generated(self, instance: Model, field: Field[Any, Any]) -> Any:
        """Return the database's value for the generated *field*. Switches: yes, if its source fields have changed."""
        with self._guard.aside():
            return self._row.generated.value(instance, field)

    def save_asked(self, instance: Model) -> None:  # noqa: ARG002 - a scope of many keys has several
        """Note that an operation has called `save`, which may compute a column of its own. Switches: no."""
        self._row.save_asked = True

    def key_of(self, instance: Model) -> Any:  # noqa: ARG002 - a scope of many keys has several
        """Return the key. Switches: no."""
        return self._key

    def copied(self, value: object) -> object:
        """Return a copy of *value* if it lies in a column and can be changed; else itself. Switches: no."""
        return copied(self._row.instance, self._rows.model, value, self._connection)

    def owns(self, value: object) -> bool:
        """Return whether *value* is the instance of the batch, or lies in one of its columns. Switches: no."""
        instance = self._row.instance
        return value is instance or asks_later(value) or lies_in(instance, self._rows.model, value)

    # -- undoing --------------------------------------------------------------------------------------------

    def checkpoint(self) -> Checkpoint:
        """Return a copy of the memory. Raises `CannotUndo` if a value cannot be copied. Switches: no."""
        return self._undo.checkpoint()

    def restore(self, checkpoint: Any) -> M:
        """Restore the memory. Raises `CannotUndo` if more than memory has changed since. Switches: no."""
        return self._undo.restore(checkpoint)

    # -- step by step ---------------------------------------------------------------------------------------

    @property
    def steps(self) -> bool:
        """Return whether each operation can be judged by itself.

        To write each operation's changes on SQLite would lock out all other writers. There, only the statements that
        operations send themselves are undone.
        """
        vendor = self._connection.vendor
        has_steps = vendor in {"postgresql", "mysql"} or (vendor == "sqlite" and not self._batch.rejections)
        return has_steps and self._connection.features.uses_savepoints

    def begin_steps(self) -> None:
        """Make the loaded state the one to go back to. Switches: yes."""
        if not self._batch.rejections:
            self._steps = Savepoints(self._row, self._guard, self._undo, self._transaction)
            self._steps.remember()
            return
        steps = self._steps = Steps(self._row, self._guard, self._undo, self._transaction, self._batch)
        with self._between():
            steps.begin()

    def keep(self) -> None:
        """Write the changes of the last operation, or raise why they cannot be saved. Switches: yes.

        If no save was refused yet, the changes are only kept in memory; the operation's own statements are sent
        already.
        """
        steps = self._steps
        assert steps is not None  # noqa: S101 - it has begun
        if isinstance(steps, Savepoints):
            steps.remember()
            return
        with self._between() as verdict:
            if verdict is not None:
                raise verdict
            try:
                if self._write_row(self._batch.rows[steps.kept :], commits=False):
                    self._row.remember_written()
            except Error as error:
                self._refuse_duplicate_step(error, steps)
                raise
            self._check_save()
            steps.keep()

    def undo(self) -> M:
        """Go back to the last `keep`. Switches: yes, if more than memory has changed."""
        steps = self._steps
        assert steps is not None  # noqa: S101 - it has begun
        if isinstance(steps, Savepoints) and steps.is_in_memory:
            steps.put_back()
            return self._row.instance
        with self._between():
            over = self._transaction.ended_by()
            if over is not None:
                raise over
            steps.undo()
        return self._row.instance

    def _refuse_duplicate_step(self, error: Error, steps: Steps) -> None:
        """Raise the `Conflict` that *error* means, if any, as `_refuse_duplicate` does."""
        if self._row.is_conflict(error):
            raise self._row.conflict() from error
        if self._row.new and errors.is_duplicate(error):
            steps.undo()
            if self._row.is_there():
                raise self._row.conflict() from error

    # -- save -----------------------------------------------------------------------------------------------

    @property
    def must_compare(self) -> bool:
        """Return whether queries of operations may have read another state of the row than the load. Switches: no."""
        return self._guard.must_compare

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        verdict = self._hand_back()
        if error is not None:
            self._leave(error)
            return
        try:
            self._save(verdict)
        except BaseException as failed:
            self._leave(failed)
            raise
        give_back(self._key, self._release, saved=True)

    def _save(self, verdict: NotSaved | None) -> None:
        if verdict is not None:
            raise verdict
        transaction, outcomes = self._transaction, self._batch.outcomes
        transaction.check()
        if not (self._batch.completed or outcomes):  # statements may have been sent, but no operation completed
            self._guard.compare()
            transaction.roll_back(NothingToSave())
            return
        recording = self._recording = Recording(self._outcomes(), outcomes) if outcomes else None
        try:
            try:
                self._write()
            finally:  # also after COMMIT with the last statement, in which Django would call them
                if not transaction.nested:
                    self._callbacks = take(self._connection)
        except Exception as error:
            if isinstance(error, Error):
                self._check_repeated(error, recording)
                self._refuse_duplicate(error)
            transaction.resolve(error)
        self._check_save()
        transaction.commit()  # nothing to send if the last statement carried COMMIT (Together._commit)

    def _check_save(self) -> None:
        """Raise if a signal's receiver, or the model's own `save`, has ended the transaction or one of its blocks."""
        if self._transaction.is_committed:
            return
        wrong = self._guard.left_behind()
        if wrong is not None and self._transaction.has_ended():
            raise wrong  # a part may be saved
        if wrong is not None:
            raise Rejected(f"{shown(self._key)} was not saved, nothing was written: {wrong}") from wrong

    def _check_repeated(self, error: Exception, recording: Recording | None) -> None:
        """Raise the right error if recording the outcomes has caused *error*."""
        if recording is None:
            return
        sending, roll_back = partial(send, self._connection), partial(self._roll_back, error)
        found = recording.check(error, sending, roll_back, self._transaction.begin_to_write)
        if found is not None:
            try:
                self._transaction.commit()  # keep the deletion of expired outcomes
            except Error as failed:
                raise errors.of_store(failed, self._key) from failed
            raise found from None

    def _roll_back(self, error: BaseException) -> None:
        """Roll back, and prepare to look for the row that was in the way. Switches: yes."""
        self._transaction.roll_back(error)
        if self._connection.connection is not None:
            self._row.prepare()

    def _record(self) -> None:
        """Send the outcomes, if they are not sent yet."""
        recording, self._recording = self._recording, None
        if recording is not None:
            self._transaction.take_write_lock()
            recording.send(partial(send, self._connection))

    def _write(self) -> None:
        if not self._batch.completed:
            self._guard.compare()
            self._record()
        else:
            self._write_row(self._batch.rows[0 if self._steps is None else self._steps.kept :], commits=True)

    def _write_row(self, rows: list[object], *, commits: bool) -> bool:
        """Write the changes of the row, and *rows*. Return whether the row was written. Switches: yes."""
        row = self._row
        row.check_key()
        fields = row.changes()
        wrote = self._transaction.wrote
        if self._batch.deleted or row.new or not fields or not row.is_joined:  # else they go with the UPDATE
            self._record()
        recording = [] if self._recording is None else [self._recording.statement()]
        # `missing`, and `prepare_connection`, may have written too.
        more = wrote or row.new or self._batch.alone or self._batch.outcomes or self._rows.prepare_connection
        self._transaction.only = not (more or self._steps)
        written = True
        if self._batch.deleted:
            row.delete()
        elif row.new:
            row.insert(commits=commits and not rows)
        elif fields or (row.save_asked and row.computes(self._class)):
            row.update(fields, commits=commits and not rows, recording=recording)
        elif (rows or wrote) and not row.ours:
            written = row.touch()
        else:
            self._guard.compare()
            written = False
        self._transaction.only &= not written and len(rows) == 1
        add_rows(rows, self._transaction, commits=commits)
        return written

    def _refuse_duplicate(self, error: Error) -> None:
        """Raise the `Conflict` that *error* means, if any: another writer has changed the row, or inserted it first."""
        if self._row.is_conflict(error):
            raise self._row.conflict() from error
        if not self._row.new or errors.kind(error) is not errors.Kind.REJECTED:
            return
        if self._transaction.nested:
            return
        self._roll_back(error)
        there = True  # assumed if the database cannot be asked: the replay will see
        with suppress(Error):
            there = self._row.is_there()
        if there:
            raise self._row.conflict() from error
        raise errors.not_saved(error, self._key) from error

    # -- the end --------------------------------------------------------------------------------------------

    def saved(self) -> None:
        """Call the callbacks given to `on_commit`. Switches: as they do."""
        self._lease.call_back(self._callbacks, self._key)

    def _leave(self, error: BaseException) -> None:
        give_back(self._key, self._end, error, saved=False)

    def _end(self, error: BaseException) -> None:
        try:
            if hasattr(self, "_transaction"):
                if self.guard is not None and self._transaction.is_begun:
                    self.guard.close_blocks()
                self._transaction.roll_back(error)
        finally:
            self._release()

    def _release(self) -> None:
        if self._steps is not None:
            self._guard.savepoints = None  # else each would keep the other alive
        self._lease.end()
