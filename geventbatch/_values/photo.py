"""A photo of an object and of all that it holds, from which they are restored in place.

They stay the same objects. So an object that refers to one of them, such as a scope written by hand, sees the restored
state too. Lists, dicts, sets and instances of classes written in Python can be photographed. Other objects, such as a
lock or a connection, hide their state: there is no photo of them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from contextlib import suppress
from enum import Enum
from fractions import Fraction
from re import Pattern
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from zoneinfo import ZoneInfo

from geventbatch._safe_repr import shown
from geventbatch._values.answers import PLAIN
from geventbatch._values.slots import HEAP_TYPE, has, slots_of
from geventbatch.errors import CannotUndo

if TYPE_CHECKING:
    from collections.abc import Callable

_ATOMS: Final = PLAIN | {range, Fraction, ZoneInfo, Pattern, BuiltinFunctionType, ModuleType, type}
"""Types whose instances are immutable, or part of no resource."""

_MOST_SHAPES: Final = 1000


class Photo:
    """The state of an object, and of all that it holds, when the photo was taken."""

    def __init__(self, resource: Any) -> None:
        """Take a photo of *resource*. Raise `CannotUndo` if that holds something that cannot be restored."""
        self._taken: list[tuple[type, Callable[[Any, Any], object], Any, Any]] = []
        hashing: list[tuple[type, Callable[[Any, Any], object], Any, Any]] = []
        self._seen: dict[int, Any] = {}  # keeps the objects alive, since they are told apart by identity
        left = [resource]
        while left:
            one = left.pop()
            if type(one) in _ATOMS or id(one) in self._seen:
                continue
            self._seen[id(one)] = one
            for part in _parts_of(one):
                content, inside = part.take(one)
                if part.put is not None:
                    (hashing if part.hashes else self._taken).append((type(one), part.put, one, content))
                left += [value for value in inside if type(value) not in _ATOMS]
        self._taken += hashing  # restored last, since their contents are hashed in their restored state

    def put_back(self) -> None:
        """Restore all of it. It may be called many times."""
        for kind, put, one, content in self._taken:
            if type(one) is not kind:  # its `__class__` was assigned
                object.__setattr__(one, "__class__", kind)
            put(one, content)


def check_changeable(resource: Any) -> None:
    """Raise `CannotUndo` unless *resource* can be restored in place."""
    if not any(part.put is not None for part in _parts_of(resource)):
        raise CannotUndo(f"{shown(resource)}, a {type(resource).__qualname__}, cannot be restored in place")


def bring_over(resource: Any, copy: Any) -> None:
    """Put the contents of *copy* into *resource*. Raise `CannotUndo` if they are of different classes."""
    if type(copy) is not type(resource):
        raise CannotUndo(f"copy_resource returned {shown(copy)} for {shown(resource)}, which is of another class")
    for part in _parts_of(resource):
        if part.put is not None:
            part.put(resource, part.take(copy)[0])


class _Part(NamedTuple):
    """One part of an object's state, such as its attributes."""

    take: Callable[[Any], tuple[Any, list[Any]]]
    """Returns the part in a form of its own, and the objects in it."""
    put: Callable[[Any, Any], object] | None
    """Puts the part back; None for a part that cannot change."""
    hashes: bool = False
    """True if `put` hashes the objects in it."""


_shapes: dict[type, list[_Part] | None] = {}
"""By class: the parts of its instances; None if they hide their state."""


def _parts_of(one: Any) -> list[_Part]:
    kind = type(one)
    if kind not in _shapes:
        if len(_shapes) >= _MOST_SHAPES:  # a program may make classes at run time without end
            _shapes.clear()
        _shapes[kind] = _look_at(kind)
    parts = _shapes[kind]
    if parts is None:
        raise CannotUndo(f"{shown(one)}, a {kind.__qualname__}, cannot be restored")
    return parts


def _look_at(kind: Any) -> list[_Part] | None:
    if issubclass(kind, (type, Enum, ModuleType)):
        return []
    if kind is MethodType:
        return [_Part(lambda one: (None, [one.__self__]), None)]
    if kind is FunctionType:
        return [_Part(_take_closure, _put_closure), _Part(_take_attributes, _put_attributes)]
    base = next(one for one in kind.__mro__ if one in _BASES)
    names = ("__reduce__", "__reduce_ex__")
    if hasattr(kind, "__deepcopy__") or any(getattr(kind, name) is not getattr(base, name) for name in names):
        return None  # it defines its own copying
    if kind is not base and not _shows_all(kind, base):
        return None
    parts = [] if _BASES[base] is None else [_BASES[base]]
    if kind.__dictoffset__ != 0:
        parts.append(_Part(_take_attributes, _put_attributes))
    slots = slots_of(kind)
    if base is defaultdict:  # written in C, it has one of its own
        slots["default_factory"] = vars(defaultdict)["default_factory"]
    if slots:
        parts.append(_part_of_slots(tuple(slots.values())))
    return [part for part in parts if part is not None]


def _shows_all(kind: Any, base: Any) -> bool:
    """Return whether Python shows all that instances of *kind* hold.

    If it does, a class that is made here with as many slots has instances of the same size.
    """
    above = set(base.__mro__)
    if not all(one in above or one.__flags__ & HEAP_TYPE for one in kind.__mro__):
        return False
    slots = [f"slot{number}" for number in range(len(slots_of(kind)) - len(slots_of(base)))]
    if base.__itemsize__:
        return not slots
    if kind.__dictoffset__ and not base.__dictoffset__:
        slots.append("__dict__")
    if kind.__weakrefoffset__ and not base.__weakrefoffset__:
        slots.append("__weakref__")
    like: Any = type("Like", (base,), {"__slots__": tuple(slots)})
    return bool(like.__basicsize__ == kind.__basicsize__ and like.__itemsize__ == kind.__itemsize__)


def is_atom(kind: Any) -> bool:
    """Return whether instances of *kind* are values, classes, modules or functions: nothing in them changes."""
    return kind in _ATOMS or issubclass(kind, (*_ATOMS, Enum, FunctionType)) or kind is object


def members_of(kind: Any) -> tuple[Any, ...] | None:
    """Return the slots of *kind*, if its instances hold nothing else but their ``__dict__``.

    Else return None; also if the class defines its own copying, or a ``__del__``.
    """
    own = kind.__flags__ & HEAP_TYPE and not any(hasattr(kind, name) for name in ("_sa_class_manager", "__del__"))
    base = next(one for one in kind.__mro__ if one in _BASES)
    return tuple(slots_of(kind).values()) if own and base is object and _look_at(kind) is not None else None


# -- the parts of objects ---------------------------------------------------------------------------------------


def _take_attributes(one: Any) -> tuple[Any, list[Any]]:
    content = dict(object.__getattribute__(one, "__dict__"))
    return content, list(content.values())


def _put_attributes(one: Any, content: Any) -> None:
    attributes = object.__getattribute__(one, "__dict__")
    attributes.clear()
    attributes.update(content)


def _take_closure(one: Any) -> tuple[Any, list[Any]]:
    content = []
    for cell in one.__closure__ or ():
        try:
            content.append((cell, True, cell.cell_contents))
        except ValueError:
            content.append((cell, False, None))
    defaults = [*(one.__defaults__ or ()), *(one.__kwdefaults__ or {}).values()]
    return content, [*(value for _, _, value in content), *defaults]


def _put_closure(_: object, content: Any) -> None:
    for cell, there, value in content:
        if there:
            cell.cell_contents = value
        else:
            with suppress(ValueError):
                del cell.cell_contents


def _part_of_slots(slots: tuple[Any, ...]) -> _Part:
    def take(one: Any) -> tuple[Any, list[Any]]:
        content = []
        for slot in slots:
            try:
                content.append((slot, slot.__get__(one)))
            except AttributeError:
                continue
        return content, [value for _, value in content]

    def put(one: Any, content: Any) -> None:
        for slot, value in content:
            slot.__set__(one, value)
        if len(content) < len(slots):
            filled = {slot for slot, _ in content}
            for slot in slots:
                if slot not in filled and has(slot, one):
                    slot.__delete__(one)

    return _Part(take, put)


def _part_of_dict(base: Any) -> _Part:
    def take(one: Any) -> tuple[Any, list[Any]]:
        content = dict(base.items(one))
        return content, [*content, *content.values()]

    def put(one: Any, content: Any) -> None:
        base.clear(one)
        for name, value in content.items():
            base.__setitem__(one, name, value)

    def put_quickly(one: Any, content: Any) -> None:
        dict.clear(one)
        dict.update(one, content)

    return _Part(take, put if base is OrderedDict else put_quickly, hashes=True)


def _part_of_collection(base: Any, fill: Any) -> _Part:
    def take(one: Any) -> tuple[Any, list[Any]]:
        content = list(base.__iter__(one))
        return content, content

    def put(one: Any, content: Any) -> None:
        base.clear(one)
        fill(one, content)

    return _Part(take, put, hashes=base is set)


def _part_of_fixed(base: Any) -> _Part:
    return _Part(lambda one: (None, list(base.__iter__(one))), None)


_BASES: Final[dict[type, _Part | None]] = {
    **dict.fromkeys((object, *_ATOMS)),
    **{base: _part_of_dict(base) for base in (dict, OrderedDict, defaultdict, Counter)},
    list: _part_of_collection(list, list.extend),
    set: _part_of_collection(set, set.update),
    deque: _part_of_collection(deque, deque.extend),
    bytearray: _part_of_collection(bytearray, bytearray.extend),
    **{base: _part_of_fixed(base) for base in (tuple, frozenset)},
}
