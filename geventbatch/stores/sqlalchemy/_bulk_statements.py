"""Statements for many documents; on PostgreSQL one for all, with an array for each column."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.types import TypeDecorator

from geventbatch.stores.sqlalchemy._documents import KeyText, StateText

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

    from sqlalchemy.types import TypeEngine

    from geventbatch.stores.sqlalchemy._documents import Mark

_TEXTS: Final = {sa.String, sa.VARCHAR, sa.Text, sa.TEXT, sa.Unicode, sa.UnicodeText}

_POSTGRESQL: Final[sa.Dialect] = cast("Any", postgresql.dialect)()


class Together:
    """A statement for many documents, with an array for each column."""

    def __init__(self, statement: Any, key: sa.ColumnElement[Any], names: Sequence[str]) -> None:
        self.key: Final = key
        """For RETURNING: the key as asked for, which the row may have in another form."""
        self._statement = statement
        self._names = names

    def of(self, some: Mapping[Hashable, dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
        """Return the statement and its parameters, for the changes of *some* documents."""
        return self._statement, _parameters(self._names, some)


def _parameters(names: Sequence[str], some: Mapping[Hashable, dict[str, Any]]) -> dict[str, Any]:
    return {f"_{name}s": [values[f"_{name}"] for values in some.values()] for name in names}


class Claim:
    """Locks rows in the order of their keys, and tells which of them are as loaded."""

    def __init__(self, table: sa.Table, mark: Mark, *, arrays: bool) -> None:
        """With *arrays*, the server compares the rows. Else only versions are compared here, and the writes compare."""
        self._compared = _compared(mark) if arrays else ()
        self._statement = _claimed(table, mark) if arrays else _locked_versions(table)

    def of(self, some: Mapping[Hashable, dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
        """Return the statement and its parameters, for the changes of *some* documents."""
        if not self._compared:
            return self._statement, {"_keys": list(some)}
        return self._statement, _parameters(self._compared, some)

    def as_loaded(
        self, found: Iterable[Any], some: Mapping[Hashable, dict[str, Any]], spelled: Mapping[Any, Hashable]
    ) -> set[Hashable]:
        """Return the keys of the rows in *found*, if they are as loaded; *spelled* has keys by those of their rows."""
        if self._compared:
            return {row.key for row in found}
        versions = {spelled.get(row.key, row.key): row.version for row in found}
        return {key for key, version in versions.items() if key in some and version == some[key]["_version"]}


def load_all(table: sa.Table, selected: Sequence[Any], *, arrays: bool, locking: bool) -> sa.Select[Any]:
    key = table.c.key
    select: Any = sa.select(key, *selected).where(_are_asked(key, arrays=arrays))
    return cast("sa.Select[Any]", select.order_by(key).with_for_update() if locking else select)


def ask_all(table: sa.Table, *, arrays: bool) -> sa.Select[Any]:
    """Return a statement that asks about keys as `load_all` does, and reads no row."""
    one: sa.Select[Any] = sa.select(sa.literal_column("1"))
    return one.where(_are_asked(table.c.key, arrays=arrays)).limit(0)


def _are_asked(key: sa.Column[Any], *, arrays: bool) -> sa.ColumnElement[bool]:
    if arrays:
        return key == sa.any_(sa.bindparam("_keys", type_=array_of(in_array(key.type))))
    return key.in_(sa.bindparam("_keys", expanding=True))


def statements_for_all(table: sa.Table, mark: Mark) -> tuple[Together, Together, Together, Together]:
    """Return PostgreSQL's UPDATE, the same of versions only, DELETE, and INSERT.

    They lock in the order of the keys, and return those found.
    """
    columns = table.c
    compared = _compared(mark)
    asked = _asked(table, *compared, "state", "new")
    locked = _locked(table, asked, mark)
    update = sa.update(table).where(_is_loaded(table, asked, mark), columns.key == locked.c.key)
    update = update.values(state=asked.c.state, version=asked.c.new)
    counted = _asked(table, *compared, "new")
    locked = _locked(table, counted, mark)
    count = sa.update(table).where(_is_loaded(table, counted, mark), columns.key == locked.c.key)
    count = count.values(version=counted.c.new)
    gone = _asked(table, *compared)
    locked = _locked(table, gone, mark)
    delete = sa.delete(table).where(_is_loaded(table, gone, mark), columns.key == locked.c.key)
    new = _asked(table, "key", "state", "new")
    select = sa.select(new.c.key, new.c.state, new.c.new).order_by(new.c.key)
    add = postgresql.insert(table).from_select(["key", "state", "version"], select).on_conflict_do_nothing()
    return (
        Together(update, asked.c.key, (*compared, "state", "new")),
        Together(count, counted.c.key, (*compared, "new")),
        Together(delete, gone.c.key, compared),
        Together(add, columns.key, ("key", "state", "new")),
    )


def _compared(mark: Mark) -> tuple[str, ...]:
    return ("key", "version") if mark.column is None else ("key", "version", "mark")


def _claimed(table: sa.Table, mark: Mark) -> sa.Select[Any]:
    asked = _asked_rows(table, *_compared(mark)).subquery("asked")  # no CTE: the statement begins with SELECT
    joined = table.join(asked, _is_loaded(table, asked, mark))
    return sa.select(asked.c.key).select_from(joined).order_by(table.c.key).with_for_update(of=table)


def _locked_versions(table: sa.Table) -> sa.Select[Any, Any]:
    columns = table.c
    asked = columns.key.in_(sa.bindparam("_keys", expanding=True))
    return sa.select(columns.key, columns.version).where(asked).order_by(columns.key).with_for_update()


def _is_loaded(table: sa.Table, asked: sa.FromClause, mark: Mark) -> sa.ColumnElement[bool]:
    is_loaded = sa.and_(table.c.key == asked.c.key, table.c.version == asked.c.version)
    return is_loaded if mark.column is None else sa.and_(is_loaded, mark.column == asked.c.mark)


def _asked(table: sa.Table, *names: str) -> sa.CTE:
    """Return the parameters of these names as a CTE, with a row for each document."""
    return _asked_rows(table, *names).cte("asked")


def _asked_rows(table: sa.Table, *names: str) -> sa.Select[Any]:
    columns = table.c
    types: dict[str, TypeEngine[Any]] = {
        "key": in_array(columns.key.type),
        "version": sa.BigInteger(),
        "mark": sa.Text(),
        "state": in_array(columns.state.type),
        "new": sa.BigInteger(),
    }
    arrays = [sa.bindparam(f"_{name}s", type_=array_of(types[name])) for name in names]
    unnested = sa.func.unnest(*arrays).table_valued(*[sa.column(name, types[name]) for name in names])
    return sa.select(unnested.render_derived(name="a"))


def array_of(kind: TypeEngine[Any]) -> TypeEngine[Any]:
    """Return the type of an array of values of *kind*."""
    if isinstance(kind, (sa.Integer, sa.JSON)) or type(kind) is sa.Text:
        return _OneText(kind)
    return sa.ARRAY(kind)


class _OneText(TypeDecorator[list[Any]]):
    """An array of texts, numbers or JSON, sent as one text in PostgreSQL's array syntax.

    SQLAlchemy and the driver convert each value by itself, which took a fifth of the time of a bulk; and they take a
    JSON list for a nested array.
    """

    impl = sa.ARRAY
    cache_ok = True

    def bind_processor(self, dialect: sa.Dialect) -> Any:
        array: Any = self.impl_instance
        quoted = _of_item(array.item_type, dialect)
        return lambda values: f"{{{','.join([quoted(value) for value in values])}}}"


def _of_item(kind: TypeEngine[Any], dialect: sa.Dialect) -> Callable[[Any], str]:
    """Return the function that makes the text of one value."""
    if isinstance(kind, sa.Integer):
        return _number
    if isinstance(kind, sa.JSON):
        serialize = getattr(dialect, "_json_serializer", None) or json.dumps
        return lambda value: _quoted(serialize(value))
    return _quoted


def _number(number: int | None) -> str:
    return "NULL" if number is None else str(number)


def _quoted(text: str | None) -> str:
    if text is None:
        return "NULL"
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _locked(table: sa.Table, asked: sa.CTE, mark: Mark) -> sa.CTE:
    key = table.c.key
    joined = table.join(asked, _is_loaded(table, asked, mark))
    return sa.select(key).select_from(joined).order_by(key).with_for_update(of=table).cte("locked")


def in_array(kind: TypeEngine[Any]) -> TypeEngine[Any]:
    """Return a text type without its length, since a cast would cut off what is too long.

    Other types stay: a CITEXT that is compared with a text is compared as a text.
    """
    is_text = isinstance(kind, (KeyText, StateText)) or type(kind) in _TEXTS
    return sa.Text() if is_text else kind


def fits(column: sa.Column[Any]) -> bool:
    """Return whether a cast to the column's type keeps its values."""
    return "(" not in in_array(column.type).compile(dialect=_POSTGRESQL)
