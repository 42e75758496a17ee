"""Statements that SQLAlchemy compiles once for each store: texts with places for values, which psycopg 3 puts in."""

from __future__ import annotations

import re
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary, ref

import sqlalchemy as sa

from geventbatch.stores._sql import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from psycopg.abc import Transformer
    from psycopg.pq.abc import PGresult
    from sqlalchemy import Dialect
    from sqlalchemy.sql.base import Executable

_PLACE: Final = re.compile(r"%(?:\((\w+)\)s|%)")

_CHECKED: Final = (
    "WITH changed AS (%s\n) SELECT CASE count(*) WHEN %d THEN 1 "  # noqa: S608 - of a statement of SQLAlchemy's
    "ELSE CAST(count(*) || ' " + errors.MARK + "' AS integer) END FROM changed"
)


def checked(statement: str, rows: int) -> str:
    """Return a statement that fails, by a text that is no number, unless *statement* returns exactly so many *rows*."""
    return _CHECKED % (statement, rows)


class Text:
    """A compiled statement.

    Args:
        query: As the driver would get it, with its places as ``%(name)s``.
        binders: By name, what prepares a value for the driver; None: nothing does.
    """

    def __init__(self, query: str, binders: dict[str, Callable[[Any], Any] | None]) -> None:
        self._query = query
        self._binders = binders
        pieces, names = [""], []
        end = 0
        for place in _PLACE.finditer(query):
            pieces[-1] += query[end : place.start()]
            end = place.end()
            if place[1] is None:
                pieces[-1] += "%"
            else:
                names.append(place[1])
                pieces.append("")
        pieces[-1] += query[end:]
        self._first = pieces[0]
        self._places: list[tuple[str, Callable[[Any], Any] | None, str]] = [
            (name, binders[name], piece) for name, piece in zip(names, pieces[1:], strict=True)
        ]

    def changing(self, rows: int) -> Text:
        """Return a text that fails unless the statement changes exactly so many *rows*."""
        return Text(checked(f"{self._query}\n RETURNING 1", rows), self._binders)

    def of(self, parameters: dict[str, Any], transformer: Transformer) -> str | None:
        """Return the statement with its values; None if only a cursor can tell how, or what is wrong."""
        whole = [self._first]
        try:
            for name, bind, piece in self._places:
                value = parameters[name]
                if bind is not None:
                    value = bind(value)
                if isinstance(value, float):  # a bare number would be a decimal
                    return None
                whole += (transformer.as_literal(value).decode(transformer.encoding), piece)
        except Exception:
            return None
        return "".join(whole)


class Fixed:
    """A statement that is sent with other values each time, but never as another text."""

    def __init__(self, statement: Any, dialect: Dialect) -> None:
        compiled = statement.compile(dialect=dialect)
        binders = {
            name: bind.type.dialect_impl(dialect).bind_processor(dialect) for name, bind in compiled.binds.items()
        }
        self.text: Final = Text(str(compiled), binders)
        self.changing: Final = None if isinstance(statement, sa.Select) else self.text.changing(1)
        self._dialect = dialect
        self._types = (
            [column.type.dialect_impl(dialect) for column in statement.selected_columns]
            if isinstance(statement, sa.Select)
            else []
        )
        # -- mutable state ---------------------------------------------------------------------------------
        self._readers: dict[tuple[int, ...], list[Callable[[Any], Any] | None]] = {}

    def row(self, result: PGresult, transformer: Transformer) -> Sequence[Any] | None:
        """Return the one row of *result*; None if it has none."""
        if not result.ntuples:
            return None
        transformer.set_pgresult(result)
        oids = tuple(map(result.ftype, range(result.nfields)))
        readers = self._readers.get(oids)
        if readers is None:
            readers = self._readers[oids] = [
                of.result_processor(self._dialect, oid) for of, oid in zip(self._types, oids, strict=True)
            ]
        values = transformer.load_row(0, tuple)
        return [value if read is None else read(value) for read, value in zip(readers, values, strict=True)]


_fixed: Final[WeakKeyDictionary[Any, Callable[[], Fixed | None]]] = WeakKeyDictionary()


def fix(statement: Executable, dialect: Dialect) -> None:
    """Note that a store has made *statement* once, and executes it on engines of *dialect*."""
    _fixed[statement] = cache(partial(_compiled, ref(statement), dialect))


def fixed(statement: Executable) -> Fixed | None:
    """Return the compiled form of *statement*; None for one that has no such form."""
    found = _fixed.get(statement)
    return None if found is None else found()


def _compiled(statement: ref[Any], dialect: Dialect) -> Fixed | None:
    found: Any = statement()
    compiled = found.compile(dialect=dialect)
    # Values of its own, as of a column's ``onupdate``; or a text that depends on the values.
    varies = compiled.prefetch or compiled.literal_execute_params or compiled.post_compile_params
    return None if varies or compiled.escaped_bind_names else Fixed(found, dialect)
