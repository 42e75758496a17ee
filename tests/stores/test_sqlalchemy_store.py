"""What SQLAlchemyStore is beside the contract of all stores (tests/stores/test_stores.py)."""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager, suppress
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

import gevent
import pytest
import sqlalchemy as sa
from gevent.event import Event
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    mapped_column,
    object_session,
    relationship,
    scoped_session,
    sessionmaker,
)
from sqlalchemy.pool import NullPool

from geventbatch import BatchError, BatchTimeout, LoadFailed, Processor, ResourceMissing, SaveFailed, current_batch
from geventbatch.stores import SQLAlchemyStore
from geventbatch.stores._sql import bounds as sql_bounds
from geventbatch.stores.sqlalchemy import idempotency_table
from geventbatch.stores.sqlalchemy._postgres import outcome
from tests.support.adapters.sqlalchemy import PLACES, PostgresPlace, fresh
from tests.support.callers import answer_of
from tests.support.proxy import Proxy
from tests.support.servers import bound_early, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy.orm import Session


class Base(DeclarativeBase):
    pass


class Train(Base):
    __tablename__ = "trains"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(80), unique=True)
    operator: Mapped[str] = mapped_column(sa.String(80), default="DB")
    taken: Mapped[int] = mapped_column(default=0)
    number: Mapped[int | None] = mapped_column(unique=True)
    seats: Mapped[dict[str, Any]] = mapped_column(sa.JSON, default=dict)
    bookings: Mapped[list[Booking]] = relationship(back_populates="train")


class Booking(Base):
    __tablename__ = "bookings"
    id: Mapped[int] = mapped_column(primary_key=True)
    train_id: Mapped[int | None] = mapped_column(sa.ForeignKey("trains.id", deferrable=True, initially="DEFERRED"))
    text: Mapped[str] = mapped_column(sa.String(80), unique=True)
    train: Mapped[Train | None] = relationship(back_populates="bookings")


class Stop(Base):
    __tablename__ = "stops"
    train: Mapped[str] = mapped_column(sa.String(80), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    waiting: Mapped[int] = mapped_column(default=0)


class Ticket(Base):
    __tablename__ = "tickets"
    id: Mapped[int] = mapped_column(primary_key=True)
    price: Mapped[int] = mapped_column(default=0)
    changes: Mapped[int] = mapped_column(default=0)
    __mapper_args__ = {"version_id_col": changes}  # noqa: RUF012 - as SQLAlchemy types it


class Postgres:
    """A schema of a server, and the way to it through a proxy."""

    def __init__(self, place: PostgresPlace, proxy: Proxy) -> None:
        self.place = place
        self.proxy = proxy
        self.direct = place.beside()
        self._engines: list[sa.Engine] = []
        self._trips: list[Trips] = []

    def engine(self, **options: Any) -> sa.Engine:
        """Through the proxy."""
        engine = self.place.engine(self.proxy, **{"pool_size": 3, "max_overflow": 0, **options})
        self._engines.append(engine)
        return engine

    def trips(self, engine: sa.Engine, directory: Path) -> Trips:
        trips = Trips(engine, directory / "trace")
        self._trips.append(trips)
        return trips

    def close(self) -> None:
        for engine in self._engines:
            engine.dispose()
        for trips in self._trips:  # libpq writes there until the connections are closed
            os.close(trips.file)


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with fresh("postgresql", tmp_path_factory.mktemp("schema")) as address:
        engine = PLACES["postgresql"](address).beside()
        Base.metadata.create_all(engine)
        with engine.begin() as connection:
            connection.execute(sa.text("DROP TABLE documents"))  # each store here has a type of its own in it
        yield address


@pytest.fixture
def postgres(schema: str) -> Iterator[Postgres]:
    place = PostgresPlace(schema)
    with Proxy(place.endpoint()) as proxy:
        postgres = Postgres(place, proxy)
        yield postgres
        postgres.close()
        with postgres.direct.begin() as connection:
            for table in reversed(Base.metadata.sorted_tables):
                connection.execute(sa.delete(table))
            connection.execute(sa.text("DROP TABLE IF EXISTS documents"))
            connection.execute(sa.text("DROP TABLE IF EXISTS others"))
        postgres.direct.dispose()


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'trains.sqlite'}")
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


def made(_: object) -> dict[str, Any]:
    return {"total": 0}


def add(resource: dict[str, Any], amount: int) -> int:
    resource["total"] += amount
    return int(resource["total"])


def take(train: Train, count: int = 1) -> int:
    train.taken += count
    return train.taken


def look(resource: object) -> object:
    return resource


def session_of(resource: object) -> Session:
    session = object_session(resource)
    assert session is not None
    return session


@contextmanager
def processor(store: SQLAlchemyStore[Any], **options: Any) -> Iterator[Processor[Any]]:
    with Processor(open_resource=store, **{"min_duration": 0, "max_duration": 30, **options}) as opened:
        yield opened


def together(opened: Processor[Any], key: object, *runs: tuple[Any, ...]) -> list[Any]:
    """What the callers of these operations were told, who ran them in one batch."""
    callers = [gevent.spawn(answer_of, opened.run, key, *run) for run in runs]
    return [caller.get() for caller in callers]


def documents(engine: sa.Engine, **options: Any) -> SQLAlchemyStore[Any]:
    store = SQLAlchemyStore.documents(engine, "documents", **{"missing": made, **options})
    store.create_table()
    return store


def train_in(engine: sa.Engine, **values: Any) -> None:
    with engine.begin() as connection:
        connection.execute(sa.insert(Train).values(**{"name": "ICE 1", "taken": 0, **values}))


def taken_in(engine: sa.Engine, name: str = "ICE 1") -> int | None:
    with engine.connect() as connection:
        return connection.scalar(sa.select(Train.taken).where(Train.name == name))


def texts_in(engine: sa.Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.select(Booking.text).order_by(Booking.id)))


class Trips:
    """How often the connections of an engine have waited for the server: its ReadyForQuery, as libpq has seen it."""

    def __init__(self, engine: sa.Engine, path: Path) -> None:
        self._path = path
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT)
        sa.event.listen(engine, "connect", self._trace)

    def _trace(self, connection: Any, _: object) -> None:
        connection.pgconn.trace(self.file)

    def of(self, run: Callable[[], object]) -> int:
        before = self._count()
        run()
        return self._count() - before

    def _count(self) -> int:
        return self._path.read_text().count("ReadyForQuery")


# -- round trips ------------------------------------------------------------------------------------------------


def book(resource: Any, row: object) -> None:
    """Change the resource, and have a row inserted."""
    if isinstance(resource, Train):
        take(resource)
    else:
        add(resource, 1)
    current_batch().add_row(row)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 2),
        ({"mode": "version"}, 2),
        # BEGIN, bound, SELECT; bound, UPDATE, INSERT, COMMIT.
        ({"pipeline": False}, 7),
    ],
    ids=["lock", "version", "without a pipeline"],
)
def test_a_batch_over_a_document_and_its_rows_is_two_round_trips(
    postgres: Postgres, tmp_path: Path, options: dict[str, Any], expected: int
) -> None:
    engine = postgres.engine()
    trips = postgres.trips(engine, tmp_path)
    with processor(documents(engine, **options)) as opened:
        opened.run("k", add, 1)
        assert trips.of(lambda: opened.run("k", book, (Booking, {"text": "a"}))) == expected
    assert texts_in(postgres.direct) == ["a"]


@pytest.mark.parametrize(
    ("options", "row", "expected"),
    [
        ({}, (Booking, {"text": "a"}), 2),
        ({"mode": "version"}, (Booking, {"text": "a"}), 2),
        # The save of an instance asks for the key that the server gives it.
        ({}, Booking(text="a"), 4),
    ],
    ids=["lock", "version", "a mapped row"],
)
def test_a_batch_over_a_mapped_class_takes_two_round_trips_where_nothing_needs_an_answer(
    postgres: Postgres, tmp_path: Path, options: dict[str, Any], row: object, expected: int
) -> None:
    train_in(postgres.direct)
    engine = postgres.engine()
    trips = postgres.trips(engine, tmp_path)
    with processor(SQLAlchemyStore.mapped(engine, Train, by="name", **options)) as opened:
        opened.run("ICE 1", take)
        assert trips.of(lambda: opened.run("ICE 1", book, row)) == expected
    assert taken_in(postgres.direct) == 2
    assert texts_in(postgres.direct) == ["a"]


def test_idempotency_keys_cost_no_round_trip(postgres: Postgres, tmp_path: Path) -> None:
    train_in(postgres.direct)
    outcomes = idempotency_table("outcomes")
    engine = postgres.engine()
    trips = postgres.trips(engine, tmp_path)
    operation: Callable[..., int]
    for opened, key, operation in (
        (documents(engine, idempotency=outcomes), "k", add),
        (SQLAlchemyStore.mapped(engine, Train, by="name", idempotency=outcomes), "ICE 1", take),
    ):
        with processor(opened) as running:
            running.run(key, operation, 1, idempotency_key="first")
            run = partial(running.run, key, operation, 1, idempotency_key="second")
            assert trips.of(run) == 2


def test_a_table_that_cannot_hold_outcomes_is_refused(postgres: Postgres) -> None:
    for table in (Train.__table__, "outcomes"):
        with pytest.raises(TypeError, match=r"must be a Table that idempotency_table\(\) has made"):
            documents(postgres.direct, idempotency=table)
    for seconds in (0, -1, float("inf"), "1", True):
        with pytest.raises((TypeError, ValueError), match=f"idempotency_ttl is {seconds!r}, but must be"):
            documents(postgres.direct, idempotency=idempotency_table("outcomes"), idempotency_ttl=seconds)
    with pytest.raises(TypeError, match="idempotency_ttl is 60, but no outcomes are recorded: pass idempotency=… too"):
        documents(postgres.direct, idempotency_ttl=60)
    with pytest.raises(TypeError, match="idempotency_ttl is 60, but no outcomes are recorded: pass idempotency=… too"):
        SQLAlchemyStore.mapped(postgres.direct, Train, idempotency_ttl=60)
    with pytest.raises(ValueError, match="records no outcomes: pass idempotency="):
        documents(postgres.direct).purge_outcomes()


def test_stores_that_share_a_table_of_outcomes_have_their_keys_apart(postgres: Postgres) -> None:
    metadata = sa.MetaData()
    outcomes = idempotency_table("outcomes", metadata)
    assert idempotency_table("outcomes", metadata) is outcomes
    stores = [
        SQLAlchemyStore.documents(postgres.direct, name, missing=lambda _: {"total": 0}, idempotency=outcomes)
        for name in ("ones", "others")
    ]
    for store in stores:
        store.create_table()
        with processor(store) as opened:
            assert [opened.run("k", add, 1, idempotency_key="a") for _ in range(2)] == [1, 1]


def test_a_batch_that_changes_nothing_writes_nothing(postgres: Postgres, tmp_path: Path) -> None:
    engine = postgres.engine()
    trips = postgres.trips(engine, tmp_path)
    store = documents(engine)
    with processor(store) as opened:
        opened.run("k", add, 1)
        assert trips.of(lambda: opened.run("k", add, 0)) == 2  # the second one is ROLLBACK
    with postgres.direct.connect() as connection:
        assert connection.scalar(sa.select(store.table.c.version)) == 1


# -- documents --------------------------------------------------------------------------------------------------


def test_the_table_is_shown_in_the_metadata_that_was_given_and_can_be_created_by_many_at_once(
    postgres: Postgres,
) -> None:
    metadata = sa.MetaData()
    engine = postgres.engine(pool_size=8)
    stores = [SQLAlchemyStore.documents(engine, "others", metadata=metadata) for _ in range(8)]
    assert list(metadata.tables) == ["others"]
    assert [column.name for column in stores[0].table.columns] == ["key", "state", "version"]
    gevent.joinall([gevent.spawn(store.create_table) for store in stores], raise_error=True)
    with postgres.direct.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(stores[0].table)) == 0


def test_keys_are_values_of_the_type_of_their_column(sqlite: sa.Engine) -> None:
    numbers = SQLAlchemyStore.documents(sqlite, "numbers", key_type=sa.Integer())
    assert numbers.normalize_key("42") == numbers.normalize_key(42) == 42
    for wrong in ("4_2", "x", "", 1.0, True, None, b"42"):
        with pytest.raises((TypeError, ValueError), match=r"is no key for the column numbers\.key") as raised:
            numbers.normalize_key(wrong)
        assert repr(wrong) in str(raised.value)
    ids = SQLAlchemyStore.documents(sqlite, "ids", key_type=sa.Uuid())
    one = UUID(int=1)
    assert ids.normalize_key(str(one)) == ids.normalize_key(str(one).upper()) == ids.normalize_key(one) == one


def test_what_cannot_be_encoded_fails_the_operation_that_made_it_so_and_no_other(sqlite: sa.Engine) -> None:
    def spoil(resource: dict[str, Any]) -> None:
        resource["spoilt"] = object()

    with processor(documents(sqlite), min_duration=0.05) as opened:
        answers = together(opened, "k", (add, 1), (spoil,), (add, 1))
        assert answers[::2] == [1, 2]
        assert isinstance(answers[1], TypeError)
        assert opened.run("k", look) == {"total": 2}


def test_a_state_that_sqlalchemy_encodes_may_be_changed_in_place(postgres: Postgres) -> None:
    store = documents(postgres.engine(), state_type=JSONB(), encode=look, decode=look)
    with processor(store) as opened:
        assert [opened.run("k", add, 1) for _ in range(3)] == [1, 2, 3]
        assert opened.run("k", look) == {"total": 3}


def test_rows_of_all_kinds_are_inserted_together(sqlite: sa.Engine) -> None:
    table = Booking.__table__

    def change(resource: dict[str, Any]) -> None:
        batch = current_batch()
        batch.add_row((table, {"text": "pair"}))
        batch.add_row((Booking, {"text": "pair of a class"}))
        batch.add_row(sa.insert(Booking).values(text="statement"))
        batch.add_row(Booking(text="instance"))

    with processor(documents(sqlite)) as opened:
        opened.run("k", change)
        assert sorted(texts_in(sqlite)) == ["instance", "pair", "pair of a class", "statement"]
        error = answer_of(opened.run, "k", lambda _: current_batch().add_row("text"))
    assert isinstance(error, TypeError)
    assert "'text'" in str(error)


def test_what_makes_no_sense_is_refused_when_the_store_is_made(sqlite: sa.Engine) -> None:
    with pytest.raises(ValueError, match="SQLite has no row locks"):
        SQLAlchemyStore.documents(sqlite, "documents", mode="lock")
    with pytest.raises(ValueError, match="mode='locked'"):
        SQLAlchemyStore.documents(sqlite, "documents", mode="locked")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="missing is 7"):
        SQLAlchemyStore.documents(sqlite, "documents", missing=7)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="AUTOCOMMIT"):
        SQLAlchemyStore.documents(sqlite.execution_options(isolation_level="AUTOCOMMIT"), "documents")
    with pytest.raises(ValueError, match="operator is not unique"):
        SQLAlchemyStore.mapped(sqlite, Train, by="operator")
    with pytest.raises(ValueError, match="no column attribute 'bookings'"):
        SQLAlchemyStore.mapped(sqlite, Train, by="bookings")
    with pytest.raises(ValueError, match="no whole number"):
        SQLAlchemyStore.mapped(sqlite, Train, version="operator")
    with pytest.raises(ValueError, match=r"version_id_col is tickets\.changes"):
        SQLAlchemyStore.mapped(sqlite, Ticket, version="price")
    with pytest.raises(TypeError, match=r"neither an Engine nor a sessionmaker.*db\.session"):
        SQLAlchemyStore.mapped(7, Train)  # type: ignore[call-overload]


def test_a_document_that_somebody_changed_is_found_out_too_when_only_rows_beside_it_are_saved(
    sqlite: sa.Engine,
) -> None:
    def note(resource: dict[str, Any]) -> int:
        current_batch().add_row((Booking, {"text": f"total {resource['total']}"}))
        return int(resource["total"])

    store = documents(sqlite)
    with processor(store) as opened, processor(store) as other:
        opened.run("k", add, 1)
        with between_load_and_save(opened, "k", note) as answers:
            other.run("k", add, 6)
        assert answers == [7]
    assert texts_in(sqlite) == ["total 7"]


# -- bounds, and connections that break -------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", [True, False])
def test_the_server_ends_a_statement_before_the_deadline_and_the_connection_stays(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch, pipeline: bool
) -> None:
    bound_early(monkeypatch, 9)
    store = documents(postgres.engine(), pipeline=pipeline)
    with processor(store, max_duration=9.5) as opened, postgres.direct.connect() as other:
        opened.run("k", add, 1)
        accepted = postgres.proxy.accepted
        other.execute(sa.select(store.table).with_for_update())
        error = answer_of(opened.run, "k", add, 1)
        assert isinstance(error, LoadFailed)
        assert "statement timeout" in str(error.__cause__)
        other.rollback()
        assert opened.run("k", add, 1) == 2
    assert postgres.proxy.accepted == accepted
    with store._engine.connect() as connection:
        assert connection.exec_driver_sql("SHOW statement_timeout").scalar() == "0"
        assert connection.exec_driver_sql("SHOW transaction_isolation").scalar() == "read committed"
    assert postgres.proxy.accepted == accepted


@pytest.mark.parametrize(
    ("pipeline", "row"),
    [(True, None), (True, Booking(text="asks for its key")), (False, None)],
    ids=["one message", "several", "without a pipeline"],
)
def test_the_server_ends_a_save_before_the_deadline_so_that_its_outcome_is_known(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch, pipeline: bool, row: object
) -> None:
    bounds = bound_early(monkeypatch, 9)
    store = documents(postgres.engine(), mode="version", pipeline=pipeline)

    def change_late(resource: dict[str, Any]) -> None:
        add(resource, 1)
        if row is not None:
            current_batch().add_row(row)
        gevent.sleep(0.3)

    with processor(store, max_duration=9.8) as opened, postgres.direct.connect() as other:
        opened.run("k", add, 1)
        other.execute(sa.select(store.table).with_for_update())
        bounds.clear()
        error = answer_of(opened.run, "k", change_late)
        assert isinstance(error, SaveFailed)
        assert error.retry_safe
        assert "statement timeout" in str(error)
        load, save, *_ = bounds
        assert save < load - 0.25  # what is left then, and not what was left at the load
        other.rollback()
        assert opened.run("k", add, 1) == 2


@pytest.mark.parametrize("pipeline", [True, False])
def test_a_connection_whose_rollback_meets_the_deadline_is_given_back(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch, pipeline: bool
) -> None:
    bound_early(monkeypatch, 1)
    store = documents(postgres.engine(pool_size=1), pipeline=pipeline)
    with processor(store, max_duration=1.3) as opened:
        opened.run("k", add, 1)
        with postgres.direct.connect() as other, postgres.proxy.hold(b"ROLLBACK") as rule:
            other.execute(sa.select(store.table).with_for_update())
            assert isinstance(answer_of(opened.run, "k", add, 1), BatchError)
            assert rule.met == 1  # after the server had ended the SELECT
            wait_until(lambda: checked_out(store) == 0)
        assert opened.run("k", add, 1) == 2


@pytest.mark.parametrize("pipeline", [True, False])
def test_after_the_deadline_nobody_waits_for_a_rollback(postgres: Postgres, pipeline: bool) -> None:
    store = documents(postgres.engine(pool_size=1), pipeline=pipeline)
    with processor(store, max_duration=0.3) as opened:
        opened.run("k", add, 1)
        with postgres.proxy.hold(b"ROLLBACK") as rule:
            assert isinstance(answer_of(opened.run, "k", lambda _: Event().wait()), BatchTimeout)
            wait_until(lambda: checked_out(store) == 0)
            assert rule.met == 0
            assert opened.run("k", add, 1) == 2


def checked_out(store: SQLAlchemyStore[Any]) -> int:
    pool: Any = store._engine.pool
    return int(pool.checkedout())


@pytest.mark.parametrize("pipeline", [True, False])
def test_a_batch_does_not_notice_that_the_server_has_ended_its_connections_at_rest(
    postgres: Postgres, pipeline: bool
) -> None:
    with processor(documents(postgres.engine(), pipeline=pipeline)) as opened:
        opened.run("k", add, 1)
        with postgres.direct.connect() as connection:
            postgres.place.terminate(connection)
        assert opened.run("k", add, 1) == 2


@pytest.mark.parametrize("pipeline", [True, False])
def test_a_commit_that_never_arrived_is_found_out_and_replayed(postgres: Postgres, pipeline: bool) -> None:
    with processor(documents(postgres.engine(), pipeline=pipeline)) as opened:
        opened.run("k", add, 1)
        rule = postgres.proxy.cut_before(b"COMMIT")
        assert opened.run("k", add, 1) == 2
        assert rule.met == 1
        assert opened.run("k", add, 0) == 2


def test_a_commit_of_which_nobody_can_ask_is_not_told_to_be_safe_to_run_again(postgres: Postgres) -> None:
    with processor(documents(postgres.engine()), max_duration=0.5) as opened:
        opened.run("k", add, 1)
        postgres.proxy.cut_after(b"COMMIT", b"COMMIT")
        postgres.proxy.refusing = True
        error = answer_of(opened.run, "k", add, 1)
        postgres.proxy.refusing = False
        assert isinstance(error, BatchError)
        assert not error.retry_safe
        assert opened.run("k", add, 0) == 2


def test_the_outcome_of_a_transaction_is_asked_for_until_it_has_one(postgres: Postgres) -> None:
    def begun(connection: sa.Connection) -> str:
        return str(connection.exec_driver_sql(sql_bounds.postgres_bound_and_xid(30)).one()[1])

    with postgres.direct.connect() as connection:
        xid = begun(connection)
        assert outcome(postgres.direct, "k", xid, 0.02) is None
        asking = gevent.spawn(outcome, postgres.direct, "k", xid, 30)
        gevent.sleep(0)
        connection.commit()
        assert asking.get() is True
        xid = begun(connection)
        connection.rollback()
        assert outcome(postgres.direct, "k", xid, 30) is False


def test_after_a_crash_nobody_is_told_that_a_transaction_was_committed(postgres: Postgres) -> None:
    with postgres.direct.connect() as connection:
        xid = str(connection.exec_driver_sql(sql_bounds.postgres_bound_and_xid(30)).one()[1])
        connection.commit()
    number, last_crash = xid.split()
    assert outcome(postgres.direct, "k", f"{number} {last_crash}", 30) is True
    assert outcome(postgres.direct, "k", f"{number} {Decimal(last_crash) - Decimal('0.000001')}", 30) is None


def test_a_constraint_that_is_checked_at_commit_fails_its_own_operation_only(postgres: Postgres) -> None:
    with processor(documents(postgres.engine()), min_duration=0.05) as opened:
        runs = [(book, (Booking, {"text": f"{n}", "train_id": 404 if n == 2 else None})) for n in range(5)]
        answers = together(opened, "k", *runs)
        assert [type(answer) for answer in answers if answer is not None] == [IntegrityError]
        assert isinstance(answers[2], IntegrityError)
        assert opened.run("k", look) == {"total": 4}
    assert sorted(texts_in(postgres.direct)) == ["0", "1", "3", "4"]


def test_a_serialization_failure_is_replayed(postgres: Postgres) -> None:
    store = documents(postgres.engine(isolation_level="REPEATABLE READ"), mode="version")
    started, go_on = Event(), Event()

    def wait(resource: dict[str, Any]) -> int:
        started.set()
        go_on.wait()
        return add(resource, 1)

    with processor(store) as opened, processor(store) as other:
        opened.run("k", add, 1)
        caller = gevent.spawn(opened.run, "k", wait)
        started.wait()
        other.run("k", add, 10)
        go_on.set()
        assert caller.get() == 12


# -- mapped classes: what operations may do ---------------------------------------------------------------------


@pytest.fixture
def trains(postgres: Postgres) -> SQLAlchemyStore[Train]:
    """In which there is the ICE 1."""
    train_in(postgres.direct)
    return SQLAlchemyStore.mapped(postgres.engine(), Train, by="name")


def test_an_operation_sees_what_those_before_it_have_added(postgres: Postgres, trains: SQLAlchemyStore[Train]) -> None:
    def reserve(train: Train, text: str) -> int:
        session = session_of(train)
        session.add(Booking(text=text, train=train))
        take(train)
        return session.scalars(
            sa.select(sa.func.count()).select_from(Booking).where(Booking.train_id == train.id)
        ).one()

    with processor(trains, min_duration=0.05) as opened:
        assert together(opened, "ICE 1", (reserve, "a"), (reserve, "b"), (reserve, "c")) == [1, 2, 3]
    assert texts_in(postgres.direct) == ["a", "b", "c"]
    assert taken_in(postgres.direct) == 3


def test_what_an_operation_has_added_is_dropped_when_it_raises(
    postgres: Postgres, trains: SQLAlchemyStore[Train]
) -> None:
    def reserve(train: Train, text: str, error: Exception | None = None) -> None:
        session_of(train).add(Booking(text=text))
        if error is not None:
            raise error

    with processor(trains, min_duration=0.05, clean_errors=(LookupError,)) as opened:
        metrics = opened.subscribe_batch_metrics()
        answers = together(
            opened, "ICE 1", (reserve, "a"), (reserve, "no", LookupError()), (reserve, "no", KeyError()), (reserve, "b")
        )
    assert [type(answer) for answer in answers] == [type(None), LookupError, KeyError, type(None)]
    assert texts_in(postgres.direct) == ["a", "b"]
    assert [metric.attempts for metric in metrics] == [1]


def test_what_an_operation_has_written_is_undone_when_it_raises(
    postgres: Postgres, trains: SQLAlchemyStore[Train]
) -> None:
    def flush(train: Train) -> None:
        session_of(train).add(Booking(text="flushed"))
        session_of(train).flush()
        raise LookupError

    def write(train: Train) -> None:
        session_of(train).connection().execute(sa.insert(Booking).values(text="written"))
        raise KeyError

    with processor(trains, min_duration=0.05) as opened:
        answers = together(opened, "ICE 1", (take,), (flush,), (take,), (write,), (take,))
    assert answers[::2] == [1, 2, 3]
    assert [type(answer) for answer in answers[1::2]] == [LookupError, KeyError]
    assert texts_in(postgres.direct) == []
    assert taken_in(postgres.direct) == 3


def test_an_operation_may_roll_back_to_a_savepoint_of_its_own(
    postgres: Postgres, trains: SQLAlchemyStore[Train]
) -> None:
    def insert_or_count(train: Train, text: str) -> str:
        session = session_of(train)
        try:
            with session.begin_nested():
                session.execute(sa.insert(Booking).values(text=text))
        except IntegrityError:
            take(train)
            return "counted"
        return "inserted"

    with processor(trains, min_duration=0.05) as opened:
        metrics = opened.subscribe_batch_metrics()
        answers = together(opened, "ICE 1", *[(insert_or_count, text) for text in "aab"])
    assert answers == ["inserted", "counted", "inserted"]
    assert texts_in(postgres.direct) == ["a", "b"]
    assert taken_in(postgres.direct) == 1
    assert [metric.attempts for metric in metrics] == [1]


def swallow(train: Train) -> None:
    with pytest.raises(DBAPIError):
        session_of(train).execute(sa.text("SELECT * FROM nowhere"))


def roll_back(train: Train) -> None:
    take(train)
    session_of(train).rollback()


def close(train: Train) -> None:
    session_of(train).close()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (swallow, "went on after a statement of it had failed"),
        (roll_back, "the batch ends its transaction"),
        (close, "the batch ends its transaction"),
    ],
)
def test_an_operation_that_spoils_the_transaction_and_says_nothing_is_found_and_left_out(
    postgres: Postgres, trains: SQLAlchemyStore[Train], spoil: Callable[[Train], None], told: str
) -> None:
    with processor(trains, min_duration=0.05) as opened:
        answers = together(opened, "ICE 1", (take,), (take,), (take,), (spoil,))
    assert answers[:3] == [1, 2, 3]
    assert isinstance(answers[3], Exception)
    assert told in str(answers[3])
    assert taken_in(postgres.direct) == 3


@pytest.mark.parametrize("what", ["its session", "the connection of its session"])
def test_an_operation_cannot_commit(postgres: Postgres, trains: SQLAlchemyStore[Train], what: str) -> None:
    def commit(train: Train) -> None:
        session = session_of(train)
        if what == "its session":
            session.commit()
        session.flush()
        session.connection().commit()

    with processor(trains, min_duration=0.05) as opened:
        answers = together(opened, "ICE 1", (take,), (commit,), (take,))
    assert answers[::2] == [1, 2]
    assert isinstance(answers[1], RuntimeError)
    assert "the batch commits" in str(answers[1])
    assert str(answers[1]).endswith(". Nothing of this operation was saved")
    assert taken_in(postgres.direct) == 2


def test_a_deadlock_in_an_operations_own_sql_is_replayed(postgres: Postgres) -> None:
    for name in ("a", "b"):
        train_in(postgres.direct, name=name)
    trains = SQLAlchemyStore.mapped(postgres.engine(), Train, by="name")
    both = Event()
    locked: list[str] = []

    def take_both(train: Train, other: str) -> int:
        locked.append(train.name)
        if len(locked) == 2:
            both.set()
        both.wait()
        found = session_of(train).scalars(sa.select(Train).where(Train.name == other).with_for_update()).one()
        return take(train) + take(found)

    with processor(trains) as opened:
        callers = [gevent.spawn(answer_of, opened.run, key, take_both, other) for key, other in ("ab", "ba")]
        assert sorted(caller.get() for caller in callers) == [2, 4]
    assert len(locked) == 3
    assert [taken_in(postgres.direct, name) for name in "ab"] == [2, 2]


def test_lists_and_dictionaries_may_be_changed_in_place(postgres: Postgres, trains: SQLAlchemyStore[Train]) -> None:
    def seat(train: Train, number: str, name: str) -> dict[str, Any]:
        train.seats = train.seats or {}
        train.seats[number] = {"name": name}
        return train.seats

    def rename(train: Train, number: str, name: str) -> None:
        train.seats[number]["name"] = name

    with postgres.direct.begin() as connection:
        connection.execute(sa.update(Train).values(seats={}))
    with processor(trains) as opened:
        opened.run("ICE 1", seat, "12", "Ann")
        opened.run("ICE 1", rename, "12", "Bob")
        assert opened.run("ICE 1", lambda train: train.seats) == {"12": {"name": "Bob"}}


def test_an_instance_is_detached_when_its_batch_has_ended(trains: SQLAlchemyStore[Train]) -> None:
    with processor(trains) as opened:
        train: Any = opened.run("ICE 1", lambda train: take(train) and train)
    assert (train.name, train.taken) == ("ICE 1", 1)
    assert object_session(train) is None


def test_an_operation_deletes_through_the_session(postgres: Postgres, trains: SQLAlchemyStore[Train]) -> None:
    with processor(trains) as opened:
        opened.run("ICE 1", lambda train: session_of(train).delete(train))
        assert isinstance(answer_of(opened.run, "ICE 1", take), ResourceMissing)
    assert taken_in(postgres.direct) is None


# -- mapped classes: rows and their versions --------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["lock", "version"])
def test_a_key_of_several_columns_is_a_tuple(postgres: Postgres, mode: Any) -> None:
    def wait(stop: Stop) -> int:
        stop.waiting += 1
        return stop.waiting

    stops = SQLAlchemyStore.mapped(postgres.engine(), Stop, mode=mode, missing=lambda _: Stop(waiting=0))
    with processor(stops) as opened:
        assert opened.run(("ICE 1", 3), wait) == 1
        assert opened.run(("ICE 1", "3"), wait) == 2
        with pytest.raises(TypeError, match=r"'ICE 1' is no key for the columns stops\.train, stops\.number"):
            opened.run("ICE 1", wait)
        with pytest.raises(ValueError, match="3 values, not 2"):
            opened.run(("ICE 1", 3, 4), wait)
        with pytest.raises(ValueError, match="three"):
            opened.run(("ICE 1", "three"), wait)


@contextmanager
def between_load_and_save(opened: Processor[Any], key: object, change: Callable[[Any], object]) -> Iterator[list[Any]]:
    started, go_on = Event(), Event()

    def wait(resource: Any) -> object:
        started.set()
        go_on.wait()
        return change(resource)

    answers: list[Any] = []
    caller = gevent.spawn(answer_of, opened.run, key, wait)
    started.wait()
    yield answers
    go_on.set()
    answers.append(caller.get())


@pytest.mark.parametrize("server", ["sqlite", "postgresql"])
def test_a_version_that_sqlalchemy_counts_is_compared(postgres: Postgres, sqlite: sa.Engine, server: str) -> None:
    engine, direct = (sqlite, sqlite) if server == "sqlite" else (postgres.engine(), postgres.direct)
    with direct.begin() as connection:
        connection.execute(sa.insert(Ticket).values(id=1, price=10, changes=1))

    def raise_price(ticket: Ticket) -> int:
        ticket.price += 1
        return ticket.price

    tickets = SQLAlchemyStore.mapped(engine, Ticket, mode="version")
    with processor(tickets) as opened:
        with between_load_and_save(opened, 1, raise_price) as answers, direct.begin() as connection:
            connection.execute(sa.update(Ticket).values(price=100, changes=2))
        assert answers == [101]
        assert opened.run(1, lambda ticket: ticket.changes) == 3


def test_a_row_that_somebody_changed_is_found_out_too_when_only_rows_beside_it_are_saved(
    postgres: Postgres, trains: SQLAlchemyStore[Train]
) -> None:
    def note(train: Train) -> int:
        current_batch().add_row(Booking(text=f"{train.taken} taken"))
        return train.taken

    by_xmin = SQLAlchemyStore.mapped(postgres.engine(), Train, by="name", mode="version")
    with processor(by_xmin) as opened:
        with between_load_and_save(opened, "ICE 1", note) as answers, postgres.direct.begin() as connection:
            connection.execute(sa.update(Train).values(taken=7))
        assert answers == [7]
    assert texts_in(postgres.direct) == ["7 taken"]


def test_an_operation_that_flushes_compares_before_it_writes(
    postgres: Postgres, trains: SQLAlchemyStore[Train]
) -> None:
    def flush(train: Train) -> int:
        taken = take(train)
        session_of(train).flush()
        session_of(train).add(Booking(text=f"{taken}"))
        return taken

    by_xmin = SQLAlchemyStore.mapped(postgres.engine(), Train, by="name", mode="version")
    with processor(by_xmin) as opened:
        with between_load_and_save(opened, "ICE 1", flush) as answers, postgres.direct.begin() as connection:
            connection.execute(sa.update(Train).values(taken=7))
        assert answers == [8]
    assert texts_in(postgres.direct) == ["8"]


def test_another_unique_column_of_a_new_resource_is_no_race(postgres: Postgres) -> None:
    train_in(postgres.direct, name="ICE 2", number=2)

    def made_with_number(name: str) -> Train:
        return Train(name=name, taken=0, number=2)

    made = SQLAlchemyStore.mapped(postgres.engine(), Train, by="name", missing=made_with_number)
    with processor(made) as opened:
        metrics = opened.subscribe_batch_metrics()
        error = answer_of(opened.run, "ICE 3", take)
    assert isinstance(error, IntegrityError)
    assert [metric.attempts for metric in metrics] == [1]


@pytest.mark.parametrize("wrap", [look, scoped_session], ids=["sessionmaker", "scoped_session"])
def test_the_sessions_of_batches_are_made_as_the_users_own(sqlite: sa.Engine, wrap: Callable[[Any], Any]) -> None:
    class Own(sa.orm.Session):
        pass

    maker = sessionmaker(sqlite, class_=Own, info={"of": "the user"})
    flushed: list[object] = []
    sa.event.listen(maker, "after_flush", lambda session, _: flushed.append(session))
    train_in(sqlite)
    with processor(SQLAlchemyStore.mapped(wrap(maker), Train, by="name")) as opened:
        session = opened.run("ICE 1", lambda train: take(train) and session_of(train))
    assert isinstance(session, Own)
    assert session.info["of"] == "the user"
    assert flushed == [session]


# -- SQLite -----------------------------------------------------------------------------------------------------


def test_an_operation_cannot_lock_sqlite_before_the_save(sqlite: sa.Engine) -> None:
    def flush(train: Train) -> None:
        take(train)
        session_of(train).flush()

    train_in(sqlite)
    trains = SQLAlchemyStore.mapped(sqlite, Train, by="name")
    with processor(trains) as opened:
        error = answer_of(opened.run, "ICE 1", flush)
        assert isinstance(error, RuntimeError)
        assert "would write to SQLite" in str(error)
        assert opened.run("ICE 1", take) == 1
    with processor(trains, batching=False) as alone:  # where nothing else of the batch runs meanwhile
        alone.run("ICE 1", flush)
    assert taken_in(sqlite) == 2


def test_while_another_process_writes_to_sqlite_a_save_waits_and_others_run(sqlite: sa.Engine, tmp_path: Path) -> None:
    applied = Event()

    def add_and_say_so(resource: dict[str, Any]) -> int:
        applied.set()
        return add(resource, 1)

    store = documents(sqlite)
    other = sa.create_engine(sqlite.url)
    with processor(store) as opened, other.connect() as connection:
        opened.run("k", add, 1)
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        caller = gevent.spawn(opened.run, "k", add_and_say_so)
        applied.wait()
        for _ in range(20):
            gevent.sleep(0.005)  # it would hold the whole process in the driver
        assert not caller.ready()
        connection.rollback()
        assert caller.get() == 2
    other.dispose()


def test_a_save_that_waits_for_sqlite_until_the_deadline_has_saved_nothing(
    sqlite: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound_early(monkeypatch, 9)
    store = documents(sqlite)
    with processor(store, max_duration=9.2) as opened, sqlite.connect() as connection:
        opened.run("k", add, 1)
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        error = answer_of(opened.run, "k", add, 1)
        assert isinstance(error, SaveFailed)
        assert error.retry_safe
        assert "another process holds SQLite's write lock" in str(error)
        connection.rollback()
        assert opened.run("k", add, 1) == 2


def test_no_more_outcomes_are_purged_at_once_than_the_limit_says_whatever_the_server_makes_of_it(
    postgres: Postgres,
) -> None:
    engine = postgres.direct
    table = idempotency_table("outcomes_to_purge")
    table.create(engine)
    store = documents(engine, idempotency=table)
    outcomes = store._outcomes
    assert outcomes is not None
    with engine.connect() as connection:
        connection.execute(sa.insert(table), [{"id": str(n), "outcome": "", "expires": 1} for n in range(5)])
        # One of the plans that statistics may make it take: the expired ones are looked for again for each row.
        for other in ("hashagg", "hashjoin", "mergejoin", "sort", "material", "memoize"):
            connection.exec_driver_sql(f"SET LOCAL enable_{other} = off")
        assert [outcomes.purge(connection.exec_driver_sql, 3) for _ in range(3)] == [3, 2, 0]
    table.drop(engine)


# -- mapped classes: what is only seen at the save ---------------------------------------------------------------


def bookings(train: Train) -> int:
    """How many there are, after all that the session has is flushed."""
    return session_of(train).scalars(sa.select(sa.func.count()).select_from(Booking)).one()


def seats_in(engine: sa.Engine) -> object:
    with engine.connect() as connection:
        return connection.scalar(sa.select(Train.seats))


def test_what_is_changed_in_place_in_a_new_instance_after_a_flush_is_saved(postgres: Postgres) -> None:
    def seat(train: Train, number: str) -> dict[str, Any]:
        train.seats[number] = "taken"
        bookings(train)
        return dict(train.seats)

    made = SQLAlchemyStore.mapped(
        postgres.engine(), Train, by="name", missing=lambda name: Train(name=name, taken=0, seats={})
    )
    with processor(made, min_duration=0.05) as opened:
        answers = together(opened, "new", (seat, "1"), (seat, "2"))
    assert answers == [{"1": "taken"}, {"1": "taken", "2": "taken"}]
    assert seats_in(postgres.direct) == answers[1]


def test_what_is_changed_back_in_place_after_a_flush_is_saved(
    postgres: Postgres, trains: SQLAlchemyStore[Train]
) -> None:
    def seat(train: Train) -> None:
        train.seats = {"1": "taken"}
        bookings(train)

    with postgres.direct.begin() as connection:
        connection.execute(sa.update(Train).values(seats={}))
    with processor(trains, min_duration=0.05) as opened:
        assert together(opened, "ICE 1", (seat,), (lambda train: train.seats.pop("1"),)) == [None, "taken"]
    assert seats_in(postgres.direct) == {}


def test_an_sql_expression_in_a_column_is_refused_to_its_own_caller(
    postgres: Postgres, trains: SQLAlchemyStore[Train]
) -> None:
    def take_in_sql(train: Any) -> None:
        train.taken = Train.taken + 10

    def take_in_sql_and_flush(train: Any) -> None:
        take_in_sql(train)
        bookings(train)

    with processor(trains, min_duration=0.05) as opened:
        answers = together(opened, "ICE 1", (take,), (take_in_sql,), (take,), (take_in_sql_and_flush,), (take,))
    assert answers[::2] == [1, 2, 3]
    for answer in answers[1::2]:
        assert isinstance(answer, Exception)
        assert "has assigned the SQL expression" in f"{answer}{answer.__cause__}"
    assert taken_in(postgres.direct) == 3


def test_a_conflict_that_an_operation_swallowed_is_a_replay_all_the_same(
    postgres: Postgres, trains: SQLAlchemyStore[Train]
) -> None:
    def note(train: Train) -> int:
        if train.taken == 0:
            with postgres.direct.begin() as connection:
                connection.execute(sa.update(Train).values(taken=7))
        with suppress(Exception):
            session_of(train).execute(sa.insert(Booking).values(text="noted"))
        return take(train)

    by_xmin = SQLAlchemyStore.mapped(postgres.engine(), Train, by="name", mode="version")
    with processor(by_xmin) as opened:
        assert opened.run("ICE 1", note) == 8
    assert taken_in(postgres.direct) == 8
    assert texts_in(postgres.direct) == ["noted"]


def test_a_first_insert_that_a_query_of_an_operation_makes_and_loses_is_a_replay(postgres: Postgres) -> None:
    def insert_elsewhere(train: Train) -> int:
        if train.taken == 0:
            train_in(postgres.direct, name="new", taken=7)
        bookings(train)
        return take(train)

    made = SQLAlchemyStore.mapped(postgres.engine(), Train, by="name", missing=lambda name: Train(name=name, taken=0))
    with processor(made) as opened:
        metrics = opened.subscribe_batch_metrics()
        assert opened.run("new", insert_elsewhere) == 8
    assert taken_in(postgres.direct, "new") == 8
    assert [metric.attempts for metric in metrics] == [2]


def test_a_first_insert_is_replayed_too_when_it_cannot_be_seen_who_was_faster(postgres: Postgres) -> None:
    def insert_elsewhere(train: Train) -> int:
        if train.taken == 0:
            train_in(postgres.direct, name="new", taken=7)
            postgres.proxy.cut_before(b"FROM trains")
        return take(train)

    made = SQLAlchemyStore.mapped(postgres.engine(), Train, by="name", missing=lambda name: Train(name=name, taken=0))
    with processor(made) as opened:
        assert opened.run("new", insert_elsewhere) == 8
    assert taken_in(postgres.direct, "new") == 8


def test_what_a_listener_adds_after_the_flush_is_saved_with_the_rest_or_not_at_all(postgres: Postgres) -> None:
    def note(session: Session, _: object) -> None:
        if any(isinstance(one, Train) for one in session.dirty):
            session.add(Booking(text="noted"))

    maker = sessionmaker(postgres.engine())
    sa.event.listen(maker, "after_flush", note)
    train_in(postgres.direct)
    with processor(SQLAlchemyStore.mapped(maker, Train, by="name")) as opened:
        assert opened.run("ICE 1", take) == 1
        assert texts_in(postgres.direct) == ["noted"]
        assert isinstance(answer_of(opened.run, "ICE 1", take), IntegrityError)  # there is such a booking
    assert taken_in(postgres.direct) == 1


def test_a_listener_that_asks_while_the_save_flushes_is_answered(
    postgres: Postgres, trains: SQLAlchemyStore[Train]
) -> None:
    def count(_: object, connection: sa.Connection, train: Train) -> None:
        train.seats = {"bookings": connection.scalar(sa.select(sa.func.count()).select_from(Booking))}

    sa.event.listen(Train, "before_update", count)
    try:
        with processor(trains) as opened:
            assert opened.run("ICE 1", take) == 1
    finally:
        sa.event.remove(Train, "before_update", count)
    assert seats_in(postgres.direct) == {"bookings": 0}


def test_what_a_function_in_a_query_writes_is_committed(postgres: Postgres, trains: SQLAlchemyStore[Train]) -> None:
    def call(train: Train) -> Any:
        return session_of(train).scalar(sa.select(sa.func.reserve("called")))

    with postgres.direct.begin() as connection:
        connection.exec_driver_sql(
            "CREATE OR REPLACE FUNCTION reserve(booked text) RETURNS text LANGUAGE sql "
            "AS 'INSERT INTO bookings (text) VALUES (booked) RETURNING text'"
        )
    with processor(trains) as opened:
        assert opened.run("ICE 1", call) == "called"
    assert texts_in(postgres.direct) == ["called"]


# -- mapped classes: what is the fault of one operation only -----------------------------------------------------


def test_a_timeout_of_an_operation_around_its_sql_breaks_that_operation_only(
    postgres: Postgres, trains: SQLAlchemyStore[Train]
) -> None:
    def wait(train: Train) -> None:
        with gevent.Timeout(0.05, LookupError), session_of(train).no_autoflush:
            session_of(train).execute(sa.text("SELECT pg_sleep(0.5)"))

    with processor(trains, min_duration=0.05) as opened:
        answers = together(opened, "ICE 1", (take,), (wait,), (take,))
    assert answers[::2] == [1, 2]
    assert isinstance(answers[1], LookupError)
    assert taken_in(postgres.direct) == 2


def test_what_an_operation_has_deleted_stays_when_it_raises(postgres: Postgres, trains: SQLAlchemyStore[Train]) -> None:
    def delete(train: Train) -> None:
        session_of(train).delete(session_of(train).scalars(sa.select(Booking)).one())
        raise LookupError

    with postgres.direct.begin() as connection:
        connection.execute(sa.insert(Booking).values(text="kept"))
    with processor(trains, min_duration=0.05) as opened:
        answers = together(opened, "ICE 1", (delete,), (take,))
    assert isinstance(answers[0], LookupError)
    assert answers[1] == 1
    assert texts_in(postgres.direct) == ["kept"]
    assert taken_in(postgres.direct) == 1


# -- mapped classes: batches of two processes --------------------------------------------------------------------


def change_beside(resource: Any, pause: Callable[[], None]) -> str:
    booking = session_of(resource).scalars(sa.select(Booking)).one()
    pause()
    booking.text += "+"
    return booking.text


def add_beside(resource: Any, pause: Callable[[], None]) -> str:
    text = "+" * bookings(resource)
    pause()
    current_batch().add_row((Booking, {"text": text}))
    return text


def execute_beside(resource: Any, pause: Callable[[], None]) -> str:
    text = session_of(resource).scalars(sa.select(Booking.text)).one() + "+"
    pause()
    session_of(resource).execute(sa.update(Booking).values(text=text))
    return text


@pytest.mark.parametrize(
    ("operation", "saved"),
    [(change_beside, ["++"]), (add_beside, ["", "+", "++"]), (execute_beside, ["++"])],
    ids=["a related object", "rows", "a statement"],
)
@pytest.mark.parametrize(
    ("mapped", "options"),
    [(Train, {}), (Train, {"version": "taken"}), (Ticket, {})],
    ids=["xmin", "version", "version_id_col"],
)
def test_without_locks_a_batch_that_writes_only_beside_the_resource_is_noticed_by_that_of_another_process(
    postgres: Postgres,
    mapped: type[Any],
    options: dict[str, Any],
    operation: Callable[[Any, Callable[[], None]], str],
    saved: list[str],
) -> None:
    train_in(postgres.direct, id=1)
    with postgres.direct.begin() as connection:
        connection.execute(sa.insert(Ticket).values(id=1, changes=1))
        connection.execute(sa.insert(Booking).values(text=""))
    ours, theirs = (SQLAlchemyStore.mapped(postgres.engine(), mapped, mode="version", **options) for _ in range(2))
    told: list[str] = []

    def let_the_other_run() -> None:
        if not told:
            told.append(gevent.spawn(other.run, 1, operation, lambda: None).get())

    with processor(ours) as opened, processor(theirs) as other:
        told.append(opened.run(1, operation, let_the_other_run))
    assert told == ["+", "++"]
    assert texts_in(postgres.direct) == saved


def test_an_engine_that_was_made_to_commit_by_itself_is_refused(postgres: Postgres, sqlite: sa.Engine) -> None:
    for engine in (
        postgres.engine(isolation_level="AUTOCOMMIT"),
        sa.create_engine(sqlite.url, isolation_level="AUTOCOMMIT"),
    ):
        with pytest.raises(ValueError, match="AUTOCOMMIT"):
            SQLAlchemyStore.mapped(engine, Train, by="name")
        with pytest.raises(ValueError, match="AUTOCOMMIT"):
            SQLAlchemyStore.documents(engine, "documents")


def seat(train: Train, number: str) -> dict[str, Any]:
    train.seats[number] = "taken"
    return dict(train.seats)


def roll_back_to_a_savepoint(train: Train, number: str) -> dict[str, Any]:
    with suppress(KeyError), session_of(train).begin_nested():
        seat(train, number)
        take(train)
        session_of(train).flush()
        raise KeyError
    return dict(train.seats)


def test_what_was_changed_in_place_before_a_savepoint_outlives_its_rollback(
    postgres: Postgres, trains: SQLAlchemyStore[Train]
) -> None:
    with postgres.direct.begin() as connection:
        connection.execute(sa.update(Train).values(seats={}))
    with processor(trains, min_duration=0.05) as opened:
        answers = together(opened, "ICE 1", (seat, "1"), (roll_back_to_a_savepoint, "2"), (seat, "3"))
    assert answers == [{"1": "taken"}, {"1": "taken"}, {"1": "taken", "3": "taken"}]
    assert seats_in(postgres.direct) == answers[2]


def test_what_is_changed_in_place_as_it_was_before_a_rollback_is_saved(
    postgres: Postgres, trains: SQLAlchemyStore[Train]
) -> None:
    with postgres.direct.begin() as connection:
        connection.execute(sa.update(Train).values(seats={}))
    with processor(trains, min_duration=0.05) as opened:
        answers = together(opened, "ICE 1", (roll_back_to_a_savepoint, "1"), (seat, "1"))
    assert answers == [{}, {"1": "taken"}]
    assert seats_in(postgres.direct) == answers[1]


@pytest.mark.parametrize("forget", ["expire", "expire_all"])
def test_what_an_operation_has_loaded_anew_has_the_changes_of_those_before(
    postgres: Postgres, trains: SQLAlchemyStore[Train], forget: str
) -> None:
    def load_anew(train: Train) -> int:
        session = session_of(train)
        session.expire_all() if forget == "expire_all" else session.expire(train)
        return train.taken

    with processor(trains, min_duration=0.05) as opened:
        assert together(opened, "ICE 1", (take,), (load_anew,), (take,)) == [1, 1, 2]
    assert taken_in(postgres.direct) == 2


def test_operations_that_only_ask_and_raise_cost_no_load_though_asking_flushes_what_others_have_changed(
    postgres: Postgres, trains: SQLAlchemyStore[Train]
) -> None:
    def ask_and_raise(train: Train) -> None:
        bookings(train)
        raise LookupError

    with processor(trains, min_duration=0.05, clean_errors=(LookupError,)) as opened:
        metrics = opened.subscribe_batch_metrics()
        answers = together(opened, "ICE 1", (take,), *[(ask_and_raise,)] * 40)
    assert answers[0] == 1
    assert {type(answer) for answer in answers[1:]} == {LookupError}
    assert taken_in(postgres.direct) == 1
    assert [metric.attempts for metric in metrics] == [1]


def test_a_server_that_an_operation_cannot_reach_is_no_matter_of_the_batch(
    postgres: Postgres, trains: SQLAlchemyStore[Train]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    other = sa.create_engine(f"postgresql+psycopg://nobody@127.0.0.1:{port}/nowhere", poolclass=NullPool)

    def ask_another_server(_: Train) -> None:
        with other.connect():
            pass

    with processor(trains, min_duration=0.05) as opened:
        answers = together(opened, "ICE 1", (take,), (ask_another_server,), (take,))
    assert answers[::2] == [1, 2]
    assert isinstance(answers[1], DBAPIError)
    assert taken_in(postgres.direct) == 2


def test_a_change_of_nothing_but_a_collection_is_noticed_by_another_process(postgres: Postgres) -> None:
    def book_once(train: Train, pause: Callable[[], None]) -> bool:
        if train.bookings:
            return False
        pause()
        train.bookings.append(Booking(text="only one"))
        return True

    train_in(postgres.direct)
    ours, theirs = (SQLAlchemyStore.mapped(postgres.engine(), Train, by="name", mode="version") for _ in range(2))
    told: list[bool] = []

    def let_the_other_run() -> None:
        if not told:
            told.append(gevent.spawn(other.run, "ICE 1", book_once, lambda: None).get())

    with processor(ours) as opened, processor(theirs) as other:
        told.append(opened.run("ICE 1", book_once, let_the_other_run))
    assert told == [True, False]
    assert texts_in(postgres.direct) == ["only one"]


def test_a_class_with_a_subclass_in_another_table_is_refused(sqlite: sa.Engine) -> None:
    class Apart(DeclarativeBase):
        pass

    class Vehicle(Apart):
        __tablename__ = "vehicles"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Bus(Vehicle):
        __tablename__ = "buses"
        id: Mapped[int] = mapped_column(sa.ForeignKey("vehicles.id"), primary_key=True)

    with pytest.raises(ValueError, match="Vehicle has a subclass in a table of its own, Bus"):
        SQLAlchemyStore.mapped(sqlite, Vehicle)
