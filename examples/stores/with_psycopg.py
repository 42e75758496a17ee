"""Accounts in PostgreSQL, with psycopg alone. The kind: a transaction that has locked its row."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from psycopg import Connection, Error
from psycopg_pool import ConnectionPool

from geventbatch import current_batch
from geventbatch.scopes import OnServer
from geventbatch.stores import as_not_saved

TABLE = "CREATE TABLE account (name text PRIMARY KEY, balance bigint NOT NULL CHECK (balance >= 0))"


@dataclass
class Account:
    """What operations get."""

    balance: int

    def add(self, amount: int) -> int:
        """Add *amount*, and return what there is then."""
        self.balance += amount
        return self.balance


class Accounts:
    """A store: ``Processor(open_resource=Accounts(pool), max_batches=…, …)``, with as many batches as connections."""

    on_server = True

    def __init__(self, pool: ConnectionPool[Connection]) -> None:
        self._pool = pool

    @contextmanager
    def __call__(self, name: str) -> Iterator[Account]:
        """Load the account and lock its row; at the end of the block, save it and commit."""
        committing = False
        try:
            with self._pool.connection() as connection:  # rolls back and lets go whatever happens, a Timeout too
                account = Account(_locked(connection, name))
                yield account
                connection.execute("UPDATE account SET balance = %s WHERE name = %s", [account.balance, name])
                committing = True
                connection.commit()
        except Error as error:
            known = as_not_saved(error, name, committing=committing)
            if known is None:  # nobody can tell whether it is saved: callers are told so
                raise
            raise known from error


def _locked(connection: Connection, name: str) -> int:
    # Who waits for a lock is ended by the server too: it knows nothing of our deadline.
    milliseconds = int(current_batch().remaining() * 1000)
    connection.execute("SELECT set_config('statement_timeout', %s, true)", [str(milliseconds)])
    for _ in range(2):
        row = connection.execute("SELECT balance FROM account WHERE name = %s FOR UPDATE", [name]).fetchone()
        if row is not None:
            return int(row[0])
        # It waits for another one that inserts it just now, and is rolled back with all else if nothing is saved.
        connection.execute("INSERT INTO account VALUES (%s, 0) ON CONFLICT DO NOTHING", [name])
    raise LookupError(f"account {name} was deleted while it was loaded")


_: type[OnServer] = Accounts  # a type checker compares the store with what it says it has
