"""The row of one attempt: loads it, compares it with the loaded state, and writes it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from django.db import Error, router
from django.db.models import Model
from django.db.models.fields import NOT_PROVIDED
from django.db.models.signals import post_save, pre_save

from geventbatch._safe_repr import said, shown
from geventbatch.errors import Conflict, ResourceMissing, Undecided
from geventbatch.stores._sql import errors
from geventbatch.stores._sql.keys import row_key
from geventbatch.stores.django._as_loaded import check_assigned
from geventbatch.stores.django._changes import changed, columns, comparable, differ, same, state_of
from geventbatch.stores.django._compiled_load import compile_load
from geventbatch.stores.django._fields import pk_fields
from geventbatch.stores.django._generated import Generated, evaluate, generated_fields
from geventbatch.stores.django._instance_class import take_related
from geventbatch.stores.django._messages import Written
from geventbatch.stores.django._model_save import has_own_save, has_to_write, takes
from geventbatch.stores.django._query import is_of_others
from geventbatch.stores.django._selection import XMIN, Selection
from geventbatch.stores.django._statements import tables_of
from geventbatch.stores.django._tenants import prepare
from geventbatch.stores.django._transaction import send

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.models import Field, QuerySet

    from geventbatch.stores.django._model_rows import ModelRows
    from geventbatch.stores.django._transaction import Statement, Transaction

M = TypeVar("M", bound=Model)


class Row(Generic[M]):
    """The row that an attempt has loaded, and the model instance that stands for it."""

    # -- mutable state, from the load on --------------------------------------------------------------------
    instance: M
    loaded: dict[str, object]
    """The row's `state_of`; empty for a new row."""
    key: Any
    """The key as the row has it: under a collation, another spelling may have found it."""
    _xmin: str | None

    def __init__(
        self,
        rows: ModelRows[M],
        key: Any,
        connection: BaseDatabaseWrapper,
        transaction: Transaction,
        selection: Selection[M] | None = None,
    ) -> None:
        self._rows = rows
        self._key = key
        self._part = rows.key_of_row(key)
        self._connection = connection
        self._transaction = transaction
        self.new = False
        """True if there is no such row yet."""
        self.ours = False
        """True if this attempt has written the row: it is locked, not compared again, and its version is counted."""
        self.claimed = False
        """True if the row was locked after the load, and was unchanged then."""
        self.save_asked = False
        """True if an operation has called `save`."""
        self._generated: Generated | None = None  # most models have no generated columns
        self._selection = selection = selection or Selection(rows, connection)
        self.locks = selection.locks
        """True if the load locks the row."""
        self._has_xmin = selection.has_xmin
        self._compares_all = not self.locks and not self._has_xmin

    # -- load -----------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Load the row, or make a new one, and set `instance`. Switches: yes."""
        compiled = self._rows.compiled
        if compiled and self.locks and self._rows.prepare_connection is None and compiled.has(self._part):
            with self._transaction.loading():
                found = self._read(lambda: compiled.first(self._connection, self._part))
            self.take(found)
            return
        first, rows = self._selection.to_load(**self.where)
        if self._rows.prepare_connection is None:
            with self._transaction.loading(*first):
                found = self._first(rows)
            if compiled is None and self.locks and not first:
                compile_load(self._rows, rows, self._connection, self._part)
        else:
            self.prepare()
            for statement in first:
                send(self._connection, *statement)
            found = self._first(rows)
        self.take(found)

    @property
    def where(self) -> dict[str, Any]:
        """The arguments of ``filter`` that find the row."""
        return self._rows.row_key.where(self._part)

    def find(self) -> M | None:
        """Return the row as it is loaded; lock it if the load does. Switches: yes."""
        first, rows = self._selection.to_load(**self.where)
        for statement in first:
            send(self._connection, *statement)
        return self._first(rows)

    def take(self, found: M | None) -> None:
        """Take *found* as the loaded row, or make a new one, and set `instance`. Switches: as ``missing`` does."""
        if found is not None and not isinstance(found, self._rows.model):
            raise TypeError(
                f"the manager of {self._rows.model._meta.label} returned {shown(found)}, which is no row of it"
            )
        self.instance = self._make() if found is None else found
        self._xmin = vars(self.instance).pop(XMIN, None)
        self.loaded = {} if self.new else state_of(self.instance, self._connection)
        if not self.new and generated_fields(type(self.instance)):
            self.generated.note(self.instance, self.loaded)
        part = self._part if self.new else row_key(self._part, self._rows.row_key.of(self.instance))
        self.key = self._rows.key_with(self._key, part)

    def prepare(self) -> None:
        """Prepare the connection to find the key's tables, if the store has a function for it. Switches: yes."""
        hook = self._rows.prepare_connection
        if hook is None:
            return
        if not self._transaction.is_begun:  # rolled back since
            self._transaction.begin()
        with self._transaction.loading():
            pass
        prepare(self._connection, self._key, hook)

    def _first(self, rows: QuerySet[M]) -> M | None:
        return self._read(lambda: next(iter(rows[:1]), None))

    def _read(self, query: Callable[[], M | None]) -> M | None:
        try:
            return query()
        except Error:
            raise
        except Exception as error:  # raised by a field that converts the column's value
            raise ValueError(
                f"the {self._rows.model._meta.label} {shown(self._key)} cannot be read: {said(error)}"
            ) from error

    def _make(self) -> M:
        rows = self._rows
        label, name = rows.model._meta.label, rows.row_key.name
        if not callable(rows.missing):
            raise ResourceMissing(f"there is no {label} with {name} {shown(self._part)}", key=self._key)
        made = rows.missing(self._part)
        if not isinstance(made, rows.model):
            raise TypeError(f"missing returned {shown(made)} for key {shown(self._key)}, but must return a new {label}")
        if not rows.row_key.is_of(made, self._part):
            raise ValueError(
                f"missing returned a {label} whose {name} is {shown(rows.row_key.of(made))}, but must be the key, "
                f"{shown(self._key)}"
            )
        self.new = True
        made._state.db = rows.using  # the database for its related rows
        self._take_db_defaults(made)
        return made

    def _take_db_defaults(self, made: M) -> None:
        """Replace database defaults by their values, which the database computes: operations read no expression."""
        values = vars(made)
        fields = [field for field in made._meta.concrete_fields if _is_db_default(field, values.get(field.attname))]
        if fields:
            found = evaluate(self._connection, [(values[field.attname], field) for field in fields], {})
            for field, value in zip(fields, found, strict=True):
                setattr(made, field.attname, value)

    # -- what has changed -----------------------------------------------------------------------------------

    def changes(self) -> list[Field[Any, Any]]:
        """Return the fields to write. Switches: no.

        Raises:
            TypeError: An operation has assigned an expression.
            ValueError: An operation has assigned an unsaved instance.
        """
        take_related(self.instance)
        fields = changed(self.instance, self.loaded, self._connection)
        for field in fields:
            check_assigned(field, vars(self.instance).get(field.attname))
        return fields

    def differs(self) -> bool:
        """Return whether the database has another row, or none. Switches: no."""
        return self.new or bool(changed(self.instance, self.loaded, self._connection))

    def is_named_in(self, statement: str) -> bool:
        """Return whether *statement* names a table of the row's model. Switches: no."""
        return tables_of(self._rows.model).search(statement) is not None

    def misleads(self, query: str, params: Any) -> bool:
        """Return whether *query*, on the row's table, may read the row without its unsaved changes. Switches: no."""
        return self.differs() and not is_of_others(query, params, self.instance)

    def is_lost_with(self, deleted: Sequence[Hashable]) -> bool:  # noqa: ARG002 - `Rows` has several keys
        """Return whether its unsaved changes are lost if the keys in *deleted* are. Switches: no."""
        return self.differs()

    def refused(self, key: object) -> Undecided | None:
        """Return why the database has refused to compute a generated value, once, or None. Switches: no."""
        return None if self._generated is None else self._generated.refused(key)

    @property
    def generated(self) -> Generated:
        """The values of the generated columns."""
        if self._generated is None:
            self._generated = Generated(self._connection)
        return self._generated

    def check_key(self) -> None:
        """Raise `ValueError` if an operation has changed the key. Switches: no."""
        if self.new:
            if not self._rows.row_key.is_of(self.instance, self._part):
                raise ValueError(f"an operation changed {self._rows.row_key.name}, the key of the resource")
            return
        for field in self._rows.key_fields:
            before, value = self.loaded[field.attname], getattr(self.instance, field.attname)
            if value is not before and differ(before, comparable(field, value, self._connection)):
                what = "the primary key" if field in pk_fields(self._rows.model) else f"{field.name}, the key"
                raise ValueError(f"an operation changed {what} of the resource, from {shown(before)} to {shown(value)}")

    # -- write ----------------------------------------------------------------------------------------------

    def touch(self) -> bool:
        """Write the row, unchanged, if it is not locked and only something beside it was changed.

        Otherwise another process that has loaded the same row would not notice. (Where whole rows are compared,
        that process cannot notice.) Return whether the row was written. Switches: yes.
        """
        beside = list(columns(self._rows.model)[:1])
        if not self.locks and self._rows.version_field is not None:
            self.update([], commits=False)
        elif self._has_xmin and beside:
            self.update(beside, commits=False)
        else:
            self.verify()
            return False
        return True

    def update(self, fields: Sequence[Field[Any, Any]], *, commits: bool, recording: Sequence[Statement] = ()) -> None:
        """Write *fields*. Switches: yes.

        If the UPDATE `is_joined`, send it in one message with *recording*, the statements that record outcomes.
        If a signal or the model's own `save` may compute other columns, all are written, as by `save()`.
        """
        names = [field.name for field in self.counted(fields)]
        checks: list[Statement] = []
        if self.is_joined:
            checks = [*recording] if self.is_exclusive else [*recording, self._check()]
        else:
            commits = False
            self.verify()
        only: dict[str, Any] = {} if self.computes(type(self.instance)) else {"update_fields": names}
        with self._transaction.saving(*checks, commits=self._written if commits else None):
            self._save(has_to=bool(names), **only)

    def counted(self, fields: Sequence[Field[Any, Any]]) -> list[Field[Any, Any]]:
        """Return *fields* and the one that counts the saves, which is set by one more than loaded. Switches: no."""
        version = self._rows.version_field
        if version is None or self.ours:
            return [*fields]
        setattr(self.instance, version.attname, cast("int", self.loaded[version.attname]) + 1)
        return [*(field for field in fields if field is not version), version]

    def insert(self, *, commits: bool) -> None:
        """Insert the new row. Switches: yes."""
        self._transaction.take_write_lock()
        with self._transaction.saving(commits=self._written if commits and self.is_plain else None):
            self._save(has_to=True, force_insert=True)

    def _save(self, *, has_to: bool, **options: Any) -> None:
        model = type(self.instance)
        with has_to_write(model, self._connection) if has_to else nullcontext():
            model.save(self.instance, using=self._rows.using, **options)

    @property
    def _written(self) -> Written:
        return Written(self.instance._meta.db_table, 1)

    def remember_written(self) -> None:
        """Remember the instance as the row's written state, on which a later write builds. Switches: no."""
        self.new, self.ours, self.save_asked = False, True, False
        self.loaded = state_of(self.instance, self._connection)

    def delete(self) -> None:
        """Delete the row if it is unchanged since the load; the current operation's changes go with it. Switches: yes.

        Raises:
            RuntimeError: The model's own `delete` would use another database.
        """
        if self.new:
            return
        self.verify()
        instance, using = self.instance, self._rows.using
        model = type(instance)
        if takes(model.delete, "using"):
            model.delete(instance, using=using)
        elif router.db_for_write(model, instance=instance) == using:
            model.delete(instance)
        else:
            raise RuntimeError(
                f"{model.__name__}.delete() takes no using=…, and the routers send it elsewhere than to {shown(using)}"
            )

    @property
    def is_joined(self) -> bool:
        """Return whether an UPDATE can share a message with the statements before it."""
        if not self._transaction.pipelines or self._transaction.nested:
            return False
        return self.is_plain and (self.is_exclusive or not self._compares_all)

    @property
    def is_plain(self) -> bool:
        """Return whether saving is one statement, and calls no code of the user's that may send more."""
        meta = self.instance._meta
        return not (self.computes(type(self.instance)) or meta.parents or meta.select_on_save)

    @staticmethod
    def computes(model: type[Model]) -> bool:
        """Return whether saving calls code of the user's, which may write more columns than have changed."""
        return has_own_save(model) or pre_save.has_listeners(model) or post_save.has_listeners(model)

    # -- is it as it was loaded? ----------------------------------------------------------------------------

    def _rows_as_loaded(self) -> QuerySet[M]:
        """Return the query for the row if it is unchanged since the load, as far as the database can tell."""
        rows = self._selection.plain().filter(pk=self.instance.pk)
        version = self._rows.version_field
        if self.is_exclusive:
            return rows
        if self._has_xmin:
            rows = rows.extra(where=[f"{self._selection.xmins} = %s"], params=[self._xmin])  # noqa: S610 - as above
        if version is not None:
            rows = rows.filter(**{version.attname: self.loaded[version.attname]})
        return rows

    def _check(self) -> Statement:
        """Return a statement that fails, as does COMMIT behind it, unless the row is unchanged since the load."""
        rows = self._selection.ids(self._selection.locked(self._rows_as_loaded()))
        sql, params = rows.query.get_compiler(self._rows.using).as_sql()
        checked = f"CASE WHEN count(*) = 1 THEN 1 ELSE CAST('{errors.MARK} ' || count(*) AS integer) END"
        return f"SELECT {checked} FROM ({sql}) AS found", params  # noqa: S608 - a statement that Django has made

    def verify(self) -> None:
        """Lock the row and raise `Conflict` unless it is unchanged, if it was not locked all along. Switches: yes."""
        if self.is_exclusive or self.new:
            return
        self._transaction.take_write_lock()
        with self._transaction.saving():
            found = self._first(self._selection.locked(self._rows_as_loaded()))
        if found is None or (self._compares_all and not same(state_of(found, self._connection), self.loaded)):
            raise self.conflict()
        self.claimed = True

    @property
    def identity(self) -> tuple[object, ...]:
        """The values of the primary key, as `identity_of` returns them for the same row. It is not of a new row."""
        return tuple(self.loaded[field.attname] for field in pk_fields(self._rows.model))

    def claim(self, found: M | None, *, whole: bool) -> None:
        """Take note that *found* is the row, locked by now and loaded again with its ``xmin``. Switches: no.

        Raises:
            Conflict: It is not as it was loaded, as far as the database can tell; or, if *whole*, in no column.
        """
        version = self._rows.version_field
        if found is None:
            raise self.conflict()
        if self._has_xmin and vars(found).pop(XMIN, None) != self._xmin:
            raise self.conflict()
        if version is not None and getattr(found, version.attname) != self.loaded[version.attname]:
            raise self.conflict()
        if (whole or self._compares_all) and not same(state_of(found, self._connection), self.loaded):
            raise self.conflict()
        self.claimed = True

    @property
    def is_exclusive(self) -> bool:
        """Return whether no other transaction can have changed the row."""
        return self.locks or self.ours or self.claimed

    @property
    def model(self) -> type[M]:
        """The model of the row."""
        model: Any = self._rows.model
        return cast("type[M]", model)

    def now(self) -> dict[str, object]:
        """Return the row's `state_of` as the transaction sees it; empty if there is no row. Switches: yes."""
        found = self._first(self._selection.plain().filter(**self.where))
        return {} if found is None else state_of(found, self._connection)

    def is_there(self) -> bool:
        """Return whether there is a row at the key by now. Switches: yes."""
        rows = self._selection.plain().filter(**self.where)
        if self._connection.vendor == "mysql" and self._connection.in_atomic_block:  # else it reads its snapshot
            rows = self._selection.locked(rows)
        return rows.exists()

    def conflict(self) -> Conflict:
        """Return the `Conflict` for a row that has changed since the load. Switches: no."""
        return errors.changed(self._key)

    def is_conflict(self, error: Exception) -> bool:
        """Return whether *error* came from the statement of `_check`. Switches: no."""
        return errors.is_marked(error)


def identity_of(instance: Model, model: type[Model], connection: BaseDatabaseWrapper) -> tuple[object, ...]:
    """Return the values of the primary key of *instance*, in a form that can be hashed. Switches: no."""
    return tuple(comparable(field, getattr(instance, field.attname), connection) for field in pk_fields(model))


def _is_db_default(field: Field[Any, Any], value: object) -> bool:
    return hasattr(value, "resolve_expression") and getattr(field, "db_default", NOT_PROVIDED) is not NOT_PROVIDED
