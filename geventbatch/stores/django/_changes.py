"""Tells what a batch has changed in a model instance: its columns' values now, against the loaded ones.

Values are compared as the database would be sent them. An immutable value is kept as it is. Of any other value (a
JSONField's, say) an encoding is kept. So no change is ever missed; if equal values have two encodings, the price is one
UPDATE too many.
"""

from __future__ import annotations

import pickle
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import cache
from typing import TYPE_CHECKING, Any, Final, cast
from uuid import UUID

from django.core.files import File
from django.db.models import Field, FileField

from geventbatch.stores.django._fields import pk_fields

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.models import Model

IMMUTABLE: Final = frozenset(
    {bool, bytes, date, datetime, Decimal, float, int, str, time, timedelta, type(None), UUID},
)
_COARSE: Final = frozenset({datetime, Decimal, float, time})
"""Types whose equal values may differ: 0.0 and -0.0, 1.0 and 1.00, 12:00 in two zones."""
BUILT_IN: Final = frozenset({bytearray, dict, frozenset, list, set, tuple})


_NOTHING: Final = object()


class _Incomparable:
    """Stands for a value that cannot be compared: equal to nothing."""


@cache
def columns(model: type[Model]) -> tuple[Field[Any, Any], ...]:
    """Return the fields of *model* that a batch may write: neither its key nor what the database computes."""
    own = pk_fields(model)
    return tuple(
        field
        for field in model._meta.concrete_fields
        if field not in own and not field.primary_key and not getattr(field, "generated", False)
    )


@cache
def computed(model: type[Model]) -> tuple[Field[Any, Any], ...]:
    """Return the columns that every save computes anew: by the clock, or by a `pre_save` of their own."""
    return tuple(field for field in columns(model) if _computes(field))


def _computes(field: Field[Any, Any]) -> bool:
    own: Any = type(field).pre_save
    return bool(getattr(field, "auto_now", False)) or not str(own.__module__).startswith("django.db.models.fields")


def state_of(instance: Model, connection: BaseDatabaseWrapper) -> dict[str, object]:
    """Return the values of all columns, in a form that later changes of the instance do not reach.

    Raises:
        TypeError: A value cannot be compared with a later one.
    """
    values = instance.__dict__
    found = {}
    for field in instance._meta.concrete_fields:
        name = field.attname
        if name in values:
            value = values[name]
            form = found[name] = value if type(value) in IMMUTABLE else _comparable_form(field, value, connection)
            if isinstance(form, _Incomparable):
                raise TypeError(
                    f"changes of {field} cannot be noticed: its value is a {type(value).__name__}, for which "
                    "get_db_prep_save() returns something else each time, and which has no pickle"
                )
    return found


def same(state: dict[str, object], other: dict[str, object]) -> bool:
    """Return whether two states are equal."""
    return state.keys() == other.keys() and not any(map(differ, state.values(), map(other.__getitem__, state)))


def changed(instance: Model, loaded: dict[str, object], connection: BaseDatabaseWrapper) -> list[Field[Any, Any]]:
    """Return the fields to write: first the changed ones, then those that every save computes."""
    model, values = type(instance), instance.__dict__
    found = []
    for field in columns(model):
        name = field.attname
        if name in values:
            value = values[name]
            # The state of a mutable value is an encoding, so that it is never the value itself.
            if value is not loaded.get(name, _NOTHING) and has_changed(field, value, loaded, connection):
                found.append(field)
    return found and [*found, *(field for field in computed(model) if field not in found)]


def has_changed(
    field: Field[Any, Any], value: object, loaded: dict[str, object], connection: BaseDatabaseWrapper
) -> bool:
    """Return whether *value* differs from the loaded one."""
    if field.attname not in loaded:
        return True
    return differ(loaded[field.attname], comparable(field, value, connection))


def comparable(field: Field[Any, Any], value: object, connection: BaseDatabaseWrapper) -> object:
    """Return a form of *value* that is equal for values that the database would not tell apart."""
    return value if type(value) in IMMUTABLE else _comparable_form(field, value, connection)


def differ(one: object, other: object) -> bool:
    """Return whether two results of `comparable` stand for different values."""
    if one is other:
        return False
    kind = type(one)
    if kind is not type(other):
        return True
    if kind not in _COARSE or (isinstance(one, datetime) and _in_one_zone(one, cast("datetime", other))):
        return one != other
    return repr(one) != repr(other)


def _in_one_zone(one: datetime, other: datetime) -> bool:
    return one.tzinfo is other.tzinfo and one.fold == other.fold


def _comparable_form(field: Field[Any, Any], value: Any, connection: BaseDatabaseWrapper) -> object:
    if type(value) not in BUILT_IN:
        return _comparable_for_driver(field, value, connection)
    text = pickled(value)
    if text is not None:
        return text
    found = _comparable_for_driver(field, value, connection)
    return found if isinstance(found, _Incomparable) else (found,)  # in a tuple, so that bytes are always a pickle


def _comparable_for_driver(field: Field[Any, Any], value: Any, connection: BaseDatabaseWrapper) -> object:
    if isinstance(value, memoryview):
        return bytes(value)
    if isinstance(value, File) and not (isinstance(field, FileField) and getattr(value, "_committed", False)):
        return _Incomparable()  # the save stores it under a name not known yet
    try:
        bound, again = (_bound(field, value, connection) for _ in range(2))
    except Exception:
        return _Incomparable()  # the field refuses it, as the save will
    if not differ(bound, again):
        return bound
    found = pickled(value)  # encrypted with a new salt each time, say
    return _Incomparable() if found is None else found


def _bound(field: Field[Any, Any], value: Any, connection: BaseDatabaseWrapper) -> object:
    """Return the form of *value* that the driver gets."""
    found = field.get_db_prep_save(value, connection)
    if hasattr(found, "dumps") and hasattr(found, "obj"):  # psycopg's `Json`
        found = found.obj if found.dumps is None else found.dumps(found.obj)
    if type(found) in IMMUTABLE:
        return found
    text = pickled(found)
    return _Incomparable() if text is None else text


def pickled(value: object) -> bytes | None:
    """Return the pickle of *value*, or None if it has none. Switches: no."""
    try:
        return pickle.dumps(value)
    except Exception:
        return None
