"""A key is one row: what is equal is one key, and what can be in no row is told so, before the database is asked."""

from __future__ import annotations

import enum
import time
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

import gevent
import pytest
import redis
import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from geventbatch import IdempotencyKeyReused, LoadFailed, Processor, ResourceMissing, worker_number_for_key
from geventbatch.errors import ImpossibleKey
from geventbatch.stores import RedisStore, SQLAlchemyStore
from geventbatch.stores._sql.keys import KeyColumn, row_key
from geventbatch.stores.sqlalchemy import idempotency_table
from geventbatch.stores.sqlalchemy._key_columns import key_column
from tests.stores.test_stores import spawned
from tests.support.adapters.sqlalchemy import PLACES, fresh
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator
    from pathlib import Path


class Line(str, enum.Enum):  # noqa: UP042 - a StrEnum has the text of its value
    NORTH = "north"


class Number(int, enum.Enum):
    TWELVE = 12


class OwnUuid(UUID):
    def __str__(self) -> str:
        return "no text of a UUID's"


class OwnMoment(datetime):
    pass


class Base(DeclarativeBase):
    pass


class Train(Base):
    __tablename__ = "trains_by_key"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(100), unique=True)
    kind: Mapped[str] = mapped_column(sa.Enum("fast", "slow", name="kind_of_train"), unique=True)


SERVERS = [
    "sqlite",
    "postgresql",
    pytest.param("mariadb", marks=pytest.mark.mariadb),
]


@pytest.fixture(params=SERVERS)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    with fresh(request.param, tmp_path) as address:
        engine = PLACES[request.param](address).beside()
        Base.metadata.create_all(engine)
        yield engine
        engine.dispose()


# -- what is equal is one key -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "keys", "value"),
    [
        (str, [Line.NORTH, "north"], "north"),
        (str, [Number.TWELVE, 12, "12"], "12"),
        (str, [OwnUuid(int=1), UUID(int=1)], str(UUID(int=1))),
        (int, [Number.TWELVE, "12", "+12", "012"], 12),
        (UUID, [OwnUuid(int=1), str(UUID(int=1)), UUID(int=1).bytes], UUID(int=1)),
        (Decimal, ["1.50", Decimal("1.5")], Decimal("1.5")),
        (float, ["1.5", Decimal("1.5")], 1.5),
        (date, ["2024-05-01", date(2024, 5, 1)], date(2024, 5, 1)),
        (datetime, [OwnMoment(2024, 5, 1, tzinfo=UTC)], datetime(2024, 5, 1, tzinfo=UTC)),
    ],
)
def test_what_is_equal_is_one_key_of_the_plain_type(kind: type, keys: list[Hashable], value: Hashable) -> None:
    for key in keys:
        found = KeyColumn("trains.key", kind).normalize(key)
        assert found == value
        assert type(found) is kind


def test_members_of_an_enum_are_their_values_in_redis() -> None:
    normalize = RedisStore(redis.Redis()).normalize_key
    for key, text in ((Line.NORTH, "north"), (Number.TWELVE, "12"), (OwnUuid(int=1), str(UUID(int=1)))):
        assert normalize(key) == text
        assert type(normalize(key)) is str


def test_an_operation_on_a_member_of_an_enum_finds_the_row_of_its_text(engine: sa.Engine) -> None:
    store = SQLAlchemyStore.documents(engine, "lines", missing=lambda _: [])
    store.create_table()
    with Processor(open_resource=store, min_duration=0, max_duration=30) as processor:
        processor.run("north", list.append, 1)
        assert processor.run(Line.NORTH, lambda resource: resource) == [1]


def test_only_texts_take_the_form_that_the_row_has() -> None:
    assert row_key("ann", "Ann") == "Ann"
    assert row_key(("ann", 1), ["Ann", Decimal(1)]) == ("Ann", 1)
    assert type(row_key(("ann", 1), ["Ann", Decimal(1)])[1]) is int


# -- what can be in no row --------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["1E+150000", "1E+999999999", "-1E+150000", "9" * 200_000, "1E-999999", "NaN", "sNaN"])
def test_a_number_that_takes_long_to_write_out_is_refused_at_once(key: str) -> None:
    begun = time.process_time()
    for kind in (Decimal, int):
        assert isinstance(answer_of(KeyColumn("trains.key", kind).normalize, key), ValueError)
        if kind is Decimal:
            assert isinstance(answer_of(KeyColumn("trains.key", kind).normalize, Decimal(key)), ValueError)
    assert time.process_time() - begun < 1


def test_the_number_of_a_shard_costs_nothing_for_an_exponent() -> None:
    begun = time.process_time()
    for key in ("1E+150000", "1E+999999999999", "1E-999999999999", "0E+999999999999", "Infinity"):
        assert 0 <= worker_number_for_key(Decimal(key), 64) < 64
    assert time.process_time() - begun < 1


def test_equal_numbers_are_in_one_shard() -> None:
    workers = 2**31
    for one, other in (("0E+99999", "0"), ("1.50", "1.5"), ("1E+30000", "10E+29999"), ("1E+4299", "10E+4298")):
        assert worker_number_for_key(Decimal(one), workers) == worker_number_for_key(Decimal(other), workers)
    assert worker_number_for_key(Decimal("1E+400"), workers) == worker_number_for_key(10**400, workers)
    assert worker_number_for_key(Decimal("-12.0"), workers) == worker_number_for_key(-12, workers)


@pytest.mark.parametrize(
    ("kind", "database", "takes", "refuses"),
    [
        (sa.Integer(), "postgresql", [2**31 - 1, -(2**31)], [2**31, 2**70, "9" * 5000]),
        (sa.Integer(), "sqlite", [2**31, 2**63 - 1], [2**63, 2**70]),
        (sa.BigInteger(), "postgresql", [2**63 - 1], [2**63]),
        (sa.SmallInteger(), "mysql", [2**15 - 1], [2**15]),
        (mysql.INTEGER(unsigned=True), "mysql", [0, 2**32 - 1], [-1, 2**32]),
        (sa.Numeric(20, 0), "postgresql", [10**20 - 1, "42.0"], [10**20, "1.5", "1E+400"]),
        (sa.Numeric(5, 2), "postgresql", ["999.99", "1.500"], ["1000", "1.001"]),
        (sa.Numeric(), "postgresql", ["1E+1000", "1E-1000"], ["1E+131072", "1E-16384", "NaN", "-Infinity"]),
        (sa.Numeric(), "mysql", [10**10 - 1], [10**10, "0.5"]),
        (sa.Float(), "sqlite", ["1e300"], ["1e400", "nan"]),
        (sa.String(3), "postgresql", ["abc"], ["abcd", "a\0", "\ud83d"]),
        (sa.String(3), "mysql", ["abc", "a\0"], ["abcd", "\ud83d"]),
        (sa.String(3), "sqlite", ["abcd", "a\0"], ["\ud83d"]),
    ],
)
def test_a_column_takes_what_it_has_room_for(kind: Any, database: str, takes: list[Any], refuses: list[Any]) -> None:
    dialects: dict[str, Any] = {"postgresql": postgresql, "mysql": mysql, "sqlite": sqlite}
    column = sa.Table("trains", sa.MetaData(), sa.Column("key", kind)).c.key
    shown = key_column(column, dialects[database].dialect())
    for key in takes:
        shown.normalize(key)
    for key in refuses:
        with pytest.raises(ImpossibleKey, match=r"is no key for the column trains\.key") as raised:
            shown.normalize(key)
        assert isinstance(raised.value, ResourceMissing)
        assert isinstance(raised.value, ValueError)
        assert raised.value.key == key
        assert raised.value.retry_safe
        assert len(str(raised.value)) < 500


def test_a_key_that_no_row_can_have_is_missing_or_refused_at_the_door(engine: sa.Engine) -> None:
    documents = SQLAlchemyStore.documents(engine, "documents")
    documents.create_table()
    for store, keys in (
        (documents, ["a\0b", "a\ud83db", "x" * 5000]),
        (SQLAlchemyStore.mapped(engine, Train), [2**31, 2**63, 2**70, "9" * 10_000]),
        (SQLAlchemyStore.mapped(engine, Train, by="name"), ["a\0b", "a\ud83db", "x" * 5000]),
        (SQLAlchemyStore.mapped(engine, Train, by="kind"), ["none of both"]),
    ):
        with Processor(open_resource=store, min_duration=0, max_duration=30) as processor:
            for key in keys:
                assert isinstance(answer_of(processor.run, key, repr), (ResourceMissing, ValueError)), (store, key)


def test_a_text_that_the_database_does_not_know_as_a_value_of_the_column_is_missing(engine: sa.Engine) -> None:
    """A type that only the database knows the values of, as PostgreSQL's enumerations and addresses."""
    if engine.dialect.name != "postgresql":
        kind: Any = sa.Enum("a", "b", validate_strings=True)
    else:
        kind = postgresql.INET()
    made: list[Any] = []
    store = SQLAlchemyStore.documents(engine, "kinds", key_type=kind, missing=made.append)
    store.create_table()
    with Processor(open_resource=store, min_duration=0, max_duration=30) as processor:
        assert isinstance(answer_of(processor.run, "no such value", repr), ResourceMissing)
    assert made == []


# -- a database that takes several texts for one ----------------------------------------------------------------


def folding(engine: sa.Engine) -> Any:
    """A type of a column that takes "Ann" and "ann" for one key."""
    if engine.dialect.name == "postgresql":
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE EXTENSION citext")
        return postgresql.CITEXT()
    return sa.String(80, collation="NOCASE" if engine.dialect.name == "sqlite" else "utf8mb4_general_ci")


def add(resource: dict[str, int]) -> int:
    resource["total"] += 1
    return resource["total"]


@pytest.mark.parametrize("mode", ["lock", "version"])
def test_an_idempotency_key_belongs_to_the_row_whatever_its_key_was_written_like(engine: sa.Engine, mode: Any) -> None:
    if engine.dialect.name == "sqlite":
        mode = "version"
    store = SQLAlchemyStore.documents(
        engine,
        "folding",
        mode=mode,
        missing=lambda _: {"total": 0},
        key_type=folding(engine),
        idempotency=idempotency_table("outcomes_of_folding"),
    )
    store.create_table()
    with Processor(open_resource=store, min_duration=0, max_duration=30) as processor:
        assert processor.run("Ann", add, idempotency_key="a") == 1
        assert processor.run("ann", add, idempotency_key="a") == 1
        assert processor.run("ANN", add, idempotency_key="b") == 2
        assert processor.run("ann", add, idempotency_key="b") == 2
        assert processor.run("Ann", add) == 3


def move(documents: tuple[dict[str, int], ...], amount: int) -> tuple[int, ...]:
    documents[0]["total"] -= amount
    documents[-1]["total"] += amount
    return tuple(document["total"] for document in documents)


@pytest.mark.parametrize("mode", ["lock", "version"])
def test_an_operation_across_keys_names_rows_in_any_spelling_but_none_of_them_twice(
    engine: sa.Engine, mode: Any
) -> None:
    if engine.dialect.name == "sqlite":
        mode = "version"
    store = SQLAlchemyStore.documents(
        engine, "folding", mode=mode, missing=lambda _: {"total": 0}, key_type=folding(engine)
    )
    store.create_table()
    with Processor(open_resources=store.open_resources, min_duration=0, max_duration=30, workers=1) as processor:
        assert processor.run_across(["Ann", "Bob"], move, 1) == (-1, 1)
        assert processor.run_across(["BOB", "Ann", "Cid"], move, 1) == (0, -1, 1)
        runs = [["Ann", "ann"], ["Cid", "bob"], ["Dan", "Eve"]]
        callers = [gevent.spawn(answer_of, processor.run_across, keys, move, 1) for keys in runs]
        gevent.joinall(callers)
        twice, *answers = [caller.value for caller in callers]
        assert isinstance(twice, LoadFailed)
        assert isinstance(twice.__cause__, ValueError)
        assert "'ann' names the row 'Ann', as 'Ann' does" in str(twice.__cause__)
        assert answers == [(0, 1), (-1, 1)]
        assert processor.run_across(["ann", "eve"], move, 0) == (-1, 1)
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(store.table)) == 5


@pytest.mark.parametrize("mode", ["lock", "version"])
def test_an_idempotency_key_across_rows_is_found_in_any_spelling_and_refused_unless_they_are_named_as_before(
    engine: sa.Engine, mode: Any
) -> None:
    if engine.dialect.name == "sqlite":
        mode = "version"
    store = SQLAlchemyStore.documents(
        engine,
        "folding",
        mode=mode,
        missing=lambda _: {"total": 0},
        key_type=folding(engine),
        idempotency=idempotency_table("outcomes_of_folding"),
    )
    store.create_table()
    with Processor(open_resource=store, min_duration=0, max_duration=30) as processor:
        for _ in range(2):
            assert processor.run_across(["Ann", "bob"], move, 1, idempotency_key="a") == (-1, 1)
        for keys in (["ann", "Bob"], ["ANN", "bob"], ["bob", "Ann"]):
            error = answer_of(processor.run_across, keys, move, 1, idempotency_key="a")
            assert isinstance(error, IdempotencyKeyReused)
        assert processor.run_across(["ANN", "BOB"], move, 0) == (-1, 1)
        for key in ("Ann", "ann"):  # of single keys, with and without a bulk
            with Processor(open_resources=store.open_resources, min_duration=0, max_duration=30) as bulk:
                assert processor.run(key, add, idempotency_key="a") == bulk.run(key, add, idempotency_key="a") == 0


class Folding(DeclarativeBase):
    pass


class Folded(Folding):
    __tablename__ = "trains_that_fold"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(
        sa.String(80, collation="NOCASE")
        .with_variant(postgresql.CITEXT(), "postgresql")
        .with_variant(mysql.VARCHAR(80, collation="utf8mb4_general_ci"), "mysql", "mariadb"),
        unique=True,
    )
    seats: Mapped[int]


def test_so_does_one_of_a_mapped_row(engine: sa.Engine) -> None:
    folding(engine)
    Folding.metadata.create_all(engine)
    outcomes = idempotency_table("outcomes_of_folding")
    store = SQLAlchemyStore.mapped(
        engine, Folded, by="name", missing=lambda name: Folded(name=name, seats=0), idempotency=outcomes
    )
    store.create_table()

    def take(train: Folded) -> int:
        train.seats += 1
        return train.seats

    with Processor(open_resource=store, min_duration=0, max_duration=30) as processor:
        assert processor.run("North", take, idempotency_key="a") == 1
        assert processor.run("north", take, idempotency_key="a") == 1
        assert processor.run("NORTH", take, idempotency_key="b") == 2
        assert processor.run("North", take, idempotency_key="b") == 2


@pytest.mark.parametrize("mode", ["lock", "version"])
def test_a_bulk_has_no_row_twice_and_answers_all_who_ask_for_it(engine: sa.Engine, mode: Any) -> None:
    if engine.dialect.name == "sqlite":
        mode = "version"
    store = SQLAlchemyStore.documents(
        engine, "folding", mode=mode, missing=lambda _: {"total": 0}, key_type=folding(engine)
    )
    store.create_table()
    opens = store.open_resources
    with Processor(open_resources=opens, min_duration=0, max_duration=30, workers=1, max_batches=1) as processor:
        for turn in range(3):
            callers = {key: spawned(processor.run, key, add) for key in ("Ann", "ann", "bob", "Cy", "ANN")}
            answers = {key: caller.get() for key, caller in callers.items()}
            assert sorted(answers[key] for key in ("Ann", "ann", "ANN")) == [3 * turn + 1, 3 * turn + 2, 3 * turn + 3]
            assert answers["bob"] == answers["Cy"] == turn + 1
    with engine.connect() as connection:
        assert len(connection.execute(sa.select(store.table)).all()) == 3


def test_in_bulk_a_key_that_the_database_does_not_take_fails_alone(engine: sa.Engine) -> None:
    kind = postgresql.INET() if engine.dialect.name == "postgresql" else sa.Enum(*"123456789", validate_strings=True)
    store = SQLAlchemyStore.documents(engine, "kinds", missing=lambda _: {"total": 0}, key_type=kind)
    store.create_table()
    good = [f"10.0.0.{number}" if engine.dialect.name == "postgresql" else str(number) for number in range(1, 10)]
    opens = store.open_resources
    with Processor(open_resources=opens, min_duration=0, max_duration=30, workers=1, max_batches=1) as processor:
        for turn in (1, 2):
            asked = [*good[:5], "nothing", *good[5:], "neither"]
            callers = {key: spawned(processor.run, key, add) for key in asked}
            answers = {key: caller.get() for key, caller in callers.items()}
            assert [answers[key] for key in good] == [turn] * 9
            for key in ("nothing", "neither"):
                assert isinstance(answers[key], ResourceMissing)
                assert answers[key].key == key
