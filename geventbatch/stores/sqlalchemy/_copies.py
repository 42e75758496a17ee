"""Copies of mutable values, which go on referring to the session's own instances."""

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
    """Makes copies of one value with all its contents: one object in two places is one object in each copy too.

    The *kept* objects are themselves in the copies. The value is pickled, which is quickest, or else deep-copied.
    """

    def __init__(self, value: Any, *kept: object) -> None:
        """Copy *value*. Raises `CannotUndo`, and what the classes of the copied objects raise."""
        self.kept = list(kept)
        self._places = {id(one): place for place, one in enumerate(kept)}
        self._number = next(_numbers)
        file = io.BytesIO()
        try:
            _Pickler(file, self).dump(value)
        except CannotUndo:
            raise
        except Exception:  # not to be pickled: a function, a local class
            self._text: bytes | None = None
            self._value = _DeepCopy(self).copy(value)
        else:
            self._text = file.getvalue()
            _alive[self._number] = self

    def copy(self) -> Any:
        """Return a new copy."""
        return _DeepCopy(self).copy(self._value) if self._text is None else pickle.loads(self._text)  # noqa: S301 - ours

    def place_of(self, one: Any) -> int | None:
        """Return the index of *one* among the kept objects; None if it is to be copied. Raises `CannotUndo`."""
        place = self._places.get(id(one))
        if place is not None:
            return place
        kind = type(one)
        if hasattr(kind, "_sa_class_manager"):
            raise CannotUndo(f"{shown(one)} is not in the session of its batch, and it cannot be copied")
        if not kind.__module__.startswith("sqlalchemy.") or isinstance(one, MutableBase):
            return None
        self._places[id(one)] = len(self.kept)  # it has no state of its own: an association proxy's collection
        self.kept.append(one)
        return len(self.kept) - 1

    @property
    def number(self) -> int:
        """The number by which a pickle finds these copies, while they are alive."""
        return self._number


def _kept(number: int, place: int) -> Any:
    return _alive[number].kept[place]


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, copies: Copies) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._copies = copies

    def reducer_override(self, one: Any) -> Any:
        """Pickle a kept object as its index (called for all but plain values and containers)."""
        place = None if isinstance(one, type) else self._copies.place_of(one)
        return NotImplemented if place is None else (_kept, (self._copies.number, place))


class _DeepCopy:
    """One deep copy, of what cannot be pickled."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        # -- mutable state ---------------------------------------------------------------------------------
        self._memo: dict[int, Any] = {id(one): one for one in copies.kept}  # copies, by `id` of the original
        self._seen: list[Any] = []  # the originals, so that no other object gets their `id`

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
        """Copy a container, but no mapped instance in it."""
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
