"""The store of examples/stores/with_psycopg.py on the bench, and stores that do wrong, each in a way of its own."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import psycopg
from gevent.pool import Pool
from psycopg.conninfo import make_conninfo

from examples.stores.bench_with_psycopg import AccountsBench
from examples.stores.with_psycopg import TABLE, Account, Accounts
from geventbatch import Conflict, NothingToSave
from tests.support.servers import administer, postgres_url

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg_pool import ConnectionPool

    from geventbatch.testing._proxy import Endpoint


@contextmanager
def schema() -> Iterator[str]:
    """The name of a new schema with the table."""
    name = f"accounts_{uuid4().hex}"
    administer(f"CREATE SCHEMA {name}; SET LOCAL search_path = {name}; {TABLE}")
    yield name
    administer(f"DROP SCHEMA {name} CASCADE")


def of_schema(name: str) -> tuple[str, tuple[str, int] | str]:
    """What a bench is told of the database where *name* is a schema."""
    url = urlsplit(postgres_url())
    port = url.port or 5432
    server = (url.hostname, port) if url.hostname else f"{parse_qs(url.query)['host'][0]}/.s.PGSQL.{port}"
    return make_conninfo(postgres_url(), options=f"-c search_path={name}"), server


def without_tls(server: Endpoint | None) -> dict[str, Any]:
    """What a driver is told besides the database, so that a proxy can read what is sent."""
    through: dict[str, Any] = {"host": server[0], "port": server[1]} if isinstance(server, tuple) else {}
    return {**through, "sslmode": "disable", "gssencmode": "disable"}


class PsycopgBench(AccountsBench):
    """The right one, and what the wrong ones have of it."""

    def __init__(self, schema: str) -> None:
        super().__init__(*of_schema(schema))

    @contextmanager
    def open_store(self, server: Endpoint | None, /) -> Iterator[Any]:
        with super().open_store(server) as accounts:
            yield self.store(accounts._pool)

    def store(self, pool: ConnectionPool) -> Any:
        return Accounts(pool)


# -- wrong ones ---------------------------------------------------------------------------------------------------

LOAD: Final = "SELECT balance FROM account WHERE name = %s"
UPDATE: Final = "UPDATE account SET balance = %s WHERE name = %s"


def load(connection: psycopg.Connection, name: str, how: str = " FOR UPDATE") -> Account:
    """What is there; a new one where nothing is."""
    connection.execute("INSERT INTO account VALUES (%s, 0) ON CONFLICT DO NOTHING", [name])
    (balance,) = connection.execute(LOAD + how, [name]).fetchone() or (0,)
    return Account(balance)


class LosesConcurrentWrites(PsycopgBench):
    """It locks nothing, and compares nothing."""

    def store(self, pool: ConnectionPool) -> Any:
        @contextmanager
        def open_account(name: str) -> Iterator[Account]:
            with pool.connection() as connection:
                account = load(connection, name, "")
                connection.commit()
                yield account
                connection.execute(UPDATE, [account.balance, name])

        return open_account


class AnswersBeforeItSaved(PsycopgBench):
    """It leaves the save to another greenlet."""

    @contextmanager
    def open_store(self, server: Endpoint | None, /) -> Iterator[Any]:
        with super().open_store(server) as pool:
            later = Pool()

            @contextmanager
            def open_account(name: str) -> Iterator[Account]:
                lent = pool.connection()
                connection = lent.__enter__()
                account = load(connection, name)
                yield account
                later.spawn(save, lent, connection, account, name)

            def save(lent: Any, connection: psycopg.Connection, account: Account, name: str) -> None:
                with lent_again(lent):
                    connection.execute(UPDATE, [account.balance, name])

            try:
                yield open_account
            finally:
                later.join()

    def store(self, pool: ConnectionPool) -> Any:
        return pool


@contextmanager
def lent_again(lent: Any) -> Iterator[None]:
    """Have what was entered elsewhere end here."""
    try:
        yield
    finally:
        lent.__exit__(None, None, None)


class SwallowsTheErrorOfCommit(PsycopgBench):
    """It writes it into a log, say, and is content."""

    def store(self, pool: ConnectionPool) -> Any:
        @contextmanager
        def open_account(name: str) -> Iterator[Account]:
            with pool.connection() as connection:
                account = load(connection, name)
                yield account
                connection.execute(UPDATE, [account.balance, name])
                try:
                    connection.commit()
                except psycopg.Error:
                    connection.close()

        return open_account


class TakesItsOwnWriteForAConflict(PsycopgBench):
    """It compares and sets; when the connection is lost it sends the same again, and finds its own write there."""

    save_marker = b"UPDATE account"  # each statement is a transaction

    def store(self, pool: ConnectionPool) -> Any:
        @contextmanager
        def connected() -> Iterator[psycopg.Connection]:
            with pool.connection() as connection:
                connection.autocommit = True
                yield connection

        @contextmanager
        def open_account(name: str) -> Iterator[Account]:
            with connected() as connection:
                account = load(connection, name, "")
            loaded = account.balance
            yield account
            for _ in range(3):
                try:
                    with connected() as connection:
                        done = connection.execute(UPDATE + " AND balance = %s", [account.balance, name, loaded])
                except psycopg.OperationalError:
                    continue
                if not done.rowcount:
                    raise Conflict("somebody else has changed it")
                return

        return open_account


class LeaksAfterADeadline(PsycopgBench):
    """It gives its connection back after an `Exception`, and a deadline is none."""

    def store(self, pool: ConnectionPool) -> Any:
        @contextmanager
        def open_account(name: str) -> Iterator[Account]:
            connection = pool.getconn()
            try:
                account = load(connection, name)
                yield account
                connection.execute(UPDATE, [account.balance, name])
                connection.commit()
            except Exception:
                pool.putconn(connection)
                raise
            pool.putconn(connection)

        return open_account


class LeaksFromAPoolWithoutBounds(PsycopgBench):
    """Likewise, and it makes a new connection for each that it has lost."""

    @contextmanager
    def open_store(self, server: Endpoint | None, /) -> Iterator[Any]:
        idle: list[psycopg.Connection] = []
        made: list[psycopg.Connection] = []

        @contextmanager
        def open_account(name: str) -> Iterator[Account]:
            if not idle:
                idle.append(psycopg.connect(self.database, **without_tls(server)))
                made.extend(idle)
            connection = idle.pop()
            try:
                account = load(connection, name)
                yield account
                connection.execute(UPDATE, [account.balance, name])
                connection.commit()
            except Exception:
                connection.rollback()
                idle.append(connection)
                raise
            idle.append(connection)

        try:
            yield open_account
        finally:
            for connection in made:
                connection.close()


class SharesStateBetweenKeys(PsycopgBench):
    """It has the name of the account that it has loaded last."""

    def store(self, pool: ConnectionPool) -> Any:
        class Store:
            name = ""

            @contextmanager
            def __call__(self, name: str) -> Iterator[Account]:
                self.name = name
                with pool.connection() as connection:
                    account = load(connection, name)
                    yield account
                    connection.execute(UPDATE, [account.balance, self.name])

        return Store()


class SaysThatNothingWasSavedOfALostCommit(PsycopgBench):
    """It takes every error of the database for one before COMMIT."""

    def store(self, pool: ConnectionPool) -> Any:
        right = Accounts(pool)

        @contextmanager
        def open_account(name: str) -> Iterator[Account]:
            try:
                with right(name) as account:
                    yield account
            except psycopg.OperationalError as error:
                raise Conflict("the connection was lost") from error

        return open_account


class KeepsWhatItHasLoaded(PsycopgBench):
    """It has a cache of its own, and does not ask whether that is what is saved."""

    def store(self, pool: ConnectionPool) -> Any:
        cached: dict[str, Account] = {}

        @contextmanager
        def open_account(name: str) -> Iterator[Account]:
            with pool.connection() as connection:
                account = cached[name] = cached.get(name) or load(connection, name)
                yield account
                connection.execute(UPDATE, [account.balance, name])

        return open_account


class SavesWhatWasLeftByAnError(PsycopgBench):
    """It commits however its block ends."""

    def store(self, pool: ConnectionPool) -> Any:
        @contextmanager
        def open_account(name: str) -> Iterator[Account]:
            with pool.connection() as connection:
                account = load(connection, name)
                try:
                    yield account
                finally:
                    connection.execute(UPDATE, [account.balance, name])
                    connection.commit()

        return open_account


class FailsEverybodyForAConstraint(PsycopgBench):
    """It does not say whose fault an error is."""

    def store(self, pool: ConnectionPool) -> Any:
        @contextmanager
        def open_account(name: str) -> Iterator[Account]:
            with pool.connection() as connection:
                account = load(connection, name)
                yield account
                connection.execute(UPDATE, [account.balance, name])

        return open_account


class HoldsItsLockWhenNothingIsSaved(PsycopgBench):
    """It forgets its transaction when it has nothing to save."""

    def store(self, pool: ConnectionPool) -> Any:
        forgotten: list[psycopg.Connection] = []

        @contextmanager
        def open_account(name: str) -> Iterator[Account]:
            connection = pool.getconn()
            account = load(connection, name)
            try:
                yield account
            except NothingToSave:
                forgotten.append(connection)
                raise
            except BaseException:
                pool.putconn(connection)
                raise
            connection.execute(UPDATE, [account.balance, name])
            connection.commit()
            pool.putconn(connection)

        return open_account
