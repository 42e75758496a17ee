"""Accounts in PostgreSQL behind gunicorn's gevent worker, for `benchmarks.durable`: WAY is "row lock" or "batches"."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks.ways import Pool
from geventbatch import Processor
from geventbatch.stores import SQLAlchemyStore
from geventbatch.stores.sqlalchemy import idempotency_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

POOL: Final = 2
"""Connections of the row lock; more wait for the same row."""


class Base(DeclarativeBase):
    """See SQLAlchemy."""


class Account(Base):
    """Somebody's money."""

    __tablename__ = "accounts"

    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[int] = mapped_column(sa.BigInteger)

    def add(self, amount: int) -> int:
        """Be an operation."""
        self.value += amount
        return self.value


outcomes = idempotency_table("outcomes", Base.metadata)


def pay(accounts: tuple[Account, ...]) -> int:
    """Be an operation across keys."""
    source, target = accounts
    source.value -= 1
    target.value += 1
    return target.value


class RowLock:
    """Each request by itself: lock the rows, change them, commit. An idempotency key changes nothing."""

    def __init__(self, url: str) -> None:
        """Connect."""
        self._pool = Pool(url, POOL)

    def change(self, keys: Sequence[str], amounts: Sequence[int], _: str | None) -> int:
        """Add the *amounts*, and return what the last one has then."""
        connection = self._pool.take()
        try:
            with connection.transaction():
                rows = connection.execute(
                    "SELECT key, value FROM accounts WHERE key = ANY(%s) ORDER BY key FOR UPDATE", (list(keys),)
                ).fetchall()
                values = dict(rows)
                for key, amount in zip(keys, amounts, strict=True):
                    values[key] += amount
                    connection.execute("UPDATE accounts SET value = %s WHERE key = %s", (values[key], key))
            return int(values[keys[-1]])
        finally:
            self._pool.give(connection)


class Batches:
    """The library: one key, or an operation across keys."""

    def __init__(self, url: str) -> None:
        """Connect."""
        engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"), pool_size=20)
        store = SQLAlchemyStore.mapped(engine, Account, by="key", idempotency=outcomes)
        self._processor = Processor(open_resource=store, min_duration=0, max_duration=10)

    def change(self, keys: Sequence[str], amounts: Sequence[int], idempotency_key: str | None) -> int:
        """See `RowLock`."""
        if len(keys) == 1:
            return self._processor.run(keys[0], Account.add, amounts[0], idempotency_key=idempotency_key)
        return self._processor.run_across(keys, pay, idempotency_key=idempotency_key)


ways: Final[dict[str, type[RowLock | Batches]]] = {"row lock": RowLock, "batches": Batches}
way: Final = ways[os.environ["WAY"]](os.environ["DATABASE_URL"])


def app(environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], object]) -> Iterable[bytes]:
    """Answer POST /add/KEY, /transfer/SOURCE/TARGET and /read/KEY."""
    _, action, *keys = environ["PATH_INFO"].split("/")
    amounts = {"add": [1], "transfer": [-1, 1], "read": [0]}[action]
    content = json.dumps(way.change(keys, amounts, environ.get("HTTP_IDEMPOTENCY_KEY"))).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(content)))])
    return [content]
