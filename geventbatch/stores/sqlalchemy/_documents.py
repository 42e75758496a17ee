"""Documents: the table of keys, states and versions, its statements, and what the scopes of one store share."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from secrets import randbelow
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import TypeDecorator

from geventbatch._core import process
from geventbatch._safe_repr import named, shown
from geventbatch.stores import _json
from geventbatch.stores.sqlalchemy import _engines
from geventbatch.stores.sqlalchemy._bound_values import python_type
from geventbatch.stores.sqlalchemy._load import Question
from geventbatch.stores.sqlalchemy._texts import fix

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from sqlalchemy.engine import Dialect
    from sqlalchemy.types import TypeEngine

    from geventbatch.stores._missing import Making
    from geventbatch.stores._reuse import Kept
    from geventbatch.stores._sql.outcomes import OutcomeTable
    from geventbatch.stores.sqlalchemy._transaction import Transaction


KEY_LENGTH: Final = 255

_WITH_SAVEPOINTS: Final = ("postgresql", "mysql", "mariadb")
"""Databases in which a batch may write before its operations have ended."""


class KeyText(TypeDecorator[str]):
    """A text that is compared exactly: MySQL's default collation takes "a", "A" and "a " for one key."""

    __module__ = "geventbatch.stores.sqlalchemy"  # by this path Alembic writes it into migrations
    impl = sa.String
    cache_ok = True

    @property
    def python_type(self) -> type[str]:
        """The type that keys are converted to."""
        return str

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """For MySQL and MariaDB, set a collation that compares all code points; its name differs."""
        if dialect.name not in {"mysql", "mariadb"}:
            return dialect.type_descriptor(sa.String(KEY_LENGTH))
        collation = "utf8mb4_nopad_bin" if getattr(dialect, "is_mariadb", False) else "utf8mb4_0900_bin"
        return dialect.type_descriptor(mysql.VARCHAR(KEY_LENGTH, charset="utf8mb4", collation=collation))


class StateText(TypeDecorator[str]):
    """A text of any length."""

    __module__ = "geventbatch.stores.sqlalchemy"  # by this path Alembic writes it into migrations
    impl = sa.Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """For MySQL and MariaDB, whose TEXT ends after 64 KB, use LONGTEXT."""
        if dialect.name not in {"mysql", "mariadb"}:
            return dialect.type_descriptor(sa.Text())
        return dialect.type_descriptor(mysql.LONGTEXT(charset="utf8mb4", collation="utf8mb4_bin"))


def is_text(state: sa.Column[Any]) -> bool:
    """Return whether the states are texts or bytes, which are immutable."""
    return isinstance(state.type, StateText) or python_type(state) in {str, bytes}


_PLAIN_JSON: Final = frozenset({sa.JSON, postgresql.JSON, postgresql.JSONB, mysql.JSON, sqlite.JSON})
"""Column types whose values are decoded JSON, and nothing else."""


def reader_of(state: sa.Column[Any], dialect: Dialect) -> Callable[[Any], Any] | None:
    """Return the decoder of the column's JSON; None if the column's type does more than decode."""
    return (getattr(dialect, "_json_deserializer", None) or json.loads) if type(state.type) in _PLAIN_JSON else None


def check_name(table: object) -> None:
    """Raise unless *table* is a name."""
    if not isinstance(table, str):
        raise TypeError(f"table is {named(table)}, but must be the name of the table; of a mapped class: mapped()")


def check_kept(kept: Kept[Any] | None, state_type: Any) -> None:
    """Raise if states of that type are to be cached, and cannot be."""
    if kept is not None and state_type is not None and not is_text(sa.Column(state_type)):
        raise ValueError(
            f"reuse_resource keeps states that are a text or bytes, but state_type is {shown(state_type)}: pass a Text "
            "or a LargeBinary and functions that encode and decode, or no reuse_resource"
        )


def has_steps(table: sa.Table, dialect: Dialect) -> bool:
    """Return whether operations on documents can be judged step by step."""
    state = table.c.state
    return dialect.name in _WITH_SAVEPOINTS and (isinstance(state.type, sa.JSON) or is_text(state))


def documents_table(
    name: str, metadata: sa.MetaData, key_type: TypeEngine[Any], state_type: TypeEngine[Any], schema: str | None
) -> sa.Table:
    """Return the table of that name in *metadata*, declared unless it is there."""
    there = metadata.tables.get(name if schema is None else f"{schema}.{name}")
    if there is not None:
        return there
    return sa.Table(
        name,
        metadata,
        sa.Column("key", key_type, primary_key=True, autoincrement=False),
        sa.Column("state", state_type, nullable=False),
        # The number of saves that changed it; with `reuse_resource`, a number after each save that never comes again.
        sa.Column("version", sa.BigInteger, nullable=False),
        schema=schema,
    )


def create_table(engine: sa.Engine, table: sa.Table, attempts: int = 20) -> None:
    """Create *table* unless it exists. Switches: yes.

    If two processes do so at once, the database refuses one, which then finds the table on its next attempt.
    """
    for attempt in range(1, attempts + 1):
        try:
            with _engines.own(engine).begin() as connection:
                table.create(connection, checkfirst=True)
            return
        except DBAPIError:
            if attempt == attempts:
                raise
            process.sleep(0.05)


class Statements:
    """The statements for one document, made once for each store."""

    def __init__(self, table: sa.Table, dialect: Dialect, *, locking: bool, marks: bool, tells_key: bool) -> None:
        """Make them; with *marks*, a row that was deleted and inserted again is recognised."""
        columns = table.c
        mark = mark_of(table, dialect) if marks else Mark()
        read = reader_of(columns.state, dialect)
        is_key = columns.key == sa.bindparam("_key")
        has_version = sa.and_(is_key, columns.version == sa.bindparam("_version"))
        is_loaded = has_version if mark.column is None else sa.and_(has_version, mark.column == sa.bindparam("_mark"))
        beside = [sa.type_coerce(columns.key, columns.key.type).label("row_key")] if tells_key else []
        column: Any = mark.column
        if mark.is_selected:
            beside.append(column.label("mark"))
        self.mark: Final = mark
        self.tells_key: Final = tells_key
        # Load JSON as an immutable text too, from which the state can be decoded again to undo an operation.
        state: Any = columns.state if read is None else sa.cast(columns.state, sa.Text).label("state")
        self.read: Final = read
        self.selected: Final = (state, columns.version, *beside)
        self.look: Final = sa.select(*self.selected).where(is_key)
        self.load: Final = self.look.with_for_update() if locking else self.look
        self.ask: Final[Any] = sa.select(sa.literal_column("1")).where(is_key).limit(0)
        update = sa.update(table).values(state=sa.bindparam("_state"), version=sa.bindparam("_new"))
        self.update: Final = update.where(is_loaded)
        self.update_again: Final = update.where(has_version)  # later in the transaction, so the row is locked
        self.count: Final = sa.update(table).where(is_loaded).values(version=sa.bindparam("_new"))
        self.fence: Final = sa.update(table).where(has_version).values(version=sa.bindparam("_new"))
        self.delete: Final = sa.delete(table).where(is_loaded)
        self.delete_again: Final = sa.delete(table).where(has_version)
        self.add: Final = _insert(table, dialect.name)
        for statement in (self.load, self.update, self.count, self.delete, self.add):
            fix(statement, dialect)

    def row_of(self, found: Any, before: int = 0) -> Row:
        """Return what was selected as a `Row`; the statement has so many columns *before* those `selected`."""
        state, version = found[before], found[before + 1]  # a column's name takes three times as long
        if self.mark.is_selected:
            mark = found[before + 2 + self.tells_key]
        else:
            mark = state if self.mark.column is not None else None
        key = found[before + 2] if self.tells_key else None
        if self.read is None:
            return Row(state, version, mark, key)
        return Row(self.read(state), version, mark, key, state)


def _insert(table: sa.Table, dialect: str) -> sa.Insert:
    """Return the INSERT of a document, which inserts no row if it exists (on MySQL: raises)."""
    values: dict[str, Any] = {
        "key": sa.bindparam("_key"),
        "state": sa.bindparam("_state"),
        "version": sa.bindparam("_new"),
    }
    if dialect == "postgresql":
        return postgresql.insert(table).values(values).on_conflict_do_nothing().inline()
    if dialect == "sqlite":
        return sqlite.insert(table).values(values).on_conflict_do_nothing().inline()
    return sa.insert(table).values(values).inline()


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The options and the statements of one store of documents, shared by its scopes."""

    engine: sa.Engine
    transaction: Callable[[sa.Engine, Hashable], Transaction]
    statements: Statements
    name: str
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    missing: Literal["raise"] | Making
    locking: bool
    check: Callable[[Any], None] | None = None
    """Raises if the encoding of a resource has lost something, and says what."""
    is_json: bool = False
    """The column itself encodes the state as JSON."""
    has_steps: bool = False
    """A save can be rolled back in part, and a state kept unchanged."""
    outcomes: OutcomeTable | None = None
    kept: Kept[Row] | None = None

    def question(self, key: Hashable) -> Question:
        """Return what asks whether a row can have *key*."""
        return Question(key, self.statements.ask, {"_key": key})

    def snapshot(self, state: Any) -> Any:
        """Return an immutable form, or a copy, of *state*."""
        if self.is_json:
            return _json.encode(state)
        return state if isinstance(state, (str, bytes)) else deepcopy(state)

    def restored(self, snapshot: Any) -> Any:
        """Return the state of a snapshot."""
        if type(snapshot) is Uncopied:
            raise snapshot.error
        if self.is_json:
            return (self.statements.read or json.loads)(snapshot)
        return snapshot if isinstance(snapshot, (str, bytes)) else deepcopy(snapshot)

    def unchanged(self, loaded: Row) -> Any:
        """Return the snapshot of what was loaded. It costs something only for mutable states."""
        if loaded.text is not None:
            return loaded.text
        try:
            return self.snapshot(loaded.state)
        except Exception as error:  # raised only if the snapshot is needed
            return Uncopied(error)

    def version_after(self, version: int | None) -> int:
        """Return the version that the next save writes: 1 more, or 1 for a new document.

        If states are cached, a version must never come again. Otherwise the first version of a document that was
        deleted and inserted again would match a cached one; and after a lost COMMIT, no process could tell whose save a
        version is.
        """
        if self.kept is None:
            return (version or 0) + 1
        return _FEWEST + (randbelow(_FIRST) if version is None else version + randbelow(_STEP))


_FIRST: Final = 1 << 60
_STEP: Final = 1 << 21  # so that they last for 4,000,000,000,000 saves
_FEWEST: Final = 16  # so that a writer who counts by one does not get there


class Row(NamedTuple):
    """A document's row."""

    state: Any
    version: int | None  # None: there is no row
    mark: Any = None
    key: Any = None  # as in the row, if a store needs that
    text: str | None = None  # of a JSON state


class Uncopied(NamedTuple):
    """In place of a snapshot, if the state cannot be copied."""

    error: Exception


class Mark(NamedTuple):
    """Distinguishes a row, beside its version, from one that was deleted and inserted again, which begins at 1."""

    column: Any = None
    """None: the row is locked, or versions never come again."""
    is_selected: bool = False
    """It is selected beside the state; else it is the state itself."""


def mark_of(table: sa.Table, dialect: sa.Dialect) -> Mark:
    """Return PostgreSQL's xmin; elsewhere the state, as the database has it."""
    state = table.c.state
    if dialect.name == "postgresql":
        name = dialect.identifier_preparer.quote(table.name)
        return Mark(sa.cast(sa.literal_column(f"{name}.xmin"), sa.Text), is_selected=True)
    if dialect.name not in {"sqlite", "mysql", "mariadb"}:
        return Mark()
    if isinstance(state.type, StateText) or type(state.type) in {sa.Text, sa.String, sa.LargeBinary}:
        return Mark(state)
    kind = state.type.impl_instance if isinstance(state.type, TypeDecorator) else state.type
    if isinstance(kind, sa.LargeBinary):
        return Mark(sa.type_coerce(state, sa.LargeBinary()), is_selected=True)
    return Mark(sa.cast(state, sa.Text), is_selected=True)
