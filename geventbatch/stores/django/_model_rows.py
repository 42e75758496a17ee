"""The common part of a Django store's scopes: the model, the key, the query for rows, and the connections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from django.db.models import Model

from geventbatch.stores._sql.outcomes import OutcomeTable

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.models import Field, QuerySet

    from geventbatch.integrations.django.models import OutcomeModel
    from geventbatch.stores.django._connections import Pool
    from geventbatch.stores.django._key import RowKey

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
    has_xmin: bool = True  # mutable
    """True if rows have PostgreSQL's xmin. A view's rows have none, as the first load finds out."""

    def key_of_row(self, key: Any) -> Any:
        """Return the row's own key: a batch's *key* without the tenant. Switches: no."""
        return key if self.tenant is None else key[1]

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
