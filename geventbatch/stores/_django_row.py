"""The row of one attempt: loading it, seeing whether it is as it was loaded, and writing it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

from django.db import Error
from django.db.models import Field, Model
from django.db.models.signals import post_save, pre_save

from geventbatch.errors import Conflict, ResourceMissing
from geventbatch.stores._django_changes import changed, state_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.models import QuerySet

    from geventbatch.stores._django_transaction import Statement, Transaction
    from geventbatch.stores.django import DjangoStore

M = TypeVar("M", bound=Model)

_XMIN: Final = "geventbatch_xmin"
_CHANGED: Final = "geventbatch: the row has changed"


class Row(Generic[M]):
    """The row that an attempt has loaded, and the instance that stands for it."""

    # -- mutable state, from the load on --------------------------------------------------------------------
    instance: M
    loaded: dict[str, object]
    _xmin: str | None

    def __init__(
        self, store: DjangoStore[M], key: Any, connection: BaseDatabaseWrapper, transaction: Transaction
    ) -> None:
        self._store = store
        self._key = key
        self._connection = connection
        self._transaction = transaction
        self.new = False
        """There is no such row yet."""
        self.locks = store.locks(connection)
        """It is locked from the load on."""
        self._has_xmin = not self.locks and store.has_xmin(connection)

    # -- load -----------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Have the instance. Switches: yes."""
        rows = self._store.rows(self._key)
        if self.locks:
            rows = self._locked(rows)
        if self._has_xmin:
            rows = rows.extra(select={_XMIN: f"{self._table}.xmin::text"})  # noqa: S610 - a name that we quote
        with self._transaction.loading():
            found = self._first(rows)
        self.instance = self._make() if found is None else found
        self._xmin = vars(self.instance).pop(_XMIN, None)
        self.loaded = state_of(self.instance)

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
        self.new = True
        return made

    @property
    def _table(self) -> str:
        return self._connection.ops.quote_name(self._store.model._meta.db_table)

    # -- save -----------------------------------------------------------------------------------------------

    def changes(self) -> list[Field[Any, Any]]:
        """The fields to write. Switches: no."""
        fields = changed(self.instance, self.loaded)
        for field in fields:
            if hasattr(getattr(self.instance, field.attname), "resolve_expression"):
                raise TypeError(
                    f"an operation assigned an expression to {field.name}, which would be lost in the next one's: "
                    "assign a value"
                )
        return fields

    def touch(self) -> None:
        """Where nobody is kept out by a lock, have the row change too when only something beside it does.

        Else another process that has loaded the same would not notice. (It does not where the whole row is compared.)
        Switches: yes.
        """
        fields = self.instance._meta.concrete_fields
        beside = [one for one in fields if not one.primary_key and not getattr(one, "generated", False)][:1]
        if not self.locks and self._store.version_field is not None:
            self.update([], commits=False)
        elif self._has_xmin and beside:
            self.update(beside, commits=False)
        else:
            self.verify()

    def check_key(self) -> None:
        """Refuse to write another row than the one that was loaded. Switches: no."""
        before = self.loaded.get(self._store.model._meta.pk.attname)
        if not self.new and self.instance.pk != before:
            raise ValueError(
                f"an operation changed the primary key of the resource, from {before!r} to {self.instance.pk!r}"
            )

    def update(self, fields: Sequence[Field[Any, Any]], *, commits: bool, recording: Sequence[Statement] = ()) -> None:
        """Write *fields*, in one message with what is *recording* outcomes if it `is_joined`. Switches: yes."""
        names = [field.name for field in fields]
        version = self._store.version_field
        checks = []
        if self.is_joined:
            checks = [*recording, self._check()]
        else:
            commits = False
            self.verify()
        if version is not None:
            setattr(self.instance, version.attname, cast("int", self.loaded[version.attname]) + 1)
            names.append(version.name)
        with self._transaction.saving(*checks, commits=commits):
            type(self.instance).save(self.instance, using=self._store.using, update_fields=names)

    @property
    def is_joined(self) -> bool:
        """Whether an UPDATE is one message with what has to be sent before it."""
        return self._transaction.pipelines and not self._transaction.nested and self._is_plain

    @property
    def _is_plain(self) -> bool:
        """Whether saving is one statement, and calls nothing of the user's that could do more."""
        model = type(self.instance)
        own = model.save is not Model.save or model.save_base is not Model.save_base
        heard = pre_save.has_listeners(model) or post_save.has_listeners(model)
        return not (own or heard or model._meta.parents or model._meta.select_on_save)

    def _rows_as_loaded(self) -> QuerySet[M]:
        """The row, if it is as it was loaded as far as the database can tell."""
        rows = self._store.row_of(self.instance)
        version = self._store.version_field
        if self._has_xmin:
            return rows.extra(where=[f"{self._table}.xmin::text = %s"], params=[self._xmin])  # noqa: S610 - as above
        if version is not None and not self.locks:
            return rows.filter(**{version.attname: self.loaded[version.attname]})
        return rows

    def _check(self) -> tuple[str, Sequence[object]]:
        """A statement that fails unless the row is as it was loaded, so that a COMMIT behind it does not happen."""
        rows = self._locked(self._rows_as_loaded()).values_list("pk")
        sql, params = rows.query.get_compiler(self._store.using).as_sql()
        checked = f"CASE WHEN count(*) = 1 THEN 1 ELSE CAST('{_CHANGED} ' || count(*) AS integer) END"
        return f"SELECT {checked} FROM ({sql}) AS found", params  # noqa: S608 - a statement that Django has made

    def verify(self) -> None:
        """Lock the row and see whether it is as it was loaded, where it was not locked all the time. Switches: yes."""
        if self.locks or self.new:
            return
        self._transaction.take_write_lock()
        with self._transaction.saving():
            found = self._first(self._locked(self._rows_as_loaded()))
        by_row = self._store.version_field is None and not self._has_xmin
        if found is None or (by_row and state_of(found) != self.loaded):
            raise self.conflict()

    def conflict(self) -> Conflict:
        """What to raise when the row is not as it was loaded. Switches: no."""
        return Conflict(f"{self._key!r} was changed by somebody else since it was loaded; nothing was written")

    def insert(self, *, commits: bool) -> None:
        """Write the new row. Switches: yes."""
        self._transaction.take_write_lock()
        with self._transaction.saving(commits=commits and self._is_plain):
            type(self.instance).save(self.instance, using=self._store.using, force_insert=True)

    def is_conflict(self, error: Error) -> bool:
        """Whether *error* came from `_check`. Switches: no."""
        return _CHANGED in str(error)
