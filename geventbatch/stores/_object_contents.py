"""Finds out whether a value lies anywhere in another one, however deep."""

from __future__ import annotations

from datetime import date, datetime, time, timedelta
from decimal import Decimal
from types import FunctionType, ModuleType
from typing import Final
from uuid import UUID

from geventbatch._values.slots import slots_of, slotted

ATOMS: Final = frozenset(
    {type(None), bool, int, float, complex, str, bytes, date, datetime, time, timedelta, Decimal, UUID, type}
)
"""Types whose values are immutable."""

_ELSEWHERE: Final = (type, ModuleType, FunctionType)
"""Types whose attributes are no part of a value."""


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
