"""What a batch has changed in a model instance: its columns' values now, against those that were loaded.

A value that nobody can change in place is kept as it is. Of any other (what a JSONField gives, say) an encoding is
kept: two that differ although their values are equal cost an UPDATE, and a change can never be missed.
"""

from __future__ import annotations

import pickle
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

if TYPE_CHECKING:
    from django.db.models import Field, Model

_IMMUTABLE: Final = frozenset(
    {bool, bytes, date, datetime, Decimal, float, int, str, time, timedelta, type(None), UUID},
)


def columns(model: type[Model]) -> list[Field[Any, Any]]:
    """The fields of *model* that a batch may write: not its key, not what the database computes."""
    return [
        field
        for field in model._meta.concrete_fields
        if not field.primary_key and not getattr(field, "generated", False)
    ]


def state_of(instance: Model) -> dict[str, object]:
    """The values of all columns, in a form that later changes of the instance do not reach."""
    values = instance.__dict__
    return {
        field.attname: _kept(field, values[field.attname])
        for field in instance._meta.concrete_fields
        if field.attname in values
    }


def changed(instance: Model, loaded: dict[str, object]) -> list[Field[Any, Any]]:
    """The fields whose columns have to be written: those with another value, and then those that follow the clock."""
    fields = columns(type(instance))
    found = [field for field in fields if _has_changed(field, instance, loaded)]
    return found and [field for field in fields if field in found or getattr(field, "auto_now", False)]


def _has_changed(field: Field[Any, Any], instance: Model, loaded: dict[str, object]) -> bool:
    values = instance.__dict__
    if field.attname not in values:
        return False
    if field.attname not in loaded:
        return True
    before, after = loaded[field.attname], _kept(field, values[field.attname])
    return type(before) is not type(after) or before != after


def _kept(field: Field[Any, Any], value: object) -> object:
    if type(value) in _IMMUTABLE:
        return value
    try:
        plain = field.get_prep_value(value)  # a FieldFile is its name
        return plain if type(plain) in _IMMUTABLE else pickle.dumps(plain)
    except Exception:
        return object()  # equal to nothing: such as a value that the field refuses, which saving will say
