"""A row that SQLAlchemy, the driver or the database cannot read fails the load of its own key; it is not missing."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from datetime import date
from math import ceil, log2
from typing import TYPE_CHECKING, Any

import gevent
import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects.postgresql import INET
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

from geventbatch import LoadFailed, Processor, ResourceMissing
from geventbatch.stores import SQLAlchemyStore
from geventbatch.stores.sqlalchemy import _engines
from tests.support.adapters.sqlalchemy import PLACES, fresh
from tests.support.callers import answer_of
from tests.support.sql_pools import psycopg2_waits

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DRIVERS = [
    "psycopg",
    "psycopg, statement by statement",
    "psycopg2",
    "sqlite",
    pytest.param("mariadb", marks=pytest.mark.mariadb),
]

on_postgres = pytest.mark.parametrize("engine", DRIVERS[:3], indirect=True)

GOOD = """'{"n": 1}'"""
BAD = {"sqlite": "CAST(x'ff41' AS TEXT)"}  # no UTF-8
BROKEN = """'{"broken": "nothing'"""


class Read(FunctionElement[str]):
    """The text of a column, where the database can read it."""

    type = sa.Text()
    inherit_cache = True


@compiles(Read)
def _plain(element: Any, compiler: Any, **options: Any) -> str:
    return str(compiler.process(element.clauses, **options))


@compiles(Read, "postgresql")
def _json(element: Any, compiler: Any, **options: Any) -> str:
    return f"CAST(CAST({_plain(element, compiler, **options)} AS jsonb) AS text)"


@compiles(Read, "mysql")
@compiles(Read, "mariadb")
def _short(element: Any, compiler: Any, **options: Any) -> str:
    text = _plain(element, compiler, **options)
    return f"CONCAT({text}, LEFT(LENGTH({text}) * {2**59}, 0))"  # of 16 characters, it is out of range


class Strict(TypeDecorator[str]):
    impl = sa.Text
    cache_ok = True

    def column_expression(self, column: Any) -> Any:
        return Read(column)


class UnsealedError(Exception):
    """No error of values, types or look-ups."""


class Sealed(TypeDecorator[str]):
    impl = sa.Text
    cache_ok = True

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:
        if "broken" in value:
            raise UnsealedError(value)
        return value


class Whole(TypeDecorator[int]):
    """A number of whose limits nothing is known before the database is asked."""

    impl = sa.Integer
    cache_ok = True


class Place:
    """A database, and stores of one form in it."""

    def __init__(self, engine: sa.Engine, form: str, *, pipeline: bool) -> None:
        self.engine = engine
        self._form = form
        self._options: dict[str, Any] = {"pipeline": pipeline}
        self.is_postgres = engine.dialect.name == "postgresql"

    def store(self, kind: Any, key: Any = None) -> SQLAlchemyStore[Any]:
        """One whose states are of this *kind*, or have such a column beside their number."""
        if self._form == "documents":
            of_date: dict[str, Any] = {"encode": same, "decode": same} if isinstance(kind, sa.Date) else {}
            return SQLAlchemyStore.documents(
                self.engine, "shows", key_type=key or Whole(), state_type=kind, **of_date, **self._options
            )
        return SQLAlchemyStore.mapped(self.engine, model(kind, key or sa.Integer()), **self._options)

    def made(self, kind: Any, bad: str, good: str = GOOD) -> SQLAlchemyStore[Any]:
        """One with the rows 1 to 8, of which 3 and 4 are bad."""
        store = self.store(kind)
        self.fill(store, {number: bad if number in {3, 4} else good for number in range(1, 9)})
        return store

    def fill(self, store: SQLAlchemyStore[Any], states: dict[Any, str]) -> None:
        """Make its table, with these states by key: literals of SQL."""
        store.create_table()
        count = "version" if self._form == "documents" else "n"
        with self.engine.begin() as connection:
            for of_key, state in states.items():
                row = {"key": of_key, "state": sa.literal_column(state), count: 1}
                connection.execute(sa.insert(store.table).values(row))

    def bad(self) -> str:
        """A state that the database, or the driver, cannot read as `Strict`."""
        return BAD.get(self.engine.dialect.name, BROKEN)


def model(kind: Any, of_key: Any) -> Any:
    class Base(DeclarativeBase):
        pass

    class Show(Base):
        __tablename__ = "shows"
        key: Mapped[Any] = mapped_column(of_key, primary_key=True, autoincrement=False)
        state: Mapped[Any] = mapped_column(kind)
        n: Mapped[int]

    return Show


@contextmanager
def engine_of(driver: str, directory: Path) -> Iterator[sa.Engine]:
    server: Any = driver if driver in PLACES else "postgresql"
    with fresh(server, directory) as address, ExitStack() as stack:
        place: Any = PLACES[server](address)
        if driver == "psycopg2":
            stack.enter_context(psycopg2_waits())
            settings = {"options": f"-c search_path={place.schema}"}
            engine = sa.create_engine(place.url.set(drivername="postgresql+psycopg2"), connect_args=settings)
            stack.callback(_engines._known.pop, engine, None)  # or check_setup() names its driver until it is collected
        else:
            engine = place.engine(None)
        stack.callback(engine.dispose)
        yield engine


@pytest.fixture(params=DRIVERS)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[sa.Engine, bool]]:
    driver, _, how = request.param.partition(", ")
    with engine_of(driver, tmp_path) as made:
        yield made, not how


@pytest.fixture(params=["documents", "mapped"])
def place(request: pytest.FixtureRequest, engine: tuple[sa.Engine, bool]) -> Place:
    return Place(engine[0], request.param, pipeline=engine[1])


def same(value: Any) -> Any:
    return value


def sell(show: Any) -> int:
    if isinstance(show, dict):
        show["n"] += 1
        return int(show["n"])
    show.n += 1
    return int(show.n)


def sell_all(shows: tuple[Any, ...]) -> list[int]:
    return [sell(show) for show in shows]


def look(show: Any) -> str:
    return str(getattr(show, "state", show))


def singly(store: SQLAlchemyStore[Any], **options: Any) -> Processor[Any]:
    return Processor(open_resource=store, min_duration=0, max_duration=30, workers=1, max_batches=1, **options)


def in_bulk(store: SQLAlchemyStore[Any]) -> Processor[Any]:
    """One that runs all that comes together as one bulk."""
    opens = store.open_resources
    return Processor(open_resources=opens, min_duration=0, max_duration=30, workers=1, max_batches=1)


def together(processor: Processor[Any], *runs: tuple[Any, Any]) -> list[Any]:
    """What the callers of these operations are told, each of a key or of a list of keys."""
    callers = [
        gevent.spawn(answer_of, processor.run_across if isinstance(keys, list) else processor.run, keys, operation)
        for keys, operation in runs
    ]
    return [caller.get() for caller in callers]


def is_unreadable(answer: Any, cause: type[Exception] = DBAPIError) -> bool:
    """Whether the load has failed, for what the driver, or a type, has raised."""
    return type(answer) is LoadFailed and isinstance(answer.__cause__, cause) and bool(answer.retry_safe)


# -- a key that no row can have -----------------------------------------------------------------------------------


def impossible(place: Place) -> list[tuple[Any, list[Any]]]:
    """Types of keys, and keys that no row has: refused at the door, by the type, or by the server."""
    texts = INET() if place.is_postgres else sa.Enum("1", "2", validate_strings=True)
    return [
        (Whole(), [2**40]),
        (sa.Integer(), [2**31, 2**70]),
        (sa.String(20), ["a\0b", "a\ud83d", "x" * 5000]),
        (texts, ["no such value"]),
    ]


@pytest.mark.parametrize("number", range(4))
def test_a_key_that_no_row_can_have_is_missing_alone(place: Place, number: int) -> None:
    kind, keys = impossible(place)[number]
    good = [f"10.0.0.{one}" if isinstance(kind, INET) else str(one) for one in (1, 2)]
    store = place.store(sa.Text(), kind)
    place.fill(store, dict.fromkeys(good, GOOD))
    for bad in keys:
        with singly(store) as processor:
            answers = [answer_of(processor.run, bad, sell), *together(processor, ([good[0], bad], sell_all))]
            assert isinstance(processor.run(good[0], sell), int)
        with in_bulk(store) as processor:
            one, *others, other = together(
                processor, (good[0], sell), (bad, sell), ([good[1], bad], sell_all), (good[1], sell)
            )
        answers += others
        assert [isinstance(answer, ResourceMissing) for answer in answers] == [True] * 4, answers
        assert {answer.key for answer in answers} == {bad}
        assert isinstance(one, int)
        assert isinstance(other, int)


# -- a row that cannot be read ------------------------------------------------------------------------------------


def test_a_row_that_the_database_or_the_driver_cannot_read_fails_its_load_and_is_not_missing(place: Place) -> None:
    store = place.made(Strict(), place.bad())
    for batching in (True, False):
        with singly(store, batching=batching) as processor:
            assert is_unreadable(answer_of(processor.run, 3, sell))
            assert processor.run(5, sell) == (2 if batching else 3)
            assert isinstance(answer_of(processor.run, 9, sell), ResourceMissing)


def test_in_a_bulk_those_that_cannot_be_read_fail_alone(place: Place) -> None:
    with in_bulk(place.made(Strict(), place.bad())) as processor:
        for turn in (2, 3):
            answers = together(processor, *[(number, sell) for number in (1, 2, 3, 2**40, 4, 5, 6, 7, 99, 8)])
            assert [answers[at] for at in (0, 1, 5, 6, 7, 9)] == [turn] * 6
            assert is_unreadable(answers[2])
            assert is_unreadable(answers[4])
            assert [answers[2].key, answers[4].key] == [3, 4]
            assert isinstance(answers[3], ResourceMissing)
            assert isinstance(answers[8], ResourceMissing)


def test_a_bulk_of_nothing_that_can_be_read_answers_everybody(place: Place) -> None:
    with in_bulk(place.made(Strict(), place.bad())) as processor:
        assert all(map(is_unreadable, together(processor, (3, sell), (4, sell))))
        assert is_unreadable(answer_of(processor.run, 4, sell))
        assert processor.run(5, sell) == 2


def test_across_keys_only_operations_that_name_what_cannot_be_read_fail(place: Place) -> None:
    store = place.made(Strict(), place.bad())
    for processor in (singly(store), in_bulk(store)):
        with processor:
            both, one, other, missing = together(
                processor, ([1, 3], sell_all), (1, sell), ([1, 2], sell_all), ([2, 99], sell_all)
            )
            assert is_unreadable(both)
            assert isinstance(one, int)
            assert other[0] == one + 1
            assert isinstance(missing, ResourceMissing)


@on_postgres
def test_what_the_driver_makes_no_date_of_fails_alone(place: Place) -> None:
    store = place.made(sa.Date(), "'infinity'", "'2026-01-01'")
    reads = place.engine.dialect.driver == "psycopg2"  # it makes the last day of it
    with singly(store) as processor:
        single, across = answer_of(processor.run, 3, look), answer_of(processor.run_across, [1, 3], len)
    with in_bulk(store) as processor:
        first, *bad, last = together(processor, (1, look), (3, look), (4, look), (2, look))
    assert first == last == "2026-01-01"
    if reads:
        assert [single, across, *bad] == [str(date.max), 2, str(date.max), str(date.max)]
    else:
        assert all(is_unreadable(answer, Exception) for answer in (single, across, *bad))
        assert "date too large" in str(bad[0].__cause__)


def test_what_a_type_of_the_application_cannot_read_fails_alone(place: Place) -> None:
    store = place.made(Sealed(), BROKEN)
    with in_bulk(store) as processor:
        answers = together(processor, *[(number, sell) for number in range(1, 9)])
        assert is_unreadable(answer_of(processor.run, 3, sell), UnsealedError)
    assert [answer for answer in answers if isinstance(answer, int)] == [2] * 6
    assert all(is_unreadable(answer, UnsealedError) for answer in answers[2:4])


@on_postgres
def test_a_view_that_cannot_look_at_the_row_hides_none(place: Place) -> None:
    """A view that looks at the row before it is selected: the key by itself is asked without reading any."""
    place.made(sa.Text(), BROKEN)
    with place.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE shows RENAME TO all_shows")
        connection.exec_driver_sql("CREATE VIEW shows AS SELECT * FROM all_shows WHERE state::jsonb IS NOT NULL")
    with singly(place.store(sa.Text())) as processor:
        assert is_unreadable(answer_of(processor.run, 3, look))


@pytest.mark.parametrize("count", [2, 5, 100])
def test_a_load_that_reads_nobodys_row_is_given_up_after_a_few(place: Place, count: int) -> None:
    sent: list[str] = []
    event.listen(place.engine, "before_cursor_execute", lambda _, __, statement, *___: sent.append(statement))
    store = place.store(Strict())
    place.fill(store, dict.fromkeys(range(1, count + 1), place.bad()))
    with in_bulk(store) as processor:
        sent.clear()
        answers = together(processor, *[(number, sell) for number in range(1, count + 1)])
    assert all(map(is_unreadable, answers))
    loads = sum("FROM shows" in one for one in sent)
    assert loads <= min(
        3 * count, ceil(log2(count)) + 8 + 5
    )  # the last: for each that fails alone, whether it is its key


# -- what is nobody's row -----------------------------------------------------------------------------------------


def test_a_table_that_is_not_there_is_not_looked_for_key_by_key(place: Place) -> None:
    sent: list[str] = []
    event.listen(place.engine, "before_cursor_execute", lambda _, __, statement, *___: sent.append(statement))
    with in_bulk(place.store(sa.Text())) as processor:
        answers = together(processor, *[(number, sell) for number in range(1, 9)])
    assert all(map(is_unreadable, answers))
    assert sum("FROM shows" in one for one in sent) == 1
