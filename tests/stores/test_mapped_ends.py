"""What an application's own session raises as it is closed changes nothing of what became of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from geventbatch import Processor, ResourceMissing
from geventbatch.stores import SQLAlchemyStore
from geventbatch.stores.sqlalchemy._session import BatchSession
from tests.support.callers import answer_of
from tests.support.mapped import Bed, opening

if TYPE_CHECKING:
    from collections.abc import Iterator


class Base(DeclarativeBase):
    pass


class Train(Base):
    __tablename__ = "ends_trains"
    id: Mapped[int] = mapped_column(primary_key=True)
    sold: Mapped[int] = mapped_column(default=0)
    __table_args__ = (sa.CheckConstraint("sold < 100", name="ends_most"),)


class Broken(LookupError):
    pass


class Sessions(Session):
    """An application's own."""

    def close(self) -> None:
        super().close()
        if isinstance(self, BatchSession):
            raise Broken


opened_bed = opening(Base)


@pytest.fixture
def bed(bed: Bed) -> Bed:
    bed.add(Train(id=1))
    return bed


@pytest.fixture
def processor(bed: Bed) -> Iterator[Processor[Any]]:
    sessions = sessionmaker(bed.engine, class_=Sessions)
    store = SQLAlchemyStore.mapped(sessions, Train, mode=bed.mode, pipeline=bed.pipeline)
    with Processor(open_resource=store, min_duration=0, max_duration=10) as made:
        yield made


def together(processor: Processor[Any], key: int, *operations: Any) -> list[Any]:
    callers = [gevent.spawn(answer_of, processor.run, key, operation) for operation in operations]
    return [caller.get() for caller in callers]


def sell(train: Train) -> int:
    train.sold += 1
    return train.sold


def oversell(train: Train) -> None:
    train.sold += 1000


def test_what_was_saved_is_answered(bed: Bed, processor: Processor[Any], caplog: pytest.LogCaptureFixture) -> None:
    assert together(processor, 1, sell, sell) == [1, 2]
    assert bed.read(sa.select(Train.sold)) == 2
    assert "after the batch of key 1 was saved" in caplog.text


def test_what_was_refused_is_the_error_of_who_brought_it(
    bed: Bed, processor: Processor[Any], caplog: pytest.LogCaptureFixture
) -> None:
    answers = together(processor, 1, oversell)
    assert isinstance(answers[0], DBAPIError)
    assert together(processor, 1, sell) == [1]
    assert bed.read(sa.select(Train.sold)) == 1
    assert "after the batch of key 1 was given up" in caplog.text


def test_a_conflict_is_replayed(bed: Bed, processor: Processor[Any]) -> None:
    runs: list[int] = []

    def sell_late(train: Train) -> int:
        runs.append(train.sold)
        if len(runs) == 1 and bed.mode == "version":
            bed.write(sa.update(Train).values(sold=5))
        return sell(train)

    assert together(processor, 1, sell_late) == [6 if bed.mode == "version" else 1]


def test_a_row_that_is_missing_is_told(processor: Processor[Any]) -> None:
    (answer,) = together(processor, 2, sell)
    assert isinstance(answer, ResourceMissing)
