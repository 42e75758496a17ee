"""Deletions over mapped classes, by the session and by `Batch.delete`, find what the operations before have added."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from geventbatch import current_batch
from tests.support.mapped import Bed, opening, session_of


class Base(DeclarativeBase):
    pass


class Train(Base):
    __tablename__ = "deletions_trains"
    id: Mapped[int] = mapped_column(primary_key=True)
    sold: Mapped[int] = mapped_column(default=0)
    wagons: Mapped[list[Wagon]] = relationship(order_by="Wagon.id", cascade="all, delete-orphan")


class Wagon(Base):
    __tablename__ = "deletions_wagons"
    id: Mapped[int] = mapped_column(primary_key=True)
    train_id: Mapped[int | None] = mapped_column(sa.ForeignKey("deletions_trains.id"))
    name: Mapped[str] = mapped_column(sa.String(10), unique=True)
    seats: Mapped[list[Seat]] = relationship(cascade="all")


class Seat(Base):
    __tablename__ = "deletions_seats"
    id: Mapped[int] = mapped_column(primary_key=True)
    wagon_id: Mapped[int | None] = mapped_column(sa.ForeignKey("deletions_wagons.id"))


class Stop(Base):
    __tablename__ = "deletions_stops"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(unique=True)


opened_bed = opening(Base)


@pytest.fixture
def bed(bed: Bed) -> Bed:
    bed.add(Train(id=1, wagons=[Wagon(name="a")]))
    bed.statements.clear()
    return bed


def append(train: Train, name: str = "b") -> None:
    train.wagons.append(Wagon(name=name))


def sell(train: Train) -> int:
    train.sold += 1
    return train.sold


def names(bed: Bed) -> list[str]:
    with Session(bed.other) as session:
        return list(session.scalars(sa.select(Wagon.name).order_by(Wagon.id)))


def seats(bed: Bed) -> Any:
    return bed.read(sa.select(sa.func.count()).select_from(Seat))


def test_what_an_operation_before_has_added_may_be_deleted(bed: Bed) -> None:
    def delete_last(train: Train) -> str:
        last = train.wagons[-1]
        session_of(train).delete(last)
        return last.name

    assert bed.together(Train, 1, append, sell, delete_last, sell) == [None, 1, "b", 2]
    assert names(bed) == ["a"]
    assert bed.read(sa.select(Train.sold)) == 2


def test_what_an_operation_has_added_itself_may_not_as_alone(bed: Bed) -> None:
    def delete_own(train: Train) -> None:
        append(train, "c")
        session_of(train).delete(train.wagons[-1])

    answers = bed.together(Train, 1, append, delete_own, sell)
    assert answers[::2] == [None, 1]
    assert isinstance(answers[1], InvalidRequestError)
    assert names(bed) == ["a", "b"]


def test_what_an_operation_before_has_added_to_what_is_deleted_is_deleted_too(bed: Bed) -> None:
    def seat(train: Train) -> None:
        train.wagons[0].seats.append(Seat())

    def delete_first(train: Train) -> None:
        session_of(train).delete(train.wagons[0])

    assert bed.together(Train, 1, seat, seat, delete_first, sell) == [None, None, None, 1]
    assert (names(bed), seats(bed)) == ([], 0)


def test_where_nothing_was_added_a_deletion_flushes_nothing(bed: Bed) -> None:
    def delete_first(train: Train) -> None:
        session_of(train).delete(train.wagons[0])

    assert bed.together(Train, 1, sell, sell, delete_first) == [1, 2, None]
    assert names(bed) == []
    assert sum("UPDATE deletions_trains SET sold=" in one for one in bed.updates()) == 1


def test_what_operations_have_added_is_deleted_with_the_resource(bed: Bed) -> None:
    def seat(train: Train) -> None:
        train.wagons[-1].seats.append(Seat())

    def delete(_: Train) -> None:
        current_batch().delete()

    assert bed.together(Train, 1, append, seat, sell, delete) == [None, None, 1, None]
    assert (names(bed), seats(bed)) == ([], 0)


def test_what_the_operation_that_deletes_has_added_is_deleted_with_it(bed: Bed) -> None:
    def delete(train: Train) -> None:
        append(train)
        current_batch().delete()

    assert bed.together(Train, 1, delete) == [None]
    assert names(bed) == []


def test_what_is_refused_of_what_was_added_before_a_deletion_is_told_to_who_added_it(bed: Bed) -> None:
    def delete(_: Train) -> None:
        current_batch().delete()

    answers = bed.together(Train, 1, sell, lambda train: append(train, "a"), delete)
    assert answers[::2] == [1, None]
    assert isinstance(answers[1], sa.exc.IntegrityError)
    assert names(bed) == []


def test_what_an_operation_has_changed_in_what_it_deletes_is_not_written_first(bed: Bed) -> None:
    """Not where a refused save has the batch go on behind savepoints, either."""

    def renumber(stop: Stop) -> None:
        stop.number = 2

    def delete_renumbered(stop: Stop) -> None:
        session_of(stop).expire_all()
        stop.number = 2
        current_batch().delete()

    bed.add(Stop(id=1, number=1), Stop(id=2, number=2))
    refused, deleted = bed.together(Stop, 1, renumber, delete_renumbered)
    assert isinstance(refused, IntegrityError)
    assert deleted is None
    assert bed.read(sa.select(Stop.id)) == 2
