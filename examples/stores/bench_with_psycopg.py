"""The store of with_psycopg.py on the bench of `geventbatch.testing.store_contract`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg_pool import ConnectionPool

from examples.stores.with_psycopg import Account, Accounts
from geventbatch.testing import StoreBench


class AccountsBench(StoreBench):
    """A database for tests that has the table, and its server: host and port, or the path of its Unix socket."""

    load_marker = b"SELECT balance"
    save_marker = b"COMMIT"

    def __init__(self, database: str, server: tuple[str, int] | str) -> None:
        self.database = database
        self.server = server

    @contextmanager
    def open_store(self, server: tuple[str, int] | str | None) -> Iterator[Any]:
        """Connect to where *server* is, without TLS, so that what is sent can be read."""
        through: dict[str, Any] = {"host": server[0], "port": server[1]} if isinstance(server, tuple) else {}
        settings = {**through, "sslmode": "disable", "gssencmode": "disable"}
        with ConnectionPool(self.database, kwargs=settings, min_size=0, max_size=self.max_batches, open=True) as pool:
            yield Accounts(pool)

    def add(self, resource: Account, amount: int) -> int:
        """Run as an operation."""
        return resource.add(amount)

    def violate(self, resource: Account) -> None:
        """Run as an operation whose account the CHECK of the table refuses."""
        resource.balance = -1

    def get(self, key: str) -> int | None:
        """Read beside the store."""
        with psycopg.connect(self.database) as connection:
            row = connection.execute("SELECT balance FROM account WHERE name = %s", [key]).fetchone()
            return None if row is None else int(row[0])

    def put(self, key: str, total: int) -> None:
        """Write beside the store."""
        with psycopg.connect(self.database) as connection:
            connection.execute(
                "INSERT INTO account VALUES (%s, %s) ON CONFLICT (name) DO UPDATE SET balance = EXCLUDED.balance",
                [key, total],
            )
