"""The common part of a Django store's scopes: the model, the key, the query for rows, and the connections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from django.db.models import Model
from django.db.models.manager import BaseManager

from geventbatch._safe_repr import shown
from geventbatch.stores._missing import checked
from geventbatch.stores._sql.outcomes import OutcomeTable
from geventbatch.stores.django._fields import check_names, pk_fields, version_field
from geventbatch.stores.django._key import RowKey
from geventbatch.stores.django._model_save import check_save

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.models import Field, QuerySet

    from geventbatch.integrations.django.models import OutcomeModel
    from geventbatch.stores.django._compiled_load import CompiledLoad
    from geventbatch.stores.django._connections import Pool

M = TypeVar("M", bound=Model)


@dataclass(kw_only=True)
class ModelRows(Generic[M]):
    """The rows of one model, as the scopes of one store load and save them."""

    model: type[M]
    using: str
    row_key: RowKey
    key_fields: tuple[Field[Any, Any], ...]
    """Operations may not change these fields."""
    version_field: Field[Any, Any] | None
    missing: Literal["raise"] | Callable[[Any], M]
    manager: str | None
    may_lock: bool
    """True if the store's mode allows to lock the rows."""
    pipeline: bool
    pool: Pool
    tenant: Callable[[], Hashable] | None
    prepare_connection: Callable[[BaseDatabaseWrapper, Any], object] | None
    idempotency: type[OutcomeModel] | None
    idempotency_ttl: float
    name: str | None = None
    """The first part of the model's keys, in a store of several models."""
    has_xmin: bool = True  # mutable
    """True if rows have PostgreSQL's xmin. A view's rows have none, as the first load finds out."""

    compiled: CompiledLoad[M] | Literal[False] | None = None  # mutable
    """What loads a row that the load locks; False if the query may differ from row to row, None if it is unknown."""

    @property
    def place(self) -> str:
        """The name by which outcomes are recorded."""
        return f"{self.model._meta.db_table} by {self.row_key.attnames}"

    def key_of_row(self, key: Any) -> Any:
        """Return the row's own key: a batch's *key* without the tenant and the name. Switches: no."""
        key = key if self.tenant is None else key[1]
        return key if self.name is None else key[1]

    def key_with(self, key: Any, part: Any) -> Any:
        """Return the batch's *key* with *part* in place of the row's own key. Switches: no."""
        if self.name is not None:
            part = (self.name, part)
        return part if self.tenant is None else (key[0], part)

    def query(self) -> QuerySet[M]:
        """Return a query for all rows of the store, on the batch's connection. Switches: no."""
        manager: Any = self.model._base_manager if self.manager is None else getattr(self.model, self.manager)
        rows: QuerySet[M] = manager.using(self.using)
        return rows

    def locks(self, connection: BaseDatabaseWrapper) -> bool:
        """Return whether a load locks the row on *connection*. Switches: no."""
        return self.may_lock and bool(connection.features.has_select_for_update)

    def outcome_table(self, connection: BaseDatabaseWrapper) -> OutcomeTable:
        """Return the statements for the table of outcomes, if the store has one. Switches: no."""
        assert self.idempotency is not None  # noqa: S101 - else there are no outcomes
        name = connection.ops.quote_name(self.idempotency._meta.db_table)
        return OutcomeTable(name, connection.vendor, self.idempotency_ttl)


def by_name(model: Any, options: Mapping[str, Any]) -> Iterator[tuple[str | None, type[Model], dict[str, Any]]]:
    """Yield the name, the model and its own options, for each model of a store. Raises as `DjangoStore`."""
    if not isinstance(model, Mapping):
        yield None, model, dict(options)
        return
    if not model:
        raise ValueError("model has no model: name at least one")
    for option, given in options.items():
        unknown = [name for name in given if name not in model] if isinstance(given, Mapping) else []
        if unknown:
            raise ValueError(f"{option} names {shown(unknown[0])}, which is no name of a model of the store")
    for name, one in model.items():
        if not isinstance(name, str):
            raise TypeError(f"model has the name {shown(name)}, but must have strings")
        given = {option: value for option, value in options.items() if not isinstance(value, Mapping)}
        given |= {option: value[name] for option, value in options.items() if _names(value, name)}
        yield name, one, given


def _names(value: object, name: str) -> bool:
    return isinstance(value, Mapping) and name in value


def rows_of(  # noqa: PLR0913 - each is a keyword
    model: Any,
    name: str | None,
    shared: Mapping[str, Any],
    *,
    by: Any = "pk",
    version: Any = None,
    missing: Any = "raise",
    manager: Any = None,
) -> ModelRows[Any]:
    """Check the options of one model, as `DjangoStore` says, and return its rows. Switches: no."""
    if not isinstance(model, type) or not issubclass(model, Model) or model._meta.abstract:
        raise TypeError(f"model is {shown(model)}, but must be a concrete model class of Django")
    makes = checked(missing, rows=True)
    check_names(model)
    check_save(model, inserts=callable(missing))
    row_key = RowKey(model, by, shared["using"])
    return ModelRows(
        model=model,
        name=name,
        row_key=row_key,
        key_fields=tuple(dict.fromkeys([*pk_fields(model), *row_key.fields])),
        version_field=None if version is None else version_field(model, version),
        missing=makes,
        manager=None if manager is None else _manager(model, manager),
        **shared,
    )


def _manager(model: type[Model], name: str) -> str:
    found = getattr(model, name, None)
    if not isinstance(found, BaseManager):
        raise ValueError(  # noqa: TRY004 - the name is of the right type
            f"manager is {shown(name)}, but must name a manager of {model._meta.label}"
        )
    return name
