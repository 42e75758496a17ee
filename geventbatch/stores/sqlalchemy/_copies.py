"""Copies of what can change in place, in which the instances of a session stay what they are."""

from __future__ import annotations

import io
import pickle
from copy import deepcopy
from itertools import count
from operator import is_
from typing import Any, Final
from weakref import WeakValueDictionary

from sqlalchemy.ext.mutable import MutableBase

from geventbatch._safe_repr import shown
from geventbatch.errors import CannotUndo
from geventbatch.stores._object_contents import ATOMS

_CONTAINERS: Final = frozenset({dict, list, set, tuple})

_numbers: Final = count()
_alive: Final[WeakValueDictionary[int, Copies]] = WeakValueDictionary()


class Copies:
    """Of one value, with all that is in it: what is one object in two places is one in each copy too.

    Those that are to be *kept* are themselves in the copies. It is pickled, which is quickest, or copied each time.
    """

    def __init__(self, value: Any, *kept: object) -> None:
        """Raises `CannotUndo`, and whatever the classes of what is copied raise."""
        self.kept = list(kept)
        self._places = {id(one): place for place, one in enumerate(kept)}
        self._number = next(_numbers)
        file = io.BytesIO()
        try:
            _Pickler(file, self).dump(value)
        except CannotUndo:
            raise
        except Exception:  # a function, a class of one's own in a function
            self._text: bytes | None = None
            self._value = _DeepCopy(self).copy(value)
        else:
            self._text = file.getvalue()
            _alive[self._number] = self

    def copy(self) -> Any:
        """Another one."""
        return _DeepCopy(self).copy(self._value) if self._text is None else pickle.loads(self._text)  # noqa: S301 - ours

    def place_of(self, one: Any) -> int | None:
        """Where it is kept; None: it is copied. Raises `CannotUndo`."""
        place = self._places.get(id(one))
        if place is not None:
            return place
        kind = type(one)
        if hasattr(kind, "_sa_class_manager"):
            raise CannotUndo(f"{shown(one)} is not in the session of its batch, and it cannot be copied")
        if not kind.__module__.startswith("sqlalchemy.") or isinstance(one, MutableBase):
            return None
        self._places[id(one)] = len(self.kept)  # it has nothing of its own: an association's proxy
        self.kept.append(one)
        return len(self.kept) - 1

    @property
    def number(self) -> int:
        """Of those that are alive."""
        return self._number


def _kept(number: int, place: int) -> Any:
    return _alive[number].kept[place]


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, copies: Copies) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._copies = copies

    def reducer_override(self, one: Any) -> Any:
        """Asked of what is no plain value nor container."""
        place = None if isinstance(one, type) else self._copies.place_of(one)
        return NotImplemented if place is None else (_kept, (self._copies.number, place))


class _DeepCopy:
    """One copy, of what cannot be pickled."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        # -- mutable state ---------------------------------------------------------------------------------
        self._memo: dict[int, Any] = {id(one): one for one in copies.kept}  # by what they are copies of
        self._seen: list[Any] = []  # that, so that no other object has its id

    def copy(self, value: Any) -> Any:
        kind = type(value)
        if kind in ATOMS:
            return value
        found = self._memo.get(id(value), self)
        if found is not self:
            return found
        if kind in _CONTAINERS:
            return self._container(kind, value)
        place = self._copies.place_of(value)
        return deepcopy(value, self._memo) if place is None else self._copies.kept[place]

    def _container(self, kind: type, value: Any) -> Any:
        """So that no instance in it is copied."""
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
        self._seen.append(value)
        return copied
