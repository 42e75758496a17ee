"""Mutable arguments: an operation may put them into the resource, where later operations change them.

So if an operation is applied again, because of a replay or an undo, it gets copies of its arguments as they were.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

from geventbatch._core.operation import attribute
from geventbatch._values.answers import PLAIN, Copying
from geventbatch._values.slots import has


def repeatable(operation: Any, args: tuple[Any, ...]) -> Any:
    """Return a callable that applies *operation* to *args* as they are now, any number of times.

    Containers are copied, as in answers, and objects of nothing but values, also in a partial. If there is nothing to
    copy, return *operation* itself.
    """
    given = args
    if type(operation) is partial:
        named = tuple(operation.keywords.values())
        if PLAIN.issuperset(map(type, (*operation.args, *named, *args))):
            return operation
        given = (operation.args, named, args)
    copying = _Copying()
    try:
        kept = copying.copy(given)
    except Exception:  # nested too deep, or not readable: the arguments are passed as they are
        return operation
    return Repeatable(operation, kept) if copying.changeable else operation


class Repeatable:
    """An operation that is first applied to its caller's own arguments, and every other time to a copy of them."""

    __slots__ = ("__wrapped__", "_applied", "_kept", "stands_for")

    def __init__(self, operation: Any, kept: tuple[Any, ...]) -> None:
        self.__wrapped__ = operation
        asked = attribute(operation, "stands_for")
        self.stands_for = operation if asked is None else asked
        self._kept = kept
        # -- mutable state ---------------------------------------------------------------------------------
        self._applied = False

    def __call__(self, resource: Any, *args: Any) -> Any:
        operation = self.__wrapped__
        if not self._applied:
            self._applied = True
            return operation(resource, *args)
        kept = _Copying().copy(self._kept)
        if type(operation) is not partial:
            return operation(resource, *kept)
        first, named, last = kept
        return operation.func(*first, resource, *last, **dict(zip(operation.keywords, named, strict=True)))


class _Copying(Copying):
    """Copies objects of values too: in the resource, operations change them like a dict."""

    def __init__(self) -> None:
        super().__init__()
        # -- mutable state ---------------------------------------------------------------------------------
        self.changeable = False  # something was copied
        self._inside = False  # the value at hand lies in an object that is copied whole, or not at all

    def _copy_changeable(self, value: Any) -> Any:
        self.changeable = True
        return super()._copy_changeable(value)

    def _copy_other(self, value: Any) -> Any:
        kind: Any = type(value)
        is_atom, members = _known(kind)
        if is_atom:
            return value
        if members is None:
            if self._inside:
                raise _NoValue
            return super()._copy_other(value)
        if self._inside or hasattr(kind, "__dataclass_fields__"):
            return self._copy_object(value, members)
        return self._copy_whole(value, members)

    def _copy_whole(self, value: Any, members: tuple[Any, ...]) -> Any:
        """Copy *value* if it holds nothing but values. An object with a connection, say, is passed as it is."""
        before = len(self._copies), len(self.others), self.changeable
        self._inside = True
        try:
            return self._copy_object(value, members)
        except _NoValue:
            while len(self._copies) > before[0]:
                self._copies.popitem()
            del self.others[before[1] :]
            self.changeable = before[2]
        finally:
            self._inside = False
        return super()._copy_other(value)

    def _copy_object(self, value: Any, members: tuple[Any, ...]) -> Any:
        """Copy the attributes and slots of *value*, past any property. Return *value* itself if it has none."""
        attributes = getattr(value, "__dict__", {})
        slots = [(member, member.__get__(value)) for member in members if has(member, value)]
        if not attributes and not slots:
            return value
        self.changeable = True
        copy: Any = object.__new__(type(value))
        self._copies[id(value)] = copy
        for name, one in attributes.items():
            copy.__dict__[name] = self.copy(one)
        for member, one in slots:
            member.__set__(copy, self.copy(one))
        return copy


class _NoValue(Exception):
    """An object holds something that perhaps cannot be copied."""


@lru_cache(maxsize=1000)
def _known(kind: Any) -> tuple[bool, tuple[Any, ...] | None]:
    """Return whether instances of *kind* are immutable; and their slots, if they hold nothing else that is hidden."""
    from geventbatch._values.photo import is_atom, members_of  # which is slow to import

    return (True, None) if is_atom(kind) else (False, members_of(kind))
