"""The query that loads and locks a row, compiled once: Django builds and compiles it anew each time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from django.db import models
from django.db.models import Manager, Model
from django.db.models.lookups import Exact

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.models import Field, QuerySet

    from geventbatch.stores.django._model_rows import ModelRows

M = TypeVar("M", bound=Model)

_NUMBERS: Final = frozenset(
    {
        *(models.AutoField, models.BigAutoField, models.SmallAutoField),
        *(models.IntegerField, models.BigIntegerField, models.SmallIntegerField),
    }
)
_PLAIN: Final = frozenset({models.CharField, models.TextField, models.SlugField, models.UUIDField, *_NUMBERS})
"""Types of columns with nothing of their own in a query."""


class CompiledLoad(Generic[M]):
    """The query for the row with one value of one column, and what makes an instance of the row.

    Args:
        rows: The query for *value*.
    """

    def __init__(self, rows: QuerySet[M], field: Field[Any, Any], connection: BaseDatabaseWrapper, value: Any) -> None:
        compiler: Any = rows.query.get_compiler(connection=connection)
        self._sql, parameters = compiler.as_sql()
        self._field = field
        self._using = rows.db
        self._model = rows.model
        columns = [column for column, _, _ in compiler.select]
        self._names = [column.target.attname for column in columns]
        self._converters = list(compiler.get_converters(columns).items())
        is_number = type(field) in _NUMBERS
        self._range = connection.ops.integer_field_range(field.get_internal_type()) if is_number else (None, None)
        self.is_right: Final = list(parameters) == [self._parameter(value, connection)]
        """True if nothing but the value differs from row to row."""

    def has(self, value: Any) -> bool:
        """Return whether the column can have *value*: if not, Django knows it without a query. Switches: no."""
        least, most = self._range
        return (least is None or value >= least) and (most is None or value <= most)

    def first(self, connection: BaseDatabaseWrapper, value: Any) -> M | None:
        """Return the row, as the query's first one. Switches: yes."""
        with connection.cursor() as cursor:
            cursor.execute(self._sql, (self._parameter(value, connection),))
            found = cursor.fetchone()
        if found is None:
            return None
        values = list(found)
        for place, (converters, expression) in self._converters:
            for convert in converters:
                values[place] = convert(values[place], expression, connection)
        return self._model.from_db(self._using, self._names, values)

    def _parameter(self, value: Any, connection: BaseDatabaseWrapper) -> Any:
        prepared = self._field.get_prep_value(value)
        return self._field.get_db_prep_value(prepared, connection, prepared=True)


def compile_load(rows: ModelRows[M], query: QuerySet[M], connection: BaseDatabaseWrapper, value: Any) -> None:
    """Compile *query*, which has loaded the row with *value*, unless it may differ from row to row. Switches: no."""
    fields = rows.row_key.fields
    plain = (
        rows.manager is None
        and type(rows.model._base_manager) is Manager
        and not rows.model._meta.parents
        and len(fields) == 1
        and type(fields[0]) in _PLAIN
        and (fields[0].get_lookup("exact") or Exact).__module__ == Exact.__module__
    )
    made = CompiledLoad(query[:1], fields[0], connection, value) if plain else None
    rows.compiled = made if made is not None and made.is_right else False
