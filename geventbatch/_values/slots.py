"""The slots of a class: what its instances hold beside their ``__dict__``, read and written past any property."""

from __future__ import annotations

from types import MemberDescriptorType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

Slots: TypeAlias = "Mapping[str, MemberDescriptorType]"

HEAP_TYPE: Final = 1 << 9
"""Python's flag of a class that is made as the program runs, as every class written in Python is."""


def slots_of(kind: type) -> dict[str, MemberDescriptorType]:
    """Return the slots that *kind* and its parents name in ``__slots__``.

    The names differ from the name of any attribute, and of a slot of the same name in another class.
    """
    return {
        f"{parent.__qualname__}.{name} ({place})": slot
        for place, parent in enumerate(kind.__mro__)
        if parent.__flags__ & HEAP_TYPE
        for name, slot in vars(parent).items()
        if isinstance(slot, MemberDescriptorType)
    }


def has(slot: Any, instance: object) -> bool:
    """Return whether *slot* is filled in *instance*."""
    try:
        slot.__get__(instance)
    except AttributeError:
        return False
    return True


def slotted(slots: Slots, instance: object) -> dict[str, Any]:
    """Return the values of *slots* in *instance*, without those that are empty."""
    found = {}
    for name, slot in slots.items():
        try:
            found[name] = slot.__get__(instance)
        except AttributeError:
            continue
    return found


def put_in_slots(slots: Slots, instance: object, values: Mapping[str, Any]) -> None:
    """Fill *slots* of *instance* with *values*, and empty the others."""
    for name, slot in slots.items():
        if name in values:
            slot.__set__(instance, values[name])
        elif has(slot, instance):
            slot.__delete__(instance)
