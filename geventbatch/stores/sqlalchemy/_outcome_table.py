"""The table of outcomes, declared in SQLAlchemy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.types import TypeDecorator

from geventbatch._safe_repr import shown
from geventbatch.stores._sql.outcomes import ID_LENGTH, OutcomeTable, seconds_to_keep
from geventbatch.stores.sqlalchemy._documents import StateText

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect
    from sqlalchemy.types import TypeEngine

_VENDORS: Final = {"mariadb": "mysql"}
_MARKS: Final = {"format": "%s", "pyformat": "%s", "qmark": "?"}


class OutcomeId(TypeDecorator[str]):
    """An ASCII text, compared byte by byte."""

    __module__ = "geventbatch.stores.sqlalchemy"  # by this path Alembic writes it into migrations
    impl = sa.String(ID_LENGTH)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Set a binary collation: any other one is slower, or takes two texts for one."""
        if dialect.name == "postgresql":
            return dialect.type_descriptor(sa.String(ID_LENGTH, collation="C"))
        if dialect.name in {"mysql", "mariadb"}:
            return dialect.type_descriptor(mysql.VARCHAR(ID_LENGTH, charset="ascii", collation="ascii_bin"))
        return dialect.type_descriptor(sa.String(ID_LENGTH))


def idempotency_table(name: str, metadata: sa.MetaData | None = None, *, schema: str | None = None) -> sa.Table:
    """Declare the table in which a `SQLAlchemyStore` records outcomes, for its option ``idempotency``.

    Several stores of one database may share it. `SQLAlchemyStore.create_table` creates it, or a migration.

    Args:
        name: The table's name.
        metadata: Where to declare it, for Alembic; a new one unless given.
        schema: The table's schema.

    Switches: no.
    """
    metadata = sa.MetaData() if metadata is None else metadata
    there = metadata.tables.get(name if schema is None else f"{schema}.{name}")
    if there is not None:
        return there
    return sa.Table(
        name,
        metadata,
        sa.Column("id", OutcomeId, primary_key=True),
        sa.Column("outcome", StateText, nullable=False),
        sa.Column("expires", sa.BigInteger, nullable=False),
        # Rows expire roughly in the order of their insertion, for which PostgreSQL has an index that costs nothing.
        sa.Index(f"{name}_expires", "expires", postgresql_using="brin"),
        schema=schema,
    )


def outcome_table(table: sa.Table | None, engine: sa.Engine, seconds: object) -> OutcomeTable | None:
    """Check the options ``idempotency`` and ``idempotency_ttl``, and return the table's statements."""
    ttl = seconds_to_keep(seconds, table)
    if table is None:
        return None
    if not isinstance(table, sa.Table) or {column.name for column in table.columns} != {"id", "outcome", "expires"}:
        raise TypeError(
            f"idempotency is {shown(table)}, but must be a Table that idempotency_table() has made, or None"
        )
    mark = _MARKS.get(engine.dialect.paramstyle)
    if mark is None:
        raise ValueError(f"idempotency: the driver {engine.dialect.driver} has none of the forms {', '.join(_MARKS)}")
    schemas = engine.get_execution_options().get("schema_translate_map") or {}
    there = sa.table(table.name, schema=schemas.get(table.schema, table.schema))
    name = engine.dialect.identifier_preparer.format_table(there)
    vendor = _VENDORS.get(engine.dialect.name, engine.dialect.name)
    return OutcomeTable(name, vendor, ttl, mark)
