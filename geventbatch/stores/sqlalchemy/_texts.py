"""Statements that SQLAlchemy compiles once for each store: texts with places for values, which psycopg 3 puts in."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary, ref

import sqlalchemy as sa

from geventbatch.stores._sql.joined import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from psycopg.abc import Transformer
    from psycopg.pq.abc import PGresult
    from sqlalchemy import Dialect
    from sqlalchemy.sql.base import Executable


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
