"""Arguments that are lists, dicts or sets: operations behind may change them, where they are in the resource by now.

So an operation that is applied again, because the batch is replayed or another one is undone, gets them as they were.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from types import MemberDescriptorType
from typing import Any

from geventbatch._answer import PLAIN, Copying
from geventbatch._operation import attribute


def repeatable(operation: Any, args: tuple[Any, ...]) -> Any:
    """Give what applies *operation* to *args* as they are now, however often; itself if nothing changes them.

    Lists, dicts, sets and tuples are copied, as in answers, and dataclasses; a partial's too.
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
    except RecursionError:  # what lies so deep is passed as it is
        return operation
    return Repeatable(operation, kept) if copying.changeable else operation


class Repeatable:
    """An operation whose first application gets the arguments of its caller, and every other one a copy."""

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
    """Copies dataclasses too, which are changed in the resource like a dict."""

    def __init__(self) -> None:
        super().__init__()
        # -- mutable state ---------------------------------------------------------------------------------
        self.changeable = False  # there is something that was copied

    def _copy_changeable(self, value: Any) -> Any:
        self.changeable = True
        return super()._copy_changeable(value)

    def _copy_other(self, value: Any) -> Any:
        kind: Any = type(value)
        if not hasattr(kind, "__dataclass_fields__") or hasattr(kind, "_sa_class_manager"):
            return super()._copy_other(value)
        try:
            copy: Any = object.__new__(kind)
        except TypeError:  # it is a dict besides, say
            return super()._copy_other(value)
        self.changeable = True
        self._copies[id(value)] = copy
        for name, one in getattr(value, "__dict__", {}).items():  # without what is around them, such as a property
            copy.__dict__[name] = self.copy(one)
        for member in (vars(above).get(name) for above in kind.__mro__ for name in kind.__dataclass_fields__):
            if type(member) is MemberDescriptorType:
                with suppress(AttributeError):  # it has none
                    member.__set__(copy, self.copy(member.__get__(value)))
        return copy
