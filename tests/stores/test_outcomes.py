"""Where stores keep what was recorded under idempotency keys: by which names, in which schema, and until when."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import gevent
import pytest
import sqlalchemy as sa
from django.db import OperationalError
from gevent.event import Event
from redis import RedisCluster
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column
from sqlalchemy.pool import QueuePool

from geventbatch import BatchError, Processor
from geventbatch._idempotency.outcome_name import name_of
from geventbatch.stores._sql import outcomes
from geventbatch.stores.django import _transaction
from geventbatch.stores.redis import RedisStore
from geventbatch.stores.sqlalchemy import SQLAlchemyStore, idempotency_table
from tests.support import redis_server
from tests.support.adapters.base import cases
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.adapters.base import Case


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "accounts"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(unique=True)
    total: Mapped[int]


class Price(Base):
    __tablename__ = "prices"
    amount: Mapped[Decimal] = mapped_column(sa.Numeric(10, 2), primary_key=True)
    total: Mapped[int]


class Ticket(MappedAsDataclass, Base):
    __tablename__ = "tickets"
    id: Mapped[int] = mapped_column(primary_key=True)
    total: Mapped[int]


OUTCOMES: Final = idempotency_table("outcomes", Base.metadata)

KEEPS_THE_LOCK: Final = {"sqlalchemy-document-version-sqlite-bulk", "django-row-sqlite-bulk"}
"""They look for outcomes behind a savepoint, with SQLite's write lock: nobody else writes from then on to COMMIT."""

KEEPS_THE_ROW: Final = {
    "sql-pymysql-mariadb-bulk",
    "sqlalchemy-document-lock-mariadb-bulk",
    "sqlalchemy-document-version-mariadb-bulk",
}
"""On InnoDB an INSERT that finds its key keeps that row locked, through a rollback to a savepoint too: to delete it,
somebody else waits for COMMIT."""


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'bank.sqlite'}")
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


def deposit(account: Account | Price, amount: int) -> int:
    account.total += amount
    return account.total


def itself(ticket: Ticket) -> Ticket:
    ticket.total += 1
    return ticket


def test_a_dataclass_that_cannot_be_made_again_is_refused_at_first(engine: sa.Engine) -> None:
    # A mapped dataclass was recorded, and who came again got a BatchError.
    with engine.begin() as connection:
        connection.execute(sa.insert(Ticket).values(id=1, total=0))
    mapped = SQLAlchemyStore.mapped(engine, Ticket, idempotency=OUTCOMES)
    with Processor(open_resource=mapped, min_duration=0) as processor:
        assert isinstance(answer_of(processor.run, 1, itself, idempotency_key="a"), TypeError)


# -- names ------------------------------------------------------------------------------------------------------


def test_stores_of_one_table_by_other_columns_have_nothing_to_do_with_each_other(engine: sa.Engine) -> None:
    # Key 1 by id and key 1 by number are two accounts: the second one got the outcome of the first one's.
    with engine.begin() as connection:
        connection.execute(
            sa.insert(Account), [{"id": 1, "number": 2, "total": 10}, {"id": 2, "number": 1, "total": 20}]
        )
    for by, total in ((None, 11), ("number", 21), ("id", 11)):
        mapped = SQLAlchemyStore.mapped(engine, Account, by=by, idempotency=OUTCOMES)
        with Processor(open_resource=mapped, min_duration=0) as processor:
            assert processor.run(1, deposit, 1, idempotency_key="a") == total


def test_keys_that_are_equal_have_the_same_outcomes(engine: sa.Engine) -> None:
    # 1.50 and 1.5 are one key and one row; sent again under the other one, the operation was applied again.
    with engine.begin() as connection:
        connection.execute(sa.insert(Price).values(amount=Decimal("1.50"), total=0))
    mapped = SQLAlchemyStore.mapped(engine, Price, idempotency=OUTCOMES)
    with Processor(open_resource=mapped, min_duration=0) as processor:
        assert [processor.run(key, deposit, 1, idempotency_key="a") for key in ("1.50", "1.5", Decimal(15) / 10)] == [
            1
        ] * 3


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Decimal("1.50"), Decimal("1.5")),
        (Decimal(100), Decimal("1E+2")),
        (Decimal("-0"), Decimal(0)),
        (datetime(2026, 7, 1, 12, tzinfo=UTC), datetime(2026, 7, 1, 14, tzinfo=timezone(timedelta(hours=2)))),
        ((1, Decimal("1.0")), (1, Decimal(1))),
    ],
)
def test_keys_that_are_equal_have_one_name(first: Any, second: Any) -> None:
    table = outcomes.OutcomeTable("outcomes", "sqlite", 1.0)
    assert first == second
    assert outcomes.Outcomes(table, "s", first).prefix == outcomes.Outcomes(table, "s", second).prefix
    assert outcomes.Outcomes(table, "s", first).prefix != outcomes.Outcomes(table, "s", str(first)).prefix


def test_the_ids_of_outcomes_in_a_bulk_never_change_and_those_of_one_key_are_as_without_a_bulk() -> None:
    table = outcomes.OutcomeTable("outcomes", "postgresql", 1.0)
    bulk = outcomes.OutcomesOfBulk(table, "a bulk", lambda key: ("accounts", key))
    for key in ("Ann", 12, ("seat", 12), Decimal("1.50")):
        alone = outcomes.Outcomes(table, "accounts", key)
        assert bulk.rest_of(name_of((key,), "x", across=False)) == f"{alone.prefix}x"
    across = [name_of(keys, "x", across=True) for keys in (("b", ("seat", 12)), (("seat", 12), "b"), ("b",))]
    assert [bulk.rest_of(one) for one in across] == [
        "8ecace46f628f8542f6b74bbc9f1c90f:x",
        "8ecace46f628f8542f6b74bbc9f1c90f:x",
        "9c6caa9f70afefbe33b07522961865a3:x",
    ]


def test_the_outcomes_are_in_the_schema_that_the_engine_translates_to(tmp_path: Path) -> None:
    # Once: the statements of the table of outcomes knew nothing of it: one tenant got the outcomes of another one.
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'main.sqlite'}", poolclass=QueuePool)

    @sa.event.listens_for(engine, "connect")
    def attach(connection: Any, _: object) -> None:
        for name in "ab":
            connection.execute(f"ATTACH '{tmp_path / name}' AS {name}")

    for name, start in (("a", 0), ("b", 10)):
        store = SQLAlchemyStore.documents(
            engine.execution_options(schema_translate_map={None: name}),
            "documents",
            missing=partial(made_at, start),
            idempotency=idempotency_table("outcomes"),
        )
        store.create_table()
        with Processor(open_resource=store, min_duration=0) as processor:
            assert [processor.run("k", count, idempotency_key="a") for _ in range(2)] == [start + 1] * 2
            assert store.purge_outcomes() == 0
    engine.dispose()


def made_at(start: int, key: str) -> list[int]:
    return [start]


def count(resource: list[int]) -> int:
    resource[0] += 1
    return resource[0]


# -- expiry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=case.marks)
        for case in cases()
        if case.has_rows and case.has_outcomes and case.name not in KEEPS_THE_LOCK | KEEPS_THE_ROW
    ],
)
def test_an_expired_outcome_that_somebody_else_deletes_meanwhile_is_in_nobodys_way(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Once: the caller got the IntegrityError of the table of outcomes, as if its operation had violated a constraint:
    # with a purge at that moment, or when two processes were given the key at once.
    with case.fresh(tmp_path) as address, case.opens(address) as adapter:
        adapter.put("k", 10)
        store: Any = adapter.store()
        find = outcomes.Outcomes.find

        def purged_before(self: outcomes.Outcomes, send: Any, keys: Any) -> dict[str, str]:
            store.purge_outcomes()
            return find(self, send, keys)

        with adapter.processor() as processor:
            assert processor.run("k", adapter.add, 1, idempotency_key="a") == 11
            adapter.expire_outcomes()
            monkeypatch.setattr(outcomes.Outcomes, "find", purged_before)
            assert processor.run("k", adapter.add, 1, idempotency_key="a") == 12


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=case.marks) for case in cases() if case.has_rows and case.has_outcomes],
)
def test_who_cannot_look_what_is_recorded_has_certainly_not_saved(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The insert was refused, and so nothing is saved; what looking raised, a deadlock of MariaDB's for one, was a
    # SaveFailed that said that nobody knows.
    with case.fresh(tmp_path) as address, case.opens(address) as adapter:
        adapter.put("k", 10)
        with adapter.processor() as processor:
            assert processor.run("k", adapter.add, 1, idempotency_key="a") == 11

            def fails(self: outcomes.Outcomes, send: Any, keys: Any) -> dict[str, str]:
                return dict(send("SELECT nothing", ()).fetchall())

            with monkeypatch.context() as patch:
                patch.setattr(outcomes.Outcomes, "find", fails)
                error = answer_of(processor.run, "k", adapter.add, 1, idempotency_key="a")
            assert isinstance(error, BatchError)
            assert error.retry_safe
            assert processor.run("k", adapter.add, 1, idempotency_key="a") == 11


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name)
        for case in cases()
        if "sqlite" in case.name and case.has_outcomes and case.name not in KEEPS_THE_LOCK
    ],
)
def test_an_expired_outcome_is_deleted_in_gevents_way_while_another_process_writes(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Once: the driver waited for the other one, five seconds, and held the hub.
    with case.fresh(tmp_path) as address, case.opens(address) as adapter:
        adapter.put("k", 10)
        adapter.put("other", 0)
        find = outcomes.Outcomes.find
        others: list[gevent.Greenlet[..., None]] = []
        writes = Event()

        def write() -> None:
            with adapter.holding("other", 1):
                writes.set()
                for _ in range(20):  # turns of the hub, of which a driver that waits leaves it one in five seconds
                    gevent.sleep(0.005)

        def while_another_writes(self: outcomes.Outcomes, send: Any, keys: Any) -> dict[str, str]:
            others.append(gevent.spawn(write))
            writes.wait()
            return find(self, send, keys)

        with adapter.processor() as processor:
            assert processor.run("k", adapter.add, 1, idempotency_key="a") == 11
            adapter.expire_outcomes()
            monkeypatch.setattr(outcomes.Outcomes, "find", while_another_writes)
            assert processor.run("k", adapter.add, 1, idempotency_key="a") == 12
        (other,) = others
        other.get()
        assert adapter.get("other") == 1


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name) for case in cases() if case.name == "django-row-sqlite"]
)
def test_a_deletion_of_expired_outcomes_that_cannot_be_committed_leaves_nothing_unknown(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing of the batch was in that COMMIT; but its callers were told that nobody knows.
    def fails(self: Any) -> None:
        raise OperationalError("disk I/O error")

    with case.fresh(tmp_path) as address, case.opens(address) as adapter:
        adapter.put("k", 10)
        with adapter.processor() as processor:
            assert processor.run("k", adapter.add, 1, idempotency_key="a") == 11
            adapter.expire_outcomes()
            with monkeypatch.context() as patch:
                patch.setattr(_transaction.Transaction, "commit", fails)
                error = answer_of(processor.run, "k", adapter.add, 1, idempotency_key="a")
            assert isinstance(error, BatchError)
            assert error.retry_safe
            assert processor.run("k", adapter.add, 1, idempotency_key="a") == 12


def test_a_key_beside_which_a_cluster_can_keep_nothing_is_refused_with_an_idempotency_key_only() -> None:
    # Once: it failed at the save, for everybody in the batch.
    client = RedisCluster.from_url(redis_server.cluster_url())
    store = RedisStore(client, prefix=f"{uuid4().hex}:", missing=lambda _: [0])
    with Processor(open_resource=store, min_duration=0, max_duration=10) as processor:
        for key in ("a}b", "x{}y", "}"):
            error = answer_of(processor.run, key, count, idempotency_key="a")
            assert isinstance(error, ValueError)
            assert "nothing was run" in str(error)
            assert processor.run(key, count) == 1
        assert [processor.run("{a}b}", count, idempotency_key="a") for _ in range(2)] == [1, 1]
