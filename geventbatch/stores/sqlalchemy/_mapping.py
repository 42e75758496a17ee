"""Shared by the scopes of one mapped store: the class's columns, the statements, and what a save compares."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final, cast

import sqlalchemy as sa
from sqlalchemy.sql.functions import FunctionElement

from geventbatch._safe_repr import named, shown
from geventbatch.stores._sql.functions import Functions
from geventbatch.stores._sql.keys import row_key
from geventbatch.stores.sqlalchemy import _engines
from geventbatch.stores.sqlalchemy._bound_values import Columns, python_type
from geventbatch.stores.sqlalchemy._bulk_statements import array_of
from geventbatch.stores.sqlalchemy._change_tracker import track_refreshes
from geventbatch.stores.sqlalchemy._computed import has_computed
from geventbatch.stores.sqlalchemy._load import Question
from geventbatch.stores.sqlalchemy._tenants import prepare

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from sqlalchemy.orm import Mapper, Session
    from sqlalchemy.orm.attributes import InstrumentedAttribute

    from geventbatch.stores._sql.outcomes import OutcomeTable
    from geventbatch.stores.sqlalchemy._transaction import Transaction

_LISTED: Final = "_listed"
"""The parameter with the keys of many rows."""

_NUMBERS: Final = frozenset({sa.Integer, sa.INTEGER, sa.BigInteger, sa.BIGINT, sa.SmallInteger, sa.SMALLINT})


@dataclass(kw_only=True, eq=False)
class Mapping:
    """The class, the options and the statements of one mapped store, shared by its scopes."""

    engine: sa.Engine
    sessions: Callable[..., Session]
    transaction: Callable[[sa.Engine, Hashable], Transaction]
    mapper: Mapper[Any]
    by: tuple[InstrumentedAttribute[Any], ...]
    missing: Any
    locking: bool
    version: str | None
    """The attribute that counts the saves; None if there is none, or the mapper counts."""
    counts_itself: bool
    """The mapper has a `version_id_col`."""
    token: tuple[sa.Label[Any], ...]  # mutable: see `forget_token`
    """Expressions that tell at the save whether the row was changed (xmin); if empty, all columns are compared."""
    outcomes: OutcomeTable | None = None
    prepare: Callable[[sa.Connection, Any], object] | None = None
    """The option ``prepare_connection``."""
    has_tenants: bool = False
    """A key is a pair of the tenant and the row's own key."""
    model: str | None = None
    """The name of the class in a store of several: a key is a pair of that and the row's own key."""
    rank: int = 0
    """Its place among the classes of the store, in which they are loaded and locked."""
    mappers: tuple[Mapper[Any], ...] = ()
    """The mappers of all classes of the store, if there are several."""
    functions: Functions = field(init=False)
    reads_computed: bool = False
    """An operation has sent a query that may have read what the database computes from earlier operations' changes."""
    keeps: bool = False  # mutable: see `_session_snapshot`
    """Copy each load, since an operation could not be undone without a copy."""
    _columns: dict[Mapper[Any], Columns] = field(default_factory=dict)
    _many: dict[object, sa.Select[Any]] = field(default_factory=dict)  # the statements of many rows
    _compares: dict[tuple[Mapper[Any], tuple[str, ...]], sa.Select[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the cache of the server's functions, empty."""
        self.functions = Functions("mysql" if self.engine.dialect.name == "mariadb" else self.engine.dialect.name)

    @cached_property
    def name(self) -> str:
        """The name of the class."""
        return str(self.mapper.class_.__name__)

    @cached_property
    def columns(self) -> dict[str, sa.Column[Any]]:
        """The columns of the class's attributes that are plain columns."""
        return self.columns_of(self.mapper).named

    def columns_of(self, mapper: Mapper[Any]) -> Columns:
        """Return the columns of any class whose instances are in the session."""
        found = self._columns.get(mapper)
        if found is None:
            found = self._columns[mapper] = Columns(mapper, self.engine.dialect)
            if found.in_place or (self.sees_all and any(map(mapper.isa, self.mappers or (self.mapper,)))):
                track_refreshes(mapper.class_)
        return found

    @cached_property
    def sees_all(self) -> bool:
        """Return whether a save compares all loaded columns of the row."""
        return not self.locking and not self.token

    @cached_property
    def load(self) -> sa.Select[Any]:
        """Selects the instance, and the token."""
        entity = self.mapper.class_
        found = sa.select(entity, *self.token).where(*self._is_row())
        return found.with_for_update(of=entity, key_share=True) if self.locking else found

    @cached_property
    def lock(self) -> sa.Select[Any] | None:
        """Locks the row before it is loaded; None if the load reads the row only.

        A statement reads other rows as they were when it began, before it waited for its lock.
        """
        if not self.locking or not _reads_beside(self.load, self.mapper, self.engine.dialect):
            return None
        one: sa.Select[Any] = sa.select(sa.literal_column("1"))
        return self._locked(one.where(*self._is_row()))

    def load_all(self, own_keys: list[Any]) -> tuple[sa.Select[Any], dict[str, Any]]:
        """Select the instances of many keys, and their tokens, in the order of the primary keys.

        Return the statement and its parameters, as `lock_all` and `claim_all` do.
        """
        return self._of_rows("load", self._load_all, self.by, own_keys)

    def _load_all(self, are_rows: sa.ColumnElement[bool]) -> sa.Select[Any]:
        entity = self.mapper.class_
        found = sa.select(entity, *self.token).where(are_rows).order_by(*self.mapper.primary_key)
        return found.with_for_update(of=entity, key_share=True) if self.locking else found

    def lock_all(self, own_keys: list[Any]) -> tuple[sa.Select[Any], dict[str, Any]]:
        """Lock the rows of many keys; see `lock`."""
        return self._of_rows("lock", self._lock_all, self.by, own_keys)

    def _lock_all(self, are_rows: sa.ColumnElement[bool]) -> sa.Select[Any]:
        one: sa.Select[Any] = sa.select(sa.literal_column("1"))
        return self._locked(one.where(are_rows).order_by(*self.mapper.primary_key))

    def claim_all(
        self, mapper: Mapper[Any], identities: list[tuple[Any, ...]], names: tuple[str, ...]
    ) -> tuple[sa.Select[Any], dict[str, Any]]:
        """Lock rows of *mapper* in order, and return primary keys and the columns *names*; or tokens, if it has any."""
        key = mapper.primary_key
        values = identities if len(key) > 1 else [one[0] for one in identities]
        return self._of_rows((mapper, names), partial(self._claim_all, mapper, names), key, values)

    def _claim_all(
        self, mapper: Mapper[Any], names: tuple[str, ...], are_rows: sa.ColumnElement[bool]
    ) -> sa.Select[Any]:
        named = self.columns_of(mapper).named
        columns = self.token or [named[name] for name in names]
        select: Any = sa.select(*mapper.primary_key, *columns)
        return self._locked(select.where(are_rows).order_by(*mapper.primary_key), mapper)

    def _of_rows(
        self,
        name: object,
        made: Callable[[sa.ColumnElement[bool]], sa.Select[Any]],
        columns: Sequence[Any],
        values: list[Any],
    ) -> tuple[sa.Select[Any], dict[str, Any]]:
        """Return the statement *name* for the rows whose *columns* have one of *values*; tuples, of several."""
        several = len(columns) > 1
        if several and self.engine.dialect.name in {"mysql", "mariadb"}:
            # MariaDB would scan, and lock, the whole table for tuples.
            each = [sa.and_(*[one == part for one, part in zip(columns, value, strict=True)]) for value in values]
            return made(sa.or_(*each)), {}
        in_array = self._are_numbers(columns, values)
        found = self._many.get((name, in_array))
        if found is None:
            column: Any = sa.tuple_(*columns) if several else columns[0]
            if in_array:
                are_rows = column == sa.any_(sa.bindparam(_LISTED, type_=array_of(column.type)))
            else:
                are_rows = column.in_(sa.bindparam(_LISTED, type_=None if several else column.type, expanding=True))
            found = self._many[name, in_array] = made(are_rows)
        return found, {_LISTED: values}

    def _are_numbers(self, columns: Sequence[Any], values: list[Any]) -> bool:
        """Return whether *values* go into an array of PostgreSQL: a parameter each costs as much as loading a row."""
        if len(columns) > 1 or self.engine.dialect.name != "postgresql" or type(columns[0].type) not in _NUMBERS:
            return False
        return all(type(value) is int for value in values)

    @cached_property
    def shares_rows(self) -> bool:
        """Return whether keys of another class of the store may name its rows."""
        return [table_of(one) for one in self.mappers].count(table_of(self.mapper)) > 1

    @cached_property
    def claim(self) -> sa.Select[Any]:
        """Locks the row if primary key and token are as loaded."""
        return self._locked(self._as_loaded())

    @cached_property
    def look_at(self) -> sa.Select[Any]:
        """Selects 1 if primary key and token are as loaded, without a lock."""
        return self._as_loaded().select_from(self.mapper.selectable)

    def _as_loaded(self) -> sa.Select[Any]:
        expressions = [*self.mapper.primary_key, *[token.element for token in self.token]]
        is_same = [part == sa.bindparam(f"_{i}", type_=part.type) for i, part in enumerate(expressions)]
        one: sa.Select[Any] = sa.select(sa.literal_column("1"))
        return one.where(*is_same)

    def compare(self, mapper: Mapper[Any], names: tuple[str, ...]) -> sa.Select[Any]:
        """Return a SELECT that locks a row of *mapper* by its primary key, and returns the columns *names*."""
        found = self._compares.get((mapper, names))
        if found is None:
            named = self.columns_of(mapper).named
            is_row = [column == sa.bindparam(f"_{i}") for i, column in enumerate(mapper.primary_key)]
            found = self._locked(sa.select(*[named[name] for name in names]).where(*is_row), mapper)
            self._compares[mapper, names] = found
        return found

    def _locked(self, row: sa.Select[Any], mapper: Mapper[Any] | None = None) -> sa.Select[Any]:
        mapper = mapper or self.mapper
        return row.select_from(mapper.selectable).with_for_update(of=list(mapper.tables), key_share=True)

    def forget_token(self) -> None:
        """Compare all columns from now on: the relation has no xmin, as a view of PostgreSQL."""
        self.token = ()
        for name in ("load", "claim", "look_at", "sees_all"):
            vars(self).pop(name, None)
        self._columns.clear()
        self._many.clear()

    @cached_property
    def look(self) -> sa.Select[Any]:
        """Selects something if the row is there."""
        return sa.select(self.by[0]).where(*self._is_row())

    def question(self, key: Hashable) -> Question:
        """Return what asks whether a row can have *key*."""
        return Question(key, _asking(*self._is_row()), self.parameters(key))

    def question_of_many(self, key: Hashable) -> Question:
        """Return the same in the form of a statement for many keys, in which the driver may give values other types."""
        return Question(key, *self._of_rows("ask", _asking, self.by, [self.own_key(key)]))

    @contextmanager
    def connect(self, key: Hashable) -> Iterator[sa.Connection]:
        """Yield another connection than the batch's, prepared for the tenant of *key*."""
        with _engines.beside(self.engine, key) as connection:
            if self.prepare is not None:
                prepare(connection, key, self.prepare)
            yield connection

    @cached_property
    def finding(self) -> tuple[str, ...]:
        """The attributes by which a load finds the row and its class."""
        kind = self.mapper.polymorphic_on
        known = kind is not None and kind in self.mapper.columns.values()
        names = [attribute.key for attribute in self.by]
        return (*names, self.mapper.get_property_by_column(cast("sa.Column[Any]", kind)).key) if known else (*names,)

    @cached_property
    def has_computed(self) -> bool:
        """Return whether the database computes attributes that operations may read."""
        return has_computed(self.mapper)

    def _is_row(self) -> list[sa.ColumnElement[bool]]:
        return [column == sa.bindparam(f"_{i}") for i, column in enumerate(self.by)]

    def key_of(self, resource: Any, asked: Hashable) -> Hashable:
        """Return the key as in the row of *resource*, which was found by the key *asked* for."""
        if self.outcomes is None:  # only outcomes need it
            return asked
        if self.has_tenants:
            tenant, own = cast("tuple[Hashable, Hashable]", asked)
            return tenant, self._own_key_of(resource, own)
        return self._own_key_of(resource, asked)

    def _own_key_of(self, resource: Any, asked: Any) -> Hashable:
        if self.model is not None:
            return self.model, self._row_key_of(resource, asked[1])
        return self._row_key_of(resource, asked)

    def _row_key_of(self, resource: Any, asked: Any) -> Hashable:
        values = vars(resource)
        if len(self.by) == 1:
            return row_key(asked, values.get(self.by[0].key, asked))  # type: ignore[no-any-return]
        found = [values.get(one.key, part) for one, part in zip(self.by, asked, strict=True)]
        return row_key(asked, found)  # type: ignore[no-any-return]

    @property
    def outcome_place(self) -> str:
        """The name by which outcomes of its rows are told from those of others: stores may share the table."""
        return f"{self.mapper.local_table} by {', '.join([attribute.key for attribute in self.by])}"

    def own_key(self, key: Any) -> Any:
        """Return the row's own part of *key*."""
        own = key[1] if self.has_tenants else key
        return own if self.model is None else own[1]

    def parameters(self, key: Any) -> dict[str, Any]:
        """Return the parameters of `load`."""
        own = self.own_key(key)
        values = own if len(self.by) > 1 else (own,)
        return {f"_{i}": value for i, value in enumerate(values)}


def _asking(*are_rows: sa.ColumnElement[bool]) -> sa.Select[Any]:
    one: sa.Select[Any] = sa.select(sa.literal_column("1"))
    return one.where(*are_rows).limit(0)


def table_of(mapper: Mapper[Any]) -> str:
    """Return the name of the table that has the rows of *mapper*; of a subclass that is not concrete, its base's."""
    while mapper.inherits is not None and not mapper.concrete:
        mapper = mapper.inherits
    table: Any = mapper.local_table
    return str(getattr(table, "fullname", table))


def refuse_joined(mapper: Mapper[Any]) -> None:
    """Refuse a class with a subclass in a table of its own, which would be neither locked nor compared."""
    for one in mapper.self_and_descendants:
        if one.local_table is not mapper.local_table:
            raise ValueError(
                f"{mapper.class_.__name__} has a subclass in a table of its own, {one.class_.__name__}, whose columns "
                "would be neither locked nor compared: give that class a store"
            )


def mapper_of(entity: object) -> Any:
    """Return the mapper of *entity*. Raises a `TypeError` if it is no mapped class."""
    mapper: Any = sa.inspect(entity, raiseerr=False) if isinstance(entity, type) else None
    if mapper is None:
        raise TypeError(f"entity is {named(entity)}, but must be a class that SQLAlchemy maps")
    return mapper


def key_attributes(mapper: Mapper[Any], by: str | None) -> tuple[InstrumentedAttribute[Any], ...]:
    """Return the attributes that a key stands for: the primary key's, or one that is unique."""
    if by is None:
        return tuple(_attribute(mapper, mapper.get_property_by_column(column).key) for column in mapper.primary_key)
    attribute = _attribute(mapper, by)
    column = _column(attribute)
    if not _is_unique(column):
        raise ValueError(
            f"by={shown(by)}: the column {column} is not unique, so that it does not name one {mapper.class_.__name__}"
        )
    return (attribute,)


def version_attribute(mapper: Mapper[Any], version: str | None) -> str | None:
    """Return the attribute that the store counts up; None if there is none, or the mapper counts."""
    if version is None:
        return None
    column = _column(_attribute(mapper, version))
    if mapper.version_id_col is not None:
        if mapper.version_id_col is not column:
            raise ValueError(f"version={shown(version)}: the mapper's version_id_col is {mapper.version_id_col}")
        return None
    if not issubclass(python_type(column) or int, int):
        raise ValueError(  # noqa: TRY004 - it is the value of *version* that is wrong
            f"version={shown(version)}: the column {column} is no whole number"
        )
    return version


def token_of(mapper: Mapper[Any], dialect: sa.Dialect) -> tuple[sa.Label[Any], ...]:
    """Return what tells whether a row was changed, or deleted and inserted again: xmin on PostgreSQL, else nothing."""
    tables = [table for table in mapper.tables if isinstance(table, sa.Table)]
    if dialect.name != "postgresql" or len(tables) != len(mapper.tables):
        return ()
    return tuple(sa.cast(_xmin(table), sa.Text).label(f"_xmin_{i}") for i, table in enumerate(tables))


def _xmin(table: sa.Table) -> sa.ColumnElement[Any]:
    column: sa.ColumnClause[Any] = sa.column("xmin")
    column.table = table
    return column


def _reads_beside(load: sa.Select[Any], mapper: Mapper[Any], dialect: sa.Dialect) -> bool:
    """Return whether *load* reads more than columns of *mapper*'s tables: a join, or an expression."""
    compiled: Any = load.compile(dialect=dialect)
    selects = 0
    for part in sa.sql.visitors.iterate(compiled.compile_state.statement):
        selects += isinstance(part, sa.SelectBase)
        is_other_table = isinstance(part, sa.Table) and part not in mapper.tables
        if is_other_table or isinstance(part, (sa.Alias, sa.TextClause, FunctionElement)):
            return True
    return selects > 1


def _attribute(mapper: Mapper[Any], name: str) -> InstrumentedAttribute[Any]:
    if name not in mapper.column_attrs:
        raise ValueError(f"{mapper.class_.__name__} has no column attribute {shown(name)}")
    return cast("InstrumentedAttribute[Any]", getattr(mapper.class_, name))


def _column(attribute: InstrumentedAttribute[Any]) -> sa.Column[Any]:
    return cast("sa.Column[Any]", attribute.property.columns[0])


def _is_unique(column: sa.Column[Any]) -> bool:
    table = column.table
    indexes = [index.columns for index in table.indexes if index.unique]
    constraints = [
        constraint.columns
        for constraint in table.constraints
        if isinstance(constraint, (sa.UniqueConstraint, sa.PrimaryKeyConstraint))
    ]
    return bool(column.unique) or any(list(columns) == [column] for columns in (*indexes, *constraints))
