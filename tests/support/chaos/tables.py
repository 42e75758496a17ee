"""What is kept in SQL, as the workers and the judge know it."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from geventbatch.stores import Reuse, SQLAlchemyStore
from geventbatch.stores.sqlalchemy import idempotency_table

METADATA = sa.MetaData()

ENTRIES = sa.Table(
    "entries",
    METADATA,
    sa.Column("id", sa.BigInteger, primary_key=True),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
)
"""The rows beside the resources."""


class EntriesText(TypeDecorator[list[str]]):
    """Entries as documents have them."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: list[str] | None, dialect: sa.Dialect) -> str:
        return json.dumps(value)

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> list[str]:
        return list(json.loads(value))


class Base(DeclarativeBase):
    """What is mapped; `METADATA` does not know it."""


class Resource(Base):
    """A document's row as a mapped class."""

    __tablename__ = "resources"
    key: Mapped[str] = mapped_column(sa.String(255), primary_key=True)
    state: Mapped[list[str]] = mapped_column(EntriesText)
    version: Mapped[int] = mapped_column(sa.BigInteger, default=0)


OUTCOMES = idempotency_table("outcomes", METADATA)

Entries = list[str]


def add_line(account: Entries, name: str, amount: int) -> None:
    """Note a transfer in an account: its name, what it has put there, and what is in it since."""
    balance = int(account[-1].rpartition(" ")[2]) if account else 0
    account.append(f"{name} {amount:+d} {balance + amount}")


def documents(engine: sa.Engine, mode: Any, *, idempotent: bool) -> SQLAlchemyStore[Entries]:
    return SQLAlchemyStore.documents(
        engine,
        "resources",
        mode="version" if mode == "reuse" else mode,
        missing=lambda _: [],
        metadata=METADATA,
        idempotency=OUTCOMES if idempotent else None,
        reuse_resource=Reuse() if mode == "reuse" else None,
    )


def mapped(engine: sa.Engine, mode: Any, *, idempotent: bool) -> SQLAlchemyStore[Resource]:
    return SQLAlchemyStore.mapped(
        engine,
        Resource,
        version="version" if mode == "version" else None,
        mode="lock" if mode == "lock" else "version",
        missing=lambda key: Resource(key=key, state=[]),
        idempotency=OUTCOMES if idempotent else None,
    )
