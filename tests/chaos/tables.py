"""What is kept in SQL, as the workers and the judge know it."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from geventbatch.stores import SQLAlchemyStore
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

OUTCOMES = idempotency_table("outcomes", METADATA)

Entries = list[str]


def documents(engine: sa.Engine, mode: Any, *, idempotent: bool) -> SQLAlchemyStore[Entries]:
    return SQLAlchemyStore.documents(
        engine,
        "resources",
        mode=mode,
        missing=lambda _: [],
        metadata=METADATA,
        idempotency=OUTCOMES if idempotent else None,
    )
