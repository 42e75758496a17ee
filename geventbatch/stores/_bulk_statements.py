"""The statements for many documents: on PostgreSQL one for all of them, which takes an array for each column."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.types import TypeDecorator

from geventbatch.stores._documents import KeyText, StateText

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from sqlalchemy.types import TypeEngine

_POSTGRESQL: Final[sa.Dialect] = cast("Any", postgresql.dialect)()


class Together:
    """A statement for many documents, which takes an array for each column."""

    def __init__(self, statement: Any, key: sa.Column[Any], names: Sequence[str]) -> None:
        self.key: Final = key
        self._statement = statement
        self._names = names

    def of(self, some: dict[Hashable, dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
        """The statement and its parameters."""
        return self._statement, {f"_{name}s": [values[f"_{name}"] for values in some.values()] for name in self._names}


def load_all(table: sa.Table, *, arrays: bool, locking: bool) -> sa.Select[*tuple[Any, ...]]:
    columns = table.c
    if arrays:
        asked: Any = columns.key == sa.any_(sa.bindparam("_keys", type_=_array(_in_array(columns.key.type))))
    else:
        asked = columns.key.in_(sa.bindparam("_keys", expanding=True))
    select = sa.select(columns.key, columns.state, columns.version).where(asked)
    return select.order_by(columns.key).with_for_update() if locking else select


def statements_for_all(table: sa.Table) -> tuple[Together, Together, Together]:
    """UPDATE, DELETE and INSERT of PostgreSQL, which lock in the order of the keys and tell whom they found."""
    columns = table.c
    asked = _asked(table, "key", "version", "state", "new")
    as_loaded = sa.and_(columns.key == asked.c.key, columns.version == asked.c.version)
    locked = _locked(table, asked)
    update = (
        sa.update(table).where(as_loaded, columns.key == locked.c.key).values(state=asked.c.state, version=asked.c.new)
    )
    gone = _asked(table, "key", "version")
    locked = _locked(table, gone)
    as_loaded = sa.and_(columns.key == gone.c.key, columns.version == gone.c.version)
    delete = sa.delete(table).where(as_loaded, columns.key == locked.c.key)
    new = _asked(table, "key", "state", "new")
    select = sa.select(new.c.key, new.c.state, new.c.new).order_by(new.c.key)
    add = postgresql.insert(table).from_select(["key", "state", "version"], select).on_conflict_do_nothing()
    return (
        Together(update, columns.key, ("key", "version", "state", "new")),
        Together(delete, columns.key, ("key", "version")),
        Together(add, columns.key, ("key", "state", "new")),
    )


def _asked(table: sa.Table, *names: str) -> sa.CTE:
    """The parameters of these names, a row for each document."""
    columns = table.c
    types: dict[str, TypeEngine[Any]] = {
        "key": _in_array(columns.key.type),
        "version": sa.BigInteger(),
        "state": _in_array(columns.state.type),
        "new": sa.BigInteger(),
    }
    arrays = [sa.bindparam(f"_{name}s", type_=_array(types[name])) for name in names]
    unnested = sa.func.unnest(*arrays).table_valued(*[sa.column(name, types[name]) for name in names])
    return sa.select(unnested.render_derived(name="a")).cte("asked")


def _array(kind: TypeEngine[Any]) -> TypeEngine[Any]:
    if isinstance(kind, sa.Integer) or type(kind) is sa.Text:
        return _OneText(kind)
    return sa.ARRAY(kind)


class _OneText(TypeDecorator[list[Any]]):
    """An array of texts or numbers, sent as one text in PostgreSQL's own form.

    SQLAlchemy and the driver look at each value by itself, which took a fifth of the time of a bulk.
    """

    impl = sa.ARRAY
    cache_ok = True

    def bind_processor(self, dialect: sa.Dialect) -> Any:  # noqa: ARG002 - it is for one of them
        array: Any = self.impl_instance
        quoted = str if isinstance(array.item_type, sa.Integer) else _quoted
        return lambda values: f"{{{','.join([quoted(value) for value in values])}}}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _locked(table: sa.Table, asked: sa.CTE) -> sa.CTE:
    columns = table.c
    as_loaded = sa.and_(columns.key == asked.c.key, columns.version == asked.c.version)
    joined = table.join(asked, as_loaded)
    return sa.select(columns.key).select_from(joined).order_by(columns.key).with_for_update(of=table).cte("locked")


def _in_array(kind: TypeEngine[Any]) -> TypeEngine[Any]:
    """A text without the length of its column: casting to that would cut off what is too long."""
    return sa.Text() if isinstance(kind, (sa.String, KeyText, StateText)) else kind


def fits(column: sa.Column[Any]) -> bool:
    """Whether its values are the same after a cast to its type."""
    return "(" not in _in_array(column.type).compile(dialect=_POSTGRESQL)
