"""Accounts in PostgreSQL, with Pony. The kind: a transaction that has locked its row."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pony import orm

from geventbatch import current_batch
from geventbatch.scopes import OnServer
from geventbatch.stores import as_not_saved


@dataclass
class Account:
    """What operations get: an entity belongs to its session, and would have to be undone together with that."""

    balance: int

    def add(self, amount: int) -> int:
        """Add *amount*, and return what there is then."""
        self.balance += amount
        return self.balance


def define(database: orm.Database) -> Any:
    """Return the entity. Pony takes psycopg2, which waits in gevent's way after psycogreen's ``patch_psycopg()``."""

    class Row(database.Entity):  # type: ignore[misc] # Pony has no types
        _table_ = "account"
        name = orm.PrimaryKey(str)
        balance = orm.Required(int, size=64)

    return Row


class Accounts:
    """A store: ``Processor(open_resource=Accounts(database, Row), workers=1, max_batches=…, …)``.

    With Pony each worker has a connection of its own. With one shard, there are no more than batches at once.
    """

    on_server = True

    def __init__(self, database: orm.Database, row: Any) -> None:
        self._database = database
        self._row = row

    @contextmanager
    def __call__(self, name: str) -> Iterator[Account]:
        """Load the account and lock its row; at the end of the block, save it and commit."""
        committing = False
        try:
            with orm.db_session:  # rolls back whatever happens, a Timeout too
                row = self._locked(name)
                account = Account(row.balance)
                yield account
                row.balance = account.balance
                orm.flush()
                committing = True
                orm.commit()
        except (orm.DBException, orm.TransactionError) as error:
            known = as_not_saved(_of_database(error), name, committing=committing)
            if known is None:  # nobody can tell whether it is saved: callers are told so
                raise
            raise known from error

    def _locked(self, name: str) -> Any:
        # Who waits for a lock is ended by the server too: it knows nothing of our deadline.
        milliseconds = str(int(current_batch().remaining() * 1000))  # noqa: F841 - Pony reads it by its name
        self._database.select("SELECT set_config('statement_timeout', $milliseconds, true)")
        row = self._row.get_for_update(name=name)
        if row is None:
            # It waits for another one that inserts it just now, and is rolled back with all else if nothing is saved.
            self._database.execute("INSERT INTO account VALUES ($name, 0) ON CONFLICT DO NOTHING")
            row = self._row.get_for_update(name=name)
        return row


def _of_database(error: Exception) -> Exception:
    """Return the driver's own error, which Pony has wrapped without a cause."""
    for _, wrapped, _ in getattr(error, "exceptions", []):  # of a COMMIT
        return _of_database(wrapped)
    wrapped = getattr(error, "original_exc", None)
    return error if wrapped is None else _of_database(wrapped)


_: type[OnServer] = Accounts  # a type checker compares the store with what it says it has
