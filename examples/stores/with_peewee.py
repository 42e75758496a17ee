"""Accounts in PostgreSQL, with Peewee. The kind: a transaction that has locked its row."""

from collections.abc import Iterator
from contextlib import contextmanager

from peewee import BigIntegerField, Check, DatabaseError, InterfaceError, Model, TextField
from playhouse.pool import PooledPostgresqlDatabase

from geventbatch import current_batch
from geventbatch.scopes import OnServer
from geventbatch.stores import as_not_saved


class Account(Model):
    """What operations get."""

    name = TextField(primary_key=True)
    balance = BigIntegerField(default=0, constraints=[Check("balance >= 0")])

    def add(self, amount: int) -> int:
        """Add *amount*, and return what there is then."""
        self.balance += amount
        return int(self.balance)


class Accounts:
    """A store: ``Processor(open_resource=Accounts(database), max_batches=…, …)``, as many as connections.

    The database is a ``PooledPostgresqlDatabase(…, prefer_psycopg3=True, max_connections=…, timeout=…)``: without
    psycogreen, psycopg2 does not wait in gevent's way.
    """

    on_server = True

    def __init__(self, database: PooledPostgresqlDatabase) -> None:
        self._database = database

    @contextmanager
    def __call__(self, name: str) -> Iterator[Account]:
        """Load the account and lock its row; at the end of the block, save it and commit."""
        committing = False
        try:
            with self._lent():
                self._database.begin()
                account = self._locked(name)
                yield account
                changed = Account.update(balance=account.balance).where(Account.name == name)
                changed.execute(self._database)
                committing = True
                self._database.commit()
        except (DatabaseError, InterfaceError) as error:
            known = as_not_saved(error, name, committing=committing)
            if known is None:  # nobody can tell whether it is saved: callers are told so
                raise
            raise known from error

    @contextmanager
    def _lent(self) -> Iterator[None]:
        """Lend a connection, which is closed if anything has interrupted it.

        ``atomic()`` would send ROLLBACK on what a deadline has interrupted, and raise the error of that in its place.
        """
        self._database.connect()
        try:
            yield
        except BaseException:
            self._database.manual_close()
            raise
        self._database.close()

    def _locked(self, name: str) -> Account:
        # Who waits for a lock is ended by the server too: it knows nothing of our deadline.
        milliseconds = int(current_batch().remaining() * 1000)
        self._database.execute_sql("SELECT set_config('statement_timeout', %s, true)", [str(milliseconds)])
        row = Account.select().where(Account.name == name).for_update()
        account: Account | None = row.first(self._database)
        if account is None:
            # It waits for another one that inserts it just now, and is rolled back with all else if nothing is saved.
            Account.insert(name=name).on_conflict_ignore().execute(self._database)
            account = row.clone().get(self._database)
        return account


_: type[OnServer] = Accounts  # a type checker compares the store with what it says it has
