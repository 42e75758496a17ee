"""What JSON loses: documents of which the next load would not give what operations have made. Imports no vendor."""

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
    """What `json.dumps` gives, which looks at each container for a circle first."""
    try:
        return _encode(resource)
    except RecursionError:
        return json.dumps(resource)  # which says so, if there is one
    except TypeError as error:
        raise _unencodable(resource, error) from None


def encode_compact(resource: Any) -> str:
    """The same without a space, and in no more ASCII than the texts are."""
    try:
        return _encode_compact(resource)
    except RecursionError:
        return json.dumps(resource, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except TypeError as error:
        raise _unencodable(resource, error) from None


packed: Final[Callable[[Any], bytes]] = marshal.dumps
"""Gives a copy of a resource that came of JSON, exactly as it is. Raises a `ValueError` where something else is in it.

It takes a fraction of the time of encoding it, and a tuple in it is a tuple for who encodes it later. (What is a
buffer, as a bytearray, comes back as bytes; but that is refused when it is encoded, either way.)
"""


unpacked: Final = marshal.loads
"""What makes the resource once more, of such a copy."""


def check_of(decode: object) -> Callable[[Any], None] | None:
    """What looks for losses, however a resource is encoded; None where nobody knows what *decode* gives back."""
    return check_lossless if decode is json.loads else None


def check_lossless(resource: Any) -> None:
    """Raise a `TypeError`, which names the culprit, unless what JSON gives back is equal to *resource*.

    Names have to be texts, and what holds something has to be a dict or a list. (A tuple is equal to no list.) NaN,
    which is equal to nothing, comes back.
    """
    # All of a level at once, by functions that look at its values without a turn of Python's for each: it is done with
    # every save that changes something, and costs a fraction of encoding that.
    level, kinds = [resource], {type(resource)}
    while level:
        if not kinds <= _CONTAINERS:
            level = [plain for one in level if (plain := _container_of(one, resource)) is not None]
        values = get_referents(*level)
        # A dict whose names were all texts since it was made refers to its values only, any other one to both.
        if len(values) != sum(map(len, level)):
            values = _values_of(level, resource)
        found = {*map(type, values)}
        kinds = found - _PLAIN
        if len(kinds) == len(found):
            level = values
        else:
            level = [value for value in values if type(value) in kinds] if kinds else []


def _values_of(level: list[Any], resource: Any) -> list[Any]:
    """What is in the dicts and lists of *level*, all of whose names have to be texts."""
    try:
        "".join(chain.from_iterable(one for one in level if type(one) is dict))
    except TypeError:
        raise _loss(resource) from None
    return list(chain.from_iterable(one.values() if type(one) is dict else one for one in level))


def _container_of(value: Any, resource: Any) -> Any:
    """A dict or a list that is equal to *value*; None when there is nothing in that to look at."""
    if isinstance(value, (dict, list)):
        return dict(value.items()) if isinstance(value, dict) else list(value)
    if value is None or isinstance(value, (str, int, float)):
        return None
    raise _loss(resource)


def _loss(resource: Any) -> TypeError:
    found = _found(resource, "")
    assert found is not None  # noqa: S101 - who calls has seen it
    return _refusal(found)


def _unencodable(resource: Any, error: TypeError) -> TypeError:
    """What *error*, of encoding *resource*, leaves open: where it is, and what to do."""
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
    """Say what in *value* JSON has nothing for, or what it *loses* too, and where it is."""
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
