"""Look-ups of a model's fields: the one that is the key, the one that counts the saves."""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from django.core.exceptions import FieldDoesNotExist
from django.db.models import (
    BinaryField,
    CharField,
    DateField,
    DateTimeField,
    DecimalField,
    Field,
    ForeignKey,
    IntegerField,
    TextField,
    UUIDField,
)

if TYPE_CHECKING:
    from django.db.models import Model


def key_field(model: type[Model], by: str) -> Field[Any, Any]:
    field = model._meta.pk if by == "pk" else _field(model, "by", by)
    if not field.unique:
        raise ValueError(f"by is {by!r}, but must name a unique field of {model._meta.label}, or be 'pk'")
    return field


def key_type(field: Field[Any, Any]) -> type | None:
    """The type of the values of *field*; None when it is none of the usual ones."""
    while isinstance(field, ForeignKey):
        field = field.target_field
    return next((kind for fields, kind in _KEY_TYPES.items() if isinstance(field, fields)), None)


_KEY_TYPES: Final[dict[type[Field[Any, Any]], type]] = {
    IntegerField: int,
    CharField: str,
    TextField: str,
    UUIDField: UUID,
    DecimalField: Decimal,
    BinaryField: bytes,
    DateTimeField: datetime,
    DateField: date,
}


def version_field(model: type[Model], version: str) -> Field[Any, Any]:
    field = _field(model, "version", version)
    if not isinstance(field, IntegerField):
        raise ValueError(  # noqa: TRY004 - the name is of the right type
            f"version is {version!r}, but must name an integer field of {model._meta.label}"
        )
    return field


def _field(model: type[Model], argument: str, name: str) -> Field[Any, Any]:
    try:
        field: object = model._meta.get_field(name)
    except FieldDoesNotExist:
        field = None
    if not isinstance(field, Field) or not field.concrete:
        raise ValueError(f"{argument} is {name!r}, which is no column of {model._meta.label}")
    return field
