"""Documents: a table of keys, states and versions, and what the scopes of one store have in common."""

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
from geventbatch.stores.sqlalchemy._mapping import python_type

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
"""Databases in which a batch may hold what it has written while its operations go on."""


class KeyText(TypeDecorator[str]):
    """A text that is equal to no other one: MySQL's own comparison takes "a", "A" and "a " for one key."""

    impl = sa.String
    cache_ok = True

    @property
    def python_type(self) -> type[str]:
        """What keys are converted to."""
        return str

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """For MySQL and MariaDB, with a collation that compares all code points. They call it by different names."""
        if dialect.name not in {"mysql", "mariadb"}:
            return dialect.type_descriptor(sa.String(KEY_LENGTH))
        collation = "utf8mb4_nopad_bin" if getattr(dialect, "is_mariadb", False) else "utf8mb4_0900_bin"
        return dialect.type_descriptor(mysql.VARCHAR(KEY_LENGTH, charset="utf8mb4", collation=collation))


class StateText(TypeDecorator[str]):
    """A text of any length."""

    impl = sa.Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """For MySQL and MariaDB, whose TEXT ends after 64 KB, their longest."""
        if dialect.name not in {"mysql", "mariadb"}:
            return dialect.type_descriptor(sa.Text())
        return dialect.type_descriptor(mysql.LONGTEXT(charset="utf8mb4", collation="utf8mb4_bin"))


def is_text(state: sa.Column[Any]) -> bool:
    """Whether its values are texts or bytes, which nobody changes in place."""
    return isinstance(state.type, StateText) or python_type(state) in {str, bytes}


_PLAIN_JSON: Final = frozenset({sa.JSON, postgresql.JSON, postgresql.JSONB, mysql.JSON, sqlite.JSON})
"""Types of columns whose states are what JSON makes of a text, and nothing else."""


def reader_of(state: sa.Column[Any], dialect: Dialect) -> Callable[[Any], Any] | None:
    """What makes a state of the JSON in its column; None where that is not all that the column's type does."""
    return (getattr(dialect, "_json_deserializer", None) or json.loads) if type(state.type) in _PLAIN_JSON else None


def check_name(table: object) -> None:
    """Raise unless it is one."""
    if not isinstance(table, str):
        raise TypeError(f"table is {named(table)}, but must be the name of the table; of a mapped class: mapped()")


def check_kept(kept: Kept[Any] | None, state_type: Any) -> None:
    """Raise where states of that type are to be kept from batch to batch, and cannot be."""
    if kept is not None and state_type is not None and not is_text(sa.Column(state_type)):
        raise ValueError(
            f"reuse_resource keeps states that are a text or bytes, but state_type is {shown(state_type)}: pass a Text "
            "or a LargeBinary and functions that encode and decode, or no reuse_resource"
        )


def has_steps(table: sa.Table, dialect: Dialect) -> bool:
    """Whether operations on documents can be judged step by step there."""
    state = table.c.state
    return dialect.name in _WITH_SAVEPOINTS and (isinstance(state.type, sa.JSON) or is_text(state))


def documents_table(
    name: str, metadata: sa.MetaData, key_type: TypeEngine[Any], state_type: TypeEngine[Any], schema: str | None
) -> sa.Table:
    """The table of that name in *metadata*, made unless it is there."""
    there = metadata.tables.get(name if schema is None else f"{schema}.{name}")
    if there is not None:
        return there
    return sa.Table(
        name,
        metadata,
        sa.Column("key", key_type, primary_key=True, autoincrement=False),
        sa.Column("state", state_type, nullable=False),
        # How many saves changed it; with `reuse_resource`, another number after each that never comes again.
        sa.Column("version", sa.BigInteger, nullable=False),
        schema=schema,
    )


def create_table(engine: sa.Engine, table: sa.Table, attempts: int = 20) -> None:
    """Create it unless it is there. Switches: yes.

    Of two processes that do so at once, the database refuses one, which then finds the table in its place.
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
    """What is sent for a document, made once for each store."""

    def __init__(  # noqa: PLR0913 - what a store decides
        self,
        table: sa.Table,
        dialect: str,
        *,
        locking: bool,
        mark: Mark,
        tells_key: bool = False,
        read: Callable[[str], Any] | None = None,
    ) -> None:
        columns = table.c
        is_key = columns.key == sa.bindparam("_key")
        has_version = sa.and_(is_key, columns.version == sa.bindparam("_version"))
        is_loaded = has_version if mark.column is None else sa.and_(has_version, mark.column == sa.bindparam("_mark"))
        beside = [sa.type_coerce(columns.key, columns.key.type).label("row_key")] if tells_key else []
        column: Any = mark.column
        if mark.is_selected:
            beside.append(column.label("mark"))
        self.mark: Final = mark
        self.tells_key: Final = tells_key
        # A text that nobody can change, to be read once more where what an operation has changed is to be undone.
        state: Any = columns.state if read is None else sa.cast(columns.state, sa.Text).label("state")
        self.read: Final = read
        self.selected: Final = (state, columns.version, *beside)
        self.look: Final = sa.select(*self.selected).where(is_key)
        self.load: Final = self.look.with_for_update() if locking else self.look
        update = sa.update(table).values(state=sa.bindparam("_state"), version=sa.bindparam("_new"))
        self.update: Final = update.where(is_loaded)
        self.update_again: Final = update.where(has_version)  # in the same transaction, and so locked
        self.fence: Final = sa.update(table).where(has_version).values(version=sa.bindparam("_new"))
        self.delete: Final = sa.delete(table).where(is_loaded)
        self.delete_again: Final = sa.delete(table).where(has_version)
        self.add: Final = _insert(table, dialect)

    def row_of(self, found: Any) -> Row:
        """What was selected."""
        mark = found.mark if self.mark.is_selected else found.state if self.mark.column is not None else None
        key = found.row_key if self.tells_key else None
        if self.read is None:
            return Row(found.state, found.version, mark, key)
        return Row(self.read(found.state), found.version, mark, key, found.state)


def statements_of(table: sa.Table, dialect: Dialect, *, locking: bool, marks: bool, tells_key: bool) -> Statements:
    """Those of a store; *marks* is whether a row that was made anew is told by its mark."""
    return Statements(
        table,
        dialect.name,
        locking=locking,
        mark=mark_of(table, dialect) if marks else Mark(),
        tells_key=tells_key,
        read=reader_of(table.c.state, dialect),
    )


def _insert(table: sa.Table, dialect: str) -> sa.Insert:
    """Insert a document; when it is there already: no row, or (MySQL) an error that says so."""
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
    """What the scopes of one store have in common."""

    engine: sa.Engine
    transaction: Callable[[sa.Engine, Hashable], Transaction]
    statements: Statements
    name: str
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    missing: Literal["raise"] | Making
    locking: bool
    check: Callable[[Any], None] | None = None
    """Raises what says what the encoding of a resource has lost."""
    is_json: bool = False
    """The column makes JSON of what is encoded."""
    has_steps: bool = False
    """A save can be taken back in part, and a state be kept that no operation changes."""
    outcomes: OutcomeTable | None = None
    kept: Kept[Row] | None = None

    def snapshot(self, state: Any) -> Any:
        """The state as nobody can change it."""
        if self.is_json:
            return _json.encode(state)
        return state if isinstance(state, (str, bytes)) else deepcopy(state)

    def restored(self, snapshot: Any) -> Any:
        """The state of such a one."""
        if type(snapshot) is Uncopied:
            raise snapshot.error
        if self.is_json:
            return (self.statements.read or json.loads)(snapshot)
        return snapshot if isinstance(snapshot, (str, bytes)) else deepcopy(snapshot)

    def unchanged(self, loaded: Row) -> Any:
        """What was loaded, as nobody can change it. It costs something only where the column gives what one can."""
        if loaded.text is not None:
            return loaded.text
        try:
            return self.snapshot(loaded.state)
        except Exception as error:  # nobody is told so before it is needed
            return Uncopied(error)

    def version_after(self, version: int | None) -> int:
        """What the next save writes: 1 more, or 1 for what is new.

        Where states are kept, a version has to be another one whoever has saved. Else the first version of a document
        that was deleted and made anew would be taken for that of the one before; and nobody could tell after a lost
        COMMIT whose save it was.
        """
        if self.kept is None:
            return (version or 0) + 1
        return _FEWEST + (randbelow(_FIRST) if version is None else version + randbelow(_STEP))


_FIRST: Final = 1 << 60
_STEP: Final = 1 << 21  # so that they last for 4,000,000,000,000 saves
_FEWEST: Final = 16  # whoever counts by one does not get there meanwhile


class Row(NamedTuple):
    """A document as it is in its table."""

    state: Any
    version: int | None  # None: there is none
    mark: Any = None
    key: Any = None  # as the row has it, where a store needs that
    text: str | None = None  # of a state that is JSON


class Uncopied(NamedTuple):
    """In place of what was loaded, where it cannot be copied."""

    error: Exception


class Mark(NamedTuple):
    """What tells, beside the version, a row from one that was deleted and made anew, whose version begins again."""

    column: Any = None
    """None: nobody can do that meanwhile, or versions never come again."""
    is_selected: bool = False
    """It is loaded beside the state; else it is the state."""


def mark_of(table: sa.Table, dialect: sa.Dialect) -> Mark:
    """PostgreSQL's xmin; elsewhere what was loaded, in the form that the database has."""
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
