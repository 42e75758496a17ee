"""What comes of a batch is what would come of its operations one by one, but for what docs/as-if-alone.md names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from geventbatch import Processor
from geventbatch.stores import SQLAlchemyStore
from tests.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Base(DeclarativeBase):
    pass


class Stock(Base):
    __tablename__ = "stocks"
    id: Mapped[int] = mapped_column(primary_key=True)
    left: Mapped[int] = mapped_column(sa.CheckConstraint('"left" >= 0'))
    saves: Mapped[int] = mapped_column(default=1)


class Written(Base):
    __tablename__ = "written"
    id: Mapped[int] = mapped_column(primary_key=True)
    left: Mapped[int]


_TRIGGER = """
CREATE TRIGGER remember AFTER UPDATE ON stocks BEGIN INSERT INTO written ("left") VALUES (new."left"); END
"""


@pytest.fixture
def engine(tmp_path: Path) -> sa.Engine:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'stocks.sqlite'}")
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(_TRIGGER)
        connection.execute(sa.insert(Stock).values(id=1, left=5, saves=1))
    return engine


def take(stock: Stock, pieces: int) -> int:
    stock.left -= pieces
    return stock.left


def in_one_batch(engine: sa.Engine, *operations: tuple[Callable[..., object], Any]) -> list[Any]:
    store = SQLAlchemyStore.mapped(engine, Stock, version="saves")
    with Processor(open_resource=store, min_duration=0, max_duration=10) as processor:
        callers = [gevent.spawn(answer_of, processor.run, 1, *operation) for operation in operations]
        return [caller.get() for caller in callers]


def rows(engine: sa.Engine, statement: str) -> list[tuple[Any, ...]]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(statement)]


def test_what_is_done_at_each_write_is_done_once_for_a_batch(engine: sa.Engine) -> None:
    assert in_one_batch(engine, (take, 1), (take, 1), (take, 1)) == [4, 3, 2]
    assert rows(engine, 'SELECT "left", saves FROM stocks') == [(2, 2)]
    assert rows(engine, 'SELECT "left" FROM written') == [(2,)]  # one by one: 4, 3, 2


def test_a_constraint_judges_the_state_that_is_saved_and_not_the_ones_between(engine: sa.Engine) -> None:
    assert in_one_batch(engine, (take, 7), (take, -3)) == [-2, 1]
    assert rows(engine, 'SELECT "left" FROM stocks') == [(1,)]
