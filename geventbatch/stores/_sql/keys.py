"""A key as its column has it: 42 and "42" are one row, and so one batch. Imports no vendor.

A key that is equal to a value of the column becomes that value: a member of ``class Line(str, Enum)`` becomes its text.
A key that no row can have is refused here, at the door: many databases would take it for another value.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from datetime import date, datetime
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from geventbatch._safe_repr import shown
from geventbatch.errors import ImpossibleKey

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Hashable, Sequence

_NUMBER: Final = re.compile(r"[+-]?[0-9]+", re.ASCII)

_EXACT: Final = Context(prec=MAX_PREC, Emin=MIN_EMIN, Emax=MAX_EMAX)

_MOST_DIGITS: Final = 4300
"""Digits of an integer that is given as a text: parsing takes a time that grows with the square of their number."""

_LONGEST_SHOWN: Final = 200
"""Characters of a key in a message."""


@dataclass(frozen=True, slots=True)
class KeyColumn:
    """A column of the key: its type, and its limits."""

    name: str
    kind: type | None
    """The Python type of its values. None, or an unknown type: keys are taken as they are."""
    longest: int = sys.maxsize
    """Characters of a text."""
    takes_nul: bool = True
    """A text may contain a NUL."""
    least: float = -math.inf
    """The smallest integer."""
    most: float = math.inf
    digits: int = 131_072
    """Digits of a decimal before its point; PostgreSQL's limit unless given."""
    decimals: int = 16_383
    """Digits of a decimal after its point."""

    def normalize(self, key: Hashable) -> Hashable:
        """Return the column's value for *key*.

        Raises:
            TypeError: Keys of this type are impossible. Names the key and the column.
            ImpossibleKey: No row can have this key.
        Switches: no.
        """
        kind = self.kind
        if kind is str and type(key) is str and len(key) <= self.longest and key.isprintable():
            return key  # nearly all keys
        value: Any = key
        if type(key) is not kind:
            convert = _CONVERSIONS.get(kind) if kind is not None else None
            if convert is None:
                return key
            value = self._converted(key, convert)
        check = _CHECKS.get(kind)
        why = None if check is None else check(value, self)
        if why is not None:
            raise ImpossibleKey(f"{shortened(key)} is no key for the column {self.name}: {why}", key=key)
        return value  # type: ignore[no-any-return]

    def _converted(self, key: Hashable, convert: Callable[[Any], Hashable]) -> Hashable:
        try:
            converted = None if isinstance(key, bool) else convert(key)
        except (ValueError, OverflowError, InvalidOperation):
            raise ImpossibleKey(
                f"{shortened(key)} is no key for the column {self.name}, which has values of type {_name(self.kind)}",
                key=key,
            ) from None
        if converted is None:
            raise TypeError(
                f"{shortened(key)} is no key for the column {self.name}: it has values of type {_name(self.kind)}, "
                f"not {type(key).__name__}"
            )
        return converted


def normalize(key: Hashable, column: str, kind: type | None) -> Hashable:
    """Return the value for *key* in a column of which only the type is known."""
    return KeyColumn(column, kind).normalize(key)


def normalize_all(key: Hashable, columns: Sequence[KeyColumn]) -> Hashable:
    """Return the values for *key* in several columns: a tuple."""
    if len(columns) == 1:
        return columns[0].normalize(key)
    names = ", ".join(column.name for column in columns)
    if not isinstance(key, tuple):
        raise TypeError(f"{shortened(key)} is no key for the columns {names}: pass a tuple of {len(columns)} values")
    if len(key) != len(columns):
        raise ValueError(
            f"{shortened(key)} is no key for the columns {names}: it has {len(key)} values, not {len(columns)}"
        )
    return tuple(column.normalize(part) for part, column in zip(key, columns, strict=True))


def shortened(key: object) -> str:
    """Return the `repr` of *key*, cut off for a message."""
    told = shown(key)
    return told if len(told) <= _LONGEST_SHOWN else f"{told[:_LONGEST_SHOWN]}…"


def hint_of_several(key: object, names: Container[Any]) -> str:
    """Return the end of the message about a wrong *key* of a store of *names*: a hint if it consists of such keys."""
    parts = key if isinstance(key, tuple | list) else ()
    pairs = [one for one in parts if isinstance(one, tuple | list) and len(one) == 2]  # noqa: PLR2004 - a pair
    are_keys = len(pairs) == len(parts) > 0 and all(isinstance(one[0], str) and one[0] in names for one in pairs)
    return "; these are several keys: call run_across() with a list of them" if are_keys else ""


def row_key(asked: Any, found: Any) -> Any:
    """Return the key as its row has it, which was found by the key *asked* for.

    By its collation, a database may take several texts for one; the row's own text is the same for all of them. For
    other types, return *asked*: it is equal to the row's value, in the form of the driver.
    """
    if isinstance(asked, tuple):
        return tuple(row_key(one, other) for one, other in zip(asked, found, strict=True))
    return found if isinstance(found, str) and isinstance(asked, str) else asked


# -- conversions ----------------------------------------------------------------------------------------------
#
# By methods of the plain types, since a subclass (an Enum, say) may override them. None: of a wrong type.


def _integer(key: Any) -> int | None:
    if isinstance(key, int):
        return int(key)
    if isinstance(key, str):
        if len(key) > _MOST_DIGITS or not _NUMBER.fullmatch(key):
            raise ValueError(key)
        return int(str.__str__(key))
    return None


def _text(key: Any) -> str | None:
    if isinstance(key, str):
        return str.__str__(key)
    if isinstance(key, int):
        return int.__repr__(key)
    return UUID.__str__(key) if isinstance(key, UUID) else None


def _uuid(key: Any) -> UUID | None:
    if isinstance(key, UUID):
        return UUID(int=key.int)
    if isinstance(key, str):
        return UUID(str.__str__(key))
    return UUID(bytes=bytes(key)) if isinstance(key, bytes) else None


def _decimal(key: Any) -> Decimal | None:
    if isinstance(key, str):
        key = str.__str__(key)
    return Decimal(key) if isinstance(key, (int, str, Decimal)) else None


def _float(key: Any) -> float | None:
    return float(key) if isinstance(key, (int, str, float, Decimal)) else None


def _bytes(key: Any) -> bytes | None:
    return bytes(key) if isinstance(key, (bytes, bytearray, memoryview)) else None


def _date(key: Any) -> date | None:
    if isinstance(key, date) and not isinstance(key, datetime):
        return date(key.year, key.month, key.day)
    return date.fromisoformat(str.__str__(key)) if isinstance(key, str) else None


def _datetime(key: Any) -> datetime | None:
    if isinstance(key, datetime):
        return datetime.combine(date(key.year, key.month, key.day), key.timetz())
    return datetime.fromisoformat(str.__str__(key)) if isinstance(key, str) else None


_CONVERSIONS: Final[dict[type, Callable[[Any], Hashable]]] = {
    int: _integer,
    str: _text,
    UUID: _uuid,
    Decimal: _decimal,
    float: _float,
    bytes: _bytes,
    date: _date,
    datetime: _datetime,
}

KEY_TYPES: Final = frozenset(_CONVERSIONS)
"""The types to which keys are converted."""


# -- checks: why no row can have a key ------------------------------------------------------------------------


def _text_fits(key: str, column: KeyColumn) -> str | None:
    if len(key) > column.longest:
        return f"it has {len(key)} characters, and the column has room for {column.longest}"
    if key.isprintable():  # then it has no NUL, and no half of a surrogate pair
        return None
    if "\0" in key and not column.takes_nul:
        return "it has a NUL in it, which no text in this database has"
    try:
        key.encode()
    except UnicodeEncodeError as error:
        return f"it has no UTF-8 form ({error.reason})"
    return None


def _integer_fits(key: int, column: KeyColumn) -> str | None:
    if column.least <= key <= column.most:
        return None
    return f"the column has numbers from {column.least} to {column.most}"


def _decimal_fits(key: Decimal, column: KeyColumn) -> str | None:
    if not key.is_finite():
        return "it is no number"
    if not key:
        return None
    if key.adjusted() >= column.digits:
        return f"the column has room for {column.digits} digits before the point"
    exponent = _EXACT.normalize(key).as_tuple().exponent
    if isinstance(exponent, int) and -exponent > column.decimals:
        return f"the column has room for {column.decimals} digits after the point"
    return None


def _float_fits(key: float, _: KeyColumn) -> str | None:
    return None if math.isfinite(key) else "it is no number"


_CHECKS: Final[dict[type | None, Callable[[Any, KeyColumn], str | None]]] = {
    str: _text_fits,
    int: _integer_fits,
    Decimal: _decimal_fits,
    float: _float_fits,
}


def _name(kind: type | None) -> str:
    return "any" if kind is None else kind.__name__
