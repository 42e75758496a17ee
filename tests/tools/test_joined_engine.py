"""`geventbatch.testing.joined_engine`: what a `SQLAlchemyStore` commits goes with the rollback of a test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import pytest
import sqlalchemy as sa
from gevent.event import Event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from geventbatch import IdempotencyKeyReused, LoadFailed, Processor
from geventbatch.stores import SQLAlchemyStore
from geventbatch.stores.sqlalchemy import idempotency_table
from geventbatch.testing import joined_engine
from tests.support.servers import postgres_url

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "joined_accounts"
    owner: Mapped[str] = mapped_column(primary_key=True)
    balance: Mapped[int] = mapped_column(sa.CheckConstraint("balance >= 0"))


OUTCOMES = idempotency_table("joined_outcomes", Base.metadata)


def account(owner: str) -> Account:
    return Account(owner=owner, balance=0)


def add(account: Account, amount: int) -> int:
    account.balance += amount
    return account.balance


def count(document: dict[str, int]) -> int:
    document["n"] += 1
    return document["n"]


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    url = sa.make_url(f"sqlite:///{tmp_path / 'joined.db'}" if request.param == "sqlite" else postgres_url())
    engine = sa.create_engine(url if request.param == "sqlite" else url.set(drivername="postgresql+psycopg"))
    Base.metadata.create_all(engine)
    yield engine
    Base.metadata.drop_all(engine)
    engine.dispose()


@pytest.fixture
def connection(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect() as connection, connection.begin():
        yield connection


def mapped(connection: sa.Connection, **options: Any) -> Processor[Account]:
    store = SQLAlchemyStore.mapped(joined_engine(connection), Account, missing=account, **options)
    return Processor(open_resource=store, min_duration=0, max_duration=5, batching=False)


def roll_back(connection: sa.Connection) -> None:
    transaction = connection.get_transaction()
    assert transaction is not None
    transaction.rollback()


def balances(source: sa.Connection | sa.Engine) -> dict[str, int]:
    with Session(source, join_transaction_mode="create_savepoint") as session:
        return {one.owner: one.balance for one in session.scalars(sa.select(Account))}


@pytest.mark.parametrize("mode", [None, "version"])
def test_what_is_saved_is_seen_on_the_connection_and_goes_with_its_rollback(
    engine: sa.Engine, connection: sa.Connection, mode: Any
) -> None:
    with mapped(connection, mode=mode) as accounts:
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            session.add(Account(owner="Bob", balance=5))
            session.commit()
        assert accounts.run("Ann", add, 7) == 7
        assert accounts.run("Ann", add, 1) == 8
        assert accounts.run("Bob", add, 1) == 6
    assert balances(connection) == {"Ann": 8, "Bob": 6}
    roll_back(connection)
    assert balances(engine) == {}


def test_documents_are_too_and_bulks(engine: sa.Engine, connection: sa.Connection) -> None:
    store = SQLAlchemyStore.documents(joined_engine(connection), "joined_things", missing=lambda _: {"n": 0})
    store.create_table()
    for opens in ({"open_resource": store}, {"open_resources": store.open_resources}):
        options: dict[str, Any] = {"min_duration": 0, "max_duration": 5, "batching": False, **opens}
        with Processor(**options) as things:
            things.run("a", count)
    assert connection.execute(sa.text("SELECT state FROM joined_things")).scalars().all() == ['{"n": 2}']
    roll_back(connection)
    assert not sa.inspect(engine).has_table("joined_things")


def test_a_failure_takes_back_its_own_operation_and_nothing_of_the_test(connection: sa.Connection) -> None:
    with mapped(connection) as accounts:
        accounts.run("Ann", add, 7)
        with pytest.raises(sa.exc.IntegrityError):
            accounts.run("Ann", add, -8)
        with pytest.raises(ZeroDivisionError):
            accounts.run("Ann", lambda _: 1 // 0)
        assert accounts.run("Ann", add, 1) == 8
    assert balances(connection) == {"Ann": 8}


def test_idempotency_keys_are_recorded_in_it(connection: sa.Connection) -> None:
    with mapped(connection, idempotency=OUTCOMES) as accounts:
        assert [accounts.run("Ann", add, 7, idempotency_key="x") for _ in range(2)] == [7, 7]
        with pytest.raises(IdempotencyKeyReused):
            accounts.run("Ann", add, 8, idempotency_key="x")
    assert balances(connection) == {"Ann": 7}


def test_an_operation_that_is_interrupted_leaves_the_connection_usable(connection: sa.Connection) -> None:
    def hang(account: Account) -> None:
        add(account, 1)
        hangs.set()
        gevent.sleep(60)

    hangs = Event()
    with mapped(connection) as accounts:
        accounts.run("Ann", add, 7)
        caller = gevent.spawn(accounts.run, "Ann", hang)
        hangs.wait()
        caller.kill()
        assert accounts.run("Ann", add, 1) == 8
    assert balances(connection) == {"Ann": 8}


def test_two_batches_at_once_are_told_to_turn_batching_off(connection: sa.Connection) -> None:
    began, go_on = Event(), Event()

    def wait(_: Account) -> None:
        began.set()
        go_on.wait()

    with mapped(connection) as accounts:
        waiting = gevent.spawn(accounts.run, "Ann", wait)
        began.wait()
        with pytest.raises(LoadFailed) as refused:
            accounts.run("Bob", add, 1)
        assert "turn batching off" in str(refused.value)
        go_on.set()
        waiting.get()
        assert accounts.run("Bob", add, 1) == 1


def test_it_keeps_what_else_the_engine_has(engine: sa.Engine, connection: sa.Connection) -> None:
    joined = joined_engine(connection)
    assert joined.dialect is not engine.dialect
    assert joined.dialect.name == engine.dialect.name
    assert joined.dialect.server_version_info == engine.dialect.server_version_info
    assert joined.url == engine.url
    with engine.connect() as other, other.begin():  # which commits as ever
        other.execute(sa.insert(Account).values(owner="Cyd", balance=3))
    assert balances(engine) == {"Cyd": 3}
