"""Values of a model instance's columns in answers of operations: copied, since later operations may change them."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from django.core.files import File
from django.db.models import Field, JSONField, Model, QuerySet
from django.db.models.manager import BaseManager
from django.db.models.query import RawQuerySet

from geventbatch.stores._object_contents import is_in
from geventbatch.stores.django._changes import IMMUTABLE, columns, comparable, differ

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper


def lies_in(instance: Model, model: type[Model], value: object) -> bool:
    """Return whether *value* is the value of a column, or is inside one, however deep. Switches: no."""
    return _field_of(instance, model, value) is not None or _is_deep(instance, model, value)


def copied(instance: Model, model: type[Model], value: object, connection: BaseDatabaseWrapper) -> object:
    """Return a copy of *value* if it is or lies in a column's value and can be changed; else itself. Switches: no."""
    field = _field_of(instance, model, value)
    if field is None:
        return deepcopy(value) if _is_deep(instance, model, value) else value
    if isinstance(value, File):  # a copy would take the instance along
        return value
    copy = deepcopy(value)  # keep the original if the database would tell its copy apart
    return value if differ(comparable(field, value, connection), comparable(field, copy, connection)) else copy


def _field_of(instance: Model, model: type[Model], value: object) -> Field[Any, Any] | None:
    """Return the field whose column has *value*, or None."""
    values = vars(instance)
    if type(value) is memoryview:  # the driver's, which never changes
        return None
    return next((field for field in columns(model) if values.get(field.attname) is value), None)


def _is_deep(instance: Model, model: type[Model], value: object) -> bool:
    values = vars(instance)
    found = [values.get(name) for name in _of_objects(model)]
    return any(is_in(value, one) for one in found if type(one) not in IMMUTABLE and not isinstance(one, File | Model))


@cache
def _of_objects(model: type[Model]) -> tuple[str, ...]:
    """Return the columns whose values may contain other objects: a user's own fields, and documents with a decoder."""
    return tuple(field.attname for field in columns(model) if _has_objects(field))


def _has_objects(field: Field[Any, Any]) -> bool:
    kind: type = type(field)
    return not kind.__module__.startswith("django.") or (isinstance(field, JSONField) and field.decoder is not None)


def asks_later(value: object) -> bool:
    """Return whether *value* queries the database only when it is read: a manager, or an unevaluated query set."""
    if isinstance(value, QuerySet | RawQuerySet):
        return cast("Any", value)._result_cache is None
    return isinstance(value, BaseManager)
