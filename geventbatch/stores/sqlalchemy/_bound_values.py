"""A column's values as its type binds them, so that no difference that the database sees counts as equal.

Python says that 1 == True, 2 == 2.0 and {"a": 1, "b": 2} == {"b": 2, "a": 1}, and SQLAlchemy omits equal values from an
UPDATE. It does not see at all what was changed in place.
"""

from __future__ import annotations

import json
import pickle
from copy import deepcopy
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import sqlalchemy as sa

from geventbatch._values.slots import slots_of
from geventbatch.stores.sqlalchemy._computed import UNHELD, of_all, of_row
from geventbatch.stores.sqlalchemy._loaded_values import by_attribute

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import Mapper

_SAME: Final = frozenset({type(None), bool, int, str, bytes, date, timedelta, UUID})
"""Immutable types of which two equal values of one type are the same for the database."""

_PLAIN: Final = (sa.Integer, sa.String, sa.Boolean, sa.Date, sa.Uuid, sa.Interval)
"""Column types whose equal values are equal for the database, and are immutable."""

_LOOSE: Final = (sa.Numeric, sa.DateTime, sa.Time)
"""Column types whose values are immutable, and may differ although they are equal: 1.0 and 1.00, -0.0, `fold`."""

_OF_LISTS: Final = (*_PLAIN, *_LOOSE, sa.JSON, sa.ARRAY, sa.LargeBinary)
"""Column types whose values contain no objects, but for lists and dicts."""

_DRIVERS: Final = frozenset({"psycopg", "psycopg2"})


class Columns:
    """The columns of a mapped class, by how their values can change."""

    def __init__(self, mapper: Mapper[Any], dialect: sa.Dialect) -> None:
        attributes = {attribute.key: attribute.columns[0] for attribute in mapper.column_attrs}
        self.named: dict[str, sa.Column[Any]] = {
            name: column for name, column in attributes.items() if isinstance(column, sa.Column)
        }
        """By attribute; only attributes that are plain columns."""
        self.composites: dict[str, tuple[str, ...]] = {
            composite.key: tuple(part.key for part in composite.props) for composite in mapper.composites
        }
        """The composite attributes, with the attributes of their columns."""
        self.dynamic = [name for name, relation in mapper.relationships.items() if relation.lazy in UNHELD]
        """The relationships whose changes SQLAlchemy keeps, but no collection."""
        manager = mapper.class_manager
        self.collections = tuple(manager._collection_impl_keys)  # noqa: SLF001 - nothing else tells them
        """The relationships that have a collection."""
        self.mapped = frozenset([*manager, manager.STATE_ATTR])
        """The names that an instance has because it is mapped."""
        self.slots = slots_of(mapper.class_)
        """The descriptors of the classes' ``__slots__``, whose values are in no dict."""
        self.of_row, self.of_all = of_row(mapper), of_all(mapper)
        """The attributes that the database computes; see `_computed`."""
        parts = {name for names in self.composites.values() for name in names}
        self.bound: dict[str, BoundColumn] = {name: BoundColumn(column, dialect) for name, column in self.named.items()}
        self.in_place: dict[str, BoundColumn] = {
            name: self.bound[name]
            for name, column in self.named.items()
            if not isinstance(column.type, (*_PLAIN, *_LOOSE)) or name in parts
        }
        """The columns whose values may change in place, or have an `==` of their own."""
        self.changing = (*self.in_place, *self.composites)
        """Those columns, and the composites."""
        self.of_objects = frozenset(
            name for name in self.changing if name not in self.named or not isinstance(self.named[name].type, _OF_LISTS)
        )
        """Those among them whose values may contain objects."""
        self.enums: dict[str, frozenset[str]] = {
            name: frozenset(column.type.enums)
            for name, column in self.named.items()
            if isinstance(column.type, sa.Enum) and not column.type.validate_strings
        }
        """The values of each Enum: if the database takes any text, a row with another one could not be loaded."""
        self.as_loaded = by_attribute(mapper, dialect)
        """The converters of assigned values to loaded ones."""
        self.loose: frozenset[str] = frozenset(
            name for name, column in self.named.items() if isinstance(column.type, _LOOSE) and name not in parts
        )
        """The columns whose values may be equal in Python, and differ in the database."""


class BoundColumn:
    """The values of one column, as its type binds them, made comparable."""

    def __init__(self, column: sa.Column[Any], dialect: sa.Dialect) -> None:
        kind: Any = column.type.dialect_impl(dialect)
        self._process: Callable[[Any], Any] | None = kind.bind_processor(dialect)
        self._dumps: Callable[[Any], str] = getattr(dialect, "_json_serializer", None) or json.dumps
        self._result: Callable[[], Callable[[Any], Any] | None] = partial(kind.result_processor, dialect, None)
        self._loads: Callable[[str], Any] = getattr(dialect, "_json_deserializer", None) or json.loads
        self._is_known_to_repeat = False

    def loaded(self, known: Any) -> Any:
        """Return what a load returns for the value whose `exact` form is *known*. Raises if that is uncertain."""
        if isinstance(known, str):  # JSON that the driver decodes by itself
            bound = self._loads(known)
        else:
            kind, bound = known
            if kind not in _SAME or self._process is None:
                raise LookupError(known)
        result = self._result()
        value = bound if result is None else result(bound)
        if self.exact(value) != known:
            raise LookupError(known)
        return value

    def exact(self, value: Any) -> Any:
        """Return a form that is equal for two values exactly if the database sees no difference.

        Raises what the type raises for a value that it cannot bind.
        """
        if type(value) in _SAME or self._process is None:
            return exact(value)
        if not self._is_known_to_repeat:
            self._look_whether_it_repeats(value)
        return exact(value) if self._process is None else self._bind(self._process, value)

    def differ(self, known: Any, value: Any) -> bool:
        """Return whether *value* differs from the one whose form is *known*; so does a value that cannot be bound."""
        try:
            return bool(self.exact(value) != known)
        except Exception:  # the flush raises it again, as the error of the operation that assigned it
            return True

    def copied(self, value: Any) -> Any:
        """Return a copy of *value*; *value* itself if a copy would differ for the database."""
        copy = deepcopy(value)
        return value if self.differ(self.exact(value), copy) else copy

    def _bind(self, process: Callable[[Any], Any], value: Any) -> Any:
        bound = process(value)
        if hasattr(bound, "obj") and hasattr(bound, "dumps"):  # psycopg's Json, encoded only when it is sent
            return (bound.dumps or self._dumps)(bound.obj)
        return exact(bound)

    def _look_whether_it_repeats(self, value: Any) -> None:
        """Compare unbound values if the type binds one value differently each time, as one that encrypts."""
        process = self._process
        if process is not None and self._bind(process, value) != self._bind(process, value):
            self._process = None
        self._is_known_to_repeat = True


def exact(value: Any) -> Any:
    """Return a form that is equal for two values exactly if they are the same, in type and in order.

    Raises what `pickle` raises for an object that is no container and cannot be pickled.
    """
    kind = type(value)
    if kind in _SAME:
        return (kind, value)
    if isinstance(value, (list, tuple)):
        return (list, tuple([exact(one) for one in value]))
    if isinstance(value, dict):
        return (dict, tuple([(exact(name), exact(one)) for name, one in value.items()]))
    if isinstance(value, (set, frozenset)):
        return (set, frozenset([exact(one) for one in value]))
    return _exact_object(kind, value)


def _exact_object(kind: type, value: Any) -> Any:
    if isinstance(value, (float, Decimal, complex)):
        return (kind, repr(value))
    if isinstance(value, (datetime, time)):
        return (kind, value.isoformat(), value.fold)
    if isinstance(value, Enum):
        return (kind, value.name)
    if isinstance(value, (bytearray, memoryview)):
        return (bytes, bytes(value))
    if kind.__module__.partition(".")[0] in _DRIVERS:  # their Binary
        for name in ("obj", "adapted"):
            if hasattr(value, name):
                return exact(getattr(value, name))
    return (kind, pickle.dumps(value))


def python_type(column: sa.ColumnElement[Any]) -> type | None:
    """Return the Python type of values of *column*; None if its type does not say."""
    try:
        return column.type.python_type
    except NotImplementedError:
        return None
