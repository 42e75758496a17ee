"""The key of a row: the fields that hold it, and their possible values."""

from __future__ import annotations

import sys
from contextlib import suppress
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from django.db import connections
from django.db.models import (
    BinaryField,
    CharField,
    DateField,
    DateTimeField,
    DecimalField,
    Field,
    IntegerField,
    Model,
    TextField,
    UUIDField,
)

from geventbatch._safe_repr import said, shown
from geventbatch.errors import ImpossibleKey
from geventbatch.stores._sql.keys import KeyColumn, normalize_all, shortened
from geventbatch.stores.django._fields import column, pk_fields, referenced

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

_TYPES: Final[dict[type[Field[Any, Any]], type]] = {
    IntegerField: int,
    CharField: str,
    TextField: str,
    UUIDField: UUID,
    DecimalField: Decimal,
    BinaryField: bytes,
    DateTimeField: datetime,
    DateField: date,
}

_LARGEST: Final = 2**63 - 1
_MOST_DIGITS: Final = 131_072


class RowKey:
    """The key fields of a store's rows."""

    def __init__(self, model: type[Model], by: str | Sequence[str], using: str) -> None:
        """See `DjangoStore`. Raises `ValueError` if *by* is not unique."""
        self.fields = _fields(model, by)
        self.name = ", ".join(field.name for field in self.fields)
        self.attnames = ", ".join(field.attname for field in self.fields)
        self._label = model._meta.label
        self._using = using

    @cached_property
    def _columns(self) -> list[KeyColumn]:
        return [_key_column(f"{self._label}.{field.name}", referenced(field), self._using) for field in self.fields]

    def where(self, key: Any) -> dict[str, Any]:
        """Return the arguments of ``filter`` that find the row at *key*. Switches: no."""
        if len(self.fields) == 1:
            return {self.fields[0].attname: key}
        return {field.attname: part for field, part in zip(self.fields, key, strict=True)}

    def of(self, instance: Model) -> Any:
        """Return the key of *instance*, with its values as they are. Switches: no."""
        if len(self.fields) == 1:
            return getattr(instance, self.fields[0].attname)
        return tuple(getattr(instance, field.attname) for field in self.fields)

    def is_of(self, instance: Model, key: Hashable) -> bool:
        """Return whether *instance* has the *key*. Switches: no."""
        try:
            return self.normalize(self.of(instance)) == key
        except (TypeError, ValueError):
            return False

    def normalize(self, key: Hashable) -> Hashable:
        """Return *key* in the types of its columns.

        Raises:
            TypeError: Its type cannot be such a key.
            ImpossibleKey: Its type can, and its value is none.
        Switches: no.
        """
        plain: Any = normalize_all(key, self._columns)
        if len(self.fields) == 1:
            return self._value(0, plain)
        return tuple(self._value(number, part) for number, part in enumerate(plain))

    def _value(self, number: int, part: Any) -> Hashable:
        """Return *part* as its field converts it: the values of a user's own field may be of any type."""
        name = self._columns[number].name
        try:
            value: Hashable = self.fields[number].to_python(part.value if isinstance(part, Enum) else part)
            hash(value)
        except Exception as error:
            told = f"{shortened(part)} is no key for the column {name}: {said(error)}"
            raise ImpossibleKey(told, key=part) from error
        if value is None:
            raise TypeError(f"{shortened(part)} is no key for the column {name}")
        return value


def _fields(model: type[Model], by: str | Sequence[str]) -> tuple[Field[Any, Any], ...]:
    if by == "pk":
        return tuple(pk_fields(model))
    if isinstance(by, str):
        field = column(model, "by", by)
        if not field.unique:
            raise ValueError(f"by is {shown(by)}, but must name a unique field of {model._meta.label}, or be 'pk'")
        return (field,)
    fields = tuple(column(model, "by", name) for name in by)
    if not any(set(unique) <= {field.name for field in fields} for unique in _unique_together(model)):
        raise ValueError(
            f"by is {shown(by)}, but {model._meta.label} has no constraint that these fields are unique together"
        )
    return fields


def _unique_together(model: type[Model]) -> list[Sequence[str]]:
    found: list[Sequence[str]] = [[field.name for field in pk_fields(model)]]
    for one in [model, *model._meta.get_parent_list()]:
        found += [constraint.fields for constraint in one._meta.total_unique_constraints]
        found += one._meta.unique_together
        found += [[field.name] for field in one._meta.local_concrete_fields if field.unique]
    return found


def _key_column(name: str, field: Field[Any, Any], using: str) -> KeyColumn:
    """Return the range of key values that *field* can hold in the database *using*."""
    connection = connections[using]
    kind = next((kind for fields, kind in _TYPES.items() if isinstance(field, fields)), None)
    known: Any = field
    if kind is str:
        longest = None if connection.vendor == "sqlite" else field.max_length  # SQLite ignores it
        takes_nul = connection.vendor != "postgresql"
        return KeyColumn(name, kind, longest=longest or sys.maxsize, takes_nul=takes_nul)
    if kind is Decimal:
        decimals = known.decimal_places or 0
        return KeyColumn(name, kind, digits=(known.max_digits or _MOST_DIGITS) - decimals, decimals=decimals)
    if kind is int:
        with suppress(KeyError):
            least, most = connection.ops.integer_field_range(field.get_internal_type())
            return KeyColumn(
                name, kind, least=-_LARGEST if least is None else least, most=_LARGEST if most is None else most
            )
    return KeyColumn(name, kind)
