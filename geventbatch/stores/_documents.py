"""Documents: a table of keys, states and versions, and the scope of one batch over one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.types import TypeDecorator

from geventbatch import _process
from geventbatch._processor import current_batch
from geventbatch.errors import Conflict, Rejected, ResourceMissing
from geventbatch.stores import _sql
from geventbatch.stores._outcomes import Outcomes, OutcomeTable, Recording
from geventbatch.stores._rows import insert_rows, is_instance
from geventbatch.stores._transaction import Transaction, load

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from types import TracebackType

    from sqlalchemy.engine import Dialect
    from sqlalchemy.types import TypeEngine

KEY_LENGTH: Final = 255


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
        # How many saves changed it.
        sa.Column("version", sa.BigInteger, nullable=False),
        schema=schema,
    )


def create_table(engine: sa.Engine, table: sa.Table, attempts: int = 20) -> None:
    """Create it unless it is there. Switches: yes.

    Of two processes that do so at once, the database refuses one, which then finds the table in its place.
    """
    for attempt in range(1, attempts + 1):
        try:
            with engine.begin() as connection:
                table.create(connection, checkfirst=True)
            return
        except DBAPIError:
            if attempt == attempts:
                raise
            _process.sleep(0.05)


class Statements:
    """What is sent for a document, made once for each store."""

    def __init__(self, table: sa.Table, dialect: str, *, locking: bool) -> None:
        columns = table.c
        is_key = columns.key == sa.bindparam("_key")
        is_loaded = sa.and_(is_key, columns.version == sa.bindparam("_version"))
        load = sa.select(columns.state, columns.version).where(is_key)
        self.load: Final = load.with_for_update() if locking else load
        self.update: Final = (
            sa.update(table).where(is_loaded).values(state=sa.bindparam("_state"), version=columns.version + 1)
        )
        self.delete: Final = sa.delete(table).where(is_loaded)
        self.add: Final = _insert(table, dialect)


def _insert(table: sa.Table, dialect: str) -> sa.Insert:
    """Insert a document; when it is there already: no row, or (MySQL) an error that says so."""
    values = {"key": sa.bindparam("_key"), "state": sa.bindparam("_state"), "version": sa.literal(1)}
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
    missing: Literal["raise"] | Callable[[Any], Any]
    locking: bool
    outcomes: OutcomeTable | None = None


class DocumentScope:
    """One batch over one document: entering loads it, leaving saves it."""

    takes_rows = True
    deletes = True

    # -- mutable state ---------------------------------------------------------------------------------------
    _transaction: Transaction
    _resource: Any
    _loaded: Any  # the state as it was loaded
    _version: int | None  # None: there was none

    def __init__(self, documents: Documents, key: Hashable) -> None:
        self._documents = documents
        self._key = key

    def __enter__(self) -> Any:
        try:
            row = self._fetch()
            self._version = None if row is None else row.version
            self._loaded = None if row is None else row.state
            self._resource = self._made() if row is None else self._decoded()
        except BaseException as error:
            self._end(error)
            raise
        return self._resource

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if error is None:
                self._save()
        except BaseException as raised:
            self._end(raised)
            raise
        self._end(error)

    def recorded(self, keys: list[str]) -> dict[str, str]:
        """What is recorded of operations with these idempotency keys. Switches: yes."""
        return self._outcomes().find(self._transaction.send, keys)

    # -- inside ----------------------------------------------------------------------------------------------

    def _outcomes(self) -> Outcomes:
        documents = self._documents
        assert documents.outcomes is not None  # noqa: S101 - else no operation has such a key
        return Outcomes(documents.outcomes, documents.name, self._key)

    def _fetch(self) -> Any:
        statement = self._documents.statements.load
        self._transaction, row = load(
            lambda: self._documents.transaction(self._documents.engine, self._key),
            lambda begun: begun.connection.execute(statement, {"_key": self._key}).one_or_none(),
        )
        return row

    def _made(self) -> Any:
        missing = self._documents.missing
        if missing == "raise":
            raise ResourceMissing(f"there is no {self._key!r} in {self._documents.name}", key=self._key)
        return missing(self._key)

    def _decoded(self) -> Any:
        try:
            return self._documents.decode(self._loaded)
        except Exception as error:
            raise ValueError(
                f"the state of {self._key!r} in {self._documents.name} cannot be decoded: {error}"
            ) from error

    def _save(self) -> None:
        batch = current_batch()
        rows = batch.rows
        change = None
        if batch.completed:
            state = None if batch.deleted else self._encoded()
            change = self._change(state, deleted=batch.deleted, rows=bool(rows))
        recording = Recording(self._outcomes(), batch.outcomes) if batch.outcomes else None
        if change is None and not rows and recording is None:
            return
        transaction = self._transaction

        def write() -> None:
            if change is not None:
                self._send(*change)
            insert_rows(transaction.connection, rows)

        transaction.write(write, recording, collected=not any(is_instance(row) for row in rows))

    def _encoded(self) -> Any:
        try:
            return self._documents.encode(self._resource)
        except Exception as error:
            raise Rejected(
                f"{self._key!r} was not saved, nothing was written: it cannot be encoded: {error}"
            ) from error

    def _change(self, state: Any, *, deleted: bool, rows: bool) -> tuple[Any, dict[str, Any]] | None:
        """What to send; None when the document stays as it is."""
        statements = self._documents.statements
        if self._version is None:
            return None if deleted else (statements.add, {"_key": self._key, "_state": state})
        loaded = {"_key": self._key, "_version": self._version}
        if deleted:
            return statements.delete, loaded
        # Anything but a text or bytes may be the very object that was loaded, and changed since. And rows are right
        # only beside the document that they were made for: where it is not locked, its version is counted for them.
        same = isinstance(state, (str, bytes)) and state == self._loaded
        if same and (self._documents.locking or not rows):
            return None
        return statements.update, {**loaded, "_state": state}

    def _send(self, statement: Any, parameters: dict[str, Any]) -> None:
        try:
            self._transaction.change(statement, parameters)
        except IntegrityError as error:
            if self._version is None and _sql.is_duplicate(error):
                raise Conflict(f"{self._key!r} was not saved: somebody else has inserted it meanwhile") from error
            raise

    def _end(self, error: BaseException | None) -> None:
        transaction = self.__dict__.pop("_transaction", None)
        if transaction is not None:
            transaction.end(error)
