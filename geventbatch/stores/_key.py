"""A key as its column has it: 42 and "42" are one row, and so they have to be one batch. Imports no vendor."""

from __future__ import annotations

import re
from datetime import date, datetime
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

_NUMBER: Final = re.compile(r"[+-]?[0-9]+", re.ASCII)


def normalize(key: Hashable, column: str, kind: type | None) -> Hashable:
    """The value of type *kind* that *key* stands for; where *kind* is None or an unknown type, *key* as it is.

    Raises:
        TypeError: Its type cannot be such a key. It names the key and the *column*.
        ValueError: Its type can, and its value is none.
    Switches: no.
    """
    convert = _CONVERSIONS.get(kind) if kind is not None else None
    if convert is None or type(key) is kind:
        return key
    try:
        converted: Hashable = convert(key) if not isinstance(key, bool) else None
    except (ValueError, InvalidOperation):
        raise ValueError(f"{key!r} is no key for the column {column}, which has values of type {_name(kind)}") from None
    if converted is None:
        raise TypeError(
            f"{key!r} is no key for the column {column}: it has values of type {_name(kind)}, not {type(key).__name__}"
        )
    return converted


def normalize_all(key: Hashable, columns: Sequence[tuple[str, type | None]]) -> Hashable:
    """The same for a key of several columns, a tuple."""
    if len(columns) == 1:
        return normalize(key, *columns[0])
    names = ", ".join(name for name, _ in columns)
    if not isinstance(key, tuple):
        raise TypeError(f"{key!r} is no key for the columns {names}: pass a tuple of {len(columns)} values")
    if len(key) != len(columns):
        raise ValueError(f"{key!r} is no key for the columns {names}: it has {len(key)} values, not {len(columns)}")
    return tuple(normalize(part, *column) for part, column in zip(key, columns, strict=True))


def _integer(key: Any) -> int | None:
    if isinstance(key, int):
        return int(key)
    if isinstance(key, str):
        if not _NUMBER.fullmatch(key):
            raise ValueError(key)
        return int(key)
    return None


def _text(key: Any) -> str | None:
    if isinstance(key, str):
        return str(key)
    return str(key) if isinstance(key, (int, UUID)) else None


def _uuid(key: Any) -> UUID | None:
    if isinstance(key, str):
        return UUID(key)
    return UUID(bytes=key) if isinstance(key, bytes) else None


def _decimal(key: Any) -> Decimal | None:
    return Decimal(key) if isinstance(key, (int, str)) else None


def _bytes(key: Any) -> bytes | None:
    return bytes(key) if isinstance(key, (bytearray, memoryview)) else None


def _date(key: Any) -> date | None:
    return date.fromisoformat(key) if isinstance(key, str) else None


def _datetime(key: Any) -> datetime | None:
    return datetime.fromisoformat(key) if isinstance(key, str) else None


_CONVERSIONS: Final[dict[type, Callable[[Any], Hashable]]] = {
    int: _integer,
    str: _text,
    UUID: _uuid,
    Decimal: _decimal,
    bytes: _bytes,
    date: _date,
    datetime: _datetime,
}


def _name(kind: type | None) -> str:
    return "any" if kind is None else kind.__name__
