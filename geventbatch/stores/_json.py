"""Checks for what JSON loses: documents that the next load would change. Imports no vendor."""

from __future__ import annotations

import json
import marshal
from gc import get_referents
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

from geventbatch._safe_repr import shown

if TYPE_CHECKING:
    from collections.abc import Callable

_PLAIN: Final = frozenset({str, int, float, bool, type(None)})
_CONTAINERS: Final = frozenset({dict, list})


_encode: Final = json.JSONEncoder(check_circular=False).encode
_encode_compact: Final = json.JSONEncoder(
    check_circular=False, ensure_ascii=False, allow_nan=False, separators=(",", ":")
).encode


def encode(resource: Any) -> str:
    """Return the same as `json.dumps`, without its search of each container for a circle."""
    try:
        return _encode(resource)
    except RecursionError:
        return json.dumps(resource)  # names the circle, if there is one
    except TypeError as error:
        raise _unencodable(resource, error) from None


def encode_compact(resource: Any) -> str:
    """Return JSON without spaces, in which only control characters are escaped."""
    try:
        return _encode_compact(resource)
    except RecursionError:
        return json.dumps(resource, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except TypeError as error:
        raise _unencodable(resource, error) from None


packed: Final[Callable[[Any], bytes]] = marshal.dumps
"""Copies a resource that was decoded from JSON. Raises a `ValueError` if it contains anything else.

It takes a fraction of the time of encoding. A tuple stays a tuple, so that encoding the copy still finds it. (A
buffer, as a bytearray, becomes bytes; the encoder refuses either.)
"""


unpacked: Final = marshal.loads
"""Restores the resource from that copy."""


def check_of(decode: object) -> Callable[[Any], None] | None:
    """Return the check for losses; None if *decode* is the user's own, whose result is unknown."""
    return check_lossless if decode is json.loads else None


def check_lossless(resource: Any) -> None:
    """Raise a `TypeError` that names the culprit unless JSON would return an equal *resource*.

    Names have to be texts, and containers dicts or lists: a list is not equal to a tuple. NaN, which is equal to
    nothing, is accepted.
    """
    # One level at a time, by C functions that need no Python loop over its values: each save that changes something
    # runs this, at a fraction of the cost of encoding.
    level, kinds = [resource], {type(resource)}
    while level:
        if not kinds <= _CONTAINERS:
            level = [plain for one in level if (plain := _container_of(one, resource)) is not None]
        values = get_referents(*level)
        # A dict that has only ever had texts as names refers to its values only; any other to both.
        if len(values) != sum(map(len, level)):
            values = _values_of(level, resource)
        found = {*map(type, values)}
        kinds = found - _PLAIN
        if len(kinds) == len(found):
            level = values
        else:
            level = [value for value in values if type(value) in kinds] if kinds else []


def _values_of(level: list[Any], resource: Any) -> list[Any]:
    """Return the values in the dicts and lists of *level*. Raise a `TypeError` unless all names are texts."""
    try:
        "".join(chain.from_iterable(one for one in level if type(one) is dict))
    except TypeError:
        raise _loss(resource) from None
    return list(chain.from_iterable(one.values() if type(one) is dict else one for one in level))


def _container_of(value: Any, resource: Any) -> Any:
    """Return a dict or a list that is equal to *value*; None if *value* has no contents to check."""
    if isinstance(value, (dict, list)):
        return dict(value.items()) if isinstance(value, dict) else list(value)
    if value is None or isinstance(value, (str, int, float)):
        return None
    raise _loss(resource)


def _loss(resource: Any) -> TypeError:
    found = _found(resource, "")
    assert found is not None  # noqa: S101 - the caller has found a loss
    return _refusal(found)


def _unencodable(resource: Any, error: TypeError) -> TypeError:
    """Return *error*, of encoding *resource*, as one that says where the culprit is and what to do."""
    try:
        found = _found(resource, "", loses=False)
    except RecursionError:
        return error
    return error if found is None else _refusal(found)


def _refusal(found: str) -> TypeError:
    return TypeError(
        f"{found}. Nothing of this operation was saved: make it of what JSON has, or give the store functions encode= "
        "and decode= that are each other's inverse"
    )


def _found(value: Any, path: str, *, loses: bool = True) -> str | None:
    """Return what in *value* JSON cannot represent (with *loses*: or would change), and where it is."""
    where = f" of the document at {path}" if path else " of the document"
    if isinstance(value, (dict, list)) or (isinstance(value, tuple) and not loses):
        found = _odd_name(value, where, loses=loses) if isinstance(value, dict) else None
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        inner = (_found(one, f"{path}[{shown(name)}]", loses=loses) for name, one in inside)
        return found or next(filter(None, inner), None)
    if isinstance(value, tuple):
        return f"the tuple {shown(value)}{where} would come back from JSON as a list, which is not equal to it"
    if value is None or isinstance(value, (str, int, float)):
        return None
    return f"the {type(value).__name__} {shown(value)}{where} would not come back from JSON"


def _odd_name(document: dict[Any, Any], where: str, *, loses: bool) -> str | None:
    for name in document:
        if name is not None and not isinstance(name, (str, int, float)):
            return f"the name {shown(name)}{where} is no text"
        if loses and not isinstance(name, str):
            told = repr(next(iter(json.loads(json.dumps({name: 0})))))
            return f"the name {shown(name)}{where} is no text, and JSON would give back {told} in its place"
    return None
