"""The ways of changing two accounts that `transfers` compares, and what checks afterwards that they were changed."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any, Final, Literal

import psycopg
import sqlalchemy as sa
from django.db import connections, transaction
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks.ways import POOL, Pool, Way
from geventbatch import Processor, current_batch
from geventbatch.stores import DjangoStore, SQLAlchemyStore
from geventbatch.stores.django._connections import close_idle
from tests.support.django_project.start import create_tables as create_tables_of_django
from tests.support.django_project.start import database

from benchmarks.transfer_models import (  # isort: skip - after Django is set up
    Account,
    Ledger,
    Movement,
    add,
    move,
    move_with_row,
    transfer_in_ledger,
)

Form = Literal["documents", "mapped", "Django"]

RICH: Final = 10**9

_LARGEST_BULK: Final = 1000
_BULKS: Final = 2
"""Which run at once."""


class Transfers(Way):
    """Moves money; a context manager."""

    table = "accounts"

    def transfer(self, source: int, target: int, amount: int) -> None:
        """Return when it is saved."""
        raise NotImplementedError


# -- each request by itself ---------------------------------------------------------------------------------


class Transaction(Transfers):
    """Locks both rows in their order, writes both in one statement, and commits; through psycopg.

    Args:
        url: Of the database.
        pool: Connections.
        audit: Insert a row each.
    """

    def __init__(self, url: str, pool: int, *, audit: bool = False) -> None:
        """See the class."""
        self._pool = Pool(url, pool)
        self._audit = audit

    def __exit__(self, *error: object) -> None:
        """See `Way`."""
        self._pool.close()

    def cancel_waiting(self) -> None:
        """See `Way`."""
        self._pool.kill_waiters()

    def transfer(self, source: int, target: int, amount: int) -> None:
        """See `Transfers`."""
        connection = self._pool.take()
        try:
            with connection.transaction():
                self._change(connection, source, target, amount)
        finally:
            self._pool.give(connection)

    def _change(self, connection: psycopg.Connection[Any], source: int, target: int, amount: int) -> None:
        asked = "SELECT id, balance FROM accounts WHERE id = ANY(%s) ORDER BY id FOR UPDATE"
        balances = dict(connection.execute(asked, ([source, target],)).fetchall())
        if balances[source] < amount:
            raise ValueError("insufficient funds")
        connection.execute(
            "UPDATE accounts SET balance = new.balance, transfers = transfers + 1 "
            "FROM (VALUES (%s::bigint, %s::bigint), (%s, %s)) new (id, balance) WHERE accounts.id = new.id",
            (source, balances[source] - amount, target, balances[target] + amount),
        )
        if self._audit:
            connection.execute(
                "INSERT INTO movements (source, target, amount) VALUES (%s, %s, %s)", (source, target, amount)
            )


class DjangoTransaction(Transfers):
    """The same by Django's means, as ``examples/wallet`` has it, on connections that wait in a fair pool.

    Args:
        url: Of the database.
        pool: Connections.
    """

    def __init__(self, url: str, pool: int) -> None:
        """See the class."""
        self._stack = ExitStack()
        self._alias = self._stack.enter_context(database(url, create=False))
        self._pool = _DjangoPool(self._alias, pool)

    def __exit__(self, *error: object) -> None:
        """See `Way`."""
        self._pool.close()
        self._stack.close()

    def cancel_waiting(self) -> None:
        """See `Way`."""
        self._pool.kill_waiters()

    def transfer(self, source: int, target: int, amount: int) -> None:
        """See `Transfers`."""
        connection: Any = self._pool.take()
        connections[self._alias] = connection
        try:
            with transaction.atomic(using=self._alias):
                accounts = Account.objects.using(self._alias)
                both = accounts.select_for_update().filter(pk__in=(source, target)).order_by("pk")
                locked = {account.pk: account for account in both}
                move((locked[source], locked[target]), source, target, amount)
                accounts.bulk_update(locked.values(), ["balance", "transfers"])
        finally:
            del connections[self._alias]
            self._pool.give(connection)


class _DjangoPool(Pool):
    def __init__(self, alias: str, size: int) -> None:
        self._alias = alias
        super().__init__(alias, size)

    def connected(self, url: str) -> Any:
        connection = connections.create_connection(url)
        connection.inc_thread_sharing()
        return connection


class LedgerKey(Transfers):
    """All transfers are operations on one key, whose batch loads accounts as they are touched.

    Args:
        url: Of the database.
        audit: Insert a row each.
    """

    def __init__(self, url: str, *, audit: bool = False) -> None:
        """See the class."""
        self._stack = ExitStack()
        Ledger.using = alias = self._stack.enter_context(database(url, create=False))
        self._stack.callback(close_idle, alias)
        store = DjangoStore(Ledger, by="name", version="batches", missing=lambda name: Ledger(name=name), using=alias)
        self._processor = self._stack.enter_context(
            Processor(open_resource=store, min_duration=0, max_duration=30, max_attempts=1000, max_batches=1)
        )
        self._audit = audit

    def __exit__(self, *error: object) -> None:
        """See `Way`."""
        self._stack.close()

    def transfer(self, source: int, target: int, amount: int) -> None:
        """See `Transfers`."""
        caller = object()
        Ledger.wanted[caller] = source, target
        try:
            self._processor.run("main", transfer_in_ledger, source, target, amount, self._audit)
        finally:
            del Ledger.wanted[caller]


# -- batches ------------------------------------------------------------------------------------------------


class Base(DeclarativeBase):
    """What SQLAlchemy maps."""


class MappedAccount(Base):
    """The row that `transfer_models.Account` is too."""

    __tablename__ = "accounts"
    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True)
    balance: Mapped[int] = mapped_column(sa.BigInteger)
    transfers: Mapped[int] = mapped_column(sa.BigInteger)


MOVEMENTS: Final = sa.Table(
    "movements",
    Base.metadata,
    sa.Column("id", sa.BigInteger, primary_key=True),
    *(sa.Column(name, sa.BigInteger) for name in ("source", "target", "amount")),
)


class Batched(Transfers):
    """Batches of a store.

    Args:
        url: Of the database.
        form: Of the store.
        mode: Of the store.
        audit: Insert a row each.
        alone: Each transfer is a batch.
        of_keys: For operations of one key: "each" has batches of its own, or "many" share bulks.
    """

    def __init__(  # noqa: PLR0913 - most are keywords
        self,
        url: str,
        form: Form,
        mode: Literal["lock", "version"] = "lock",
        *,
        audit: bool = False,
        alone: bool = False,
        of_keys: Literal["across", "each", "many"] = "across",
    ) -> None:
        """See the class."""
        self.table = "documents" if form == "documents" else "accounts"
        self._key: Any = str if form == "documents" else int
        self._stack = ExitStack()
        store = self._store(url, form, mode)
        options: dict[str, Any] = {"min_duration": 0, "max_duration": 30, "max_attempts": 1000}
        if of_keys == "each":
            options |= {"open_resource": store, "max_batches": POOL}
        else:
            opens = {"open_resources": store.open_resources} if of_keys == "many" else {"open_resource": store}
            options |= {**opens, "max_bulk": _LARGEST_BULK, "max_batches": _BULKS}
        if alone:
            options |= {"max_bulk": 2, "max_batch_size": 1, "max_batches": POOL}
        self._processor = self._stack.enter_context(Processor(**options))
        self._move, self._add = _OPERATIONS[form, audit]

    def __exit__(self, *error: object) -> None:
        """See `Way`."""
        self._stack.close()

    def transfer(self, source: int, target: int, amount: int) -> None:
        """See `Transfers`."""
        key = self._key
        self._processor.run_across((key(source), key(target)), self._move, source, target, amount)

    def add(self, key: Any) -> None:
        """See `Way`."""
        self._processor.run(self._key(key), self._add)

    def _store(self, url: str, form: Form, mode: Literal["lock", "version"]) -> Any:
        if form == "Django":
            alias = self._stack.enter_context(database(url, create=False))
            self._stack.callback(close_idle, alias)
            return DjangoStore(Account, mode=mode, using=alias)
        engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"), pool_size=POOL, max_overflow=0)
        self._stack.callback(engine.dispose)
        if form == "mapped":
            return SQLAlchemyStore.mapped(engine, MappedAccount, mode=mode)
        return SQLAlchemyStore.documents(engine, "documents", mode=mode)


def move_in_documents(accounts: tuple[dict[str, int], ...], source: int, target: int, amount: int) -> None:  # noqa: ARG001 - for the audit
    """The operation across keys, on documents."""
    payer, paid = accounts
    if payer["balance"] < amount:
        raise ValueError("insufficient funds")
    payer["balance"] -= amount
    payer["transfers"] += 1
    paid["balance"] += amount
    paid["transfers"] += 1


def move_in_documents_with_row(accounts: tuple[dict[str, int], ...], source: int, target: int, amount: int) -> None:
    """The same, with a line of the audit."""
    move_in_documents(accounts, source, target, amount)
    current_batch().add_row((MOVEMENTS, {"source": source, "target": target, "amount": amount}))


def move_with_row_in_table(accounts: tuple[Any, ...], source: int, target: int, amount: int) -> None:
    """The operation across keys on instances of a mapped class, with a line of the audit."""
    move(accounts, source, target, amount)
    current_batch().add_row((MOVEMENTS, {"source": source, "target": target, "amount": amount}))


def add_in_document(account: dict[str, int]) -> None:
    """The operation on one key."""
    account["balance"] += 1
    account["transfers"] += 1


_OPERATIONS: Final[dict[tuple[Form, bool], tuple[Any, Any]]] = {
    ("documents", False): (move_in_documents, add_in_document),
    ("documents", True): (move_in_documents_with_row, add_in_document),
    ("mapped", False): (move, add),
    ("mapped", True): (move_with_row_in_table, add),
    ("Django", False): (move, add),
    ("Django", True): (move_with_row, add),
}


# -- the tables ---------------------------------------------------------------------------------------------


def create_tables(url: str) -> None:
    """Make them anew."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS accounts, movements, ledgers, documents")
    with database(url, create=False) as alias:
        create_tables_of_django(alias, (Account, Movement, Ledger))
    engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"))
    SQLAlchemyStore.documents(engine, "documents").create_table()
    engine.dispose()


def begin_rich(url: str, accounts: int) -> None:
    """Have accounts that are numbered from 0, as rows and as documents, and nothing else."""
    rich = json.dumps({"balance": RICH, "transfers": 0})
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("TRUNCATE accounts, movements, ledgers, documents")
        numbers = f"FROM generate_series(0, {accounts - 1}) number"
        connection.execute(f"INSERT INTO accounts (id, balance, transfers) SELECT number, {RICH}, 0 {numbers}")
        connection.execute(f"INSERT INTO documents (key, state, version) SELECT number, '{rich}', 0 {numbers}")


def check(  # noqa: PLR0913 - most are keywords
    url: str, way: Way, accounts: int, answered: int, *, keys: int, audit: bool
) -> None:
    """Compare what is in the database with the operations that were answered, each of which had so many keys."""
    columns = ("balance", "transfers")
    named = [f"(state::json->>'{one}')::bigint" if way.table == "documents" else one for one in columns]
    with psycopg.connect(url, autocommit=True) as connection:
        asked = f"SELECT sum({named[0]}), sum({named[1]}), (SELECT count(*) FROM movements) FROM {way.table}"  # noqa: S608 - our own names
        found = connection.execute(asked).fetchone()
    money = accounts * RICH + (answered if keys == 1 else 0)
    expected = (money, keys * answered, answered if audit else 0)
    if found != expected:
        raise AssertionError(f"money, transfers and rows are {found} in the database, but {expected} by the answers")
