"""Values of all kinds in mapped columns, over both drivers of PostgreSQL, as the operations behind find them."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import gevent
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import CIDR, INET
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from geventbatch import Processor
from geventbatch.stores import SQLAlchemyStore
from tests.stores.test_isolation import waiting_in_gevents_way
from tests.support.adapters.sqlalchemy import PLACES, fresh
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EAST = timezone(timedelta(hours=5))


class Base(DeclarativeBase):
    pass


class Train(Base):
    __tablename__ = "values_trains"
    id: Mapped[int] = mapped_column(primary_key=True)
    sold: Mapped[int] = mapped_column(default=0)
    amount: Mapped[Any] = mapped_column(sa.Numeric(10, 2), nullable=True)
    share: Mapped[Any] = mapped_column(sa.Float(53), nullable=True)
    took: Mapped[Any] = mapped_column(sa.Interval, nullable=True)
    marks: Mapped[Any] = mapped_column(sa.ARRAY(sa.Integer), nullable=True)
    names: Mapped[Any] = mapped_column(sa.ARRAY(sa.String), nullable=True)
    moment: Mapped[Any] = mapped_column(sa.DateTime, nullable=True)
    zoned: Mapped[Any] = mapped_column(sa.DateTime(timezone=True), nullable=True)
    hour: Mapped[Any] = mapped_column(sa.Time, nullable=True)
    zoned_hour: Mapped[Any] = mapped_column(sa.Time(timezone=True), nullable=True)
    day: Mapped[Any] = mapped_column(sa.Date, nullable=True)
    host: Mapped[Any] = mapped_column(INET, nullable=True)
    network: Mapped[Any] = mapped_column(CIDR, nullable=True)
    parts: Mapped[Any] = mapped_column(sa.PickleType, default=lambda: {"a": [1]})


@pytest.fixture(scope="module", params=["psycopg", "psycopg2"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[sa.Engine]:
    with fresh("postgresql", tmp_path_factory.mktemp("values")) as address:
        place: Any = PLACES["postgresql"](address)
        url = place.url.set(drivername=f"postgresql+{request.param}")
        options = f"-c search_path={place.schema} -c timezone=Europe/Berlin"
        engine = sa.create_engine(url, connect_args={"options": options})
        with waiting_in_gevents_way() if request.param == "psycopg2" else nullcontext():
            Base.metadata.create_all(engine)
            yield engine
            engine.dispose()


@pytest.fixture
def run(engine: sa.Engine) -> Callable[..., list[Any]]:
    with Session(engine) as session:
        session.execute(sa.delete(Train))
        session.add(Train(id=1))
        session.commit()

    def run(*operations: Callable[[Any], Any]) -> list[Any]:
        store = SQLAlchemyStore.mapped(engine, Train)
        with Processor(open_resource=store, min_duration=0, max_duration=10) as processor:
            return [one.get() for one in [gevent.spawn(answer_of, processor.run, 1, one) for one in operations]]

    return run


def sell(train: Train) -> int:
    train.sold += 1
    return train.sold


def assign(name: str, value: Any) -> Callable[[Train], None]:
    return lambda train: setattr(train, name, value)


def look(name: str) -> Callable[[Train], str]:
    return lambda train: repr(getattr(train, name))


VALUES: list[tuple[str, Any]] = [
    ("host", "10.0.0.1"),
    ("host", "10.0.0.1/32"),
    ("host", "10.0.0.1/8"),
    ("host", "::1"),
    ("network", "10.0.0.0/8"),
    ("network", "10.0.0.1/32"),
    ("share", "1.5"),
    ("took", "1 day"),
    ("took", timedelta(hours=1)),
    ("marks", ["4"]),
    ("marks", (1, 2)),
    ("marks", [[1], [2]]),
    ("names", ["a", None]),
    ("moment", "2020-02-02 01:00:00"),
    ("moment", datetime(2020, 7, 1, tzinfo=UTC)),
    ("zoned", "2020-02-02 01:00:00+03"),
    ("zoned", datetime(2020, 7, 1, tzinfo=EAST)),
    ("zoned", datetime.fromisoformat("2020-07-01")),
    ("zoned", date(2020, 7, 1)),
    ("hour", "01:02:03"),
    ("hour", time(1, tzinfo=EAST)),
    ("hour", datetime.fromisoformat("2020-07-01 05:00")),
    ("zoned_hour", time(1)),
    ("zoned_hour", time(1, tzinfo=EAST)),
    ("day", "2020-2-2"),
    ("day", datetime.fromisoformat("2020-07-01 05:00")),
    ("amount", Decimal("Infinity")),
]


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_the_operations_behind_find_a_value_as_the_next_load_gives_it(
    engine: sa.Engine, run: Callable[..., list[Any]], name: str, value: Any
) -> None:
    if name == "amount" and engine.driver == "psycopg":
        value = Decimal("NaN")  # the column takes no infinity; psycopg2 sends this in its place
    answers = run(sell, assign(name, value), look(name), sell)
    with Session(engine) as session:
        there = session.get_one(Train, 1)
        assert [*answers, there.sold] == [1, None, look(name)(there), 2, 2]


@pytest.mark.parametrize("name", ["amount", "share"])
def test_a_truth_value_that_the_server_takes_for_no_number_is_the_error_of_who_assigned_it(
    run: Callable[..., list[Any]], name: str
) -> None:
    answers = run(sell, assign(name, True), look(name), sell)
    assert [answers[0], type(answers[1]), *answers[2:]] == [1, ProgrammingError, "None", 2]


def test_objects_that_are_pickled_can_be_changed_in_place(run: Callable[..., list[Any]]) -> None:
    def change(train: Train) -> None:
        train.parts["a"].append(2)

    def refused(train: Train) -> None:
        train.parts["a"].append(3)
        raise LookupError

    answers = run(sell, change, refused, look("parts"), sell)
    assert [*answers[:2], type(answers[2]), *answers[3:]] == [1, None, LookupError, "{'a': [1, 2]}", 2]
    assert run(sell, look("parts")) == [3, "{'a': [1, 2]}"]
