"""Many rows of a model written by one UPDATE, with PostgreSQL's VALUES.

Each value is what `save` would send: of the field's own `pre_save` and `get_db_prep_save`. Not every row can be written
so: a model's own `save`, listeners, parents and fields of a user's own need a statement for each row.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from django.db import DatabaseError
from django.db.models import Manager

from geventbatch.stores.django._changes import IMMUTABLE
from geventbatch.stores.django._fields import pk_fields, referenced
from geventbatch.stores.django._messages import Written

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping, Sequence

    from django.db.models import Field

    from geventbatch.stores.django._row import Row
    from geventbatch.stores.django._transaction import Transaction

_AT_ONCE: Final = 1000
"""Rows of one statement."""

_TEXTS: Final = frozenset(
    {"CharField", "EmailField", "FileField", "FilePathField", "SlugField", "TextField", "URLField"}
)
_TYPES: Final = {
    "AutoField": "integer",
    "BigAutoField": "bigint",
    "BigIntegerField": "bigint",
    "BooleanField": "boolean",
    "DateField": "date",
    "DateTimeField": "timestamptz",
    "DecimalField": "numeric",
    "DurationField": "interval",
    "FloatField": "double precision",
    "IntegerField": "integer",
    "JSONField": "jsonb",
    "PositiveBigIntegerField": "bigint",
    "PositiveIntegerField": "integer",
    "PositiveSmallIntegerField": "smallint",
    "SmallAutoField": "smallint",
    "SmallIntegerField": "smallint",
    "TimeField": "time",
    "UUIDField": "uuid",
    **dict.fromkeys(_TEXTS, "text"),  # without a length: a cast would cut off what the column refuses
}
"""By a field's internal type: the type in VALUES, from which PostgreSQL converts to the column's by assignment."""

_WHOLE: Final = frozenset({"integer", "bigint", "smallint"})

Planned = tuple[Any, tuple["Field[Any, Any]", ...], list[Any]]
"""A model; the fields to write; the values of the primary key and of these."""


class BulkUpdate:
    """The rows of one save that are written together."""

    def __init__(self, transaction: Transaction) -> None:
        self._transaction = transaction
        self._connection = transaction.connection
        # -- mutable state ---------------------------------------------------------------------------------
        # By model and the names of its columns, since Django's fields have a slow hash: the fields, and the values.
        self._groups: dict[tuple[Any, ...], tuple[tuple[Field[Any, Any], ...], list[list[Any]]]] = {}
        self._kinds: dict[Any, Mapping[str, Kind]] = {}  # by model: its columns; empty if it has no plain save

    def plan(self, row: Row[Any], fields: Sequence[Field[Any, Any]]) -> Planned | None:
        """Return how *fields* of *row* are written together with other rows, or None if they cannot be. Switches: no.

        Raises:
            Exception: A field refuses its value, as in `save`.
        """
        instance: Any = row.instance
        model: Any = type(instance)
        kinds = self._kinds.get(model)
        if kinds is None:
            can = self._connection.vendor == "postgresql" and row.is_plain and _is_writable(model)
            kinds = self._kinds[model] = kinds_of(model) if can else {}
        written = row.counted(fields)
        if not all(field.attname in kinds for field in written):
            return None
        values = [field.pre_save(instance, add=False) for field in written]
        if any(type(value) not in IMMUTABLE and hasattr(value, "resolve_expression") for value in values):
            return None
        prepared = [pk_fields(model)[0].get_db_prep_value(instance.pk, self._connection)]
        for field, value in zip(written, values, strict=True):
            sent_as_is = type(value) is kinds[field.attname].sent_as_is
            prepared.append(value if sent_as_is else field.get_db_prep_save(value, self._connection))
        return model, tuple(written), prepared

    def add(self, planned: Iterable[Planned]) -> None:
        """Write what was *planned*. Switches: no."""
        for model, fields, values in planned:
            group = (model, *[field.attname for field in fields])
            found = self._groups.get(group)
            if found is None:
                found = self._groups[group] = fields, []
            found[1].append(values)

    def send(self, *, commits: bool) -> None:
        """Send the statements, the last one with COMMIT if it *commits*. Switches: yes.

        Raises:
            DatabaseError: The database has left out a row.
        """
        statements = [
            (group[0], fields, rows[first : first + _AT_ONCE])
            for group, (fields, rows) in self._groups.items()
            for first in range(0, len(rows), _AT_ONCE)
        ]
        for number, (model, fields, rows) in enumerate(statements, 1):
            table, count = model._meta.db_table, len(rows)
            with (
                self._transaction.saving(
                    commits=Written(table, count) if commits and number == len(statements) else None
                ),
                self._connection.cursor() as cursor,
            ):
                cursor.execute(self._statement(model, fields, count), [value for row in rows for value in row])
                if not self._transaction.committed and cursor.rowcount != count:
                    raise DatabaseError("the database has left out a row: by a trigger, a rule or a policy")

    def _statement(self, model: Any, fields: tuple[Field[Any, Any], ...], count: int) -> str:
        quoted = self._connection.ops.quote_name
        table, key = quoted(model._meta.db_table), pk_fields(model)[0]
        kinds = kinds_of(model)
        types = ", ".join([f"CAST(%s AS {kinds[field.attname].type})" for field in (key, *fields)])
        marks = ", ".join(["%s"] * (len(fields) + 1))
        values = ", ".join([f"({types})", *[f"({marks})"] * (count - 1)])
        names = [f"c{number}" for number in range(len(fields))]
        sets = ", ".join(f"{quoted(str(field.column))} = v.{name}" for field, name in zip(fields, names, strict=True))
        return (
            f"UPDATE {table} SET {sets} FROM (VALUES {values}) AS v (k, {', '.join(names)}) "  # noqa: S608 - our names
            f"WHERE {table}.{quoted(str(key.column))} = v.k"
        )


@cache
def _is_writable(model: Hashable) -> bool:
    """Return whether an UPDATE of all rows at their primary keys is what `save` sends for each."""
    found: Any = model
    manager: Any = found._base_manager
    keys = pk_fields(found)
    return type(manager) is Manager and len(keys) == 1 and keys[0].attname in kinds_of(found)


class Kind(NamedTuple):
    """How a column is written in VALUES."""

    type: str
    sent_as_is: Any
    """Values of this very class are sent as they are; None: those of none."""


@cache
def kinds_of(model: Any) -> Mapping[str, Kind]:
    """Return, by the name of its attribute, each column of *model* whose type in VALUES is known."""
    return {field.attname: kind for field in model._meta.concrete_fields if (kind := _kind_of(field)) is not None}


def _kind_of(field: Any) -> Kind | None:
    found = referenced(field)
    if not type(found).__module__.startswith("django.db.models.") or hasattr(field, "get_placeholder"):
        return None
    name = found.get_internal_type()
    sent_as_is = int if found is field and _TYPES.get(name) in _WHOLE else None
    return Kind(_TYPES[name], sent_as_is) if name in _TYPES else None
