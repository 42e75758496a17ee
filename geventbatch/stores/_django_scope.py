"""One attempt of a batch on one row of a Django model: entering loads it, leaving saves it."""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

from django.db import Error, connections
from django.db.models import Field, Model
from django.db.models.signals import post_save, pre_save

from geventbatch._processor import current_batch
from geventbatch.errors import Conflict, NotSaved, Rejected, ResourceMissing
from geventbatch.stores import _sql
from geventbatch.stores._django_changes import changed, state_of
from geventbatch.stores._django_connections import current
from geventbatch.stores._django_held import held_class
from geventbatch.stores._django_transaction import Transaction, send
from geventbatch.stores._outcomes import Outcomes, Recording

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.models import QuerySet

    from geventbatch import Batch
    from geventbatch.stores.django import DjangoStore

M = TypeVar("M", bound=Model)

_log: Final = logging.getLogger("geventbatch")
_XMIN: Final = "geventbatch_xmin"
_CHANGED: Final = "geventbatch: the row has changed"


class Scope(Generic[M]):
    """One attempt of a batch on one row."""

    takes_rows = True
    deletes = True

    # -- mutable state, from entering on --------------------------------------------------------------------
    _connection: BaseDatabaseWrapper
    _transaction: Transaction
    _instance: M
    _class: type[M]  # of the instance, but for while operations run
    _loaded: dict[str, object]
    _xmin: str | None

    def __init__(self, store: DjangoStore[M], key: Any) -> None:
        self._store = store
        self._key = key
        self._batch: Batch = current_batch()
        self._before: BaseDatabaseWrapper | None = None
        self._callbacks: list[Callable[[], object]] = []
        self._new = False
        self._recording: Recording | None = None  # what is still to be recorded

    # -- load -----------------------------------------------------------------------------------------------

    def __enter__(self) -> M:
        reused = self._connect()
        try:
            self._load()
        except Error as error:
            self._leave(error)
            if reused and _sql.kind(error) is _sql.Kind.LOST:  # by a server that has ended idle connections
                self._store.stopped()  # all of them
                return self.__enter__()
            if _sql.kind(error) is _sql.Kind.CONFLICT:
                raise _sql.not_saved(error, self._key) from error
            raise
        except BaseException as error:
            self._leave(error)
            raise
        return self._instance

    def _connect(self) -> bool:
        """Get a connection. True when the server may have closed it meanwhile."""
        alias = self._store.using
        if self._batch.alone:
            self._connection = connections[alias]
            if not self._connection.in_atomic_block:
                self._connection.close_if_unusable_or_obsolete()
            return self._connection.connection is not None and not self._connection.in_atomic_block
        self._before = current(alias)
        self._connection, reused = self._store._pool.lend()
        self._connection.on_commit = self._on_commit  # type: ignore[method-assign]  # until it is given back
        return reused

    def _load(self) -> None:
        self._transaction = Transaction(self._connection, self._batch, pipeline=self._store.pipeline)
        self._transaction.begin()
        rows = self._store.rows(self._key)
        self._locks = self._store.locks(self._connection)
        self._has_xmin = not self._locks and self._store.has_xmin(self._connection)
        if self._locks:
            rows = self._locked(rows)
        if self._has_xmin:
            rows = rows.extra(select={_XMIN: f"{self._table}.xmin::text"})  # noqa: S610 - a name that we quote
        with self._transaction.loading():
            found = self._first(rows)
        self._instance = self._make() if found is None else found
        self._xmin = vars(self._instance).pop(_XMIN, None)
        self._loaded = state_of(self._instance)
        self._take_over()
        if not self._locks:
            self._transaction.watch()

    def _locked(self, rows: QuerySet[M]) -> QuerySet[M]:
        """Lock as an UPDATE does: whoever inserts a row that refers to this one need not wait.

        Two batches that each add a row referring to the other's would deadlock.
        """
        return rows.select_for_update(no_key=self._connection.features.has_select_for_no_key_update)

    def _first(self, rows: QuerySet[M]) -> M | None:
        try:
            return next(iter(rows[:1]), None)
        except Error:
            raise
        except Exception as error:  # of a field that makes a value of what the column holds
            raise ValueError(f"the {self._store.model._meta.label} {self._key!r} cannot be read: {error}") from error

    def _make(self) -> M:
        store = self._store
        label = store.model._meta.label
        if not callable(store.missing):
            raise ResourceMissing(f"there is no {label} with {store.key_field.name} {self._key!r}", key=self._key)
        made = store.missing(self._key)
        if not isinstance(made, store.model):
            raise TypeError(f"missing gave {made!r} for key {self._key!r}, but must give an unsaved {label}")
        value = getattr(made, store.key_field.attname)
        if value is None or store.normalize_key(value) != self._key:
            raise ValueError(
                f"missing gave a {label} whose {store.key_field.name} is {value!r} for key {self._key!r}, but must "
                "be that"
            )
        self._new = True
        return made

    @property
    def _table(self) -> str:
        return self._connection.ops.quote_name(self._store.model._meta.db_table)

    def _take_over(self) -> None:
        """Have `save` and `delete` of the instance, inside an operation, leave it to this scope."""
        instance: Any = self._instance
        self._class = type(self._instance)
        instance.__class__ = held_class(self._class)

    def _hand_back(self) -> None:
        instance: Any = self._instance
        instance.__class__ = self._class

    # -- operations -----------------------------------------------------------------------------------------

    def recorded(self, keys: list[str]) -> dict[str, str]:
        """What is recorded of operations with these idempotency keys. Switches: yes."""
        return self._outcomes().find(partial(send, self._connection), keys)

    def _outcomes(self) -> Outcomes:
        store = self._store
        name = f"{store.model._meta.db_table} by {store.key_field.attname}"
        return Outcomes(store.outcome_table(self._connection), name, self._key)

    def operation_raised(self, error: Exception) -> NotSaved | None:
        """What becomes of the batch after an operation raised *error*. Switches: no."""
        completed = self._batch.completed
        self._connection.run_on_commit = [
            entry for entry in self._connection.run_on_commit if getattr(entry[1], "completed", -1) != completed
        ]
        kind = _sql.kind(error)
        raw: Any = self._connection.connection
        lost = raw is None or bool(getattr(raw, "closed", False)) or not getattr(raw, "open", True)
        if kind is _sql.Kind.CONFLICT or (kind is _sql.Kind.LOST and lost):  # else it is of another server
            return _sql.not_saved(error, self._key)
        if self._transaction.failed() is None:
            return None
        if kind in {_sql.Kind.OTHER, _sql.Kind.TIMEOUT}:
            return Rejected(f"an operation on key {self._key!r} broke the transaction of its batch")
        return _sql.not_saved(error, self._key)

    def _on_commit(self, func: Any, robust: bool = False) -> None:  # noqa: FBT002 - Django's own signature
        if not callable(func):
            raise TypeError("on_commit()'s callback must be a callable.")
        connection = self._connection
        entry: Any = (set(connection.savepoint_ids), _Callback(func, self._batch.completed), robust)
        connection.run_on_commit.append(entry)

    # -- save -----------------------------------------------------------------------------------------------

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hand_back()
        if error is not None:
            self._leave(error)
            return
        try:
            self._save()
        except BaseException as failed:
            self._leave(failed)
            raise
        self._release()

    def _save(self) -> None:
        transaction = self._transaction
        transaction.check()
        recording = self._recording = (
            Recording(self._outcomes(), self._batch.outcomes) if self._batch.outcomes else None
        )
        try:
            try:
                self._write()
            finally:  # COMMIT may be behind its last statement, and Django would call them in it
                self._take_callbacks()
        except Error as error:
            self._check_repeated(error, recording)
            self._refuse_duplicate(error)
            transaction.settle(error)
        except NotSaved:
            raise
        except Exception as error:
            if transaction.may_be_committed:
                raise
            raise Rejected(f"{self._key!r} was not saved, nothing was written: {error}") from error
        transaction.commit()

    def _take_callbacks(self) -> None:
        """Take what operations, and signals and `save` of the model, have given to `on_commit`. Switches: no."""
        if not self._transaction.nested:
            self._callbacks = [entry[1] for entry in self._connection.run_on_commit]
            self._connection.run_on_commit = []

    def _check_repeated(self, error: Exception, recording: Recording | None) -> None:
        """Raise what *error* is, if it is of what was to be recorded."""
        if recording is None:
            return
        sending, roll_back = partial(send, self._connection), partial(self._transaction.roll_back, error)
        found = recording.check(error, sending, roll_back, self._transaction.begin_to_write)
        if found is not None:
            try:
                self._transaction.commit()  # if some have expired and were deleted
            except Error as failed:
                raise _sql.not_saved(failed, self._key) from failed
            raise found from None

    def _record(self) -> None:
        """Send what is to be recorded."""
        recording, self._recording = self._recording, None
        if recording is not None:
            self._transaction.take_write_lock()
            recording.send(partial(send, self._connection))

    def _write(self) -> None:
        instance, rows = self._instance, self._batch.rows
        if not self._batch.completed:
            self._record()
            return
        self._check_key()
        fields = changed(instance, self._loaded)
        for field in fields:
            if hasattr(getattr(instance, field.attname), "resolve_expression"):
                raise TypeError(
                    f"an operation assigned an expression to {field.name}, which would be lost in the next one's: "
                    "assign a value"
                )
        wrote = self._transaction.wrote
        if self._batch.deleted or self._new or not fields or not self._is_joined:  # else it is sent with the UPDATE
            self._record()
        if self._batch.deleted:
            if not self._new:
                self._verify()
                type(instance).delete(instance)
        elif self._new:
            self._insert(commits=not rows)
        elif fields:
            self._update(fields, commits=not rows)
        elif rows or wrote:
            self._touch()
        self._add_rows(rows)

    def _touch(self) -> None:
        """Where nobody is kept out by a lock, have the row change too when only something beside it does.

        Else another process that has loaded the same would not notice. (It does not where the whole row is compared.)
        """
        fields = self._instance._meta.concrete_fields
        beside = [one for one in fields if not one.primary_key and not getattr(one, "generated", False)][:1]
        if not self._locks and self._store.version_field is not None:
            self._update([], commits=False)
        elif self._has_xmin and beside:
            self._update(beside, commits=False)
        else:
            self._verify()

    def _check_key(self) -> None:
        """Refuse to write another row than the one that was loaded."""
        before = self._loaded.get(self._store.model._meta.pk.attname)
        if not self._new and self._instance.pk != before:
            raise ValueError(
                f"an operation changed the primary key of the resource, from {before!r} to {self._instance.pk!r}"
            )

    def _update(self, fields: Sequence[Field[Any, Any]], *, commits: bool) -> None:
        names = [field.name for field in fields]
        version = self._store.version_field
        checks = []
        if self._is_joined:
            checks = [*([self._recording.statement()] if self._recording is not None else []), self._check()]
        else:
            commits = False
            self._verify()
        if version is not None:
            setattr(self._instance, version.attname, cast("int", self._loaded[version.attname]) + 1)
            names.append(version.name)
        with self._transaction.saving(*checks, commits=commits):
            type(self._instance).save(self._instance, using=self._store.using, update_fields=names)

    @property
    def _is_joined(self) -> bool:
        """Whether an UPDATE is one message with what has to be sent before it."""
        return self._transaction.pipelines and not self._transaction.nested and self._is_plain

    @property
    def _is_plain(self) -> bool:
        """Whether saving is one statement, and calls nothing of the user's that could do more."""
        model = type(self._instance)
        own = model.save is not Model.save or model.save_base is not Model.save_base
        heard = pre_save.has_listeners(model) or post_save.has_listeners(model)
        return not (own or heard or model._meta.parents or model._meta.select_on_save)

    def _rows_as_loaded(self) -> QuerySet[M]:
        """The row, if it is as it was loaded as far as the database can tell."""
        rows = self._store.row_of(self._instance)
        version = self._store.version_field
        if self._has_xmin:
            return rows.extra(where=[f"{self._table}.xmin::text = %s"], params=[self._xmin])  # noqa: S610 - as above
        if version is not None and not self._locks:
            return rows.filter(**{version.attname: self._loaded[version.attname]})
        return rows

    def _check(self) -> tuple[str, Sequence[object]]:
        """A statement that fails unless the row is as it was loaded, so that a COMMIT behind it does not happen."""
        rows = self._locked(self._rows_as_loaded()).values_list("pk")
        sql, params = rows.query.get_compiler(self._store.using).as_sql()
        checked = f"CASE WHEN count(*) = 1 THEN 1 ELSE CAST('{_CHANGED} ' || count(*) AS integer) END"
        return f"SELECT {checked} FROM ({sql}) AS found", params  # noqa: S608 - a statement that Django has made

    def _verify(self) -> None:
        """Lock the row and see whether it is as it was loaded, where it was not locked all the time."""
        if self._locks or self._new:
            return
        self._transaction.take_write_lock()
        with self._transaction.saving():
            found = self._first(self._locked(self._rows_as_loaded()))
        by_row = self._store.version_field is None and not self._has_xmin
        if found is None or (by_row and state_of(found) != self._loaded):
            raise self._conflict()

    def _conflict(self) -> Conflict:
        return Conflict(f"{self._key!r} was changed by somebody else since it was loaded; nothing was written")

    def _insert(self, *, commits: bool) -> None:
        self._transaction.take_write_lock()
        with self._transaction.saving(commits=commits and self._is_plain):
            type(self._instance).save(self._instance, using=self._store.using, force_insert=True)

    def _refuse_duplicate(self, error: Error) -> None:
        """Raise the Conflict that *error* says: the row has changed, or somebody else has inserted it first."""
        if _CHANGED in str(error):
            raise self._conflict() from error
        if not self._new or _sql.kind(error) is not _sql.Kind.REJECTED:
            return
        if self._transaction.nested:
            return
        self._transaction.roll_back(error)
        there = True  # also where nobody can look: the replay will see
        with suppress(Error):
            there = self._store.rows(self._key).exists()
        if there:
            raise self._conflict() from error
        raise _sql.not_saved(error, self._key) from error

    def _add_rows(self, rows: Sequence[object]) -> None:
        if rows:
            self._transaction.take_write_lock()
        groups = [(model, list(group)) for model, group in groupby(_by_model(rows), key=type)]
        for number, (model, group) in enumerate(groups, 1):
            self._add_group(model, group, commits=number == len(groups))

    def _add_group(self, model: type[Model], group: list[Model], *, commits: bool) -> None:
        if model._meta.parents:  # what bulk_create cannot do
            for row in group:
                row.save(using=self._store.using, force_insert=True)
            return
        most = self._connection.ops.bulk_batch_size([*model._meta.concrete_fields], group)
        commits = commits and len(group) <= most and len({row.pk is None for row in group}) == 1
        with self._transaction.saving(commits=commits):
            model._base_manager.using(self._store.using).bulk_create(group)

    # -- the end --------------------------------------------------------------------------------------------

    def saved(self) -> None:
        """Call what was registered with `on_commit`. Switches: as they do."""
        if not self._callbacks:
            return
        if self._batch.alone:
            self._call_back()
            return
        before = current(self._store.using)
        connection, _ = self._store._pool.lend()  # it connects if a callback uses it
        try:
            self._call_back()
        finally:
            self._store._pool.give_back(connection, before)

    def _call_back(self) -> None:
        for callback in self._callbacks:
            try:
                callback()
            except Exception:
                _log.exception("an on_commit callback of the batch of key %r, which was saved, failed", self._key)

    def _leave(self, error: BaseException) -> None:
        try:
            if hasattr(self, "_transaction"):
                self._transaction.roll_back(error)
        finally:
            self._release()

    def _release(self) -> None:
        if not self._batch.alone:
            self._connection.__dict__.pop("on_commit", None)
            self._store._pool.give_back(self._connection, self._before)


class _Callback:
    """What an operation gave to `on_commit`, and how many had completed before it in that attempt."""

    def __init__(self, func: Callable[[], object], completed: int) -> None:
        self._func = func
        self.completed = completed

    def __call__(self) -> object:
        return self._func()


def _by_model(rows: Sequence[object]) -> list[Model]:
    """Those of one model together, the models in the order of their first row."""
    order: dict[type[Model], list[Model]] = {}
    for row in rows:
        if not isinstance(row, Model):
            raise TypeError(f"add_row was given {row!r}, but DjangoStore inserts unsaved model instances")
        order.setdefault(type(row), []).append(row)
    return [row for group in order.values() for row in group]
