"""What the database says as a savepoint ends, in the save of a mapped class, is what it says to a save."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DataError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, object_session, sessionmaker

from geventbatch import Processor, current_batch
from geventbatch.stores import SQLAlchemyStore
from tests.support.adapters.sqlalchemy import PLACES, fresh
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sqlalchemy.orm import Session


class Base(DeclarativeBase):
    pass


class Thing(Base):
    __tablename__ = "things"
    id: Mapped[int] = mapped_column(primary_key=True)
    n: Mapped[int]
    note: Mapped[str] = mapped_column(sa.String(20))


class Other(Base):
    __tablename__ = "others"
    id: Mapped[int] = mapped_column(primary_key=True)
    m: Mapped[int]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    with fresh("postgresql", tmp_path) as address:
        engine = PLACES["postgresql"](address).engine(None)
        Base.metadata.create_all(engine)
        with engine.begin() as connection:
            connection.execute(sa.insert(Thing).values(id=1, n=5, note="x"))
            connection.execute(sa.insert(Other).values(m=0))
        yield engine
        engine.dispose()


def session_of(thing: Thing) -> Session:
    session = object_session(thing)
    assert session is not None
    return session


def count(thing: Thing) -> int:
    thing.n += 1
    return thing.n


def count_beside(thing: Thing) -> int:
    current_batch().add_row(Other(m=5))
    session_of(thing).add(Other(m=6))
    return count(thing)


def write_too_much(thing: Thing) -> None:
    thing.note = "x" * 21
    session_of(thing).execute(sa.update(Other).values(m=Other.m + 1))


def look_again(thing: Thing) -> int:
    session = session_of(thing)
    session.flush()
    session.expire(thing, ["n", "note"])
    session.add(Other(m=7))
    return thing.n


@pytest.mark.parametrize("pipeline", [True, False])
def test_a_bad_value_that_is_refused_as_a_savepoint_ends_is_one_callers_error(
    engine: sa.Engine, *, pipeline: bool
) -> None:
    store = SQLAlchemyStore.mapped(sessionmaker(engine, autoflush=False), Thing, pipeline=pipeline)
    with Processor(open_resource=store, min_duration=0, max_duration=10) as processor:
        operations: list[Any] = [count_beside, write_too_much, look_again, count]
        callers = [gevent.spawn(answer_of, processor.run, 1, one) for one in operations]
        answers = [caller.get() for caller in callers]
    assert [type(answer) for answer in answers] == [int, DataError, int, int], answers
    assert [answers[0], answers[2], answers[3]] == [6, 6, 7]
    with engine.connect() as connection:
        assert connection.execute(sa.select(Thing.n, Thing.note)).one() == (7, "x")
        assert list(connection.scalars(sa.select(Other.m).order_by(Other.m))) == [0, 5, 6, 7]
