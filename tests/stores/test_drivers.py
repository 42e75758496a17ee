"""Drivers beside psycopg 3 and PyMySQL: what their errors mean is known, on real servers."""

from __future__ import annotations

import json
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import gevent
import psycopg2.extensions  # type: ignore[import-untyped] # it has no types
import pytest
import sqlalchemy as sa
from gevent.event import Event
from psycogreen.gevent import patch_psycopg  # type: ignore[import-untyped] # likewise
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, object_session

from geventbatch import Processor, SaveFailed, current_batch
from geventbatch.stores import SQLAlchemyStore
from geventbatch.stores.sqlalchemy import idempotency_table
from tests.support.adapters.sqlalchemy import PLACES, fresh
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Base(DeclarativeBase):
    pass


class Seat(Base):
    __tablename__ = "driven_seats"
    name: Mapped[str] = mapped_column(sa.String(40), primary_key=True)
    n: Mapped[int] = mapped_column(default=0)
    __table_args__ = (sa.CheckConstraint("n < 1000", name="enough"),)


class Line(Base):
    __tablename__ = "driven_lines"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(sa.String(40), unique=True)


OUTCOMES = idempotency_table("driven_outcomes", Base.metadata)

DEFERRED = (
    "CREATE TABLE driven_references "
    "(id serial PRIMARY KEY, line_id int REFERENCES driven_lines DEFERRABLE INITIALLY DEFERRED)"
)


class Driven:
    """A database through one driver, in as many engines as there were processes."""

    def __init__(self, url: sa.URL, direct: sa.Engine, stack: ExitStack, **options: Any) -> None:
        self.url = url
        self.direct = direct
        self._stack = stack
        self.options = options

    def engine(self) -> sa.Engine:
        engine = sa.create_engine(self.url, **self.options)
        self._stack.callback(engine.dispose)
        return engine

    def seats(self, engine: sa.Engine | None = None, **options: Any) -> Processor[Seat]:
        store = SQLAlchemyStore.mapped(
            engine or self.engine(), Seat, missing=lambda key: Seat(name=key, n=0), idempotency=OUTCOMES
        )
        processor = Processor(open_resource=store, **{"min_duration": 0.05, "max_duration": 20, **options})
        self._stack.callback(processor.stop)
        return processor


@contextmanager
def driven(driver: str, directory: Path) -> Iterator[Driven]:
    server: Any = "mariadb" if driver == "mysqlconnector" else "postgresql"
    with fresh(server, directory) as address, ExitStack() as stack:
        found: Any = PLACES[server](address)
        url: sa.URL = found.url
        options: dict[str, Any] = {"pool_size": 4, "max_overflow": 0}
        if driver == "mysqlconnector":
            url = url.set(drivername="mysql+mysqlconnector")
            options["connect_args"] = {"use_pure": True}
        elif driver == "pg8000":
            socket = f"{url.query['host']}/.s.PGSQL.{url.port or 5432}"
            url = url.difference_update_query(["host"]).set(drivername="postgresql+pg8000", host=None, port=None)
            options["connect_args"] = {"unix_sock": socket}
        else:
            url = url.set(drivername=f"postgresql+{driver}")
            patch_psycopg()
            stack.callback(psycopg2.extensions.set_wait_callback, None)
        direct = found.beside()
        if server == "postgresql":
            # pg8000 takes no options, in which the schema could be.
            options["execution_options"] = {"schema_translate_map": {None: found.schema}}
        Base.metadata.create_all(direct)
        yield Driven(url, direct, stack, **options)


over = pytest.mark.parametrize(
    "driver", ["psycopg2", "pg8000", pytest.param("mysqlconnector", marks=pytest.mark.mariadb)]
)


def add(seat: Seat, amount: int = 1, line: str | None = None) -> int:
    seat.n += amount
    if line is not None:
        current_batch().add_row((Line, {"text": line}))
    return seat.n


def together(*calls: Callable[[], object]) -> list[Any]:
    return [one.get() for one in [gevent.spawn(answer_of, call) for call in calls]]


@over
def test_what_the_database_refuses_fails_its_own_operation_alone(tmp_path: Path, driver: str) -> None:
    with driven(driver, tmp_path) as place:
        seats = place.seats()
        assert seats.run("a", add, 1, "taken") == 1
        bad = [
            lambda: seats.run("a", add, 1, "taken"),  # a duplicate
            lambda: seats.run("a", add, 10_000),  # a CHECK
            lambda: seats.run("a", add, 1, None if driver == "mysqlconnector" else "nul \x00"),
        ]
        answers = together(lambda: seats.run("a", add), *bad[:2], lambda: seats.run("a", add))
        assert [answers[0], answers[3]] == [2, 3]
        for answer in answers[1:3]:
            assert isinstance(answer, IntegrityError)
        if driver != "mysqlconnector":
            answers = together(lambda: seats.run("a", add), bad[2], lambda: seats.run("a", add))
            assert [answers[0], answers[2]] == [4, 5]
            assert isinstance(answers[1], (ValueError, DBAPIError))


@pytest.mark.parametrize("driver", ["psycopg2", "pg8000"])
def test_a_constraint_that_fails_at_commit_fails_its_own_operation_alone(tmp_path: Path, driver: str) -> None:
    with driven(driver, tmp_path) as place:
        with place.direct.begin() as connection:
            connection.exec_driver_sql(DEFERRED)

        schema = place.options["execution_options"]["schema_translate_map"][None]
        references = sa.table("driven_references", sa.column("line_id", sa.Integer), schema=schema)

        def refer(seat: Seat) -> int:
            current_batch().add_row(sa.insert(references).values(line_id=999))
            return add(seat)

        seats = place.seats()
        answers = together(lambda: seats.run("a", add), lambda: seats.run("a", refer), lambda: seats.run("a", add))
        assert [answers[0], answers[2]] == [1, 2]
        assert isinstance(answers[1], IntegrityError)


@over
def test_two_processes_that_insert_the_same_row_first_are_replayed(tmp_path: Path, driver: str) -> None:
    with driven(driver, tmp_path) as place:
        one, other = place.seats(min_duration=0), place.seats(min_duration=0)
        for name in ("a", "b", "c", "d"):
            answers = together(lambda: one.run(name, add), lambda: other.run(name, add))  # noqa: B023 - called at once
            assert sorted(answers) == [1, 2]


@over
def test_an_idempotency_key_in_two_processes_at_once_has_one_outcome(tmp_path: Path, driver: str) -> None:
    with driven(driver, tmp_path) as place:
        both = [place.seats(min_duration=0), place.seats(min_duration=0)]
        answers = together(*[lambda one=one: one.run("a", add, idempotency_key="once") for one in both * 2])
        assert answers == [1] * 4


@over
def test_a_deadlock_is_replayed(tmp_path: Path, driver: str) -> None:
    with driven(driver, tmp_path) as place:
        one, other = place.seats(min_duration=0), place.seats(min_duration=0)
        both_hold = [Event(), Event()]
        runs: list[int] = []

        def touch(seat: Seat, number: int, neighbour: str) -> int:
            runs.append(number)
            both_hold[number].set()
            both_hold[1 - number].wait()
            session: Any = object_session(seat)
            session.execute(sa.update(Seat).where(Seat.name == neighbour).values(n=Seat.n + 10))
            return add(seat)

        for name in "ab":
            one.run(name, add)
        answers = together(lambda: one.run("a", touch, 0, "b"), lambda: other.run("b", touch, 1, "a"))
        assert len(runs) == 3
        assert sorted(answers) == [2, 12]


@over
def test_a_connection_that_the_server_ended_while_it_was_at_rest_fails_no_batch(tmp_path: Path, driver: str) -> None:
    with driven(driver, tmp_path) as place:
        engine = place.engine()
        documents = SQLAlchemyStore.documents(engine, "driven_documents", missing=lambda _: {"n": 0})
        documents.create_table()
        numbers = Processor(open_resource=documents, min_duration=0, max_duration=20)

        def count(document: dict[str, int]) -> int:
            document["n"] += 1
            return document["n"]

        seats = place.seats(engine, min_duration=0)
        assert (seats.run("a", add), numbers.run("a", count)) == (1, 1)
        for expected in (2, 3):
            end_all(place, engine)
            assert seats.run("a", add) == expected
            end_all(place, engine)
            assert numbers.run("a", count) == expected
        numbers.stop()


def end_all(place: Driven, engine: sa.Engine) -> None:
    """Have the server end the connections that are at rest in the pool."""
    mysql = engine.dialect.name in {"mysql", "mariadb"}
    with ExitStack() as stack:
        open_ones = [stack.enter_context(engine.connect()) for _ in range(max(1, engine.pool.checkedin()))]  # type: ignore[attr-defined] # a QueuePool
        asked = "SELECT CONNECTION_ID()" if mysql else "SELECT pg_backend_pid()"
        numbers = [connection.exec_driver_sql(asked).scalar() for connection in open_ones]
    with place.direct.connect() as connection:
        for number in numbers:
            connection.exec_driver_sql(f"KILL {number}" if mysql else f"SELECT pg_terminate_backend({number})")


@over
def test_a_row_that_is_locked_for_too_long_is_told_before_the_deadline(tmp_path: Path, driver: str) -> None:
    with driven(driver, tmp_path) as place:
        seats = place.seats(min_duration=0, max_duration=1)
        seats.run("a", add)
        with place.direct.begin() as connection:
            connection.execute(sa.update(Seat).values(n=100))
            answer = answer_of(seats.run, "a", add)
        assert answer.retry_safe
        assert not isinstance(answer, SaveFailed)
        assert seats.run("a", add) == 101


# -- across keys ------------------------------------------------------------------------------------------------


def transfer(accounts: tuple[dict[str, int], ...], line: str | None = None) -> list[int]:
    accounts[0]["n"] -= 1
    accounts[1]["n"] += 1
    if line is not None:
        current_batch().add_row((Line, {"text": line}))
    return [account["n"] for account in accounts]


@pytest.mark.parametrize(
    ("driver", "mode"),
    [
        ("psycopg2", "lock"),
        ("psycopg2", "version"),
        ("pg8000", "lock"),
        ("pg8000", "version"),
        pytest.param("mysqlconnector", "version", marks=pytest.mark.mariadb),
    ],
)
def test_documents_that_an_operation_connects_are_saved_together_or_not_at_all(
    tmp_path: Path, driver: str, mode: Any
) -> None:
    with driven(driver, tmp_path) as database:
        store = SQLAlchemyStore.documents(database.engine(), "driven_accounts", mode=mode, missing=lambda _: {"n": 10})
        store.create_table()
        beside = database.engine()

        def overtake(accounts: tuple[dict[str, int], ...]) -> list[int]:
            table = store.table
            with beside.begin() as connection:
                if mode == "version":
                    connection.execute(sa.update(table).where(table.c.key == "b").values(version=9))
                else:
                    connection.execute(sa.insert(table).values(key="new", state='{"n": 0}', version=1))
            return transfer(accounts)

        def run(processor: Processor[Any], *runs: tuple[Any, ...]) -> list[Any]:
            callers = [gevent.spawn(answer_of, processor.run_across, list(keys), *call) for keys, *call in runs]
            return [caller.get() for caller in callers]

        opens: dict[str, Any] = {"open_resources": store.open_resources, "min_duration": 0, "max_duration": 20}
        keys: Any = [("a", "b"), ("c", "d"), ("e", "new" if mode == "lock" else "f")]
        with Processor(**opens, workers=1, max_batches=1, max_attempts=1) as processor:
            assert run(processor, ("abcdef", lambda accounts: [one.update(n=10) for one in accounts])) == [[None] * 6]
            lost = 0 if mode == "version" else 2
            answers = run(processor, (keys[0], transfer), (keys[1], overtake), (keys[2], transfer))
            assert isinstance(answers.pop(lost), SaveFailed)
            assert answers == [[9, 11]] * 2
            answers = run(processor, (keys[lost], transfer, "x"), (keys[1], transfer, "x"), (("b", "f"), transfer, "y"))
            assert sum(isinstance(answer, IntegrityError) for answer in answers) == 1
            assert isinstance(answers[2], list)
        with beside.connect() as connection:
            found = {row.key: json.loads(row.state)["n"] for row in connection.execute(sa.select(store.table))}
            lines = connection.scalars(sa.select(Line.text).order_by(Line.text)).all()
        assert sum(found.values()) == 60
        assert lines == ["x", "y"]
