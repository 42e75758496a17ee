"""The value that a load returns for a mapped column, where an operation has assigned another one.

The database keeps what fits the column: an amount with its decimal places, a day without the time, the number for a
text of digits. Later operations have to find that. A value whose loaded form is uncertain stays as it was assigned.
"""

from __future__ import annotations

import re
from datetime import date, datetime, time, timedelta, timezone
from decimal import ROUND_HALF_UP, Decimal, localcontext
from enum import Enum
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_interface,
    ip_network,
)
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects.postgresql import CIDR, INET
from sqlalchemy.types import TypeDecorator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import tzinfo

    from sqlalchemy.orm import InstanceState, Mapper

_KNOWN: Final = (
    sa.Integer,
    sa.Numeric,
    sa.Float,
    sa.String,
    sa.Boolean,
    sa.Date,
    sa.DateTime,
    sa.Time,
    sa.Uuid,
    INET,
    CIDR,
)
_ADDRESSES: Final = (IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network)
_SCALARS: Final = (bool, int, float, Decimal, str, date, time, UUID, Enum, *_ADDRESSES)

_TIMES: Final = (sa.Date, sa.DateTime, sa.Time)

_EVERYWHERE: Final = frozenset({bool, int, str})
"""Types of values whose loaded form is known for every column."""

_WHOLE: Final = re.compile(r"\s*[+-]?[0-9]+\s*")
_DECIMAL: Final = re.compile(r"\s*[+-]?[0-9]+(?:\.[0-9]+)?\s*")
_DAY: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")

_NUMERIC_OID: Final = 1700
_FLOAT_OID: Final = 701
"""PostgreSQL's type codes that SQLAlchemy's result processors expect."""

_MYSQL: Final = ("mysql", "mariadb")

_listened: Final[WeakKeyDictionary[type, set[str]]] = WeakKeyDictionary()
"""The attributes of each class that have a listener for assignments."""


class LoadedValue:
    """Converts the values of one column."""

    def __init__(self, column: sa.Column[Any], dialect: sa.Dialect) -> None:
        kind: Any = column.type.dialect_impl(dialect)
        variants: Any = getattr(column.type, "_variant_mapping", {})
        # The declared type: the driver's may be no CHAR any more, nor a Float.
        self._type: Any = _below(variants.get(dialect.name, column.type))
        self._dialect = dialect.name
        self._psycopg2 = dialect.driver == "psycopg2"
        self._addresses = not self._psycopg2 and getattr(dialect, "_native_inet_types", None) is not False
        self._of: Any = dialect  # knows whether it is MariaDB only after its first connection
        is_float = isinstance(self._type, sa.Float)
        self._bind: Callable[[Any], Any] | None = kind.bind_processor(dialect)
        self._result: Callable[[Any], Any] | None = kind.result_processor(
            dialect, _FLOAT_OID if is_float else _NUMERIC_OID
        )
        if isinstance(kind, sa.Time) and self._dialect in _MYSQL:
            self._result = None  # made for the driver's intervals
        self._is_plain = not isinstance(column.type, TypeDecorator) or isinstance(column.type, sa.Interval)
        self._keep = next((keep for kinds, keep in self._KEEPERS if isinstance(self._type, kinds)), LoadedValue._same)
        self.zoned = isinstance(self._type, (sa.Date, sa.DateTime))
        """The loaded value depends on the time zone of the database's session."""

    def __call__(self, value: Any, zone: tzinfo | None) -> Any:
        """Return what a load returns after *value* was saved; *zone* is the database session's, if known."""
        if isinstance(value, (bytearray, memoryview)) and isinstance(self._type, sa.LargeBinary):
            return bytes(value)
        if value is None or not isinstance(value, _SCALARS):
            return value
        try:
            found = value if self._bind is None else self._bind(value)
            found = self._keep(self, found, zone)
            return found if self._result is None else self._result(found)
        except Exception:  # the flush raises it again, as the error of the operation that assigned the value
            return value

    def knows(self, value: Any) -> bool:
        """Return whether the loaded form of *value*, an object in a column of numbers or texts, is known."""
        if self._is_plain and value is not None and isinstance(self._type, (sa.ARRAY, *_TIMES)):
            return self._knows_list(value) if isinstance(self._type, sa.ARRAY) else self._knows_time(value)
        if value is None or type(value) in _EVERYWHERE or isinstance(self._type, sa.LargeBinary):
            return True
        if isinstance(self._type, sa.String) and not isinstance(self._type, sa.Enum):
            return not isinstance(value, (float, Decimal)) and isinstance(value, _SCALARS)
        return isinstance(value, _SCALARS)

    def _knows_time(self, value: Any) -> bool:
        if self._dialect == "sqlite":  # it takes no others
            return True
        if isinstance(self._type, sa.DateTime):
            return isinstance(value, (date, timedelta))
        if isinstance(self._type, sa.Date):
            return isinstance(value, date) or (isinstance(value, str) and _DAY.fullmatch(value) is not None)
        zoned = self._dialect == "postgresql" and bool(self._type.timezone)
        return isinstance(value, time) and zoned == (value.tzinfo is not None)

    def _knows_list(self, value: Any) -> bool:
        """Return whether *value* is a list (of lists) whose items are of the types that a load returns."""
        kinds = fine(self._type.item_type)
        return type(value) is list and all(
            type(one) in kinds or (type(one) is list and self._knows_list(one)) for one in value
        )

    # -- the database's conversions of bound values -------------------------------------------------------------

    def _whole(self, value: Any, _: tzinfo | None) -> Any:
        if isinstance(value, str):
            return int(value) if _WHOLE.fullmatch(value) else value
        if isinstance(value, bool) and self._dialect == "postgresql":
            other = isinstance(self._type, (sa.BigInteger, sa.SmallInteger))
            return value if other else int(value)  # PostgreSQL takes no bool for the others
        if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
            return int(value)
        if self._dialect == "sqlite" or not isinstance(value, (float, Decimal)):
            return value
        return round(value) if isinstance(value, float) else int(value.quantize(Decimal(1), ROUND_HALF_UP))

    def _number(self, value: Any, _: tzinfo | None) -> Any:
        if self._dialect == "sqlite":  # it rounds numbers when they are loaded
            return value
        self._refuse_bool(value)
        if isinstance(value, str) and not _DECIMAL.fullmatch(value):
            return value
        if isinstance(value, float) and self._dialect == "postgresql":
            value = format(value, ".15g")
        found = Decimal(repr(value) if isinstance(value, float) else value)
        if self._psycopg2 and not found.is_finite():
            return Decimal("NaN")  # what psycopg2 sends for infinity
        scale = self._type.scale
        if scale is None and (self._dialect == "postgresql" or not found.is_finite()):
            return found
        with localcontext(prec=1100):
            return found.quantize(Decimal(1).scaleb(-(scale or 0)), ROUND_HALF_UP) if found.is_finite() else found

    def _float(self, value: Any, _: tzinfo | None) -> Any:
        self._refuse_bool(value)
        if isinstance(value, (int, Decimal)) or (isinstance(value, str) and self._dialect != "sqlite"):
            return float(value)
        return value

    def _refuse_bool(self, value: Any) -> None:
        """Leave a bool to PostgreSQL, which refuses it for such a number: the caller gets the server's error."""
        if isinstance(value, bool) and self._dialect == "postgresql":
            raise LookupError(value)

    def _text(self, value: Any, _: tzinfo | None) -> Any:
        if isinstance(value, bool):
            return str(value).lower() if self._dialect == "postgresql" else str(int(value))
        if isinstance(value, int):
            return str(value)
        if not isinstance(value, str) or not isinstance(self._type, sa.CHAR) or self._dialect == "sqlite":
            return value
        return value.ljust(self._type.length or 1) if self._dialect == "postgresql" else value.rstrip(" ")

    def _day(self, value: Any, zone: tzinfo | None) -> Any:
        if self._dialect == "sqlite":
            return value
        if isinstance(value, datetime):
            return self._local(value, zone).date()
        return date.fromisoformat(value) if isinstance(value, str) and _DAY.fullmatch(value) else value

    def _moment(self, value: Any, zone: tzinfo | None) -> Any:
        if self._dialect == "sqlite" or not isinstance(value, date):
            return value
        moment = value if isinstance(value, datetime) else datetime.combine(value, time())
        if self._dialect != "postgresql":
            return self._to_the_second(moment.replace(tzinfo=None))
        if not self._type.timezone:
            return self._local(moment, zone)
        if moment.tzinfo is not None:
            return moment if zone is None else self._with_offset(moment.astimezone(zone))
        found = moment.replace(tzinfo=zone, fold=0)
        is_one = zone is not None and found.utcoffset() == found.replace(fold=1).utcoffset()
        return self._with_offset(found) if is_one else value

    def _with_offset(self, moment: datetime) -> datetime:
        """Return *moment* as psycopg2 loads it: with a fixed offset, no zone."""
        offset = moment.utcoffset()
        return moment.replace(tzinfo=timezone(offset), fold=0) if self._psycopg2 and offset is not None else moment

    def _local(self, moment: datetime, zone: tzinfo | None) -> datetime:
        """Return *moment* in local time, without its zone."""
        if moment.tzinfo is None or self._dialect != "postgresql":
            return moment.replace(tzinfo=None)
        if zone is None:
            raise LookupError(moment)  # unknown
        return moment.astimezone(zone).replace(tzinfo=None)

    def _hour(self, value: Any, _: tzinfo | None) -> Any:
        if self._dialect not in _MYSQL or not isinstance(value, time):
            return value
        return self._to_the_second(datetime.combine(date(2000, 1, 1), value)).time()

    def _to_the_second(self, moment: datetime) -> datetime:
        fsp = getattr(self._type, "fsp", None) or 0
        if fsp or not moment.microsecond:
            return moment
        half = timedelta(0) if self._of.is_mariadb else timedelta(microseconds=500_000)
        return (moment + half).replace(microsecond=0)

    def _id(self, value: Any, _: tzinfo | None) -> Any:
        if self._dialect == "postgresql" and isinstance(value, str) and self._type.as_uuid:
            return UUID(value)
        return value

    def _address(self, value: Any, _: tzinfo | None) -> Any:
        """Return a host without the length of its network; a text if the driver returns texts."""
        found: Any = ip_network(value) if isinstance(self._type, CIDR) else ip_interface(value)
        if isinstance(self._type, INET) and found.network.prefixlen == found.max_prefixlen:
            found = found.ip
        return found if self._addresses else str(found)

    def _same(self, value: Any, _: tzinfo | None) -> Any:
        return value

    _KEEPERS: Final = (
        (sa.Float, _float),
        (sa.Numeric, _number),
        (sa.Integer, _whole),
        ((sa.Enum, sa.Boolean), _same),
        (sa.String, _text),
        (sa.DateTime, _moment),
        (sa.Time, _hour),
        (sa.Date, _day),
        (sa.Uuid, _id),
        ((INET, CIDR), _address),
    )


# -- the attributes -----------------------------------------------------------------------------------------------


def by_attribute(mapper: Mapper[Any], dialect: sa.Dialect) -> dict[str, LoadedValue]:
    """Return the converters of *mapper*'s attributes; from now on, guards are told when those are assigned."""
    found = {
        attribute.key: LoadedValue(column, dialect)
        for attribute in mapper.column_attrs
        if isinstance(column := attribute.columns[0], sa.Column) and _is_known(column.type)
    }
    listened = _listened.setdefault(mapper.class_, set())
    for name in found.keys() - listened:
        listened.add(name)
        attribute = getattr(mapper.class_, name)
        column = attribute.property.columns[0]  # tell of each assignment of a foreign key: relationships may follow it
        same = frozenset[type]() if column.foreign_keys else fine(column.type)
        event.listen(attribute, "set", _listener(name, same), raw=True)
    return found


def fine(kind: Any) -> frozenset[type]:
    """Return the Python types whose values come back unchanged, from any database."""
    if isinstance(kind, (sa.Enum, TypeDecorator, sa.CHAR)):
        return frozenset({type(None), getattr(kind, "enum_class", None) or type(None)})
    exact = (
        (sa.Boolean, bool),
        (sa.Integer, int),
        (sa.Float, float),
        (sa.String, str),
        (sa.Date, date),
        (sa.LargeBinary, bytes),
    )
    return frozenset({type(None), *(one for kinds, one in exact if isinstance(kind, kinds))})


def _is_known(kind: Any) -> bool:
    return isinstance(kind, (sa.LargeBinary, sa.ARRAY)) or isinstance(_below(kind), _KNOWN)


def _below(kind: Any) -> Any:
    return kind.impl_instance if isinstance(kind, TypeDecorator) else kind


def _listener(name: str, same: frozenset[type]) -> Callable[..., None]:
    def is_assigned(state: InstanceState[Any], value: object, *_: object) -> None:
        if type(value) not in same:
            guard = getattr(state.session, "batch_guard", None)
            if guard is not None:
                guard.has_assigned(state, name)

    return is_assigned


def assigned_attributes(
    state: InstanceState[Any], names: dict[str, LoadedValue]
) -> Iterator[tuple[InstanceState[Any], str]]:
    """Yield the attributes of a new instance that have a value."""
    return ((state, name) for name in names if state.dict.get(name) is not None)
