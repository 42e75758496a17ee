"""`check_operations` on mapped instances of SQLAlchemy: which ones it copies by itself, which ones need ``copy=``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from geventbatch import Processor
from geventbatch.errors import Rejected
from geventbatch.stores import SQLAlchemyStore
from geventbatch.testing import ImpureOperation, check_operations
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Base(DeclarativeBase): ...


class Station(Base):
    __tablename__ = "checked_stations"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


class Train(Base):
    __tablename__ = "checked_trains"
    name: Mapped[str] = mapped_column(primary_key=True)
    seats: Mapped[dict[str, str]] = mapped_column(MutableDict.as_mutable(sa.JSON()))
    note: Mapped[str] = mapped_column(deferred=True)
    station_id: Mapped[int] = mapped_column(sa.ForeignKey("checked_stations.id"))
    station: Mapped[Station] = relationship()


class SeatTaken(Exception): ...


def book(train: Train, seat: str, passenger: str) -> str:
    if seat in train.seats:
        raise SeatTaken(seat)
    train.seats[seat] = passenger
    return seat


def book_too_early(train: Train, seat: str, passenger: str) -> str:
    train.seats["99"] = passenger
    return book(train, seat, passenger)


def title(train: Train) -> str:
    return train.station.title


def note(train: Train) -> str:
    return train.note


def with_all(train: Train) -> Train:
    station = Station(id=train.station.id, title=train.station.title)
    return Train(name=train.name, seats=dict(train.seats), note=train.note, station_id=station.id, station=station)


@pytest.fixture(params=[True, False], ids=["batching", "alone"])
def trains(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Processor[Train]]:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/trains")
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        session.add(Train(name="ICE 1", seats={}, note="no bar", station=Station(title="Ulm")))
    store = SQLAlchemyStore.mapped(engine, Train)
    with Processor(
        open_resource=store, min_duration=0, max_duration=5, clean_errors=(SeatTaken,), batching=request.param
    ) as processor:
        yield processor
    engine.dispose()


def test_a_mapped_instance_with_a_document_is_copied_without_copy(trains: Processor[Train]) -> None:
    with check_operations(trains):
        assert trains.run("ICE 1", book, "12", "Ann") == "12"
        assert isinstance(answer_of(trains.run, "ICE 1", book, "12", "Bob"), SeatTaken)
    with (
        pytest.raises(ImpureOperation, match=r"had changed resource\.seats by then") as raised,
        check_operations(trains),
    ):
        trains.run("ICE 1", book_too_early, "12", "Bob")
    assert "(raised)" in str(raised.value)
    assert trains.run("ICE 1", lambda train: dict(train.seats)) == {"12": "Ann"}


@pytest.mark.parametrize(("operation", "answer"), [(title, "Ulm"), (note, "no bar")])
def test_what_is_loaded_only_when_it_is_read_needs_a_copy_that_has_it(
    trains: Processor[Train], operation: Any, answer: str
) -> None:
    with pytest.raises(ImpureOperation, match="DetachedInstanceError"), check_operations(trains):
        trains.run("ICE 1", operation)
    with check_operations(trains, copy=with_all):
        assert trains.run("ICE 1", operation) == answer


def move(train: Train) -> None:
    train.station_id = Train.station_id + 1


def test_the_store_refuses_an_assigned_expression_under_the_checker_too(trains: Processor[Train]) -> None:
    with check_operations(trains):
        refused = answer_of(trains.run, "ICE 1", move)
    assert isinstance(refused, Rejected)
    assert "SQL expression" in str(refused)
    assert "station_id" in str(refused)
