"""The parts of an object: its state, compared with a copy's, and the parts that can change."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from copy import deepcopy
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from geventbatch._safe_repr import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

_WHOLE: Final = (type, Enum, ModuleType, FunctionType, BuiltinFunctionType, MethodType)
"""Types that are not looked into."""

_THEIRS: Final = frozenset({"_state", "_sa_instance_state", "_sa_adapter"})
"""Attributes in which Django and SQLAlchemy keep their notes on an instance, or on a list of instances.

A `MutableDict` of SQLAlchemy's keeps its own in a `WeakKeyDictionary`: by identity, which no copy has in common.
"""


def copied(resource: Any) -> Any:
    """Copy *resource* with all that it holds.

    `copy.deepcopy` asks Django for the class of an instance. Here a Django instance keeps its class, which while a
    batch runs is one whose ``save`` writes nothing. Of an operation across keys, *resource* is the tuple of all: what
    they have in common, their copies have in common too.
    """
    several = resource if type(resource) is tuple else (resource,)
    memo: dict[int, Any] = {}
    models = [one for one in several if _is_model(one)]
    for one in models:
        kind: Any = type(one)
        memo[id(one)] = object.__new__(kind)  # past the class, which makes instances of the model itself
    for one in models:
        memo[id(one)].__dict__.update(deepcopy(vars(one), memo))
    return deepcopy(resource, memo)


def state_of(value: Any) -> Any:
    """Return the state of *value*, to be compared by ``==`` with a copy's, even if its classes define no equality.

    The state is all that is in it, without the values of a `cached_property` and the notes of Django and SQLAlchemy on
    an instance.

    Switches: no.
    """
    return _state_of(value, {})


def _state_of(value: Any, seen: dict[int, int]) -> Any:
    """Do so inside of a value; a number stands for each object that was *seen* before."""
    if id(value) in seen:
        return ("seen", seen[id(value)])
    attributes = _attributes(value)
    if isinstance(value, (dict, list, tuple, deque, set, frozenset)) or attributes is not None:
        seen[id(value)] = len(seen)
    content: Any = ()
    if isinstance(value, dict):
        content = {key: _state_of(one, seen) for key, one in value.items()}
    elif isinstance(value, (list, tuple, deque)):
        content = [_state_of(one, seen) for one in value]
    elif isinstance(value, (set, frozenset)):
        content = value if all(_attributes(one) is None for one in value) else len(value)
    elif isinstance(value, BaseException):
        content = _state_of(value.args, seen)
    elif attributes is None:
        # A value with neither parts nor a notion of equality, such as a generator: only its class can be compared.
        kind: Any = type(value)
        has_only_identity = kind.__eq__ is object.__eq__ and value is not None and not isinstance(value, _WHOLE)
        return kind if has_only_identity or _is_expression(value) else value
    return type(value), content, {name: _state_of(one, seen) for name, one in (attributes or {}).items()}


_STATE: Final = 3
"""The length of a state: class, content, attributes."""


def difference(one: Any, other: Any, path: str) -> tuple[str, Any, Any]:
    """Return the path at which two states first differ, and the two values there."""
    while True:
        parts, others = _states_in(one, path), _states_in(other, path)
        found = next((where for where in parts if where in others and parts[where] != others[where]), None)
        if found is None or parts.keys() != others.keys():
            return path, _in_short(one), _in_short(other)
        path, one, other = found, parts[found], others[found]


def _states_in(state: Any, path: str) -> dict[str, Any]:
    if not _is_state(state):
        return {}
    _, content, attributes = state
    named = {f"{path}.{name}": one for name, one in attributes.items()}
    if isinstance(content, dict):
        return named | {f"{path}[{shown(key)}]": one for key, one in content.items()}
    return named | {f"{path}[{number}]": one for number, one in enumerate(content if isinstance(content, list) else ())}


def _in_short(state: Any) -> Any:
    """Return a state in one line: the number of parts of a list, else their names."""
    if not _is_state(state):
        return state
    kind, content, attributes = state
    if isinstance(content, list):
        return f"{kind.__name__} of {len(content)}"
    names = [*attributes, *(content if isinstance(content, (dict, set, frozenset)) else ())]
    return f"{kind.__name__} of {', '.join(map(str, names))}"


def _is_state(state: Any) -> bool:
    return isinstance(state, tuple) and len(state) == _STATE and isinstance(state[0], type)


def changeable(value: Any, path: str, seen: dict[int, tuple[Any, str]] | None = None) -> dict[int, tuple[Any, str]]:
    """Return the objects in *value*, itself too, that can change: by `id`, each with its path."""
    seen = {} if seen is None else seen
    if id(value) in seen:
        return seen
    attributes = _attributes(value)
    if isinstance(value, (dict, list, deque, set, bytearray)) or (attributes is not None and not _is_value(value)):
        seen[id(value)] = (value, path)
    for one, where in _parts(value, attributes or {}, path):
        changeable(one, where, seen)
    return seen


def held_twice(value: Any, path: str) -> dict[tuple[str, str], Any]:
    """Return the lists, dicts and sets that are in two places of *value*, by their two paths."""
    first: dict[int, str] = {}
    twice: dict[tuple[str, str], Any] = {}
    todo = [(value, path)]
    while todo:
        one, where = todo.pop()
        is_container = isinstance(one, (dict, list, deque, set, bytearray))
        if id(one) in first:
            if is_container:
                twice[first[id(one)], where] = one
            continue
        attributes = _attributes(one)
        if is_container or isinstance(one, tuple) or attributes is not None:
            first[id(one)] = where
            todo += reversed(list(_parts(one, attributes or {}, where)))
    return twice


def _parts(value: Any, attributes: dict[str, Any], path: str) -> Iterator[tuple[Any, str]]:
    if isinstance(value, dict):
        yield from ((one, f"{path}[{shown(key)}]") for key, one in value.items())
    elif isinstance(value, (list, tuple, deque)):
        yield from ((one, f"{path}[{number}]") for number, one in enumerate(value))
    for name, one in attributes.items():
        yield one, f"{path}.{name}"


def _attributes(value: Any) -> dict[str, Any] | None:
    """Return an instance's own attributes but for cached ones; None for a value that has none."""
    if isinstance(value, _WHOLE) or _is_expression(value):
        return None
    kind = type(value)
    slots = [name for one in kind.__mro__ for name in _slots(one)]
    own = getattr(value, "__dict__", None)
    if own is None and not slots:
        return None
    found = {}
    for name in slots:
        with suppress(AttributeError):  # past __getattr__, which may compute anything, or fail
            found[name] = object.__getattribute__(value, name)
    kept = {
        name: one
        for name, one in (own or {}).items()
        if name not in _THEIRS and not _is_cache(kind, name) and not isinstance(one, WeakKeyDictionary)
    }
    return {**found, **kept}


def _is_expression(value: Any) -> bool:
    """Return whether it is a part of SQL, of Django's or SQLAlchemy's. Comparing two of them makes a third."""
    return hasattr(type(value), "resolve_expression") or hasattr(type(value), "__visit_name__")


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in {"__dict__", "__weakref__"})


def _is_cache(kind: type, name: str) -> bool:
    return type(getattr(kind, name, None)).__name__ == "cached_property"  # Python's, or Django's


def _is_value(value: Any) -> bool:
    """Return whether its class hashes by value, as immutable classes do: `UUID`, frozen dataclasses."""
    kind: Any = type(value)
    return kind.__hash__ not in (None, object.__hash__) and not _is_model(value)


def _is_model(value: Any) -> bool:
    return hasattr(type(value), "_meta") and hasattr(value, "_state")
