"""Copies of what can change in place, in which the instances of a session stay what they are."""

from __future__ import annotations

from copy import deepcopy
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from operator import is_
from typing import Any, Final
from uuid import UUID

from sqlalchemy.ext.mutable import MutableBase

from geventbatch._shown import shown
from geventbatch.errors import CannotUndo

ATOMS: Final = frozenset(
    {type(None), bool, int, float, complex, str, bytes, date, datetime, time, timedelta, Decimal, UUID, type}
)
"""They do not change."""

_CONTAINERS: Final = frozenset({dict, list, set, tuple})


class Copies:
    """What is one object in two places is one in the copies too; and those that are to be *kept* are themselves."""

    def __init__(self, *kept: object) -> None:
        # -- mutable state ---------------------------------------------------------------------------------
        self._memo: dict[int, Any] = {id(one): one for one in kept}  # by what they are copies of
        self._kept: list[Any] = []  # that, so that no other object has its id

    def copy(self, value: Any) -> Any:
        """One of them. Raises whatever its class raises, and `CannotUndo`."""
        kind = type(value)
        if kind in ATOMS:
            return value
        found = self._memo.get(id(value), self)
        if found is not self:
            return found
        if kind in _CONTAINERS:
            return self._container(kind, value)
        if hasattr(kind, "_sa_class_manager"):
            raise CannotUndo(f"{shown(value)} is not in the session of its batch, and it cannot be copied")
        if kind.__module__.startswith("sqlalchemy.") and not isinstance(value, MutableBase):
            return value  # it has nothing of its own: an association's proxy
        return deepcopy(value, self._memo)

    def _container(self, kind: type, value: Any) -> Any:
        """Quicker than `deepcopy` has it; and no instance in it is copied."""
        if kind is tuple:
            parts = tuple([self.copy(one) for one in value])
            return value if all(map(is_, parts, value)) else self._keep(value, parts)
        copied: Any = self._keep(value, kind())
        if kind is dict:
            for name, one in value.items():
                copied[self.copy(name)] = self.copy(one)
        elif kind is list:
            copied.extend([self.copy(one) for one in value])
        else:
            copied.update([self.copy(one) for one in value])
        return copied

    def _keep(self, value: Any, copied: Any) -> Any:
        self._memo[id(value)] = copied
        self._kept.append(value)
        return copied
