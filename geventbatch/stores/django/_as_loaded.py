"""Makes the next operation find values as it would load them, had the previous operation been saved.

An operation may assign "12" to an IntegerField; a load after the save would return 12. So when an operation that has
assigned a value of another type has returned, the scope converts the value, or refuses it if the column does not take
it. In a JSON document, a tuple becomes a list, and a number as a name becomes a text. Generated columns are computed by
the database, once their sources have changed.
"""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import UTC, date, datetime, time, timedelta
from decimal import ROUND_HALF_UP, Context, Decimal, InvalidOperation
from functools import cache
from typing import TYPE_CHECKING, Any, Final, cast
from uuid import UUID

from django.conf import settings
from django.db.models import (
    BinaryField,
    BooleanField,
    CharField,
    DateField,
    DateTimeField,
    DecimalField,
    DurationField,
    Field,
    FilePathField,
    FloatField,
    GenericIPAddressField,
    IntegerField,
    JSONField,
    TextField,
    TimeField,
    UUIDField,
)
from django.db.models.query_utils import DeferredAttribute

from geventbatch._batch import batch_at_hand, current_batch
from geventbatch._safe_repr import shown
from geventbatch.stores.django._changes import columns
from geventbatch.stores.django._fields import referenced

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.models import Model

_TYPES: Final[tuple[tuple[type[Field[Any, Any]], type], ...]] = (
    (BinaryField, bytes),
    (BooleanField, bool),
    (CharField, str),
    (DateTimeField, datetime),  # first, since it is a DateField too
    (DateField, date),
    (DecimalField, Decimal),
    (DurationField, timedelta),
    (FilePathField, str),
    (FloatField, float),
    (GenericIPAddressField, str),
    (IntegerField, int),
    (TextField, str),
    (TimeField, time),
    (UUIDField, UUID),
)
_WHOLE: Final = frozenset({bool, bytes, date, float, int, time, timedelta, UUID})
"""Types of which a load returns any value as it is."""
_DIGITS_OF_SQLITE: Final = 15
_OF_FLOATS: Final = Context(prec=_DIGITS_OF_SQLITE)
"""The precision to which Django reads SQLite's numbers."""
_ATOMS: Final = frozenset({bool, float, int, str, type(None)})


def watched(model: type[Model]) -> dict[str, Any]:
    """Return attributes, by name, for a subclass of *model*: they notice values to convert. Switches: no."""
    found: dict[str, Any] = {}
    for field in model._meta.concrete_fields:
        standing = in_class(model, field.attname)
        if type(standing) is DeferredAttribute:  # else a user's descriptor, left alone
            if getattr(field, "generated", False):
                found[field.attname] = _Generated(field)
            elif _is_document(field):
                found[field.attname] = _Document(standing, field.attname)
    checks: dict[str, Callable[[Any], bool] | None] = {field.attname: None for field in model._meta.concrete_fields}
    checks |= {name: is_natural for name, field, is_natural in _converted(model) if not _is_document(field)}
    return {**found, "__setattr__": _setter(model, checks)}


def convert_values(instance: Model, model: type[Model], connection: BaseDatabaseWrapper) -> None:
    """Convert each value to what a load would return for it.

    Raises:
        Exception: The column does not take a value. The error is the one that saving would raise.
    Switches: no.
    """
    values = vars(instance)
    for name, field, is_natural in _converted(model):
        value = values.get(name)
        if value is not None and not is_natural(value):
            check_assigned(field, value)
            field.get_db_prep_save(value, connection)  # raises as saving would
            values[name] = _as_loaded(referenced(field), value, connection)


def check_assigned(field: Field[Any, Any], value: object) -> None:
    """Raise `TypeError` if *value* is an expression. Switches: no."""
    if hasattr(value, "resolve_expression"):
        raise TypeError(
            f"an operation assigned an expression to {field.name}, which the next operation's assignment would "
            "replace: assign a value"
        )


@cache
def documents(model: type[Model]) -> frozenset[str]:
    """Return the names of the columns of *model* whose values are changed in place. Switches: no."""
    return frozenset(field.attname for field in columns(model) if _is_document(field))


@cache
def _converted(model: type[Model]) -> tuple[tuple[str, Field[Any, Any], Callable[[Any], bool]], ...]:
    found: list[tuple[str, Field[Any, Any], Callable[[Any], bool]]] = []
    for field in columns(model):
        kind = natural(field)
        if kind is not None:
            found.append((field.attname, field, _returned_as_is(field, kind)))
        elif _is_document(field):
            found.append((field.attname, field, _is_plain_in(field)))
    return tuple(found)


# -- the types ------------------------------------------------------------------------------------------------


def natural(field: Field[Any, Any]) -> type | None:
    """Return the type that a load returns for *field*; None if it is a user's own, or one of several."""
    field = referenced(field)
    own = hasattr(field, "from_db_value") or not _is_djangos(field, "to_python", "get_prep_value", "get_db_prep_value")
    return None if own else next((kind for fields, kind in _TYPES if isinstance(field, fields)), None)


def _is_djangos(field: Field[Any, Any], *methods: str) -> bool:
    return all(getattr(type(field), method).__module__.startswith("django.") for method in methods)


def _is_document(field: Any) -> bool:
    """Return whether the values are changed in place: a JSON document, or an array or hstore of PostgreSQL's."""
    if _is_hstore(field):
        return True
    if type(field).__module__ == "django.contrib.postgres.fields.array":
        return natural(field.base_field) is not None or _is_document(field.base_field)
    return isinstance(field, JSONField) and _is_djangos(field, "from_db_value", "get_prep_value", "get_db_prep_value")


def _is_hstore(field: Any) -> bool:
    return type(field).__module__ == "django.contrib.postgres.fields.hstore"


def _returned_as_is(field: Field[Any, Any], kind: type) -> Callable[[Any], bool]:
    """Return a function that tells whether a load would return a value as it is."""
    if kind is Decimal:
        return _is_number_of(cast("Any", referenced(field)))
    if kind is datetime:
        zone = UTC if settings.USE_TZ else None
        return lambda value: type(value) is datetime and value.tzinfo is zone
    if isinstance(referenced(field), GenericIPAddressField):  # IPv6 addresses are normalised
        return lambda value: type(value) is str and ":" not in value
    if kind is str:
        return lambda value: type(value) is str and (value.isascii() or _has_utf8(value))
    return lambda value: type(value) is kind


def _is_number_of(field: Any) -> Callable[[Any], bool]:
    """Return the function for a decimal number."""
    places = field.decimal_places
    if places is None:
        return lambda value: type(value) is Decimal
    exponent, digits = -places, min(field.max_digits or _DIGITS_OF_SQLITE, _DIGITS_OF_SQLITE)

    def is_natural(value: Any) -> bool:
        if type(value) is not Decimal:
            return False
        sign, known, found = value.as_tuple()
        return found == exponent and len(known) <= digits and (not sign or bool(value))

    return is_natural


def _has_utf8(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_plain_in(field: Any) -> Callable[[Any], bool]:
    if isinstance(field, JSONField):
        return _is_plain
    if _is_hstore(field):
        return _has_texts
    base = field.base_field
    kind = natural(base)
    of_each = _is_plain_in(base) if kind is None else _returned_as_is(base, kind)
    return lambda value: type(value) is list and all(one is None or of_each(one) for one in value)


def _is_plain(value: Any) -> bool:
    """Return whether a document comes back from its JSON as it is."""
    kind = type(value)
    if kind in _ATOMS:
        return True
    if kind is list:
        return all(map(_is_plain, value))
    return kind is dict and all(type(name) is str and _is_plain(part) for name, part in value.items())


def _has_texts(value: Any) -> bool:
    """Return whether an hstore comes back as it is."""
    if type(value) is not dict:
        return False
    return all(type(name) is str and (part is None or type(part) is str) for name, part in value.items())


# -- what a load would return -----------------------------------------------------------------------------------


def _as_loaded(field: Any, value: Any, connection: BaseDatabaseWrapper) -> Any:
    if value is None:
        return None
    if hasattr(field, "base_field"):
        return [_as_loaded(field.base_field, one, connection) for one in value]
    if isinstance(field, JSONField):
        return json.loads(json.dumps(value, cls=field.encoder), cls=field.decoder)
    if _is_hstore(field) or isinstance(field, GenericIPAddressField):
        return field.get_prep_value(value)
    with suppress(Exception):  # else the database decides
        value = _bytes(value) if isinstance(field, BinaryField) else field.to_python(field.get_prep_value(value))
    return _plain_value(field, value, connection)


def _bytes(value: Any) -> Any:
    """Convert a buffer to bytes, as the driver does. Leave a text, at which the save raises."""
    return bytes(value) if isinstance(value, bytearray | memoryview) else value


def _plain_value(field: Any, value: Any, connection: BaseDatabaseWrapper) -> Any:
    if isinstance(value, str):
        value.encode()  # raises at half a surrogate pair, as the driver would
        return str.__str__(value)
    if isinstance(field, DecimalField):
        return _quantized(value, field, connection)
    if isinstance(value, datetime):
        return value.astimezone(UTC) if settings.USE_TZ and value.tzinfo is not None else value
    return int(value) if isinstance(field, IntegerField) else value


def _quantized(value: Any, field: Any, connection: BaseDatabaseWrapper) -> Any:
    """Round to the places of the column, as the database does; Django rounds SQLite's numbers."""
    if field.decimal_places is None or not value.is_finite():
        return value  # the save raises
    places = Decimal(1).scaleb(-field.decimal_places)
    if connection.vendor == "sqlite":
        return _read_back(value, field, places)
    if value.adjusted() >= field.max_digits:
        return value
    found = value.quantize(places, rounding=ROUND_HALF_UP, context=None)
    return found or abs(found)  # without the sign of a zero, which the database drops


def _read_back(value: Decimal, field: Any, places: Decimal) -> Decimal:
    """Convert as Django converts SQLite's float, which holds any number."""
    found = _OF_FLOATS.create_decimal_from_float(float(value) or 0.0)
    try:
        return found.quantize(places, context=field.context)
    except InvalidOperation:
        raise ValueError(
            f"{shown(value)} of {field.name} has more digits than its column, which has {field.max_digits}: it "
            "could not be read back"
        ) from None


# -- looking at operations --------------------------------------------------------------------------------------


def in_class(model: type[Model], name: str) -> Any:
    """Return the attribute *name* of *model*, or of its nearest parent, without calling a descriptor."""
    return next((vars(parent)[name] for parent in model.__mro__ if name in vars(parent)), None)


def _setter(model: type[Model], checks: dict[str, Callable[[Any], bool] | None]) -> Any:
    """Return a `__setattr__` that has the scope look at values that no load would return."""
    parent: Any = model.__setattr__
    kinds = {field.attname: kind for field in columns(model) if (kind := natural(field)) in _WHOLE}

    def set_attribute(self: Model, name: str, value: Any) -> None:
        parent(self, name, value)
        if type(value) is kinds.get(name):
            return
        is_natural = checks.get(name, _is_of_no_column)
        if is_natural is not None and value is not None and not is_natural(value):
            ask_scope()

    return set_attribute


def _is_of_no_column(value: object) -> bool:  # noqa: ARG001 - as the others
    """Return False: no load returns this attribute."""
    return False


class _Document:
    """Replaces the descriptor of a document's field: an operation that has read the document may change it."""

    def __init__(self, standing: Any, name: str) -> None:
        self._standing = standing
        self._name = name

    def __get__(self, instance: Model | None, owner: type[Model]) -> Any:
        values: Any = None if instance is None else vars(instance)
        if values is None or self._name not in values:
            return self._standing.__get__(instance, owner)
        ask_scope()
        return values[self._name]

    def __set__(self, instance: Model, value: Any) -> None:
        ask_scope()
        vars(instance)[self._name] = value

    def __delete__(self, instance: Model) -> None:
        del vars(instance)[self._name]


class _Generated:
    """Replaces the descriptor of a generated field."""

    def __init__(self, field: Field[Any, Any]) -> None:
        self._field = field

    def __get__(self, instance: Model | None, owner: type[Model]) -> Any:
        if instance is None:
            return self
        return scope_at_hand().generated(instance, self._field)

    def __set__(self, instance: Model, value: Any) -> None:
        vars(instance)[self._field.attname] = value

    def __delete__(self, instance: Model) -> None:
        vars(instance).pop(self._field.attname, None)


def scope_at_hand() -> Any:
    """Return the scope of the batch at hand; of an unbatched operation across keys, its scope of many. Switches: no."""
    scope: Any = batch_at_hand().scope
    return getattr(scope, "of_many", scope)


def ask_scope() -> None:
    """Ask the scope to look at the current operation when it has returned. Switches: no."""
    try:
        batch = current_batch()
    except RuntimeError:  # in a greenlet that the operation has started
        return
    batch.ask_scope()
