"""Queries for the rows of one model on a batch's connection: those to load, which are locked, and those as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from django.core.exceptions import EmptyResultSet
from django.db.models import Model, QuerySet

from geventbatch.stores.django._query import own_tables, reads_beside, whole_rows

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.models import Q

    from geventbatch.stores.django._model_rows import ModelRows
    from geventbatch.stores.django._transaction import Statement

M = TypeVar("M", bound=Model)

XMIN: Final = "geventbatch_xmin"
"""The attribute with the row's ``xmin``, of an instance from `with_xmin`."""


class Selection(Generic[M]):
    """Makes the queries."""

    def __init__(self, rows: ModelRows[M], connection: BaseDatabaseWrapper) -> None:
        """Query the database of *connection* for *rows*."""
        self._rows = rows
        self._connection = connection
        self.locks = rows.locks(connection)
        """True if the load locks the rows."""
        self.has_xmin = not self.locks and connection.vendor == "postgresql" and rows.has_xmin
        """True if the load reads ``xmin``, for a later comparison."""

    def to_load(self, *where: Q, **fields: Any) -> tuple[list[Statement], QuerySet[M]]:
        """Return the query for the rows that *where* and *fields* find, and statements to send before. Switches: no."""
        rows = whole_rows(self._rows.query())
        first: list[Statement] = []
        if self.locks:
            if reads_beside(rows):
                first = self._lock_first(*where, **fields)
            else:
                rows = self.locked(rows)
        return first, self.with_xmin(rows.filter(*where, **fields))

    def _lock_first(self, *where: Q, **fields: Any) -> list[Statement]:
        """Return the statement that locks the rows: behind it, the load reads nothing older than the lock."""
        rows = self.locked(self.plain().filter(*where, **fields))
        try:
            sql, params = self.ids(rows).query.get_compiler(self._rows.using).as_sql()
        except EmptyResultSet:  # Django knows without a statement that there is no such row
            return []
        return [(sql, params)]

    def plain(self) -> QuerySet[M]:
        """Return all rows, ignoring what the model's managers filter or join. Switches: no."""
        rows: QuerySet[M] = QuerySet(self._rows.model, using=self._rows.using)
        return rows.order_by() if self._rows.model._meta.ordering else rows

    def ids(self, rows: QuerySet[M]) -> Any:
        """Return the primary keys of *rows*; all columns of a model with several tables, so that each is locked."""
        return rows if self._rows.model._meta.parents else rows.values_list("pk")

    def locked(self, rows: QuerySet[M]) -> QuerySet[M]:
        """Lock as an UPDATE does, so that another transaction may insert a row that refers to this one.

        Otherwise two batches that each add a row referring to the other's would deadlock.
        """
        return rows.select_for_update(no_key=self._connection.features.has_select_for_no_key_update)

    def with_xmin(self, rows: QuerySet[M]) -> QuerySet[M]:
        """Read the ``xmin`` too, if the load `has_xmin`. Switches: no."""
        if self.has_xmin:
            rows = rows.extra(select={XMIN: self.xmins})  # noqa: S610 - names that we quote
        return rows

    @property
    def xmins(self) -> str:
        """Return the SQL of the row's ``xmin`` in each of its tables, by which PostgreSQL tells a changed row."""
        quoted = (self._connection.ops.quote_name(table) for table in own_tables(self._rows.model))
        return " || ',' || ".join(f"{table}.xmin::text" for table in quoted)
