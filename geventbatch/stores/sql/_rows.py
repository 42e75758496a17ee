"""Rows as resources, and the values of a resource as parameters: what has changed in it, and whether that is saved."""

from __future__ import annotations

import dataclasses
from copy import deepcopy
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any, Final

from geventbatch._safe_repr import named, shown
from geventbatch.stores._object_contents import ATOMS

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping, Sequence

    from geventbatch.stores.sql._statements import Statement

_EXACT: Final = frozenset({int, str, bytes, bool, type(None)})
"""Types whose equal values are the same for a database. (Decimals may differ in digits, moments in their zone.)"""


class Row:
    """A row with its columns as attributes, and no others: what operations get unless the option ``row`` says more."""

    __slots__: tuple[str, ...] = ()
    __hash__ = None  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType] - it changes

    def __repr__(self) -> str:
        """Tell all values."""
        return f"Row({', '.join(f'{name}={shown(getattr(self, name))}' for name in self.__slots__)})"

    def __eq__(self, other: object) -> bool:
        """Compare all values."""
        if not isinstance(other, Row) or self.__slots__ != other.__slots__:
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__slots__)


class Unsaved(ValueError):
    """An operation has changed what no statement of the store writes."""


class Rows:
    """How the rows of one store become resources."""

    def __init__(
        self, kind: Any, saved: Iterable[str], inserted: Iterable[str], keys: Sequence[str], column: str
    ) -> None:
        """Make resources of *kind*: None for a `Row`. Statements write *saved* or *inserted* values, apart from *keys*.

        *column* is the name of the key's column.
        """
        self._kind = kind
        self._is_dict = kind is dict
        self._keys: Final = frozenset(keys)
        self._saved: Final = frozenset(saved) - self._keys
        self.written: Final = self._saved.union(inserted) - self._keys
        self._kept: Final = self._keys.union([column]) - self.written
        # -- mutable state ---------------------------------------------------------------------------------
        self._forms: dict[tuple[str, ...], Form] = {}  # by the columns

    def form(self, columns: tuple[str, ...]) -> Form:
        """Return the form of rows with these *columns*."""
        found = self._forms.get(columns)
        if found is None:
            found = self._forms[columns] = Form(self._maker(columns), columns)
        return found

    def _maker(self, columns: tuple[str, ...]) -> Callable[[Sequence[Any]], Any]:
        twice = sorted({name for name in columns if columns.count(name) > 1})
        if twice:
            raise ValueError(f"load selects {', '.join(twice)} twice: give each column a name of its own, by AS")
        if self._is_dict:
            return lambda values: dict(zip(columns, values, strict=True))
        if self._kind is not None:
            kind = self._kind
            return lambda values: kind(**dict(zip(columns, values, strict=True)))
        odd = [name for name in columns if not name.isidentifier() or name.startswith("__")]
        if odd:
            raise ValueError(
                f"load selects {shown(odd[0])}, which is no name of an attribute: give it one by AS, or pass row=dict"
            )
        absent = sorted(self._saved.difference(columns))
        if absent:
            raise ValueError(
                f"save has the parameter %({absent[0]})s, but load selects no {absent[0]}: it selects "
                f"{', '.join(columns)}"
            )
        return _row_maker(columns)

    def watched(self, resource: Any, form: Form, values: Sequence[Any]) -> Watched:
        """Return what to compare of *resource*, of a row of that *form* with these *values*, as it is now."""
        if self._kind is None:  # a Row has the values of its columns, and nothing else
            return Watched(form.columns, form.get, values, is_dict=False)
        own = () if self._is_dict else tuple(own_names(resource))
        found = form.compared.get((type(resource), own))
        if found is None:
            found = form.compared[type(resource), own] = self._compared(resource, form.columns, own)
        names, get = found
        return Watched(names, get, unshared(get(resource)), is_dict=self._is_dict)

    def _compared(
        self, resource: Any, columns: Sequence[str], own: Sequence[str]
    ) -> tuple[tuple[str, ...], Callable[[Any], Sequence[Any]]]:
        """Return the names of what to compare, and what reads them."""
        names = [*columns, *sorted(self.written.difference(columns))]
        if self._is_dict:
            names = [name for name in names if name in resource]
            return tuple(names), _getter(itemgetter, names)
        names += [name for name in own if name not in names]
        names = [name for name in names if hasattr(resource, name)]
        return tuple(names), _getter(attrgetter, names)

    def check_saved(self, changed: Iterable[str], columns: Container[str]) -> None:
        """Raise unless a statement writes all that has *changed* of a row with these *columns*."""
        for name in changed:
            if name in self._kept:
                raise Unsaved(f"{name} was changed, which is a part of the key: a row keeps its key")
            if name not in self.written:
                mend = (
                    f"add {name} = %({name})s to save"
                    if name in columns
                    else "load selects no column of this name; what is not to be saved begins with _"
                )
                raise Unsaved(f"{name} was changed, but save does not write it: {mend}")

    def parameters(self, resource: Any, statement: Statement, key: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of *resource* that *statement* takes, with those of its *key*. Raises `Unsaved`."""
        found = dict(key)
        for name in statement.names:
            if name not in found:
                try:
                    found[name] = resource[name] if self._is_dict else getattr(resource, name)
                except (KeyError, AttributeError) as error:
                    there = ", ".join(map(str, resource if self._is_dict else own_names(resource)))
                    raise Unsaved(
                        f"{statement.option} has the parameter %({name})s, but the {type(resource).__name__} has no "
                        f"{name}: it has {there}"
                    ) from error
        return found


class Form:
    """Makes resources of rows with the same columns."""

    def __init__(self, make: Callable[[Sequence[Any]], Any], columns: tuple[str, ...]) -> None:
        self.make = make
        self.columns = columns
        self.get = _getter(attrgetter, columns)
        """Reads the values of a `Row`."""
        # -- mutable state ---------------------------------------------------------------------------------
        self.compared: dict[tuple[type, Sequence[str]], tuple[tuple[str, ...], Callable[[Any], Sequence[Any]]]] = {}
        """By the type of a resource, and the names of attributes that it has by itself: what to compare of it."""


class Watched:
    """The values of a resource at one moment, to find out what operations have changed since."""

    __slots__ = ("_get", "_is_dict", "_names", "_values")

    def __init__(
        self, names: tuple[str, ...], get: Callable[[Any], Sequence[Any]], values: Sequence[Any], *, is_dict: bool
    ) -> None:
        self._names = names
        self._get = get
        self._is_dict = is_dict
        self._values = values

    def changed(self, resource: Any) -> list[str]:
        """Return the names of what has changed in *resource*; a name that begins with ``_`` is its own affair."""
        try:
            now = self._get(resource)
        except (KeyError, AttributeError) as error:
            raise Unsaved(f"the {type(resource).__name__} has lost {error}, which its row has") from error
        found = []
        for name, old, new in zip(self._names, self._values, now, strict=True):
            if not _is_same(old, new):
                found.append(name)
        more = resource if self._is_dict else own_names(resource)
        if more and (len(more) > len(self._names) or not self._is_dict):
            found += [name for name in more if name not in self._names]
        return found


def own_names(resource: Any) -> Sequence[str]:
    """Return the names of public attributes that *resource* has by itself."""
    if type(resource).__base__ is Row:
        return ()
    own = getattr(resource, "__dict__", None)
    names = [name for name in own if name[:1] != "_"] if own else []
    if dataclasses.is_dataclass(resource):
        names += [
            field.name for field in dataclasses.fields(resource) if field.name[:1] != "_" and field.name not in names
        ]
    return names


def unshared(values: Sequence[Any]) -> Sequence[Any]:
    """Return *values*, of which the mutable ones are copied."""
    return values if ATOMS.issuperset(map(type, values)) else deepcopy(values)


def check_kind(kind: Any) -> None:
    """Raise unless *kind* can make resources: None, dict, or a class."""
    if kind is not None and not callable(kind):
        raise TypeError(f"row is {named(kind)}, but must be dict, or a class that takes the columns as keywords")


def _is_same(old: Any, new: Any) -> bool:
    if old is new and type(old) in ATOMS:
        return True
    return type(old) is type(new) and bool(old == new) and (type(old) in _EXACT or repr(old) == repr(new))


def _getter(kind: Any, names: Sequence[str]) -> Callable[[Any], Sequence[Any]]:
    if len(names) > 1:
        get: Callable[[Any], Sequence[Any]] = kind(*names)
        return get
    if not names:
        return lambda _: ()
    one = kind(*names)
    return lambda resource: (one(resource),)


def _row_maker(columns: tuple[str, ...]) -> Callable[[Sequence[Any]], Row]:
    kind: Any = type("Row", (Row,), {"__slots__": columns, "__module__": __name__})

    def make(values: Sequence[Any]) -> Row:
        row: Row = kind()
        for name, value in zip(columns, values, strict=True):
            setattr(row, name, value)
        return row

    return make
