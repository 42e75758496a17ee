"""The contents of an object: its ``__slots__``, and whether a value lies anywhere in it."""

from __future__ import annotations

from contextlib import suppress
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from types import FunctionType, MemberDescriptorType, ModuleType
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

if TYPE_CHECKING:
    from collections.abc import Mapping

    Slots = Mapping[str, MemberDescriptorType]

ATOMS: Final = frozenset(
    {type(None), bool, int, float, complex, str, bytes, date, datetime, time, timedelta, Decimal, UUID, type}
)
"""Types whose values are immutable."""

HEAP_TYPE: Final = 1 << 9
"""CPython's flag (Py_TPFLAGS_HEAPTYPE) of a class that is made at run time."""

_ELSEWHERE: Final = (type, ModuleType, FunctionType)
"""Types whose attributes are no part of a value."""


def slots_of(kind: type) -> dict[str, MemberDescriptorType]:
    """Return the descriptors of all ``__slots__`` of *kind* and its parents.

    The names are unique: no other attribute has them, and two slots of the same name get two.
    """
    return {
        f"{parent.__qualname__}.{name} ({place})": slot
        for place, parent in enumerate(kind.__mro__)
        if parent.__flags__ & HEAP_TYPE
        for name, slot in vars(parent).items()
        if isinstance(slot, MemberDescriptorType)
    }


def slotted(slots: Slots, instance: object) -> dict[str, Any]:
    """Return the values that *instance* has in *slots*."""
    found = {}
    for name, slot in slots.items():
        with suppress(AttributeError):
            found[name] = slot.__get__(instance)
    return found


def put_in_slots(slots: Slots, instance: object, values: Mapping[str, Any]) -> None:
    """Set *values* in *slots*, and delete all others."""
    for name in slotted(slots, instance).keys() - values.keys():
        slots[name].__delete__(instance)
    for name, value in values.items():
        slots[name].__set__(instance, value)


def is_in(value: object, held: object) -> bool:
    """Return whether *value* lies anywhere in *held*: in containers, or in attributes of objects."""
    seen: dict[int, object] = {}
    todo = [held]
    while todo:
        one = todo.pop()
        if one is value:
            return True
        if type(one) in ATOMS or id(one) in seen or isinstance(one, _ELSEWHERE):
            continue
        seen[id(one)] = one
        if isinstance(one, dict):
            todo += [*dict.keys(one), *dict.values(one)]
        elif isinstance(one, (list, tuple, set, frozenset)):
            todo += one
        own = getattr(one, "__dict__", None)
        if type(own) is dict and "_sa_instance_state" not in own:
            todo += own.values()
        todo += slotted(slots_of(type(one)), one).values()
    return False
