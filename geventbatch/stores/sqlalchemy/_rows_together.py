"""Writes changes of many rows by few statements, where SQLAlchemy's flush would do nothing but send an UPDATE for each.

On PostgreSQL that is one statement for all rows of a class of which the same columns have changed. Elsewhere, and where
a value of the type may not survive a cast, it is one statement that the driver executes for each row.
"""

from __future__ import annotations

from datetime import date, datetime
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy.orm.attributes import instance_state

from geventbatch.stores.sqlalchemy._bulk_statements import array_of, fits, in_array
from geventbatch.stores.sqlalchemy._transaction import LostRow, Transaction

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy.orm import InstanceState, Mapper

    from geventbatch.stores.sqlalchemy._mapping import Mapping

_IN_ARRAYS: Final[dict[type, type]] = {
    sa.Text: str,
    **dict.fromkeys((sa.Integer, sa.INTEGER, sa.BigInteger, sa.BIGINT, sa.SmallInteger, sa.SMALLINT), int),
    **dict.fromkeys((sa.Boolean, sa.BOOLEAN), bool),
    **dict.fromkeys((sa.Float, sa.Double), float),
    **dict.fromkeys((sa.Date, sa.DATE), date),
    sa.DateTime: datetime,
}
"""Types of columns, and of their values, that an array has as a statement for one row has them.

Of JSON, None is something else there; an ARRAY cannot be in another one; a user's type may do as it likes.
"""


class Updates:
    """The statements of one store, and which classes have them."""

    def __init__(self) -> None:
        """Make them when they are needed first."""
        self._plain: dict[Mapper[Any], bool] = {}
        self._made: dict[tuple[Mapper[Any], tuple[str, ...]], tuple[sa.Update, bool]] = {}

    def of(self, mapping: Mapping, mapper: Mapper[Any], names: tuple[str, ...]) -> tuple[sa.Update, bool]:
        """Return the statement that sets *names*, and whether it takes arrays, one for each column."""
        found = self._made.get((mapper, names))
        if found is None:
            found = self._made[mapper, names] = _update_of(mapping, mapper, names)
        return found

    def changed_values(self, mapping: Mapping, instance: object) -> dict[str, Any] | None:
        """Return the changed columns of *instance*, by attribute; None if a flush would do more than write them."""
        state: InstanceState[Any] = instance_state(instance)
        plain = self._plain.get(state.mapper)
        if plain is None:
            plain = self._plain[state.mapper] = _is_plain(mapping, state.mapper)
        values = _changed_values(mapping, state) if plain and not _is_heard(state.mapper) else None
        if values and mapping.engine.dialect.name == "postgresql":
            named = mapping.columns_of(state.mapper).named
            if not all(value is None or _is_usual(named[name], value) for name, value in values.items()):
                return None
        return values


class Changes:
    """Changes of rows, by the statements that write them."""

    def __init__(self, updates: Updates) -> None:
        """Hold none yet."""
        self._updates = updates
        self._groups: dict[tuple[Mapping, Mapper[Any], tuple[str, ...]], list[tuple[Any, ...]]] = {}

    def add(self, found: Iterable[tuple[Mapping, InstanceState[Any], dict[str, Any]]]) -> None:
        """Add the changed values of some rows, by attribute."""
        for mapping, state, values in found:
            names = tuple(sorted(values))
            row = (*(state.identity or ()), *[values[name] for name in names])
            self._groups.setdefault((mapping, state.mapper, names), []).append(row)

    def send(self, transaction: Transaction) -> None:
        """Write them. Raises `LostRow` if a row is not there. Switches: yes."""
        for (mapping, mapper, names), rows in sorted(self._groups.items(), key=_in_order):
            statement, arrays = self._updates.of(mapping, mapper, names)
            if arrays:
                columns = zip(*rows, strict=True)
                transaction.change(statement, {f"_{i}": list(one) for i, one in enumerate(columns)}, len(rows))
            else:
                _send_each(transaction, statement, [{f"_{i}": one for i, one in enumerate(row)} for row in rows])


def _in_order(group: tuple[tuple[Mapping, Mapper[Any], tuple[str, ...]], Any]) -> tuple[int, str, tuple[str, ...]]:
    (mapping, mapper, names), _ = group
    return mapping.rank, str(mapper), names


def _send_each(transaction: Transaction, statement: sa.Update, rows: list[dict[str, Any]]) -> None:
    found = transaction.connection.execute(statement, rows if len(rows) > 1 else rows[0])
    dialect = transaction.connection.dialect
    is_sane = dialect.supports_sane_multi_rowcount if len(rows) > 1 else dialect.supports_sane_rowcount
    if is_sane and found.rowcount != len(rows):
        raise LostRow(f"{len(rows)} rows were to be changed, and {found.rowcount} were there")


def _update_of(mapping: Mapping, mapper: Mapper[Any], names: tuple[str, ...]) -> tuple[sa.Update, bool]:
    named = mapping.columns_of(mapper).named
    table: Any = mapper.local_table
    key: list[Any] = list(mapper.primary_key)
    changed = [named[name] for name in names]
    if mapping.engine.dialect.name != "postgresql" or not all(map(_goes_into_array, (*key, *changed))):
        is_row = [part == sa.bindparam(f"_{i}", type_=part.type) for i, part in enumerate(key)]
        values = {column: sa.bindparam(f"_{i}", type_=column.type) for i, column in enumerate(changed, start=len(key))}
        return sa.update(table).where(*is_row).values(values), False
    kinds = [in_array(column.type) for column in (*key, *changed)]
    arrays = [sa.bindparam(f"_{i}", type_=array_of(kind)) for i, kind in enumerate(kinds)]
    columns: Any = [sa.column(f"_{i}", kind) for i, kind in enumerate(kinds)]
    asked: Any = sa.func.unnest(*arrays).table_valued(*columns).render_derived(name="asked")
    parts = list(asked.c)
    is_asked = [part == one for part, one in zip(key, parts, strict=False)]
    values = dict(zip(changed, parts[len(key) :], strict=True))
    return sa.update(table).where(*is_asked).values(values), True


def _goes_into_array(column: Any) -> bool:
    """Return whether an array has the column's values as a statement for one row has them, or refuses them."""
    return type(in_array(column.type)) in _IN_ARRAYS and fits(column)


def _is_usual(column: Any, value: Any) -> bool:
    """Return whether *value* is of the type that a load returns, unless it goes into no array anyway."""
    kind = _IN_ARRAYS.get(type(in_array(column.type)))
    return kind is None or (type(value) is kind and getattr(value, "tzinfo", None) is None)


def _is_heard(mapper: Mapper[Any]) -> bool:
    """Return whether a flush of a changed row of *mapper* calls listeners, which may be added at any time."""
    heard: Any = mapper.dispatch
    return bool(heard.before_update or heard.after_update)


def _is_plain(mapping: Mapping, mapper: Mapper[Any]) -> bool:
    """Return whether a flush of a row of *mapper* would only send what has changed, if nothing listens."""
    table = mapper.local_table
    return (
        len(mapper.tables) == 1
        and isinstance(table, sa.Table)
        and mapper.version_id_col is None
        and not any(
            column.onupdate is not None or column.server_onupdate is not None or column.computed is not None
            for column in table.columns
        )
        and not mapping.columns_of(mapper).composites
    )


def _changed_values(mapping: Mapping, state: InstanceState[Any]) -> dict[str, Any] | None:
    named = mapping.columns_of(state.mapper).named
    values: dict[str, Any] = {}
    for name, before in state.committed_state.items():
        column = named.get(name)
        if column is None or column.primary_key or name not in state.dict:
            return None
        value = state.dict[name]
        if state.manager[name].impl.is_equal(value, before) is not True:
            values[name] = value
    return values
