"""What is kept in SQL, as the workers and the judge know it."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from geventbatch.stores import SQLAlchemyStore

METADATA = sa.MetaData()

ENTRIES = sa.Table(
    "entries",
    METADATA,
    sa.Column("id", sa.BigInteger, primary_key=True),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
)
"""The rows beside the resources."""

Entries = list[str]


def documents(engine: sa.Engine, mode: Any) -> SQLAlchemyStore[Entries]:
    return SQLAlchemyStore.documents(engine, "resources", mode=mode, missing=lambda _: [], metadata=METADATA)
