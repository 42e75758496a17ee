"""Any number of refused operations on a document, or a resource in Redis, costs nobody else a load or the answer."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import gevent
import pytest
import redis
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from geventbatch import Processor, current_batch
from geventbatch.stores import RedisStore, SQLAlchemyStore
from geventbatch.stores.sqlalchemy import idempotency_table
from tests.support.adapters.sqlalchemy import PLACES, fresh
from tests.support.callers import answer_of
from tests.support.redis_server import redis_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SERVERS = [
    "postgresql",
    pytest.param("postgresql, statement by statement", marks=pytest.mark.variants),
    pytest.param("mariadb", marks=pytest.mark.mariadb),
]


class Base(DeclarativeBase):
    pass


class Booking(Base):
    __tablename__ = "bookings_in_steps"
    id: Mapped[int] = mapped_column(primary_key=True)
    seat: Mapped[str] = mapped_column(sa.String(80), unique=True)


class Place:
    def __init__(self, engine: sa.Engine, *, pipeline: bool) -> None:
        self.engine = engine
        self._pipeline = pipeline
        self.loads = 0
        Base.metadata.create_all(engine)
        sa.event.listen(engine, "before_cursor_execute", self._count)

    def _count(self, *call: Any) -> None:
        self.loads += "FROM in_steps" in call[2].replace('"', "") and "SELECT" in call[2]

    def store(self, mode: Any, **options: Any) -> SQLAlchemyStore[Any]:
        store = SQLAlchemyStore.documents(
            self.engine,
            "in_steps",
            mode=mode,
            missing=lambda _: {"seats": {}},
            pipeline=self._pipeline,
            idempotency=idempotency_table("outcomes_in_steps"),
            **options,
        )
        store.create_table()
        return store

    def booked(self) -> list[str]:
        with self.engine.connect() as connection:
            return sorted(connection.scalars(sa.select(Booking.seat)))

    def version(self, store: SQLAlchemyStore[Any]) -> int:
        with self.engine.connect() as connection:
            return int(connection.scalar(sa.select(store.table.c.version)) or 0)


@pytest.fixture(params=SERVERS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    server, _, how = request.param.partition(", ")
    with fresh(server, tmp_path) as address:
        engine = PLACES[server](address).beside()
        yield Place(engine, pipeline=not how)
        engine.dispose()


def same(value: Any) -> Any:
    return value


def book(document: dict[str, Any], seat: str, passenger: Any) -> int:
    document["seats"][seat] = passenger
    return len(document["seats"])


def book_with_instance(document: dict[str, Any], seat: str, name: str) -> int:
    current_batch().add_row(Booking(seat=name))
    return book(document, seat, name)


def book_with_pair(document: dict[str, Any], seat: str, name: str) -> int:
    current_batch().add_row((Booking.__table__, {"seat": name}))
    return book(document, seat, name)


def refuse(document: dict[str, Any], seat: str) -> None:
    book(document, seat, "nobody")
    raise LookupError(seat)


def delete(_: Any) -> None:
    current_batch().delete()


def together(opened: Processor[Any], *runs: tuple[Any, ...], **options: Any) -> list[Any]:
    """What the callers of one batch are told."""
    callers = [gevent.spawn(answer_of, opened.run, "k", *run, **options) for run in runs]
    gevent.joinall(callers)
    return [caller.value for caller in callers]


def processor(store: Any, **options: Any) -> Processor[Any]:
    return Processor(open_resource=store, **{"min_duration": 0.05, "max_duration": 30, **options})


@pytest.mark.parametrize("mode", ["lock", "version"])
@pytest.mark.parametrize("kind", ["text", "JSON"])
def test_what_cannot_be_encoded_costs_no_load_each(place: Place, mode: str, kind: str) -> None:
    options: dict[str, Any] = {"state_type": sa.JSON(), "encode": same, "decode": same} if kind == "JSON" else {}
    store = place.store(mode, **options)
    for new in (True, False):
        with processor(store) as opened:
            place.loads = 0
            runs: list[Any] = [(book, f"{new} {number}", number if number % 2 else object()) for number in range(40)]
            runs.insert(7, (refuse, "7"))
            answers = together(opened, *runs)
            # One more where an operation has raised: what is before it is saved first, as it cannot be copied.
            assert place.loads <= 6
            assert type(answers.pop(7)) is LookupError
            assert [answer for answer in answers if isinstance(answer, int)] == list(
                range(1, 21) if new else range(21, 41)
            )
            assert all(isinstance(answer, TypeError) for answer in answers[::2])
            assert len(opened.run("k", lambda document: document)["seats"]) == 20 if new else 40
    assert place.version(store) < 10  # once for each save, and not for each operation


@pytest.mark.parametrize("mode", ["lock", "version"])
@pytest.mark.parametrize("operation", [book_with_pair, book_with_instance])
def test_rows_that_are_refused_are_the_error_of_one_operation(
    place: Place, mode: str, operation: Callable[..., Any]
) -> None:
    with processor(place.store(mode)) as opened:
        assert opened.run("k", operation, "0", "taken") == 1
        names = [f"{number}" if number % 3 else "taken" for number in range(1, 20)]
        answers = together(opened, *[(operation, str(number), name) for number, name in enumerate(names, start=1)])
        for name, answer in zip(names, answers, strict=True):
            assert isinstance(answer, IntegrityError if name == "taken" else int)
        assert sorted(opened.run("k", lambda document: document)["seats"].values()) == place.booked()
        assert place.booked() == sorted({*names})


def test_what_is_no_row_at_all_is_the_error_of_one_operation(place: Place) -> None:
    def add(document: dict[str, Any], row: object) -> int:
        current_batch().add_row(row)
        return book(document, str(row), 1)

    with processor(place.store("lock")) as opened:
        answers = together(
            opened, (add, "no row"), (book, "1", 1), (add, None), (add, (Booking, {"no": 1})), (book, "2", 1)
        )
        assert [isinstance(answer, int) for answer in answers] == [False, True, False, False, True]
        assert len(opened.run("k", lambda document: document)["seats"]) == 2
    assert place.booked() == []


def test_idempotency_keys_and_a_deletion_in_an_attempt_that_goes_step_by_step(place: Place) -> None:
    with processor(place.store("version")) as opened:
        for turn in range(2):
            runs = [(book, str(number), number if number % 2 else object()) for number in range(10)]
            callers = [
                gevent.spawn(answer_of, opened.run, "k", *run, idempotency_key=f"{number}")
                for number, run in enumerate(runs)
            ]
            gevent.joinall(callers)
            assert [isinstance(caller.value, int) for caller in callers] == [False, True] * 5, turn
        assert len(opened.run("k", lambda document: document)["seats"]) == 5
        runs = [(book, str(number), number if number % 2 else object()) for number in range(10, 20)]
        answers = together(opened, *runs, (delete,), (book, "after", 1))
        assert answers[-2:] == [None, 1]
        assert opened.run("k", lambda document: document) == {"seats": {"after": 1}}


def test_somebody_else_who_writes_meanwhile_has_all_of_it_replayed(place: Place) -> None:
    store = place.store("version")
    wrote: list[int] = []

    def someone_writes(document: dict[str, Any], seat: str) -> int:
        if len(wrote) < 3:
            wrote.append(1)
            with place.engine.begin() as connection:
                connection.execute(sa.update(store.table).values(version=store.table.c.version + 1))
        return book(document, seat, 1)

    with processor(store, max_attempts=20) as opened:
        opened.run("k", book, "0", 1)
        runs = [(book, str(number), number if number % 2 else object()) for number in range(10)]
        answers = together(opened, (someone_writes, "x"), *runs)
        assert sum(isinstance(answer, int) for answer in answers) == 6
        assert len(opened.run("k", lambda document: document)["seats"]) == 7
    assert len(wrote) == 3


def test_five_hundred_of_a_thousand_may_be_refused_by_a_check(place: Place) -> None:
    if place.engine.dialect.name == "postgresql":
        column: Any = JSONB()
        check = "CHECK (NOT (state -> 'seats') @> '{\"bad\": 1}')"
    else:
        column, check = sa.JSON(), "CHECK (state NOT LIKE '%%bad%%')"
    store = place.store("lock", state_type=column, encode=same, decode=same)
    with place.engine.begin() as connection:
        connection.exec_driver_sql(f"ALTER TABLE in_steps ADD CONSTRAINT nothing_bad {check}")

    def put(document: dict[str, Any], number: int) -> int:
        if number % 2:
            document["seats"]["bad"] = 1
        document["seats"]["sold"] = document["seats"].get("sold", 0) + 1
        return int(document["seats"]["sold"])

    with processor(store, min_duration=0) as opened:
        place.loads, begun = 0, time.process_time()
        answers = together(opened, *[(put, number) for number in range(1000)])
        assert time.process_time() - begun < 5  # on a machine that has other things to do, too
        assert place.loads <= 5
        assert [answer for answer in answers if isinstance(answer, int)] == list(range(1, 501))
        assert sum(isinstance(answer, sa.exc.DBAPIError) for answer in answers) == 500
        assert opened.run("k", lambda document: document) == {"seats": {"sold": 500}}


def test_in_redis_too_half_of_many_are_refused_with_a_few_loads() -> None:
    with ExitStack() as stack:
        client = stack.enter_context(redis.Redis.from_url(redis_url()))
        stack.callback(client.delete, "steps:k")
        store: RedisStore[Any] = RedisStore(client, prefix="steps:", missing=lambda _: {"seats": {}})
        loads: list[str] = []
        resources: Any = store._resources
        load = resources.server.load

        def counted(name: bytes) -> Any:
            loads.append("a load")
            return load(name)

        resources.server.load = counted
        with processor(store) as opened:
            for new in (True, False):
                loads.clear()
                runs: list[Any] = [
                    (book, f"{new} {number}", number if number % 2 else object()) for number in range(400)
                ]
                runs.insert(7, (refuse, "7"))
                answers = together(opened, *runs)
                assert len(loads) <= 6  # as above
                assert type(answers.pop(7)) is LookupError
                assert all(isinstance(answer, TypeError) for answer in answers[::2])
                assert answers[1::2] == list(range(1, 201) if new else range(201, 401))
