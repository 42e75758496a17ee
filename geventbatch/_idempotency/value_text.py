"""Plain values as text, the same in every process, without pickle: arguments of operations, and their outcomes.

The text is JSON. A value that JSON lacks is tagged: it is an object with one name, which begins with ``~``.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from functools import partial
from importlib import import_module
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID
from zoneinfo import ZoneInfo

from geventbatch._safe_repr import said
from geventbatch._values.slots import slots_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ALLOWED: Final = (
    "None, bool, int, float, str, bytes, Decimal, date, datetime, time, timedelta, UUID, an Enum, or a list, tuple, "
    "dict or dataclass of them"
)

_NATURAL: Final = frozenset({str, int, float, bool, type(None)})

_quote: Final[Callable[[str], str]] = json.encoder.encode_basestring_ascii
_dumps: Final = json.JSONEncoder(separators=(",", ":")).encode
_dumps_sorted: Final = json.JSONEncoder(separators=(",", ":"), sort_keys=True).encode


def encode(value: Any) -> str:
    """Return *value* as one line of ASCII. Raise any error, if *value* is not plain."""
    kind = type(value)
    if kind is str:
        return _quote(value)
    if kind is int:
        return str(value)
    return "null" if value is None else _dumps(_tagged(value))


def decode(text: str) -> Any:
    """Return the value that `encode` has made *text* of. Raise any error, if the text does not fit (any more)."""
    return json.loads(text, object_hook=_untagged)


def describe(operation: Callable[..., Any], args: Sequence[object], *, alone: bool = False) -> str:
    """Return a text that differs for different operations, or for different arguments.

    Args:
        operation: The callable.
        args: Its arguments.
        alone: Whether to leave out the values that *operation* has in itself: as a partial, a closure, an object.

    Raises:
        TypeError: The operation, or an argument, has no text of its own.
    """
    name = _name_alone(operation) if alone else _name(operation)
    return f"{name}({','.join([_argument(value) for value in args])})"


def _name_alone(operation: Any) -> str:
    while type(operation) is partial:
        operation = operation.func
    function = getattr(operation, "__func__", operation)
    if "<" in getattr(function, "__qualname__", "") and "<lambda>" not in function.__qualname__:
        return path_of(function)
    return f"a {path_of(type(operation))}" if is_dataclass(type(operation)) else _name(operation)


def _name(operation: Any) -> str:
    """Return the text of *operation* itself. For an object, or a method of one, that is its class."""
    kind = type(operation)
    if kind is FunctionType and operation.__closure__ is None and "<" not in operation.__qualname__:
        return f"{operation.__module__}:{operation.__qualname__}"
    if kind is partial:
        given = [_argument(value) for value in operation.args]
        if operation.keywords:
            given.append(_argument(operation.keywords))
        return f"{_name(operation.func)}[{','.join(given)}]"
    if hasattr(operation, "__func__"):
        owner = operation.__self__
        return f"{_name(operation.__func__)} of {path_of(owner if isinstance(owner, type) else type(owner))}"
    if not hasattr(operation, "__qualname__"):
        return _name_of_object(operation)
    name = path_of(operation)
    if "<lambda>" in name:  # its code changes with each release, and outcomes outlive that
        raise TypeError(f"a lambda ({name}) has no name of its own: make it a function with a name")
    return f"{name}{_dumps_sorted(_brought_along(operation))}" if "<" in name else name


def _name_of_object(operation: Any) -> str:
    kind = type(operation)
    if is_dataclass(kind):
        return f"a {_dumps_sorted(_tagged(operation))}"
    if type(kind.__call__) is not FunctionType:  # written in C, as `methodcaller` is: its state is hidden
        raise TypeError(f"a {path_of(kind)} hides the function that it calls")
    return f"a {path_of(kind)}"


def _argument(value: Any) -> str:
    kind = type(value)
    if kind is str:
        return _quote(value)
    if kind is int:
        return str(value)
    return _name(value) if kind is FunctionType else _dumps_sorted(_tagged(value, _argument_only))


# -- values -------------------------------------------------------------------------------------------------


def _refuse(value: Any) -> Any:
    raise TypeError(f"the type {type(value).__name__} is none of {ALLOWED}")


def _tagged(value: Any, otherwise: Callable[[object], Any] = _refuse) -> Any:
    """Return *value* in terms of JSON. A value without a tag is passed to *otherwise*."""
    kind = type(value)
    if kind in _NATURAL:
        return value
    if kind is list or kind is tuple:
        parts = [_tagged(one, otherwise) for one in value]
        return parts if kind is list else {"~tuple": parts}
    if kind is dict:
        return _tagged_dict(value, otherwise)
    if isinstance(value, Enum) or is_dataclass(kind):
        return _tagged_instance(value, otherwise)
    return _tagged_other(kind, value, otherwise)


def _tagged_other(kind: type, value: Any, otherwise: Callable[[object], Any]) -> Any:
    # The text of arguments must never change: their fingerprint is compared with old records.
    returned = otherwise is _refuse
    if isinstance(value, str):  # a subclass, such as a text that is marked as safe
        return _tagged_text(value) if returned else str.__str__(value)
    tag = _TAG_OF.get(kind)
    if tag is None:
        return otherwise(value)
    zoned = returned and kind in {datetime, time} and (value.tzinfo is not None or value.fold)
    return {tag: _zoned(value) if zoned else _TAGS[tag][1](value)}


def _tagged_text(value: str) -> dict[str, Any]:
    kind: Any = type(value)
    attributes = getattr(value, "__dict__", {})
    text = str.__str__(value)
    made = _text(path_of(kind), text, attributes)
    if type(made) is not kind or slots_of(kind) or str.__str__(made) != text:
        _refuse(value)
    return {"~text": [path_of(kind), text, {name: _tagged(one) for name, one in attributes.items()}]}


def _text(path: str, text: str, attributes: dict[str, Any]) -> Any:
    kind = found_at(path)
    made: Any = str.__new__(kind, text)
    if attributes:
        made.__dict__.update(attributes)
    return made


def _zoned(value: Any) -> Any:
    """Return ISO text if that tells the zone; else a list: the time without its zone, the zone, the fold."""
    zone = value.tzinfo
    if type(zone) is timezone and _own_name(zone) is None and not value.fold:
        return value.isoformat()
    return [value.replace(tzinfo=None, fold=0).isoformat(), _encoded_zone(value, zone), value.fold]


def _own_name(zone: timezone) -> str | None:
    name = zone.tzname(None)
    return None if name == timezone(zone.utcoffset(None)).tzname(None) else name


def _encoded_zone(value: Any, zone: Any) -> Any:
    """Return the name of *zone*; for a fixed offset, its parts and its own name; for no zone, None."""
    if zone is None:
        return None
    if type(zone) is timezone:
        offset = zone.utcoffset(None)
        return [offset.days, offset.seconds, offset.microseconds, _own_name(zone)]
    if type(zone) is ZoneInfo and zone.key:
        found = ZoneInfo(zone.key)
        if value.replace(tzinfo=found).utcoffset() == value.utcoffset():
            return zone.key
    raise TypeError(f"a {path_of(type(zone))} is no zone that can be found again: take a ZoneInfo or timezone.utc")


def _zone(encoded: Any) -> Any:
    if encoded is None:
        return None
    if isinstance(encoded, str):
        return ZoneInfo(encoded)
    days, seconds, microseconds, name = encoded
    offset = timedelta(days, seconds, microseconds)
    return timezone(offset) if name is None else timezone(offset, name)


def _moment(kind: Any, encoded: Any) -> Any:
    if isinstance(encoded, str):
        return kind.fromisoformat(encoded)
    moment, zone, fold = encoded
    return kind.fromisoformat(moment).replace(tzinfo=_zone(zone), fold=fold)


def _tagged_dict(value: dict[Any, Any], otherwise: Callable[[object], Any]) -> dict[str, Any]:
    if all(type(name) is str and not name.startswith("~") for name in value):
        return {name: _tagged(one, otherwise) for name, one in value.items()}
    pairs = [[_tagged(name, otherwise), _tagged(one, otherwise)] for name, one in value.items()]
    return {"~dict": pairs if otherwise is _refuse else sorted(pairs, key=_dumps_sorted)}


def _tagged_instance(value: Any, otherwise: Callable[[object], Any]) -> Any:
    kind = type(value)
    if "<" in kind.__qualname__:  # a local class cannot be imported
        return otherwise(value)
    if otherwise is _refuse and found_at(path_of(kind)) is not kind:
        raise TypeError(f"{path_of(kind)} is another class")
    if isinstance(value, Enum):
        # A combination of flags has no name to look up.
        return {"~enum": [path_of(kind), value.name if value.name in kind.__members__ else [_tagged(value.value)]]}
    own = {one.name: getattr(value, one.name) for one in fields(value)}
    # `_made` raises for an instance that could not be made again, such as an ORM's.
    if otherwise is _refuse and _attributes_of(_made(kind, own)) != _attributes_of(value):
        raise TypeError(f"a {path_of(kind)} with attributes that are no fields would not come back as it is")
    return {"~dataclass": [path_of(kind), {name: _tagged(one, otherwise) for name, one in own.items()}]}


def _attributes_of(value: Any) -> set[str]:
    return set(getattr(value, "__dict__", ()))


_TAGS: Final[dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]]] = {
    "~bytes": (bytes, lambda value: b64encode(value).decode(), b64decode),
    "~decimal": (Decimal, str, Decimal),
    "~datetime": (datetime, datetime.isoformat, partial(_moment, datetime)),
    "~date": (date, date.isoformat, date.fromisoformat),
    "~time": (time, time.isoformat, partial(_moment, time)),
    "~timedelta": (
        timedelta,
        lambda value: [value.days, value.seconds, value.microseconds],
        lambda parts: timedelta(parts[0], parts[1], parts[2]),
    ),
    "~uuid": (UUID, str, UUID),
}
_TAG_OF: Final = {kind: tag for tag, (kind, _, _) in _TAGS.items()}


def _untagged(found: dict[str, Any]) -> Any:
    if len(found) != 1:
        return found
    ((tag, value),) = found.items()
    if not tag.startswith("~"):
        return found
    if tag == "~tuple":
        return tuple(value)
    if tag == "~dict":
        return {name: one for name, one in value}  # noqa: C416 - a dict of lists is none
    if tag == "~text":
        return _text(*value)
    return _instance(*value) if tag in {"~enum", "~dataclass"} else _TAGS[tag][2](value)


def _instance(path: str, encoded: Any) -> Any:
    kind = found_at(path)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind[encoded] if isinstance(encoded, str) else kind(*encoded)
    if not is_dataclass(kind) or {one.name for one in fields(kind)} != set(encoded):
        raise ValueError(f"{path} has other fields than when the outcome was recorded")
    return _made(kind, encoded)


def _made(kind: Any, parts: dict[str, Any]) -> Any:
    """Make an instance of *kind* with the attributes *parts*, without a call of its ``__init__``."""
    made: Any = object.__new__(kind)
    for name, value in parts.items():
        object.__setattr__(made, name, value)
    return made


# -- names --------------------------------------------------------------------------------------------------


def path_of(named: Any) -> str:
    """Return module and qualified name of a class or function."""
    return f"{getattr(named, '__module__', None)}:{named.__qualname__}"


def found_at(path: str) -> Any:
    """Return the object at *path*. Raise the error of importing it."""
    module, _, names = path.partition(":")
    found: Any = import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


def _argument_only(value: Any) -> Any:
    """Return the text of a function or class: it may be an argument of an operation, but no outcome."""
    return {"~callable": _name(value)} if callable(value) else _refuse(value)


def _brought_along(function: Any) -> list[Any]:
    """Return the values that a nested function has in itself: its closed-over variables and its defaults."""
    code = getattr(function, "__code__", None)
    cells = zip(getattr(code, "co_freevars", ()), getattr(function, "__closure__", None) or (), strict=True)
    closed = {name: cell.cell_contents for name, cell in cells}
    closed |= {"defaults": getattr(function, "__defaults__", None) or ()}
    closed |= {"keywords": getattr(function, "__kwdefaults__", None) or {}}
    return [_kept(function, name, value) for name, value in sorted(closed.items())]


def _kept(function: Any, name: str, value: Any) -> Any:
    try:
        return [name, _tagged(value, _argument_only)]
    except Exception as error:
        raise TypeError(f"{function.__qualname__} closes over {name} ({said(error)})") from error
