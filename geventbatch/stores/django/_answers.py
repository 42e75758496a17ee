"""What lies in a column of a model instance, for the answers of operations: those behind may change it there."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from django.core.files import File
from django.db.models import Field, JSONField, Model, QuerySet
from django.db.models.manager import BaseManager
from django.db.models.query import RawQuerySet

from geventbatch.stores._object_contents import is_in
from geventbatch.stores.django._changes import IMMUTABLE, columns, differ, kept

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper


def lies_in(instance: Model, model: type[Model], value: object) -> bool:
    """Whether *value* is what a column has, or lies in that however deep. Switches: no."""
    return _field_of(instance, model, value) is not None or _is_deep(instance, model, value)


def copied(instance: Model, model: type[Model], value: object, connection: BaseDatabaseWrapper) -> object:
    """Give a copy of *value* where it lies in a column, and may be changed there; else itself. Switches: no."""
    field = _field_of(instance, model, value)
    if field is None:
        return deepcopy(value) if _is_deep(instance, model, value) else value
    if isinstance(value, File):  # which has the instance with it
        return value
    copy = deepcopy(value)  # or itself, where there is none that is the same for the database
    return value if differ(kept(field, value, connection), kept(field, copy, connection)) else copy


def _field_of(instance: Model, model: type[Model], value: object) -> Field[Any, Any] | None:
    """The column that has it."""
    values = vars(instance)
    if type(value) is memoryview:  # nobody changes what the driver gives
        return None
    return next((field for field in columns(model) if values.get(field.attname) is value), None)


def _is_deep(instance: Model, model: type[Model], value: object) -> bool:
    values = vars(instance)
    found = [values.get(name) for name in _of_objects(model)]
    return any(is_in(value, one) for one in found if type(one) not in IMMUTABLE and not isinstance(one, File | Model))


@cache
def _of_objects(model: type[Model]) -> tuple[str, ...]:
    """The columns in whose values there may be objects: of fields of one's own, and of documents with a decoder."""
    return tuple(field.attname for field in columns(model) if _has_objects(field))


def _has_objects(field: Field[Any, Any]) -> bool:
    kind: type = type(field)
    return not kind.__module__.startswith("django.") or (isinstance(field, JSONField) and field.decoder is not None)


def asks_later(value: object) -> bool:
    """Whether *value* asks the database only when it is read: a manager, or a query that has not been."""
    if isinstance(value, QuerySet | RawQuerySet):
        return cast("Any", value)._result_cache is None
    return isinstance(value, BaseManager)
