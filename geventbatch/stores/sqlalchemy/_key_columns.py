"""The limits of a SQLAlchemy column as a key, in the store's database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from geventbatch.stores._sql.keys import KeyColumn
from geventbatch.stores.sqlalchemy._bound_values import python_type
from geventbatch.stores.sqlalchemy._documents import KEY_LENGTH, KeyText

if TYPE_CHECKING:
    from sqlalchemy.types import TypeEngine

_LIMITED: Final = ("postgresql", "mysql", "mariadb")
"""Databases that enforce a column's length and range. SQLite takes any text, and numbers of 64 bits."""

_BITS: Final = ((mysql.TINYINT, 8), (mysql.MEDIUMINT, 24), (sa.SmallInteger, 16), (sa.BigInteger, 64), (sa.Integer, 32))


def key_column(column: sa.ColumnElement[Any], dialect: sa.Dialect) -> KeyColumn:
    """Return *column* with its limits. Of a user's own type, only the Python type is known."""
    return KeyColumn(str(column), python_type(column), **_limits(column.type, dialect.name))


def folds(column: sa.ColumnElement[Any]) -> bool:
    """Return whether it may take several texts for one: by its collation, or as CITEXT and CHAR do."""
    return python_type(column) is str and not isinstance(column.type, KeyText)


def _limits(kind: TypeEngine[Any], database: str) -> dict[str, Any]:
    limited = database in _LIMITED
    if isinstance(kind, KeyText):
        return _limits(sa.String(KEY_LENGTH), database)
    if isinstance(kind, sa.Enum):
        return {}
    if isinstance(kind, sa.String):
        longest = {"longest": kind.length} if limited and kind.length else {}
        return {"takes_nul": database != "postgresql", **longest}
    if isinstance(kind, sa.Integer):
        least, most = _range(kind, limited=limited)
        return {"least": least, "most": most}
    if isinstance(kind, sa.Numeric) and not isinstance(kind, sa.Float) and limited:
        return _places(kind, database)
    return {}


def _range(kind: sa.Integer, *, limited: bool) -> tuple[int, int]:
    bits = next(found for parent, found in _BITS if isinstance(kind, parent)) if limited else 64
    if limited and getattr(kind, "unsigned", False):
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _places(kind: sa.Numeric[Any], database: str) -> dict[str, int]:
    precision, decimals = kind.precision, kind.scale or 0
    if precision is None:
        if database == "postgresql":
            return {}
        precision = 10
    return {"digits": precision - decimals, "decimals": decimals}
